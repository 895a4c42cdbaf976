"""Tokenizers: bytes, model folders made here, and chat templates kept in their box."""

import copy
import datetime
import io
import json
import os
import shutil

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from minillm_jax.text.tokenizer import (
    BESIDE,
    REASONING,
    ByteTokenizer,
    FileTokenizer,
    Settings,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)

# Bytes


def surrogates_replaced(text):
    return "".join("?" if "\ud800" <= c <= "\udfff" else c for c in text)


def check_round_trip(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == surrogates_replaced(text)
    assert set(tokens) <= set(tokenizer.known_ids)


ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.text()


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT)
@example("a\ud800b\udfff")
def test_bytes_of_any_text_round_trip(text):
    check_round_trip(text)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(ANY_TEXT)
def test_bytes_of_any_text_round_trip_deep(text):
    check_round_trip(text)


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save(folder)
    return load_tokenizer(folder)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
@example(text="é\n\x00\U0001f600 \ud800")
def test_bytes_as_a_file_are_the_same_bytes(saved_bytes, text):
    tokens = ByteTokenizer().encode(text)
    assert saved_bytes.encode(text) == tokens
    assert saved_bytes.decode(tokens[1:]) == ByteTokenizer().decode(tokens[1:])


def test_bytes_as_a_file_have_the_ids_of_bytes_and_no_other(saved_bytes):
    assert saved_bytes.known_ids == frozenset(range(256))
    assert saved_bytes.eos_token_ids == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers() | st.integers(0, 255)))
def test_ids_that_are_no_byte_decode_to_nothing(tokens):
    tokenizer = ByteTokenizer()
    known = [token for token in tokens if 0 <= token < 256]
    assert tokenizer.decode(tokens) == tokenizer.decode(known)
    assert tokenizer.decode(known) == bytes(known).decode(errors="replace")


def test_bytes_are_a_tokenizer_without_special_ids():
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    assert (*tokenizer.known_ids,) == (*range(256),)
    assert tokenizer.eos_token_ids == ()


def test_a_conversation_in_bytes_begins_the_assistants_turn_and_knows_its_end():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "¿Qué?"},
    ]
    tokenizer = ByteTokenizer()
    text = tokenizer.decode(tokenizer.encode_chat(messages))
    assert text == "system: Be brief.\nuser: ¿Qué?\nassistant: "
    assert tokenizer.chat_stop == ("\nuser:",)


# Folders

SPECIAL = ("<s>", "</s>", "<|im_end|>", "<pad>")
BOS, EOS, IM_END, PAD = range(256, 260)
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
OBJECTS = {
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
    "eos_token": {"content": "</s>"},
}


def byte_level(*, adds_bos=False):
    """Bytes as ids, and the special tokens above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return tokenizer


def write(folder, files=None, **options):
    """A model's folder: tokenizer.json and these; text as it is, the rest as JSON."""
    byte_level(**options).save(str(folder / "tokenizer.json"))
    for name, content in (files or {}).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def loaded(folder, files=None, **options):
    return load_tokenizer(write(folder, files, **options))


def with_config(folder, **config):
    return loaded(folder, {"tokenizer_config.json": config})


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_tokenizer_json_is_enough(tmp_path, name, kind):
    tokenizer = load_tokenizer(kind(write(tmp_path) / name))
    assert isinstance(tokenizer, Tokenizer)
    text = "Größe 😀\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.known_ids == frozenset(range(260))


def test_files_beside_a_tokenizer_json_are_read_when_it_is_given_itself(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}"
    write(tmp_path, {"tokenizer_config.json": BOTH | {"chat_template": template}})
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.eos_token_ids == (EOS,)
    assert tokenizer.encode_chat([USER]) == [BOS, EOS]


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_a_byte_level_file_round_trips_any_text(text):
    tokenizer = FileTokenizer(byte_level())
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(split_off(text))


def split_off(text):
    """The text without what is written like a special token, which decodes to none."""
    for special in SPECIAL:
        text = text.replace(special, "")
    return text


