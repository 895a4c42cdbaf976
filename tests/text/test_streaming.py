"""Streamed text is the decoded whole, up to the first stop string to be completed.

Two properties carry the file. At every step the text released so far is a prefix of
what comes out in the end, so no U+FFFD is shown for a character that is only late.
And what comes out depends on the bytes alone, not on the token borders in them.
"""

import functools
import itertools
import operator

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillm_jax.text.streaming import Detokenizer, StopStrings, TextStream
from minillm_jax.text.tokenizer import ByteTokenizer, FileTokenizer

SKIPPED = 300  # an id that a ByteTokenizer leaves out
MOST_HELD = 20  # characters: 16 tokens of patience, and a character of 4 bytes

GOOD = (
    "a",
    "b",
    " ",
    "\n",
    "\0",
    "é",
    "ü",
    "€",
    "中",
    "\ufffd",
    "😀",
    "👩‍👩‍👧",
    "🇩🇪",
    "e\u0301",
)
BROKEN = (
    *(b"\xff", b"\x80", b"\xbf"),
    *(b"\xc3", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x98"),  # truncated
    *(b"\xc0\xaf", b"\xe0\x80\x80", b"\xf4\x90\x80\x80"),  # overlong, beyond Unicode
    b"\xed\xa0\x80",  # a surrogate
)
CHUNKS = st.sampled_from([*(text.encode() for text in GOOD), *BROKEN])
RUNS = st.builds(operator.mul, CHUNKS, st.integers(1, 24))
BYTES = st.lists(CHUNKS | CHUNKS | RUNS | st.binary(max_size=4), max_size=12).map(
    b"".join
)


class PieceTokenizer:
    """Tokens of several bytes: its vocabulary is the pieces that it is made with."""

    def __init__(self, pieces):
        self._vocabulary = sorted(set(pieces))
        self.tokens = [self._vocabulary.index(piece) for piece in pieces]

    def decode(self, tokens):
        known = b"".join(self._vocabulary[token] for token in tokens)
        return known.decode("utf-8", errors="replace")


class CountingTokenizer:
    """Adds up how many tokens are decoded."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, tokens):
        self.num_decoded += len(tokens)
        return self._tokenizer.decode(tokens)


def cut(data, places):
    """`data` cut at these places; an empty piece where one comes twice."""
    borders = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


def places_in(data, **limits):
    return st.lists(st.integers(0, len(data)), **limits)


@st.composite
def cut_bytes(draw):
    """Bytes in pieces of at least one."""
    data = draw(BYTES)
    inside = st.integers(1, max(1, len(data) - 1))
    return cut(data, draw(st.sets(inside, max_size=40)) if len(data) > 1 else ())


def check_pieces(tokenizer, tokens):
    """Every release extends a prefix of the whole; together they are the whole."""
    whole, released = tokenizer.decode(tokens), ""
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        released += detokenizer.push(token)
        assert whole.startswith(released)
    assert released + detokenizer.flush() == whole


def up_to_stop(text, stop):
    """The reference: a character at a time; the text, and whether it was stopped."""
    for end in range(1, len(text) + 1):
        completed = [len(s) for s in stop if text[:end].endswith(s)]
        if completed:
            return text[: end - max(completed)], True
    return text, False


def check_stop(tokenizer, tokens, stop):
    """A TextStream agrees with the reference, and never releases more than that."""
    expected, stopped = up_to_stop(tokenizer.decode(tokens), stop)
    stream, released = TextStream(tokenizer, stop), ""
    for token in tokens:
        was_stopped, piece = stream.stopped, stream.push(token)
        released += piece
        assert not (was_stopped and piece)
        assert expected.startswith(released)
    released += stream.flush()
    assert (released, stream.stopped) == (expected, stopped)
    assert stream.flush() == ""


# Characters


@settings(max_examples=150, deadline=None)
@given(BYTES)
def test_pieces_of_bytes_add_up_to_the_decoded_whole(data):
    check_pieces(ByteTokenizer(), list(data))


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(BYTES)
def test_pieces_of_bytes_add_up_to_the_decoded_whole_deep(data):
    check_pieces(ByteTokenizer(), list(data))


@settings(max_examples=150, deadline=None)
@given(cut_bytes())
def test_pieces_of_longer_tokens_add_up_to_the_decoded_whole(pieces):
    tokenizer = PieceTokenizer(pieces)
    check_pieces(tokenizer, tokenizer.tokens)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(cut_bytes())
def test_pieces_of_longer_tokens_add_up_to_the_decoded_whole_deep(pieces):
    tokenizer = PieceTokenizer(pieces)
    check_pieces(tokenizer, tokenizer.tokens)


# U+FFFD itself looks broken, and is released with what follows.
@pytest.mark.parametrize("text", [*(t for t in GOOD if t != "\ufffd"), "".join(GOOD)])
def test_a_character_is_released_with_its_last_byte_and_no_sooner(text):
    detokenizer, released = Detokenizer(ByteTokenizer()), ""
    for index, byte in enumerate(data := text.encode()):
        released += detokenizer.push(byte)
        whole = data[: index + 1].decode(errors="ignore")
        assert released == whole.removesuffix("\ufffd")
    assert released == text


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_bytes_are_released_with_the_character_after_them(broken):
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.push(byte) for byte in broken] == [""] * len(broken)
    assert detokenizer.push(ord("x")) == broken.decode(errors="replace") + "x"


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_bytes_at_the_end_are_released_by_flush(broken):
    detokenizer = Detokenizer(ByteTokenizer())
    assert "".join(map(detokenizer.push, b"x" + broken)) == "x"
    assert detokenizer.flush() == broken.decode(errors="replace")


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 18, 40])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("after", ["", "€", "😀x"])
def test_long_runs_of_broken_bytes_stay_exact(broken, count, after):
    check_pieces(ByteTokenizer(), list(b"x" + broken * count + after.encode()))


@pytest.mark.parametrize("broken", BROKEN)
def test_only_a_few_characters_of_a_broken_run_are_held(broken):
    tokenizer, data = ByteTokenizer(), list(broken * 100)
    detokenizer, released = Detokenizer(tokenizer), ""
    for index, byte in enumerate(data):
        released += detokenizer.push(byte)
        whole = tokenizer.decode(data[: index + 1])
        assert len(whole) - len(released) <= MOST_HELD


@pytest.mark.parametrize(
    "tokens",
    [
        [*"é".encode(), SKIPPED, *"€".encode()],
        [0xE2, SKIPPED, 0x82, SKIPPED, 0xAC],
        [SKIPPED] * 40 + [*"😀".encode()],
        [-1, 65, 256, 66, 10**9],
    ],
)
def test_skipped_tokens_do_not_break_characters(tokens):
    check_pieces(ByteTokenizer(), tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        [0xF0] + [SKIPPED] * 16 + [0x9F, 0x98, 0x80],
        [0xFF] * 14 + [0xF0, 0x9F, SKIPPED, 0x98, 0x80],
    ],
)
def test_many_skipped_or_broken_tokens_do_not_break_characters(tokens):
    check_pieces(ByteTokenizer(), tokens)


@settings(max_examples=100, deadline=None)
@given(BYTES.flatmap(lambda data: st.tuples(st.just(data), places_in(data))))
@example((b"\xff" * 14 + b"\xf0\x9f\x98\x80", [*range(1, 18), 16]))
def test_skipped_tokens_anywhere_leave_the_pieces_exact(case):
    tokenizer = PieceTokenizer(cut(*case))
    check_pieces(tokenizer, tokenizer.tokens)


def num_decoded(tokens):
    """Tokens decoded in all, to stream these."""
    tokenizer = CountingTokenizer(ByteTokenizer())
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == ByteTokenizer().decode(tokens)
    return tokenizer.num_decoded


@pytest.mark.parametrize(
    "run",
    [
        b"x",
        "😀".encode(),
        "\ufffd".encode(),
        b"x\xff",
        *BROKEN,
        [SKIPPED, ord("x")],
        [SKIPPED],
    ],
)
def test_twice_as_many_tokens_take_about_twice_the_decoding(run):
    once, twice = num_decoded([*run] * 200), num_decoded([*run] * 400)
    assert twice <= 2.1 * once


# Tokenizers as models have them

CORPUS = [
    "The quick brown fox jumps over the lazy dog. the end of the story, the end.",
    "Die Übung der Brüder: größer, schöner, früher.  Zwei   Leerzeichen.",
    "Être ou ne pas être, voilà la question. Привет, мир! Как дела, мир?",
    "東京は日本の首都です。你好,世界。안녕하세요 세계",
    "def f(x):\n    return x + 1\n\n\tprint(f(2))",
]
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
WORDS = st.sampled_from(sorted({word for line in CORPUS for word in line.split(" ")}))
OTHER = st.sampled_from(
    [" ", "  ", "\n", "\n    ", "😀", "👩‍👩‍👧", "ñ", "𝄞", "ไทย", "▁", "<s>"]
)
TEXTS = st.lists(WORDS | WORDS.map(" {}".format) | OTHER, max_size=12).map("".join)


def byte_level(add_prefix_space):
    """GPT-2's and Llama 3's kind: tokens are bytes, characters may be split."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=add_prefix_space
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback(kind, steps):
    """Llama 2's and Gemma's kind: `▁` for spaces, bytes for unknown characters."""
    kept = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "▁the", "he", "t", "h", "e", "▁end", "n", "d", "ü", "▁▁", "世", "界"]
    words += [*"abcfgijklmopqrsuvwxyz.,"]
    vocabulary = [*kept, *words]
    if kind == "bpe":
        merges = [("h", "e"), ("▁", "▁"), ("t", "he"), ("n", "d")]
        model = models.BPE(
            {text: index for index, text in enumerate([*vocabulary, "the", "nd"])},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    else:
        scores = [(text, -float(len(vocabulary) - len(text))) for text in vocabulary]
        model = models.Unigram(scores, unk_id=0, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


SPACES = decoders.Replace("▁", " ")
FIRST_SPACE = decoders.Strip(" ", 1, 0)
BYTES_THEN_FUSE = (decoders.ByteFallback(), decoders.Fuse())
MADE = {
    "byte_level": lambda: byte_level(False),
    "byte_level_prefix_space": lambda: byte_level(True),
    "llama2": lambda: byte_fallback("bpe", [SPACES, *BYTES_THEN_FUSE, FIRST_SPACE]),
    "gemma": lambda: byte_fallback("bpe", [SPACES, *BYTES_THEN_FUSE]),
    "unigram": lambda: byte_fallback(
        "unigram", [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    ),
}


@functools.cache
def made(name):
    return FileTokenizer(MADE[name]())


def with_special(tokenizer, text, places):
    """The text's tokens, with special ones put between them, or inside characters."""
    tokens = tokenizer.encode(text)
    for number, place in enumerate(places):
        special = SPECIAL[1 + number % (len(SPECIAL) - 1)]
        (token,) = tokenizer.encode(special)[-1:]
        tokens.insert(place % (len(tokens) + 1), token)
    return tokens


PLACES = st.lists(st.integers(0, 60), max_size=5)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, places=PLACES)
def test_pieces_of_a_models_tokenizer_add_up_to_the_decoded_whole(name, text, places):
    tokenizer = made(name)
    check_pieces(tokenizer, with_special(tokenizer, text, places))


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@settings(max_examples=500, deadline=None)
@given(text=TEXTS, places=PLACES)
def test_pieces_of_a_models_tokenizer_add_up_to_the_decoded_whole_deep(
    name, text, places
):
    tokenizer = made(name)
    check_pieces(tokenizer, with_special(tokenizer, text, places))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(len(SPECIAL), 359), max_size=60))
