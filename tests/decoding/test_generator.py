"""Generator: the completions of the cache-free reference, however they are asked for.

Two tiny models. The parameters of one are noise: its greedy tokens are held against
the float64 reference. The other recites: after any id it says the next one, so that a
test chooses the tokens, and a tokenizer of given pieces turns them into any text.
"""

import contextlib
import functools
import itertools
import logging
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax import reference, testing
from minillm_jax.decoding import generator

GREEDY = mj.SamplingParams(temperature=0.0)
SAMPLED = mj.SamplingParams(temperature=1.5, top_p=0.95, seed=11)
FULL, RING = 45, 60  # tokens of most caches here; no multiples of a chunk of 16
RECITED, EOS = 64, (50, 60)  # ids of the reciter, and those that end its rows


@pytest.fixture(autouse=True, scope="module")
def small_buckets():
    """Capacities from 48 tokens on, so that short rows grow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "SMALLEST_CAPACITY", 48)
        yield


@functools.cache
def noise(**changes):
    """A model and parameters with nothing in them at 0 or 1."""
    fields = {"vocab_size": 256, "max_seq_len": 32, "max_kv_cache_len": FULL}
    fields |= {"num_layers": 1}
    model = mj.create_model(testing.tiny_config(**(fields | changes)))
    return model, testing.noisy_params(model, seed=3)


@functools.cache
def noisy(
    overflow="stop",
    num_sinks=0,
    max_kv_cache_len=FULL,
    window=None,
    layers=1,
    seeing=(),
):
    """`seeing`: the layers that see everything, beside those with the window."""
    model, params = noise(
        max_kv_cache_len=max_kv_cache_len,
        sliding_window=window,
        num_layers=layers,
        global_layers=seeing,
    )
    return mj.Generator(model, params, BYTES, overflow, num_sinks)


class Pieces:
    """A tokenizer whose ids stand for the pieces of text, or bytes, of a test."""

    pieces = ("",) * RECITED

    def encode(self, text):
        return [0]

    def decode(self, tokens):
        pieces = (self.pieces[token] for token in tokens)
        encoded = (x.encode() if isinstance(x, str) else x for x in pieces)
        return b"".join(encoded).decode("utf-8", "replace")


BYTES, PIECES = mj.ByteTokenizer(), Pieces()


@functools.cache
def reciter():
    """A generator that follows id i with i + 1; its text is that of `PIECES`."""
    fields = {"dim_model": RECITED, "vocab_size": RECITED, "max_kv_cache_len": RECITED}
    fields |= {"eos_token_ids": EOS, "num_layers": 1}
    model = mj.create_model(testing.tiny_config(**fields))
    same = np.eye(RECITED, dtype=np.float32)
    changed = {"embedding": same, "lm_head": 10 * np.roll(same, 1, axis=1)}
    return mj.Generator(model, {**testing.plain_params(model), **changed}, PIECES)


@pytest.fixture
def said(monkeypatch):
    """Sets the text of the ids 1, 2, ..., which is what follows the prompt [0]."""

    def say(pieces):
        rest = [""] * (RECITED - 1 - len(pieces))
        monkeypatch.setattr(PIECES, "pieces", ["", *pieces, *rest])

    return say


def some_prompts(lengths, seed=0):
    draw = np.random.default_rng(seed).integers
    return [draw(0, 256, length).tolist() for length in lengths]


def stops(*strings):
    return mj.SamplingParams(temperature=0.0, stop=strings)


def following(prompt, count):
    """What the reciter says after a prompt."""
    return [(prompt[-1] + 1 + i) % RECITED for i in range(count)]


def raw_logits(run, prompt, tokens):
    """The reference's logits at each token of a completion, float64 [tokens, V]."""
    config, policy = run.model.config, run.policy
    whole = np.array([[*prompt, *tokens]])
    params = jax.device_get(run._executables.params)
    longest, mask = config.max_kv_cache_len, reference._mask

    def in_a_ring(segments, window, _):
        return mask(segments, min(window or longest, longest), policy.num_sinks)

    own = in_a_ring if policy.overflow == "ring" else mask
    with mock.patch.object(reference, "_mask", own):
        logits = testing.reference_logits(config, params, whole)
    return logits[0, len(prompt) - 1 : -1]


def assert_greedy(run, prompt, tokens):
    """Every token has the largest logit behind those before it, up to rounding."""
    logits = raw_logits(run, prompt, tokens)
    chosen = np.take_along_axis(logits, np.array(tokens)[:, None], axis=1)[:, 0]
    assert np.all(chosen >= logits.max(axis=-1) - 2e-5)