@pytest.mark.parametrize("names", [BOTH, OBJECTS])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False, None, "true", "absent"])
def test_there_is_a_bos_where_tokenizer_json_adds_one(
    tmp_path, names, adds_bos, add_bos_token
):
    config = dict(names)
    if add_bos_token != "absent":
        config |= {"add_bos_token": add_bos_token, "add_eos_token": add_bos_token}
    tokenizer = loaded(tmp_path, {"tokenizer_config.json": config}, adds_bos=adds_bos)
    tokens = tokenizer.encode("one two")
    assert tokens == [BOS] * adds_bos + byte_level().encode("one two").ids
    assert tokenizer.decode(tokens) == "one two"
    assert tokenizer.encode("") == [BOS] * adds_bos
    assert tokenizer.eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"generation_config.json": {"eos_token_id": EOS}}, (EOS,)),
        ({"generation_config.json": {"eos_token_id": [EOS, IM_END]}}, (EOS, IM_END)),
        ({"generation_config.json": {"eos_token_id": None}}, ()),
        ({"generation_config.json": {}}, ()),
        ({"config.json": {"eos_token_id": IM_END}}, (IM_END,)),
        ({"config.json": {"eos_token_id": [IM_END, IM_END]}}, (IM_END,)),
        ({"tokenizer_config.json": OBJECTS}, (EOS,)),
        ({"tokenizer_config.json": {"eos_token": "<nosuch>"}}, ()),
        ({"special_tokens_map.json": OBJECTS}, (EOS,)),
        ({"special_tokens_map.json": BOTH, "tokenizer_config.json": {}}, (EOS,)),
        (
            {
                "tokenizer_config.json": {"eos_token": "<|im_end|>"},
                "special_tokens_map.json": BOTH,
            },
            (EOS,),
        ),
        (
            {
                "tokenizer_config.json": BOTH,
                "special_tokens_map.json": {"eos_token": None},
            },
            (),
        ),
        (
            {
                "tokenizer_config.json": BOTH | {"added_tokens_decoder": {}},
                "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            },
            (EOS,),
        ),
        (
            {
                "tokenizer_config.json": BOTH,
                "generation_config.json": {"eos_token_id": [IM_END, EOS]},
                "config.json": {"eos_token_id": PAD, "other": [1]},
            },
            (EOS, IM_END, PAD),
        ),
    ],
)
def test_eos_ids_are_those_of_all_files_each_once(tmp_path, files, expected):
    assert loaded(tmp_path, files).eos_token_ids == expected


def test_stored_padding_and_truncation_are_switched_off(tmp_path):
    stored = byte_level()
    stored.enable_padding(length=64, pad_id=PAD, pad_token="<pad>")
    stored.enable_truncation(max_length=8)
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("one")) == 3
    assert len(tokenizer.encode("x" * 1000)) == 1000


def test_known_ids_have_the_holes_of_the_vocabulary_and_the_added_tokens(tmp_path):
    stored = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7, "<unk>": 9}))
    stored.add_tokens(["added"])
    stored.add_special_tokens(["<s>"])
    added = {stored.token_to_id("added"), stored.token_to_id("<s>")}
    stored.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).known_ids == {0, 7, 9} | added


def test_decode_skips_special_tokens_and_ids_without_a_token(tmp_path):
    tokenizer = loaded(tmp_path)
    one, two = tokenizer.encode("é")
    assert tokenizer.decode([BOS, one, IM_END, two, 10**6, EOS]) == "é"
    assert tokenizer.decode([BOS, EOS]) == ""
    assert tokenizer.decode([]) == ""


PLAIN = "<tool>"  # with the space after it


@pytest.mark.parametrize(
    ("name", "text", "others", "decoded"),
    [
        ("eos_token", PLAIN, {}, "a bZ"),
        ("image_token", PLAIN, {}, "a bZ"),
        ("eos_token", {"content": PLAIN, "rstrip": False}, {}, "a bZ"),
        ("eos_token", "Z", {}, f"a {PLAIN}b"),
        ("eos_token", "</s>", {}, f"a {PLAIN}bZ"),
        ("eos_token", "<nosuch>", {}, f"a {PLAIN}bZ"),
        ("eos_token", "", {}, f"a {PLAIN}bZ"),
        ("pad_token", None, {"add_token": PLAIN}, f"a {PLAIN}bZ"),
    ],
)
def test_a_named_special_token_is_special(tmp_path, name, text, others, decoded):
    stored = byte_level()
    stored.add_tokens([tokenizers.AddedToken(PLAIN, rstrip=True, normalized=False)])
    stored.save(str(tmp_path / "tokenizer.json"))
    ids = stored.encode(f"a {PLAIN}  bZ").ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: text} | others))
    tokenizer = load_tokenizer(tmp_path)
    assert list(tokenizer.encode(f"a {PLAIN}  bZ")) == ids
    assert tokenizer.decode(ids) == decoded
    assert tokenizer.known_ids == frozenset(range(261))


