"""The same ids, texts and conversations as transformers' AutoTokenizer.

goldens/ was written by goldens/make_tokenizers.py: small tokenizers, and what
transformers makes of texts, of conversations, and of folders with other settings. Not
there: settings by which it takes more than the tokenizer.json, as `load_tokenizer` has
it.
"""

import gzip
import json
import pathlib
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.text.tokenizer import TokenizerError, load_tokenizer

FOLDER = pathlib.Path(__file__).parent / "goldens"
GOLDENS = json.loads(gzip.decompress((FOLDER / "expected.json.gz").read_bytes()))
TEXTS, CHATS, VARIANTS = GOLDENS["texts"], GOLDENS["chats"], GOLDENS["variants"]
EDGES = TEXTS[: GOLDENS["edges"]]
NAMES = list(GOLDENS["tokenizers"])
TEMPLATES = ["own", *GOLDENS["templates"]]


def check_ids(tokenizer, texts, expected):
    pairs = zip(texts, expected["ids"], strict=True)
    assert [text for text, ids in pairs if list(tokenizer.encode(text)) != ids] == []


def check_decoded(tokenizer, texts, expected):
    """The texts themselves, but for those that are given."""
    wanted = [expected["decoded"].get(str(i), text) for i, text in enumerate(texts)]
    pairs = zip(expected["ids"], wanted, strict=True)
    assert [text for ids, text in pairs if tokenizer.decode(ids) != text] == []


def test_there_are_a_thousand_texts_and_four_tokenizers():
    assert len(set(TEXTS)) == 1000
    assert set(NAMES) == {"byte_level", "mistral", "llama", "gemma"}


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(name):
    check_ids(load_tokenizer(FOLDER / name), TEXTS, GOLDENS["tokenizers"][name])


@pytest.mark.parametrize("name", NAMES)
def test_decoded_texts_are_those_of_transformers(name):
    check_decoded(load_tokenizer(FOLDER / name), TEXTS, GOLDENS["tokenizers"][name])


# Conversations


def with_template(folder, name, template):
    """A tokenizer with its own chat template, or with another."""
    if template == "own":
        return load_tokenizer(FOLDER / name)
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    text = GOLDENS["templates"][template]
    (folder / "chat_template.jinja").write_bytes(text.encode())
    return load_tokenizer(folder)


def outcome(render, messages, **options):
    """What comes of a conversation, an error as the goldens have it."""
    try:
        return render(messages, **options)
    except TokenizerError as error:
        return {"error": str(error).removeprefix("chat template: ")}


@pytest.mark.parametrize("conversation", GOLDENS["conversations"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", NAMES)
def test_conversations_are_those_of_transformers(
    tmp_path, name, template, conversation
):
    tokenizer = with_template(tmp_path, name, template)
    messages = GOLDENS["conversations"][conversation]
    render = tokenizer.render_chat
    assert CHATS[name][template][conversation] == {
        "plain": outcome(render, messages, add_generation_prompt=False),
        "text": outcome(render, messages),
        "ids": outcome(tokenizer.encode_chat, messages),
    }


# Settings beside a tokenizer.json, and in it


def changed(folder, expected):
    """A tokenizer with other files, or without one."""
    shutil.copytree(FOLDER / expected["tokenizer"], folder, dirs_exist_ok=True)
    for name, content in expected["files"].items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(json.dumps(content))
    return load_tokenizer(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_mean_for_ids_what_they_do_in_transformers(tmp_path, variant):
    check_ids(changed(tmp_path, VARIANTS[variant]), EDGES, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_mean_for_texts_what_they_do_in_transformers(tmp_path, variant):
    check_decoded(changed(tmp_path, VARIANTS[variant]), EDGES, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_eos_and_special_tokens_are_those_of_transformers(tmp_path, variant):
    expected = VARIANTS[variant]
    eos = changed(tmp_path, expected).eos_token_ids
    assert eos == (() if expected["eos"] is None else (expected["eos"],))

    names = ("bos_token", "eos_token", "unk_token", "pad_token", "think_token")
    template = " ".join(f"{{{{ {name} }}}}" for name in names)
    (tmp_path / "chat_template.jinja").write_text(template)
    found = load_tokenizer(tmp_path).render_chat([{"role": "user", "content": ""}])
    assert found.split(" ") == [expected["special"].get(name, "") for name in names]


# Live, where transformers is installed

FRESH = st.lists(st.sampled_from(TEXTS) | st.text(), max_size=4).map("".join)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_transformers_that_is_installed(transformers, name):
    ours = load_tokenizer(FOLDER / name)
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER / name)

    @settings(max_examples=100, deadline=None)
    @given(FRESH)
    def check(text):
        ids = theirs.encode(text)
        assert list(ours.encode(text)) == ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    check()