def test_pieces_of_random_byte_level_ids_add_up_to_the_decoded_whole(ids):
    check_pieces(made("byte_level"), ids)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(len(SPECIAL), 359), max_size=60))
def test_pieces_of_random_byte_level_ids_add_up_to_the_decoded_whole_deep(ids):
    check_pieces(made("byte_level"), ids)


@pytest.mark.parametrize("name", MADE)
def test_spaces_between_tokens_are_kept_while_streaming(name):
    tokenizer, text = made(name), "the end  the end\n   the 世界 😀 end "
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    streamed = "".join(pieces) + stream.flush()
    # Where a space is put before the text, decoding may leave it there.
    assert streamed.removeprefix(" ") == text


@pytest.mark.parametrize("name", MADE)
def test_special_tokens_are_skipped_inside_a_character(name):
    tokenizer = made(name)
    plain = tokenizer.encode("the 😀 end")
    tokens = with_special(tokenizer, "the 😀 end", range(len(plain) + 3))
    assert len(tokens) == 2 * len(plain) + 3
    assert tokenizer.decode(tokens) == tokenizer.decode(plain)
    check_pieces(tokenizer, tokens)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, places=PLACES, stop=st.lists(WORDS.filter(bool) | OTHER, max_size=3))
@pytest.mark.parametrize("name", MADE)
def test_a_models_tokenizer_stops_where_the_reference_does(name, text, places, stop):
    tokenizer = made(name)
    check_stop(tokenizer, with_special(tokenizer, text, places), stop)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(text=TEXTS, places=PLACES, stop=st.lists(WORDS.filter(bool) | OTHER, max_size=3))