def test_lone_surrogates_in_a_prompt_are_replaced_as_bytes_are(tmp_path):
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


# Chat templates

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{% if messages[0].role != 'system' %}
<|im_start|>system
You help.<|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate, from user on!') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{%- endif %}
{% endfor %}
"""
USER = {"role": "user", "content": " Hi! "}
ASSISTANT = {"role": "assistant", "content": "Hello."}
TURNS = [USER, ASSISTANT, {"role": "user", "content": "Wer?"}]
LLAMA3_TEXT = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWer?<|eot_id|>"
)
CHATML_TEXT = (
    "<|im_start|>system\nYou help.<|im_end|>\n"
    "<|im_start|>user\n Hi! <|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nWer?<|im_end|>\n"
)
MISTRAL_TEXT = "<s>[INST]  Hi!  [/INST] Hello.</s>[INST] Wer? [/INST]"
STYLES = {
    "llama3": (
        LLAMA3,
        LLAMA3_TEXT,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": (CHATML, CHATML_TEXT, "<|im_start|>assistant\n"),
    "mistral": (MISTRAL, MISTRAL_TEXT, ""),
}


def as_file(template):
    return {"chat_template.jinja": template, "tokenizer_config.json": BOTH}


def as_string(template):
    return {"tokenizer_config.json": BOTH | {"chat_template": template}}


def as_list(template):
    listed = [
        {"name": "tool_use", "template": "not this"},
        {"name": "default", "template": template},
    ]
    return {"tokenizer_config.json": BOTH | {"chat_template": listed}}


def rendering(template, messages=(USER,), **options):
    """What a template makes of messages, without files."""
    tokenizer = FileTokenizer(byte_level(), Settings(BOTH, chat_template=template))
    return tokenizer.render_chat(messages, **options)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("files", [as_file, as_string, as_list])
def test_a_conversation_is_what_its_template_makes_of_it(tmp_path, style, files):
    template, expected, prompt = STYLES[style]
    tokenizer = loaded(tmp_path, files(template), adds_bos=True)
    assert tokenizer.render_chat(TURNS) == expected + prompt
    plain = tokenizer.render_chat(TURNS, add_generation_prompt=False)
    assert plain == expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_in_an_encoded_conversation_as_often_as_in_its_template(
    tmp_path, style, adds_bos
):
    template, expected, prompt = STYLES[style]
    tokenizer = loaded(tmp_path, as_string(template), adds_bos=adds_bos)
    tokens = tokenizer.encode_chat(TURNS)
    wanted = expected.count("<s>")
    assert tokens.count(BOS) == (tokens[0] == BOS) == wanted
    assert tokens.count(IM_END) == expected.count("<|im_end|>")
    text = byte_level().decode(tokens, skip_special_tokens=False)
    assert text == expected + prompt


def test_a_template_file_goes_before_one_in_the_config(tmp_path):
    config = {"chat_template": "config"}
    files = {"chat_template.jinja": "file", "tokenizer_config.json": config}
    assert loaded(tmp_path, files).render_chat([USER]) == "file"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"chat_template": None}},
        {"tokenizer_config.json": {"chat_template": []}},
        as_string(None),
    ],
)
def test_a_conversation_without_a_template_is_an_error_that_says_so(tmp_path, files):
    tokenizer = loaded(tmp_path, files)
    for use in (tokenizer.render_chat, tokenizer.encode_chat):
        with pytest.raises(
            TokenizerError, match=r"no chat template.*chat_template\.jinja"
        ):
            use([USER])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "user", "content": None, "calls": None}, {"role": "user"}),
        ({"content": "", "n": 0, "x": [None]}, {"content": "", "n": 0, "x": [None]}),
        *(
            (
                {name: "a", "role": "x"},
                {"thinking": "a", name: "a", "role": "x", "reasoning_content": "a"},
            )
            for name in ("thinking", "reasoning", "reasoning_content")
        ),
        (
            {"reasoning": "c", "thinking": "b", "reasoning_content": "a"},
            {"thinking": "b", "reasoning": "c", "reasoning_content": "a"},
        ),
        (
            {"reasoning": "c", "thinking": "b", "reasoning_content": None},
            {"thinking": "b", "reasoning": "c", "reasoning_content": "b"},
        ),
        ({"reasoning": "", "thinking": None}, dict.fromkeys(REASONING[::-1], "")),
    ],
)
def test_messages_reach_a_template_without_none_and_with_their_reasoning(
    given, expected
):
    before = copy.deepcopy(given)
    items = "{% for k, v in messages[0].items() %}{{ [k, v]|tojson }}\n{% endfor %}"
    found = dict(map(json.loads, rendering(items, [given]).splitlines()))
    assert found == expected
    assert given == before


LOOP = "{% for i in range(4) %}"
SUM = (
    "{% set ns = namespace(n=0) %}"
    "{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}"
    "{{ ns.n }}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LOOP + "{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (LOOP + "{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "023"),
        (LOOP + "{% generation %}{{ i }}{% endgeneration %}{% endfor %}", "0123"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{% generation %}{% if true %}x{% endif %}y{% endgeneration %}", "xy"),
        ("{% generation %}{% endgeneration %}", ""),
        ("{{ strftime_now('no directive, 100 %%') }}", "no directive, 100 %"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ bos_token }}|{{ pad_token }}|{{ nosuch }}", "<s>||"),
        (SUM, "6"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('é') }}", "<é>"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ '<b>&' }}", "<b>&"),
    ],
)
def test_templates_have_what_they_expect(template, expected):
    assert rendering(template) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a\n{% if true %}\nb\n{% endif %}\nc", "a\nb\nc"),  # trim_blocks
        ("a\n    {% if true %}\nb\n\t{% endif %}\nc", "a\nb\nc"),  # lstrip_blocks
        ("a\n  x{% if true %}\nb{% endif %}", "a\n  xb"),
        ("a\n  {{ 'b' }}\nc", "a\n  b\nc"),  # neither is for what is printed
        ("a\n  {%+ if true %}b{% endif %}", "a\n  b"),
        ("a\n{# comment #}\nb", "a\nb"),
        ("a\n", "a"),
        ("a\n\n", "a\n"),
    ],
)
def test_lines_with_a_block_alone_leave_nothing(template, expected):
    assert rendering(template) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]|tojson }}", '{"role": "user", "content": "<b>&\'\\"é😀"}'),
        ("{{ messages[0].content|tojson }}", '"<b>&\'\\"é😀"'),
        ("{{ [true, none, 'ü']|tojson(indent=2) }}", '[\n  true,\n  null,\n  "ü"\n]'),
        ("{{ {'b': 1, 'a': 2}|tojson }}", '{"b": 1, "a": 2}'),
    ],
)
def test_tojson_is_json_as_it_stands(template, expected):
    assert rendering(template, [{"role": "user", "content": "<b>&'\"é😀"}]) == expected


# The filter of transformers, for which templates are written, takes all of these.
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 'é'|tojson(ensure_ascii=True) }}", '"\\u00e9"'),
        ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=True) }}", '{"a": 2, "b": 1}'),
        ("{{ [1, {'a': 2}]|tojson(separators=(',', ':')) }}", '[1,{"a":2}]'),
    ],
)
def test_tojson_takes_the_arguments_that_templates_give_it(template, expected):
    assert rendering(template) == expected


def test_strftime_now_is_the_local_time(monkeypatch):
    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26, 13 if tz is None else 11, 5, tzinfo=tz)

    monkeypatch.setattr(datetime, "datetime", Frozen)
    text = rendering("{{ strftime_now('%d %b %Y, %H:%M') }}")
    assert text == "26 Jul 2024, 13:05"


def test_raise_exception_is_an_error_with_the_templates_message():
    with pytest.raises(TokenizerError, match=r"Roles must alternate, from user on!"):
        rendering(MISTRAL, [USER, USER])


@settings(max_examples=60, deadline=None)
@given(st.text())
@example("{{ 7 * 7 }}{% include 'x' %}{# no #}<b>&\\n")
def test_what_a_message_says_is_not_part_of_the_template(text):
    message = {"role": "user", "content": text}
    assert rendering("{{ messages[0].content }}", [message]) == text


# Saving

WHOLE = {
    "tokenizer_config.json": BOTH | {"eos_token": "Z", "extra": ["é", 1.50]},
    "special_tokens_map.json": BOTH,
    "chat_template.jinja": LLAMA3 + "\r\n",
    "added_tokens.json": "{}\n",
    "tokenizer.model": b"\0\xff\r\n",
    "config.json": {"eos_token_id": PAD},
    "generation_config.json": {"eos_token_id": [EOS]},
    "notes.txt": "mine",
}


def folder_of(parent, name, files=None, **options):
    """A new folder: a model's with these files, or an empty one."""
    folder = parent / name
    folder.mkdir()
    return folder if files is None else write(folder, files, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def behaviour(tokenizer):
    text = "<s>one Z</s> é"
    try:
        chat = tokenizer.encode_chat(TURNS)
    except TokenizerError as error:
        chat = str(error)
    ids = tokenizer.encode(text)
    return ids, tokenizer.decode(ids), chat, tokenizer.eos_token_ids


@pytest.mark.parametrize(
    "left_out", [(), ("special_tokens_map.json",), ("chat_template.jinja",), BESIDE]
)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path, left_out, kind):
    of_the_model = ("config.json", "generation_config.json")
    files = {name: WHOLE[name] for name in set(WHOLE) - {*left_out, *of_the_model}}
    source = folder_of(tmp_path, "source", files, adds_bos=True)
    target = folder_of(tmp_path, "target")
    tokenizer = load_tokenizer(source)
    tokenizer.save(kind(target))
    expected = contents(source)
    del expected["notes.txt"]
    assert contents(target) == expected
    assert behaviour(load_tokenizer(target)) == behaviour(tokenizer)