def by_row(pieces, count):
    return [[piece for piece in pieces if piece.index == row] for row in range(count)]


def assert_streams_like_generate(run, prompts, count, sampling):
    """Returns the completions, of both."""
    expected = run.generate(prompts, count, sampling)
    with run.stream(prompts, count, sampling) as pieces:
        rows = by_row(list(pieces), len(expected))
        streamed = pieces.completions
    for row, one, other in zip(rows, expected, streamed, strict=True):
        tokens = [piece.token for piece in row if piece.token is not None]
        assert tokens == one.tokens == other.tokens
        assert "".join(piece.text for piece in row) == one.text == other.text
        reasons = [piece.finish_reason for piece in row]
        assert reasons == [None] * (len(row) - 1) + [one.finish_reason]
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == other.logprobs
    return expected


# Greedy


POLICIES = {
    "error": ("error", 0, 384, None, 2),
    "stop": ("stop", 0, 384, None, 2),
    "stop-window": ("stop", 0, 384, 6, 2),
    "ring": ("ring", 0, RING, None, 2),
    "ring-sinks": ("ring", 2, RING, None, 2),
    "ring-window": ("ring", 0, RING, 6, 2),
    "error-mixed": ("error", 0, 384, 6, 2, (1,)),
    "stop-mixed": ("stop", 0, 384, 100, 2, (1,)),  # a ring of 115: grows, then wraps
    "ring-mixed": ("ring", 0, RING, 6, 2, (0,)),
}
QUICK = {("stop", 1), ("stop", 3), ("ring", 1), ("ring-sinks", 3), ("ring-window", 3)}
QUICK |= {("ring-mixed", 1)}