@pytest.mark.parametrize("name", MADE)
def test_a_models_tokenizer_stops_where_the_reference_does_deep(
    name, text, places, stop
):
    tokenizer = made(name)
    check_stop(tokenizer, with_special(tokenizer, text, places), stop)


# Stop strings

FEW = st.lists(st.sampled_from(["a", "a", "b", "c", "€", "😀"]), max_size=24).map(
    "".join
)
SHORT = st.text("aabc€😀", min_size=1, max_size=4)
CUT_TEXTS = FEW.flatmap(lambda text: st.tuples(st.just(text), places_in(text)))


@st.composite
def stop_cases(draw):
    """Bytes in pieces, and stop strings that are likely to be in them."""
    data = draw(BYTES | FEW.map(str.encode) | FEW.map(str.encode))
    text = data.decode(errors="replace")
    inside = st.builds(
        lambda start, length: text[start : start + length],
        st.integers(0, max(0, len(text) - 1)),
        st.integers(1, 5),
    )
    stop = draw(st.lists(inside.filter(bool) | SHORT if text else SHORT, max_size=4))
    places = draw(places_in(data, unique=True, max_size=40))
    return cut(data, {place for place in places if 0 < place < len(data)}), stop


def check_pieces_and_bytes(pieces, stop):
    tokenizer = PieceTokenizer(pieces)
    check_stop(tokenizer, tokenizer.tokens, stop)
    check_stop(ByteTokenizer(), list(b"".join(pieces)), stop)
    whole = PieceTokenizer([b"".join(pieces)])
    check_stop(whole, whole.tokens, stop)