def test_saving_leaves_other_files_alone_and_copies_none_of_the_model(tmp_path):
    source = folder_of(tmp_path, "source", WHOLE)
    target = folder_of(tmp_path, "target")
    mine = {"config.json": b"mine", "model.safetensors": b"weights"}
    for name, content in mine.items():
        (target / name).write_bytes(content)
    (target / "tokenizer.json").write_bytes(b"old")
    load_tokenizer(source).save(target)
    copied = {"tokenizer.json", *BESIDE}
    expected = {k: v for k, v in contents(source).items() if k in copied}
    assert contents(target) == expected | mine


def test_a_file_of_another_name_is_saved_as_tokenizer_json(tmp_path, monkeypatch):
    source = folder_of(tmp_path, "source", {"tokenizer_config.json": BOTH})
    (source / "tokenizer.json").rename(source / "other.json")
    target = folder_of(tmp_path, "target")
    monkeypatch.chdir(source)
    tokenizer = load_tokenizer("other.json")
    monkeypatch.chdir(tmp_path)
    tokenizer.save("target")
    assert set(contents(target)) == {"tokenizer.json", "tokenizer_config.json"}
    assert behaviour(load_tokenizer(target)) == behaviour(tokenizer)


def test_saving_into_its_own_folder_changes_nothing(tmp_path):
    source = folder_of(tmp_path, "source", WHOLE)
    (source / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    before = contents(source)
    load_tokenizer(source).save(source)
    (tmp_path / "link").symlink_to(source)
    load_tokenizer(tmp_path / "link").save(source)
    assert contents(source) == before
    assert (source / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("into_its_own", [False, True])
def test_a_source_that_has_gone_is_named(tmp_path, name, into_its_own):
    source = folder_of(tmp_path, "source", WHOLE)
    target = source if into_its_own else folder_of(tmp_path, "target", {})
    tokenizer = load_tokenizer(source)
    (source / name).unlink()
    with pytest.raises(TokenizerError) as caught:
        tokenizer.save(target)
    assert str(source / name) in str(caught.value)


def test_a_tokenizer_without_files_or_without_a_folder_to_go_to_is_not_saved(tmp_path):
    with pytest.raises(TokenizerError, match="no files"):
        FileTokenizer(byte_level()).save(tmp_path)
    source = folder_of(tmp_path, "source", {})
    for nosuch in (tmp_path / "nosuch", source / "tokenizer.json"):
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(source).save(nosuch)
        assert str(nosuch) in str(caught.value)


@pytest.mark.parametrize(("module", "name"), [(os, "replace"), (shutil, "copyfile")])
def test_a_copy_that_fails_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, module, name
):
    source = folder_of(tmp_path, "source", {})
    target = folder_of(tmp_path, "target")
    (target / "tokenizer.json").write_bytes(b"old")
    tokenizer = load_tokenizer(source)

    def fail(_, new):
        if module is shutil:
            new.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="no space"):
        tokenizer.save(target)
    assert contents(target) == {"tokenizer.json": b"old"}