@pytest.mark.parametrize(
    ("policy", "lengths"),
    [
        pytest.param(
            policy,
            lengths,
            id=f"{policy}-{len(lengths)}",
            marks=[] if (policy, len(lengths)) in QUICK else [pytest.mark.slow],
        )
        for policy in POLICIES
        for lengths in [(5,), (1, 40, 100), (1, 5, 40, 100)]
    ],
)
def test_greedy_equals_the_reference_over_256_tokens(policy, lengths):
    """Through all capacities, and rings of 60 (75 slots) over three wraps."""
    run, prompts = noisy(*POLICIES[policy]), some_prompts(lengths)
    completions = run.generate(prompts, 256, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == 256
        assert len(set(completion.tokens)) > 20  # not stuck
        assert_greedy(run, prompt, completion.tokens)


def test_all_of_gemmas_parts_together_equal_the_reference():
    """In 48 slots, then 60 of a local ring beside 64, then beside 100."""
    gemma = {
        "max_kv_cache_len": 100,
        "num_layers": 2,
        "head_dim": 12,
        "activation": "gelu_tanh",
        "sliding_window": 45,
        "global_layers": (1,),
        "local_rope_theta": 100.0,
        "qk_norm": True,
        "query_pre_attn_scalar": 9.0,
        "attention_softcap": 3.0,
        "logits_softcap": 4.0,
        "norm_unit_offset": True,
        "post_norms": True,
        "embedding_scale": 0.5,
        "tie_embeddings": True,
    }
    run, prompts = mj.Generator(*noise(**gemma), BYTES), some_prompts((3, 40, 62))
    completions = assert_streams_like_generate(run, prompts, 38, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(set(completion.tokens)) > 5
        assert_greedy(run, prompt, completion.tokens)


@pytest.mark.parametrize("length", range(27, 48))
def test_a_row_may_fill_a_capacity_at_any_step_of_a_chunk(length):
    """`generate` takes chunks of 16 and 4 steps, `stream` of 4; 48 grow to 64."""
    run, prompt = reciter(), [*range(length - 1), RECITED - 1]
    count = min(37, RECITED - length)
    streamed = [piece.token for piece in run.stream(prompt, count, GREEDY)]
    assert streamed == following(prompt, count)
    assert run.generate(prompt, count, GREEDY)[0].tokens == streamed


# Neighbours and seeds


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_neither_place_nor_neighbours_change_a_rows_tokens(params, place):
    run, (mine,) = noisy(), some_prompts((9,))
    other = mj.SamplingParams(seed=99, temperature=0.7, repetition_penalty=1.3)
    seen = []
    for lengths, kind in [((9, 9), params), ((30, 2), other), ((FULL, 40), SAMPLED)]:
        prompts, kinds = some_prompts(lengths, seed=sum(lengths)), [kind, kind]
        prompts.insert(place, mine)
        kinds.insert(place, params)
        seen.append(run.generate(prompts, 24, kinds)[place].tokens)
    assert seen[0] == seen[1] == seen[2]
    if params is GREEDY:
        assert_greedy(run, mine, seen[0])
    first = run.generate([mine, [1], [2]], 24, [params, other, other])[0].tokens
    assert first == seen[0]


def test_greedy_tokens_are_the_same_alone_and_in_a_batch():
    run, prompts = noisy(), some_prompts((1, 9, 25))
    together = run.generate(prompts, 20, GREEDY)
    alone = [run.generate(prompt, 20, GREEDY)[0] for prompt in prompts]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_the_same_seed_gives_the_same_tokens_again_and_another_does_not():
    run, (prompt,) = noisy(), some_prompts((9,))

    def tokens(*seeds):
        kinds = [mj.SamplingParams(seed=seed) for seed in seeds]
        return [c.tokens for c in run.generate([prompt] * 3, 24, kinds)]

    one, two, last = tokens(1, 2, 2**32 - 1)
    assert len({tuple(one), tuple(two), tuple(last)}) == 3
    assert tokens(1, 2, 2**32 - 1) == [one, two, last]
    assert tokens(2, 1, 1) == [two, one, one]


def test_equal_prompts_differ_under_one_params_and_not_under_one_each():
    run, (prompt,) = noisy(), some_prompts((9,))
    shared = run.generate([prompt] * 3, 24, SAMPLED)
    assert len({tuple(c.tokens) for c in shared}) == 3
    each = run.generate([prompt] * 3, 24, [SAMPLED] * 3)
    assert {tuple(c.tokens) for c in each} == {tuple(shared[0].tokens)}


def test_the_draw_is_keyed_by_seed_place_and_number_of_the_token():
    run, (prompt,) = noisy(), some_prompts((9,))
    params = mj.SamplingParams(seed=5, temperature=2.0)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def uniform(place, generated):
        key = jax.random.fold_in(jax.random.key(5), place)
        return jax.random.uniform(jax.random.fold_in(key, generated))

    for place, completion in enumerate(run.generate([prompt] * 3, 24, params)):
        weights = np.exp(raw_logits(run, prompt, completion.tokens) / 2.0)
        upto = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
        at = np.arange(24), np.array(completion.tokens)
        drawn = np.asarray(uniform(place, np.arange(24)))
        above = np.pad(upto, ((0, 0), (1, 0)))[at]
        assert np.all((above - 1e-5 <= drawn) & (drawn <= upto[at] + 1e-5))


# Overflow


SHORT = {"error": ("error",), "stop": (), "ring": POLICIES["ring"]}


@pytest.mark.parametrize("room", [1, 0, -1])
@pytest.mark.parametrize("overflow", ["error", "stop", "ring"])
def test_prompts_that_just_fit_and_just_do_not(overflow, room):
    run = noisy(*SHORT[overflow])
    capacity = run.model.config.max_kv_cache_len
    prompts = some_prompts((capacity - room,))
    message = None
    if overflow != "ring" and room < 0:
        message = "has 46 tokens, but the cache holds 45: shorten it by 1"
    elif overflow == "error":
        message = f"max_new_tokens={room} would fit" if room else "not even one would"
    if message is not None:
        with pytest.raises(mj.CacheOverflowError, match=message):
            run.generate(prompts, 2, GREEDY)
        return
    (completion,) = assert_streams_like_generate(run, prompts, 2, GREEDY)
    count = 2 if overflow == "ring" else room
    assert len(completion.tokens) == count
    assert completion.finish_reason == ("length" if count == 2 else "cache_full")
    if count:
        assert_greedy(run, prompts[0], completion.tokens)


@pytest.mark.parametrize("spare", [1, 0, -1])
@pytest.mark.parametrize("overflow", ["error", "stop", "ring"])
def test_completions_that_just_fit_and_just_do_not(overflow, spare):
    run, prompts = noisy(*SHORT[overflow]), some_prompts((15,))
    room = run.model.config.max_kv_cache_len - 15
    asked = room - spare
    if overflow == "error" and asked > room:
        with pytest.raises(mj.CacheOverflowError, match="max_new_tokens=30 would fit"):
            run.generate(prompts, asked, GREEDY)
        return
    (completion,) = assert_streams_like_generate(run, prompts, asked, GREEDY)
    stopped = overflow == "stop" and asked > room
    assert len(completion.tokens) == (room if stopped else asked)
    assert completion.finish_reason == ("cache_full" if stopped else "length")
    assert_greedy(run, prompts[0], completion.tokens)


def test_200_tokens_in_256_leave_56():
    run, prompts = noisy("stop", 0, 256), some_prompts((200,))
    for asked, reason in [(64, "cache_full"), (57, "cache_full"), (56, "length")]:
        with run.stream(prompts, asked, GREEDY) as pieces:
            tokens = [piece.token for piece in pieces]
        assert len(tokens) == 56
        assert pieces.completions[0].finish_reason == reason
    assert_greedy(run, prompts[0], tokens)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_error_raises_before_any_work_and_says_what_would_fit(call):
    run = mj.Generator(*noise(), overflow="error")
    message = (
        r"prompt 1 has 41 tokens and max_new_tokens=5 were asked, but the cache holds "
        r"45: max_new_tokens=4 would fit"
    )
    with pytest.raises(mj.CacheOverflowError, match=message):
        getattr(run, call)(some_prompts((3, 41)), 5, GREEDY)
    assert run.compilations == {}


def test_a_ragged_batch_ends_each_row_where_its_cache_is_full():
    """The first from the start, the second, whose last chunk passes the end, soon."""
    run, prompts = noisy(), some_prompts((FULL, FULL - 2, 3))
    completions = assert_streams_like_generate(run, prompts, 20, GREEDY)
    assert [len(c.tokens) for c in completions] == [0, 2, 20]
    reasons = ["cache_full", "cache_full", "length"]
    assert [c.finish_reason for c in completions] == reasons
    assert [c.prompt_tokens for c in completions] == [FULL, FULL - 2, 3]
    for prompt, completion in list(zip(prompts, completions, strict=True))[1:]:
        assert_greedy(run, prompt, completion.tokens)
    streamed = run.stream(prompts, 20, GREEDY)
    pieces = list(streamed)
    assert pieces[0] == mj.Piece(0, None, "", "cache_full")
    assert [piece.token for piece in by_row(pieces, 3)[0]] == [None]
    assert streamed.prefilled_tokens == FULL - 2 + 3


def test_a_batch_of_full_rows_compiles_nothing():
    run = mj.Generator(*noise())
    completions = run.generate(some_prompts((FULL, FULL)), 5, GREEDY)
    assert [c.finish_reason for c in completions] == ["cache_full"] * 2
    assert run.compilations == {}


@pytest.mark.parametrize(
    "policy", [pytest.param("ring", marks=pytest.mark.slow), "ring-sinks"]
)
def test_a_ring_takes_long_prompts_of_a_ragged_batch(policy):
    run, prompts = noisy(*POLICIES[policy]), some_prompts((RING - 1, 170, 2))
    completions = run.generate(prompts, 8, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.finish_reason == "length"
        assert_greedy(run, prompt, completion.tokens)
        assert completion.cache.tokens == len(prompt) + 8
        assert completion.cache.overwritten == max(len(prompt) + 8 - RING, 0)


@pytest.mark.parametrize(
    ("length", "count", "allocated"),
    [(3, 2, 48), (20, 28, 48), (20, 29, 64), (3, 47, 64)],
)
def test_completions_tell_how_the_cache_was_used(length, count, allocated):
    prompt = [*range(length - 1), RECITED - 1]
    (completion,) = reciter().generate(prompt, count, GREEDY)
    use = completion.cache
    assert (use.tokens, use.capacity) == (length + count, RECITED)
    assert (use.allocated, use.overwritten) == (allocated, 0)


# Streams


@pytest.mark.parametrize(
    ("lengths", "params"),
    [((7,), GREEDY), ((7, 1, 20), GREEDY), ((7, 1, 20), SAMPLED)],
    ids=["one", "ragged", "sampled"],
)
def test_a_stream_equals_generate(lengths, params):
    prompts = some_prompts(lengths)
    run = noisy()
    completions = assert_streams_like_generate(run, prompts, 24, params)
    for completion in completions:
        assert completion.text == BYTES.decode(completion.tokens)


@pytest.mark.usefixtures("unchecked")
def test_prompts_may_be_texts_ids_and_arrays():
    run, text = noisy(), "prompt é"
    ids = BYTES.encode(text)
    alone = run.generate(text, 8, GREEDY)
    for prompt in (ids, tuple(ids), np.array(ids), jax.device_put(np.array(ids))):
        assert run.generate(prompt, 8, GREEDY) == alone
    assert run.generate([text], 8, GREEDY) == run.generate([ids], 8, GREEDY) == alone
    several = run.generate([text, ids, text], 8, GREEDY)
    assert several == run.generate(np.array([ids] * 3), 8, GREEDY)
    assert run.generate([], 8, GREEDY) == []


def test_text_comes_in_whole_characters(said):
    said([b"a", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98", b"\x80z", b"\xe2\x82"])
    texts = [piece.text for piece in reciter().stream([0], 7, GREEDY)]
    assert texts == ["a", "", "é", "", "", "😀z", "\ufffd"]


def test_a_stop_string_may_be_spread_over_tokens(said):
    said(["one ", "t", "w", "o t", "hree"])
    params = stops("two th")
    (completion,) = assert_streams_like_generate(reciter(), [0], 5, params)
    assert completion.text == "one "
    assert completion.tokens == [1, 2, 3, 4, 5]
    assert completion.finish_reason == "stop"
    texts = [piece.text for piece in reciter().stream([0], 5, params)]
    assert texts == ["one ", "", "", "", ""]


@pytest.mark.parametrize("split", [list, lambda text: [text]], ids=["letters", "one"])
@pytest.mark.parametrize(
    ("strings", "text"),
    [
        (("cd", "b"), "a"),  # the first to be completed, whatever the order
        (("abcd", "bc"), "a"),
        (("c", "abc"), ""),  # of several at once, the longest
        (("dd", "d"), "abc"),
    ],
)
def test_the_first_stop_string_ends_the_text(said, strings, text, split):
    said(split("abcde"))
    (completion,) = assert_streams_like_generate(reciter(), [0], 5, stops(*strings))
    assert (completion.text, completion.finish_reason) == (text, "stop")


def test_text_that_might_have_become_a_stop_string_is_not_lost(said):
    said(["a", "b", "a", "b", "x"])
    params = stops("abac", "bx!")
    texts = [piece.text for piece in reciter().stream([0], 5, params)]
    assert texts == ["", "", "", "ab", "abx"]
    (completion,) = assert_streams_like_generate(reciter(), [0], 5, params)
    assert (completion.text, completion.finish_reason) == ("ababx", "length")


def test_rows_of_a_batch_have_their_own_stop_strings(said):
    said("abcdefghijklmnopqrstuvwxyz")
    params = [stops("e"), stops("xyz"), stops("never")]
    completions = assert_streams_like_generate(reciter(), [[0], [2], [4]], 30, params)
    assert [c.text for c in completions] == [
        "abcd",
        "cdefghijklmnopqrstuvw",
        "efghijklmnopqrstuvwxyz",
    ]
    assert [c.finish_reason for c in completions] == ["stop", "stop", "length"]
    assert [len(c.tokens) for c in completions] == [5, 24, 30]


SNIPPETS = [b"a", b"b", b"ab", b"ba", b"\n", b"", "é".encode(), "€".encode()]
SNIPPETS += [b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xa9a"]


ANY_STOPS = given(
    pieces=st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=40),
    stop=st.lists(st.text("ab\né€", min_size=1, max_size=4), max_size=3),
    asked=st.integers(1, 45),
)


def check_stops(pieces, stop, asked):
    """Stop strings applied to the text of a run without any."""
    PIECES.pieces = [b"", *pieces, *[b"a"] * (RECITED - 1 - len(pieces))]
    params = stops(*stop)
    (free,) = assert_streams_like_generate(reciter(), [0], asked, GREEDY)
    (completion,) = assert_streams_like_generate(reciter(), [0], asked, params)
    assert free.tokens == following([0], asked)
    assert free.text == PIECES.decode(free.tokens)
    ends = [(free.text.find(s) + len(s), -len(s)) for s in stop if s in free.text]
    if not ends:
        assert (completion.tokens, completion.text) == (free.tokens, free.text)
        assert completion.finish_reason == "length"
        return
    end, length = min(ends)
    assert completion.text == free.text[: end + length]
    assert completion.finish_reason == "stop"
    shorter = itertools.accumulate(([t] for t in free.tokens), initial=[])
    whole = (t for t in shorter if any(s in PIECES.decode(t) for s in stop))
    assert completion.tokens == next(whole)


def test_stop_strings_cut_the_text_of_a_free_run():
    settings(max_examples=15, deadline=None)(ANY_STOPS(check_stops))()


@pytest.mark.slow
def test_stop_strings_cut_the_text_of_many_free_runs():
    settings(max_examples=500, deadline=None)(ANY_STOPS(check_stops))()


@pytest.mark.parametrize("prompts", [[[0]], [[0], [20], [46]]], ids=["one", "three"])
def test_a_stream_may_be_closed_at_any_piece(said, prompts):
    said(["x", b"\xc3", b"\xa9", "y"] * 5)
    run, count = reciter(), 9
    whole = list(run.stream(prompts, count, GREEDY))
    expected = run.generate(prompts, count, GREEDY)
    for taken in range(len(whole) + 1):
        pieces = run.stream(prompts, count, GREEDY)
        first = list(itertools.islice(pieces, taken))
        pieces.close()
        assert first == whole[:taken]
        assert list(pieces) == []
        for row, completion in zip(
            by_row(first, len(prompts)), pieces.completions, strict=True
        ):
            assert completion.tokens == [piece.token for piece in row]
            assert completion.text == "".join(piece.text for piece in row)
            reason = row[-1].finish_reason if row else None
            assert completion.finish_reason == reason
    assert run.generate(prompts, count, GREEDY) == expected


def test_a_stream_may_be_left_inside_and_outside_a_with_block():
    run = reciter()
    for piece in run.stream([0], 20, GREEDY):
        if piece.token == 3:
            break
    with run.stream([0], 20, GREEDY) as pieces:
        assert next(pieces).token == 1
    with pytest.raises(StopIteration):
        next(pieces)
    with contextlib.suppress(KeyError), run.stream([0], 20, GREEDY) as pieces:
        assert next(pieces).token == 1
        raise KeyError
    assert pieces.completions[0].tokens == [1]
    assert [piece.token for piece in run.stream([0], 20, GREEDY)] == following([0], 20)


def test_streams_of_one_generator_may_take_turns():
    run, calls = noisy(), [(some_prompts((7,)), GREEDY), (some_prompts((25,)), GREEDY)]
    calls.append((some_prompts((7, 1, 20)), SAMPLED))
    alone = [run.generate(prompts, 20, params) for prompts, params in calls]
    streams = [run.stream(prompts, 20, params) for prompts, params in calls]
    while any([next(pieces, None) for pieces in streams]):
        pass
    for pieces, completions in zip(streams, alone, strict=True):
        tokens = [completion.tokens for completion in pieces.completions]
        assert tokens == [completion.tokens for completion in completions]


def test_a_stream_starts_no_work_before_its_first_piece():
    run = mj.Generator(*noise())
    run.stream([1, 2], 5, GREEDY).close()
    assert run.compilations == {}


# Ends


LETTERS = [""] * 40 + list("abcdefghijklmnopqrstuvw")  # 41 is "a", 50 is "j"


@pytest.mark.parametrize(
    ("prompt", "count", "params", "tokens", "text", "reason"),
    [
        ([40], 64, {}, range(41, 51), "abcdefghi", "stop"),
        ([55], 64, {}, range(56, 61), "pqrs", "stop"),
        ([49], 64, {}, [50], "", "stop"),
        ([49], 1, {}, [50], "", "stop"),
        ([40], 10, {}, range(41, 51), "abcdefghi", "stop"),  # its last token
        ([40], 9, {}, range(41, 50), "abcdefghi", "length"),
        ([40], 1, {}, [41], "a", "length"),
        ([50], 3, {}, [51, 52, 53], "klm", "length"),  # an EOS that ends nothing
        ([40], 64, {"stop_token_ids": (45, 43)}, [41, 42, 43], "ab", "stop"),
        ([40], 64, {"stop_token_ids": (50,)}, range(41, 51), "abcdefghi", "stop"),
        ([40], 64, {"stop": ("fg",)}, range(41, 48), "abcde", "stop"),
        ([40], 7, {"stop": ("fg",)}, range(41, 48), "abcde", "stop"),  # its last token
        ([40], 6, {"stop": ("fg",)}, range(41, 47), "abcdef", "length"),
        ([40], 64, {"stop": ("ij",)}, range(41, 51), "abcdefghi", "stop"),
        ([*range(40)], 64, {}, range(40, 51), "abcdefghi", "stop"),
        ([*range(40), 60], 64, {}, [*range(61, 64), *range(20)], "uvw", "cache_full"),
    ],
)
def test_what_ends_a_row(said, prompt, count, params, tokens, text, reason):
    said(LETTERS)
    kind = mj.SamplingParams(temperature=0.0, **params)
    (completion,) = assert_streams_like_generate(reciter(), prompt, count, kind)
    assert completion.tokens == list(tokens)
    assert (completion.text, completion.finish_reason) == (text, reason)


@pytest.mark.parametrize("ends", [("eos", "id", "text"), ("full", "length", "eos")])
def test_rows_of_a_batch_end_each_in_its_way(said, ends):
    said(LETTERS)
    full = [*range(RECITED - 10), 20]  # 55 tokens
    ways = {
        "eos": ([40], {}, 50, "stop"),
        "id": ([40], {"stop_token_ids": (44,)}, 44, "stop"),
        "text": ([40], {"stop": ("h",)}, 48, "stop"),
        "length": ([0], {"stop": ("never",)}, 12, "length"),
        "full": (full, {}, 29, "cache_full"),
    }
    prompts, kinds, last, reasons = zip(*[ways[end] for end in ends], strict=True)
    params = [mj.SamplingParams(temperature=0.0, **kind) for kind in kinds]
    completions = assert_streams_like_generate(reciter(), prompts, 12, params)
    assert [c.tokens[-1] for c in completions] == list(last)
    assert [c.finish_reason for c in completions] == list(reasons)


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits():
    run, prompts = noisy(), some_prompts((9, 4, 30))
    bias = {int(i): -5.0 for i in range(0, 256, 3)}
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "top_k": 20}
    kinds = [
        mj.SamplingParams(temperature=0.7, logit_bias=bias, logprobs=5, **penalties),
        SAMPLED,
        mj.SamplingParams(temperature=0.0, logprobs=0),
    ]
    completions = assert_streams_like_generate(run, prompts, 14, kinds)
    for prompt, kind, completion in zip(prompts, kinds, completions, strict=True):
        if kind.logprobs is None:
            assert completion.logprobs is None
            assert completion.top_logprobs is None
            continue
        logits = raw_logits(run, prompt, completion.tokens)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        at = np.arange(14), np.array(completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected[at], atol=1e-4)
        for row, top in zip(expected, completion.top_logprobs or (), strict=False):
            best = np.argsort(-row)[: kind.logprobs]
            assert list(top) == best.tolist()
            np.testing.assert_allclose(list(top.values()), row[best], atol=1e-4)
    assert len(completions[0].top_logprobs) == 14
    assert completions[2].top_logprobs is None  # 0 alternatives
    alone = run.generate(prompts[2], 14, GREEDY)[0]
    assert alone.tokens == completions[2].tokens
    assert alone.logprobs is None


def test_logprobs_belong_to_the_tokens_of_a_stream_that_was_closed():
    run, prompts = noisy(), some_prompts((9, 3, 5))
    params = mj.SamplingParams(seed=4, logprobs=2)
    whole = run.generate(prompts, 14, params)
    with run.stream(prompts, 14, params) as pieces:
        for _ in range(17):
            next(pieces)
    for taken, completion, other in zip(
        (6, 6, 5), pieces.completions, whole, strict=True
    ):
        assert completion.tokens == other.tokens[:taken]
        assert completion.logprobs == pytest.approx(other.logprobs[:taken], abs=1e-5)
        assert len(completion.top_logprobs) == taken


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": None}, "prompts=None: must be a text, a list of token ids"),
        ({"prompts": 5}, "prompts=5: must be a text"),
        ({"prompts": "text"}, "prompt 0 is text, which needs a tokenizer"),
        ({"prompts": [[1], "text"]}, "prompt 1 is text, which needs a tokenizer"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": np.zeros((2, 0), int)}, "prompt 0 is empty"),
        (
            {"prompts": np.zeros((1, 2, 2), int)},
            "prompt 0: must be a text or a flat list",
        ),
        ({"prompts": [1, 256]}, "prompt 0: 256 is outside the vocabulary"),
        ({"prompts": [[1], [-1]]}, "prompt 1: -1 is outside the vocabulary"),
        ({"prompts": [1.5]}, "prompt 0: must be whole numbers"),
        ({"prompts": [None]}, "prompt 0: must be whole numbers"),
        ({"prompts": [[1, [2, 3]]]}, "prompt 0"),
        ({"prompts": np.array(5)}, "prompts="),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be a number in"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5: must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens=True: must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens=None: must be a whole number"),
        ({"max_new_tokens": 2**40}, "max_new_tokens=1099511627776: must be"),
        ({"sampling": None}, "sampling=None: must be a SamplingParams"),
        ({"sampling": {"seed": 1}}, "sampling={'seed': 1}: must be a SamplingParams"),
        ({"sampling": [GREEDY] * 2}, "2 SamplingParams for 1 prompts"),
        ({"sampling": []}, "0 SamplingParams for 1 prompts"),
        ({"stop": "end"}, "stop=.*'end'.*: needs a tokenizer; use stop_token_ids"),
        ({"stop_token_ids": (3, 256)}, "stop_token_ids: 256 is outside the vocabulary"),
        ({"stop_token_ids": range(65)}, "65 ids with the EOS ids, but 64 is the most"),
        ({"logit_bias": {256: 1.0}}, "logit_bias: 256 is outside the vocabulary"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_named_before_any_work(arguments, message):
    run = mj.Generator(*noise())
    own = ("prompts", "max_new_tokens", "sampling")
    fields = {name: x for name, x in arguments.items() if name not in own}
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    call = {"prompts": [1, 2], "max_new_tokens": 4} | arguments
    call = {name: call[name] for name in own if name in call}
    if fields:
        call["sampling"] = mj.SamplingParams(**fields)
    for entrance in (run.generate, run.stream):
        with pytest.raises(mj.ConfigError, match=message):
            entrance(**call)
    assert run.compilations == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overflow": "wrap"}, "overflow='wrap': must be one of error, stop, ring"),
        ({"num_sinks": 2}, "num_sinks=2: needs overflow='ring'"),
        ({"overflow": "ring", "num_sinks": FULL}, "num_sinks=45: must be below"),
        ({"overflow": "ring", "num_sinks": -1}, "num_sinks=-1: must be a number"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(mj.ConfigError, match=message):
        mj.Generator(*noise(), **arguments)


def test_sinks_and_a_sliding_window_are_refused():
    model, params = noise(sliding_window=6)
    with pytest.raises(mj.ConfigError, match=r"sliding-window layers .* keep no sinks"):
        mj.Generator(model, params, overflow="ring", num_sinks=2)


def test_a_prompt_of_a_batch_that_overflows_is_named():
    message = "prompt 1 has 46 tokens, but the cache holds 45: shorten it by 1"
    for entrance in (noisy().generate, noisy().stream):
        with pytest.raises(mj.CacheOverflowError, match=message):
            entrance(some_prompts((3, FULL + 1)), 4, GREEDY)


# What a tokenizer knows


class Even(mj.ByteTokenizer):
    """Knows 100 ids of 256, and some that the model has not."""

    known_ids = (*range(0, 200, 2), 256, 1000)


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled():
    run, prompts = mj.Generator(*noise(), Even()), some_prompts((7, 3, 12))
    bias = {1: 50.0, 2: 5.0}  # 1 is unknown
    kinds = [
        mj.SamplingParams(temperature=0.0, logit_bias=bias),
        mj.SamplingParams(temperature=3.0),
        mj.SamplingParams(temperature=3.0, min_p=0.01, logit_bias=bias, logprobs=3),
    ]
    for sampling in (kinds, GREEDY):
        rows = by_row(list(run.stream(prompts, 17, sampling)), 3)
        tokens = np.array([[piece.token for piece in row] for row in rows])
        assert np.all(tokens % 2 == 0)
        assert tokens.max() < 200
        assert len(np.unique(tokens)) > 10
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        logits = raw_logits(run, prompt, row)[:, :200:2]
        assert row == (2 * np.argmax(logits, axis=-1)).tolist()


# Random weights


@pytest.fixture
def told(monkeypatch, caplog):
    """What the package's logger is told, from scratch."""
    generator._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="minillm_jax")
    return caplog


def test_random_weights_are_mentioned_once(told):
    model, _ = noise()
    params = mj.init_params(model)
    for _ in range(2):
        run = mj.Generator(model, params)
        for _ in range(2):
            run.stream([1], 2, GREEDY).close()
    assert [record.name for record in told.records] == ["minillm_jax"]
    assert "the weights are random" in told.text


def test_other_weights_are_not_called_random(told):
    noisy().generate([1], 2, GREEDY)
    assert told.text == ""