@settings(max_examples=200, deadline=None)
@given(stop_cases())
def test_text_ends_at_the_first_stop_string_wherever_the_token_borders_are(case):
    check_pieces_and_bytes(*case)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(stop_cases())
def test_text_ends_at_the_first_stop_string_wherever_the_token_borders_are_deep(case):
    check_pieces_and_bytes(*case)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab", ["aab"], "a"),  # whose beginning repeats
        ("aaaab", ["aab"], "aa"),
        ("abcabcabd", ["abcabd"], "abc"),
        ("ababab", ["abab"], ""),
        ("xabc", ["abc", "b"], "xa"),  # the inner one is completed first
        ("xabc", ["abc", "c"], "x"),  # together: the longest is cut
        ("xabc", ["c", "abc"], "x"),
        ("xabc", ["abc", "bc", "c"], "x"),
        ("xabab", ["abab", "ab"], "x"),
        ("xabd", ["abc", "abd"], "x"),
        ("abd", ["abc", "bd"], "a"),
        ("stop", ["stop"], ""),  # the whole text
        ("a\nuser: b", ["\nuser:"], "a"),
        ("a€😀b", ["€😀"], "a"),
        ("a😀b", ["😀"], "a"),
        ("é", ["e"], "é"),
        ("a wor", ["world"], "a wor"),
        ("aa", ["aab", "aac"], "aa"),
        ("abc", [], "abc"),
        ("", ["a"], ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_ends_before_the_stop_string(text, stop, expected, size):
    data = text.encode()
    assert up_to_stop(text, stop) == (expected, expected != text)
    tokenizer = PieceTokenizer(cut(data, range(size, len(data), size)))
    check_stop(tokenizer, tokenizer.tokens, stop)


def test_a_stop_string_may_be_spread_over_many_tokens():
    stop = "0123456789" * 20
    stream = TextStream(ByteTokenizer(), [stop])
    assert "".join(map(stream.push, f"ab{stop}cd".encode())) == "ab"
    assert stream.stopped
    assert stream.flush() == ""


@pytest.mark.parametrize("then", [b"more", b"stop", b"\xff\xff", b""])
def test_nothing_is_released_after_the_stop_string(then):
    stream = TextStream(ByteTokenizer(), ["stop"])
    assert "".join(map(stream.push, b"a stop")) == "a "
    assert [stream.push(byte) for byte in then] == [""] * len(then)
    assert stream.flush() == ""
    assert stream.stopped


def test_the_text_after_the_stop_string_in_its_token_is_not_released():
    tokenizer = PieceTokenizer([b"one stop two"])
    stream = TextStream(tokenizer, ["stop"])
    assert stream.push(*tokenizer.tokens) == "one "
    assert stream.flush() == ""


def test_flush_releases_the_beginning_of_a_stop_string():
    stream = TextStream(ByteTokenizer(), ["stop"])
    assert "".join(map(stream.push, b"a sto")) == "a "
    assert stream.flush() == "sto"
    assert not stream.stopped


def test_flush_may_complete_a_stop_string():
    stream = TextStream(ByteTokenizer(), ["b\ufffd"])
    assert "".join(map(stream.push, b"ab\xc3")) == "a"
    assert stream.flush() == ""
    assert stream.stopped


def check_held(text, places, stop):
    """What is held begins a stop string; the rest is released at once."""
    stops, given, released = StopStrings(stop), "", ""
    for part in cut(text, places):
        given += part
        released += stops.push(part)
        if stops.stopped:
            break
        assert given.startswith(released)
        held = given[len(released) :]
        assert not held or any(s.startswith(held) and s != held for s in stop)
    assert (released + stops.flush(), stops.stopped) == up_to_stop(text, stop)


@settings(max_examples=150, deadline=None)
@given(CUT_TEXTS, st.lists(SHORT, max_size=4))
def test_no_more_is_held_than_may_begin_a_stop_string(case, stop):
    check_held(*case, stop)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(CUT_TEXTS, st.lists(SHORT, max_size=4))
def test_no_more_is_held_than_may_begin_a_stop_string_deep(case, stop):
    check_held(*case, stop)


def test_streams_of_one_tokenizer_do_not_share_anything():
    texts = ["é one stop", "😀 two st", "€ three"]
    streams = [TextStream(ByteTokenizer(), ["stop"]) for _ in texts]
    released = [""] * len(texts)
    data = [text.encode() for text in texts]
    for column in itertools.zip_longest(*data):
        for row, byte in enumerate(column):
            released[row] += "" if byte is None else streams[row].push(byte)
    whole = [text + s.flush() for text, s in zip(released, streams, strict=True)]
    assert whole == ["é one ", "😀 two st", "€ three"]


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, ["a"])
    assert [stream.push(token) for token in (97, 98)] == ["", ""]
    assert stream.flush() == ""
    assert not stream.stopped