# Templates are other people's programs

SECRET = "the secret of this folder"
REFUSED = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_names }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages.clear() }}",
    "{{ messages.pop() }}",
    "{{ messages.insert(0, 'x') }}",
    "{{ messages.sort() }}",
    "{{ messages.__setitem__(0, 'x') }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages[0].setdefault('x', 'y') }}",
    "{{ messages|map('attr', 'clear')|first|string }}{{ messages[0].clear() }}",
    "{% set messages[0].content = 'x' %}",
    "{% do messages.append('x') %}",
    "{{ range(10**9)|length }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% include 'secret.txt' %}",
    "{% import 'secret.txt' as x %}{{ x }}",
    "{% from 'secret.txt' import x %}",
    "{% extends 'secret.txt' %}",
    "{{ open('secret.txt').read() }}",
    "{{ __import__('os') }}",
    "{{ eval('1') }}",
]
# What comes out of these is a matter of Jinja's version: nothing, or an error.
HARMLESS = [
    "{{ ''.__class__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{{ ['{0.__class__}'.format]|map('string')|list|length }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ raise_exception.__defaults__ }}",
    "{{ self.__class__ }}",
    "{{ messages.clear }}",
    "{{ (messages|batch(1)).gi_frame }}",
    "{% include 'secret.txt' ignore missing %}",
]


@pytest.fixture
def no_files(tmp_path, monkeypatch):
    """A folder with a secret, where nothing may be opened."""
    (tmp_path / "secret.txt").write_text(SECRET)
    monkeypatch.chdir(tmp_path)

    tokenizer, opened = byte_level(), []

    def refuse(*args, **kwargs):
        opened.append(args)
        raise OSError("refused")

    with monkeypatch.context() as patch:
        for module, name in ((io, "open"), (os, "open"), (os, "popen")):
            patch.setattr(module, name, refuse)
        patch.setattr("builtins.open", refuse)
        yield tokenizer
    assert not opened


def outcome(tokenizer, template):
    """Text or error, and that the messages are as they were."""
    messages = copy.deepcopy(TURNS)
    tokenizer = FileTokenizer(tokenizer, Settings(BOTH, chat_template=template))
    try:
        return tokenizer.render_chat(messages), None
    except TokenizerError as error:
        return None, str(error)
    finally:
        assert messages == TURNS


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_leaves_its_sandbox_is_refused(no_files, template):
    text, error = outcome(no_files, template)
    assert text is None
    assert SECRET not in error


@pytest.mark.parametrize("template", HARMLESS)
def test_nothing_of_python_shows_in_the_text(no_files, template):
    text, error = outcome(no_files, template)
    shown = text or error or ""
    assert not any(
        sign in shown for sign in ("<class", "<function", "<built", " at 0x")
    )
    assert SECRET not in shown


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ ",
        "{% if true %}",
        "{% generation %}x",
        "{% generation x %}{% endgeneration %}",
        "{% endgeneration %}",
        "{% nosuch %}",
        "{{ 'x'|nosuch }}",
        "{{ nosuch() }}",
        "{{ nosuch.x }}",
        "{{ nosuch|tojson }}",
        "{{ 1 + 'x' }}",
        "{{ raise_exception() }}",
        "{{ strftime_now(5) }}",
        "{{ 'x'.split('') }}",
        "{{ 'x'.center(10**30) }}",
        *(
            template
            for template in (
                "{{ 1 / 0 }}",
                "{{ '{}'.format() }}",
                "{{ '{x}'.format() }}",
                "{{ 'x'.encode('nosuch') }}",
                "{{ messages|xmlattr }}",
                "{{ cycler() }}",
                "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
                "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
            )
        ),
    ],
    ids=lambda template: template[:30],
)
def test_a_template_that_fails_is_a_tokenizer_error(template):
    with pytest.raises(TokenizerError, match="chat template"):
        rendering(template)


# Files that are not what they should be

JSON_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)


def check_refused(folder, files, named):
    with pytest.raises(TokenizerError) as caught:
        loaded(folder, files)
    assert str(folder / named) in str(caught.value)


def test_a_tokenizer_error_is_a_value_error():
    assert issubclass(TokenizerError, ValueError)


@pytest.mark.parametrize(
    "name", ["", "nosuch", "tokenizer.json", "nosuch/tokenizer.json"]
)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_missing_file_or_a_folder_without_one_is_named(tmp_path, name, kind):
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(kind(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", *JSON_FILES])
@pytest.mark.parametrize(
    "content",
    ["", "{", '{"a": }', "{}x", "[]", "3", "null", '"text"', b"\xff\xfe{}", b"\0"],
)
def test_broken_json_is_an_error_that_names_its_file(tmp_path, name, content):
    check_refused(tmp_path, {name: content}, name)


@pytest.mark.parametrize("content", ["{}", '{"model": {}}', '{"version": "1.0"}'])
def test_a_tokenizer_json_without_a_tokenizer_is_named(tmp_path, content):
    check_refused(tmp_path, {"tokenizer.json": content}, "tokenizer.json")


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_too_deep_is_an_error_that_names_its_file(tmp_path, name):
    check_refused(tmp_path, {name: '{"a":' * 10**5}, name)


def test_a_template_that_is_no_text_is_an_error_that_names_its_file(tmp_path):
    name = "chat_template.jinja"
    check_refused(tmp_path, {name: b"\xff"}, name)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ids", ["2", True, 2.5, -1, {"a": 2}, ["2"], [[2]], [2, None]])
def test_eos_ids_that_are_none_are_an_error_that_names_the_file(tmp_path, name, ids):
    check_refused(tmp_path, {name: {"eos_token_id": ids}}, name)


@pytest.mark.parametrize(
    "given",
    [
        *(5, True, {"default": "x"}),
        *([5], ["x"], [None], [{}], [{"name": "default"}], [{"template": "x"}]),
        *([{"name": ["x"], "template": "x"}], [{"name": "default", "template": 5}]),
    ],
)
def test_a_chat_template_that_is_none_is_an_error_that_names_the_file(tmp_path, given):
    name = "tokenizer_config.json"
    check_refused(tmp_path, {name: {"chat_template": given}}, name)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("field", ["bos_token", "eos_token"])
@pytest.mark.parametrize("given", [5, True, ["<s>"], {}, {"content": 5}, "\ud800"])
def test_a_special_token_that_is_none_is_an_error_that_names_the_file(
    tmp_path, name, field, given
):
    check_refused(tmp_path, {name: {field: given}}, name)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["content", "name", "template", "default", "x"])
JSON = st.recursive(
    SCALARS | st.sampled_from(["<s>", "</s>", "default", EOS]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = (
    *("bos_token", "eos_token", "add_bos_token", "eos_token_id", "chat_template"),
    "added_tokens_decoder",
)
FILES = st.dictionaries(
    st.sampled_from(JSON_FILES),
    st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON,
    max_size=4,
)


def check_any_files(folder, files):
    """Read as they are, or refused: no other error."""
    for name in JSON_FILES:
        (folder / name).unlink(missing_ok=True)
    try:
        tokenizer = loaded(folder, {name: json.dumps(v) for name, v in files.items()})
    except TokenizerError:
        return
    assert tokenizer.decode(tokenizer.encode("one")) == "one"
    assert all(type(i) is int and i >= 0 for i in tokenizer.eos_token_ids)
    try:
        assert isinstance(tokenizer.render_chat([USER]), str)
    except TokenizerError:
        return


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@settings(max_examples=60, deadline=None)
@given(files=FILES)
@example(files={"tokenizer_config.json": {"chat_template": [{"name": "default"}]}})
def test_any_json_in_any_file_is_read_or_refused(folder, files):
    check_any_files(folder, files)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(files=FILES)
@example(files={"tokenizer_config.json": {"chat_template": [5]}})
def test_any_json_in_any_file_is_read_or_refused_deep(folder, files):
    check_any_files(folder, files)
