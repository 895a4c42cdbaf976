"""Rows that outgrow longrope's original context, and are prefilled again.

Beyond it every key turns by other frequencies, so that a row's logits are those of its
whole sequence given at once, at any length: what both oracles here compute.
"""

import dataclasses
import itertools
from unittest import mock

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import reference, testing
from minillm_jax.decoding import decode, executables, generator, sampling

POINT, FULL, WINDOW = 24, 64, 30  # tokens: original context, capacity, local layer's
VOCABULARY, LETTERS = 256, range(32, 127)  # ids, and those that may be sampled
GREEDY = mj.SamplingParams(temperature=0.0)
PENALISED = mj.SamplingParams(
    temperature=1.5,
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    presence_penalty=0.2,
    seed=11,
)
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": POINT,
    "short_factor": (1.0, 1.1, 1.3, 1.7),
    "long_factor": (1.5, 2.0, 3.0, 4.0),
}


class Letters(mj.ByteTokenizer):
    """A letter for each token."""

    known_ids = LETTERS


def generating(overflow="stop", **changes):
    """All there is of a tiny cache in one capacity: few executables."""
    fields = {"vocab_size": VOCABULARY, "max_seq_len": 16, "max_kv_cache_len": FULL}
    fields |= {"prefill_chunk": 4, "rope_scaling": LONGROPE, "num_layers": 1}
    model = mj.create_model(testing.tiny_config(**(fields | changes)))
    params = testing.noisy_params(model, seed=3)
    return mj.Generator(model, params, Letters(), overflow)


@pytest.fixture(scope="module")
def run():
    return generating()


def some_tokens(length, seed=0):
    draw = np.random.default_rng(seed).integers
    return draw(LETTERS[0], LETTERS[-1] + 1, length).tolist()


def some_prompts(lengths):
    return [some_tokens(length, seed=length) for length in lengths]


def exact(run, prompt, tokens):
    """The logits of each token, of the sequence before it alone, float64 [T, V]."""
    config, mask = run.model.config, reference._mask
    longest = config.max_kv_cache_len
    params = jax.device_get(run._executables.params)

    def in_a_ring(segments, window, sinks):
        return mask(segments, min(window or longest, longest), sinks)

    with mock.patch.object(reference, "_mask", in_a_ring):
        return np.stack(
            [
                testing.reference_logits(config, params, [[*prompt, *tokens[:i]]])[
                    0, -1
                ]
                for i in range(len(tokens))
            ]
        )


def assert_greedy(run, prompt, tokens):
    logits = exact(run, prompt, tokens)[:, LETTERS.start : LETTERS.stop]
    chosen = logits[np.arange(len(tokens)), np.array(tokens) - LETTERS.start]
    assert np.all(chosen >= logits.max(axis=-1) - 2e-5)


def sampled_afresh(run, prompt, kind, count):
    """Tokens of a loop that prefills the whole sequence for each of them."""
    config, params = run.model.config, run._executables.params
    requests = sampling.request_arrays(
        [kind],
        sample_indices=[0],
        prompts=[prompt],
        budgets=[count],
        eos_token_ids=(),
        known=np.isin(np.arange(VOCABULARY), LETTERS),
    )
    state, tokens = sampling.initial_state(requests), np.zeros(0, np.int32)
    for i in range(count):
        whole = np.array([[*prompt, *tokens]])
        logits, _ = mj.prefill(run.model, params, mj.init_cache(config), whole)
        seen = np.bincount(tokens, minlength=VOCABULARY)[None].astype(np.int32)
        now = state._replace(generated=np.array([i], np.int32), counts=seen)
        out, _ = decode.first_tokens(logits, now, requests)
        tokens = np.append(tokens, out.tokens[0, 0])
    return tokens.tolist()


def streamed(run, prompts, count, kinds):
    """A stream that has run out, after comparing it with `generate`."""
    expected = run.generate(prompts, count, kinds)
    with run.stream(prompts, count, kinds) as stream:
        pieces = list(stream)
    for row, (one, other) in enumerate(zip(expected, stream.completions, strict=True)):
        mine = [piece for piece in pieces if piece.index == row]
        assert [piece.token for piece in mine] == one.tokens == other.tokens
        assert "".join(piece.text for piece in mine) == one.text == other.text
        reasons = [piece.finish_reason for piece in mine]
        assert reasons == [None] * (len(mine) - 1) + [one.finish_reason]
        assert other.finish_reason == one.finish_reason
    return stream


def prefilled(prompt, count):
    """Tokens that a row prefills, again if it crosses."""
    crosses = prompt <= POINT < prompt + count - 1
    return prompt + (POINT + 1 if crosses else 0)


# The point where rows cross


@pytest.mark.parametrize(
    "lengths", [(5,), (23,), (24,), (25,), (3, 20, 30), (24, 23, 25), (1, 2, 12)]
)
def test_greedy_rows_cross_like_the_reference(run, lengths):
    """At different steps, and some of them never."""
    prompts = some_prompts(lengths)
    stream = streamed(run, prompts, 30, GREEDY)
    for prompt, completion in zip(prompts, stream.completions, strict=True):
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == 30
        assert len(set(completion.tokens)) > 5
        assert_greedy(run, prompt, completion.tokens)
    assert stream.prefilled_tokens == sum(prefilled(n, 30) for n in lengths)


def test_the_two_contexts_have_different_logits(run):
    """Or the tests here would say nothing."""
    prompt = some_tokens(POINT)
    config, params = run.model.config, jax.device_get(run._executables.params)
    short, long = [
        testing.reference_logits(config, params, [prompt], reach=reach)
        for reach in (0, POINT + 1)
    ]
    assert np.max(np.abs(short - long)) > 0.1


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 7])
@pytest.mark.parametrize("way", ["length", "id", "text"])
def test_a_row_may_end_before_at_and_after_the_point(run, way, tokens):
    """From 20 tokens, five come from the shorter context."""
    prompt = some_tokens(20, seed=7)
    (free,) = run.generate(prompt, 12, GREEDY)
    assert len(set(free.tokens[:7])) == 7
    kinds = {
        "length": GREEDY,
        "id": mj.SamplingParams(
            temperature=0.0, stop_token_ids=(free.tokens[tokens - 1],)
        ),
        "text": mj.SamplingParams(
            temperature=0.0, stop=(free.text[max(tokens - 2, 0) : tokens],)
        ),
    }
    count = tokens if way == "length" else 12
    stream = streamed(run, prompt, count, kinds[way])
    (completion,) = stream.completions
    assert completion.tokens == free.tokens[:tokens]
    assert completion.finish_reason == ("length" if way == "length" else "stop")
    assert stream.prefilled_tokens == prefilled(20, tokens)


def test_a_full_cache_ends_a_row_that_has_crossed(run):
    prompts = some_prompts((20, FULL - 2, 40))
    stream = streamed(run, prompts, 60, GREEDY)
    assert [len(c.tokens) for c in stream.completions] == [44, 2, 24]
    assert {c.finish_reason for c in stream.completions} == {"cache_full"}
    assert_greedy(run, prompts[0], stream.completions[0].tokens)


@pytest.mark.parametrize("overwritten", ["before the point", "after it"])
def test_a_ring_may_be_shorter_or_longer_than_the_original_context(overwritten):
    longest = POINT - 4 if overwritten == "before the point" else POINT + 8
    run = generating("ring", max_kv_cache_len=longest)
    prompts = some_prompts((5, 23))
    stream = run.stream(prompts, 40, GREEDY)
    assert len(list(stream)) == 80
    for prompt, completion in zip(prompts, stream.completions, strict=True):
        assert_greedy(run, prompt, completion.tokens)
    assert stream.prefilled_tokens == prefilled(5, 40) + prefilled(23, 40)


# Sampling


def test_sampled_rows_cross_like_sequences_that_are_prefilled_for_each_token(run):
    """Keys, counts and penalties go on; neighbours cross at other steps, or end."""
    prompts = some_prompts((18, 22, 30))
    ends = mj.SamplingParams(seed=3, stop_token_ids=tuple(range(64, 80)))
    kinds = [PENALISED, ends, dataclasses.replace(PENALISED, logprobs=0)]
    with run.stream(prompts, 16, kinds) as pieces:
        assert len(list(pieces)) < 48
    completions = pieces.completions
    assert [c.finish_reason for c in completions] == ["length", "stop", "length"]
    for prompt, kind, completion in zip(prompts, kinds, completions, strict=True):
        count = len(completion.tokens)
        assert completion.tokens == sampled_afresh(run, prompt, kind, count)


def test_logprobs_go_on_across_the_point(run):
    prompts = some_prompts((18, 22, 30))
    params = mj.SamplingParams(temperature=0.0, logprobs=2)
    with run.stream(prompts, 12, params) as pieces:
        assert len(list(pieces)) == 36
    for prompt, completion in zip(prompts, pieces.completions, strict=True):
        logits = exact(run, prompt, completion.tokens)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        at = np.arange(12), np.array(completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected[at], atol=1e-4)
        assert len(completion.top_logprobs) == 12


# Streams and sessions


@pytest.mark.parametrize("lengths", [(21,), (21, 3, 30)])
def test_a_stream_may_be_closed_on_either_side_of_the_point(run, lengths):
    prompts = some_prompts(lengths)
    whole = list(run.stream(prompts, 9, GREEDY))
    for taken in range(len(whole) + 1):
        with run.stream(prompts, 9, GREEDY) as pieces:
            assert list(itertools.islice(pieces, taken)) == whole[:taken]
        given = [piece.token for piece in whole[:taken] if piece.index == 0]
        assert pieces.completions[0].tokens == given


def assert_turn(run, session, prompt, count, taken=None):
    """A turn equals the same without a session; returns its tokens and prefilled."""
    with run.stream(prompt, count, GREEDY, session=session) as pieces:
        tokens = [piece.token for piece in itertools.islice(pieces, taken)]
    (expected,) = run.generate(prompt, count, GREEDY)
    assert tokens == expected.tokens[: len(tokens)]
    return tokens, pieces.prefilled_tokens


def test_a_session_begins_again_where_its_context_changes(run):
    session, history = mj.Session(), some_tokens(10)
    turns = [
        (0, 6, 10),
        (3, 3, 3 + 1),  # the last sampled token has not been in the cache
        (1, 6, 1 + 1 + POINT + 1),  # from 23 tokens to 29: crosses while decoding
        (2, 5, 2 + 1),
    ]
    for said, count, new in turns:
        history += some_tokens(said, seed=said)
        tokens, found = assert_turn(run, session, history, count)
        assert found == new
        history += tokens
    assert len(history) == 36
    _, found = assert_turn(run, session, history[:15], 3)  # back again
    assert found == 15
    _, found = assert_turn(run, session, history[:26], 3)  # with a prompt beyond it
    assert found == 26


@pytest.mark.parametrize(("taken", "new"), [(2, 1), (4, 30), (5, 5), (9, 5)])
def test_a_session_goes_on_after_a_close_on_either_side_of_the_point(run, taken, new):
    """From 21 tokens, four come from the shorter context."""
    session, prompt = mj.Session(), some_tokens(21)
    tokens, _ = assert_turn(run, session, prompt, 20, taken)
    history = [*prompt, *tokens, *some_tokens(1 if taken == 2 else 5)]
    _, found = assert_turn(run, session, history, 1)
    assert found in (new, new + 1)  # the last token read may not be in the cache


@pytest.mark.parametrize("then", ["longer", "shorter"])
@pytest.mark.parametrize("calls", range(1, 20, 2))
def test_an_interrupt_at_any_call_leaves_a_session_usable(
    run, monkeypatch, calls, then
):
    session, prompt = mj.Session(), some_tokens(18)
    first, _ = assert_turn(run, session, prompt, 2)
    counter, original = itertools.count(1), executables.Executables.__call__

    def interrupted(self, key, **arrays):
        if next(counter) == calls:
            raise KeyboardInterrupt
        return original(self, key, **arrays)

    following = [*prompt, *first, 65]
    stream = run.stream(following, 40, GREEDY, session=session)
    with monkeypatch.context() as patch:
        patch.setattr(executables.Executables, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    done = stream.completions[0].tokens if then == "longer" else []
    assert_turn(run, session, [*following, *done, 66], 2)


# Executables


def test_rows_that_cross_need_what_a_warmup_compiles(run):
    calls = [((20,), GREEDY), ((20, 3, 33), GREEDY), ((24, 2, 24), PENALISED)]
    for lengths, params in calls:
        list(run.stream(some_prompts(lengths), 30, params))
    assert set(run._executables.seconds) <= {
        key for size in (1, 3) for key in run._executables.keys(size)
    }
    with testing.counted_compilations() as compilations, run.forbid_compile():
        for lengths, params in calls:
            for fewer in (0, 1):
                prompts = some_prompts([length - fewer for length in lengths])
                list(run.stream(prompts, 28, params))
        session, prompt = mj.Session(), some_tokens(20)
        for _ in range(2):
            reply = run.stream(prompt, 12, GREEDY, session=session)
            prompt += [piece.token for piece in reply]
    assert not compilations


def test_mixed_layers_cross_and_then_grow(monkeypatch):
    """From 32 slots everywhere to a local ring of 43, which wraps, beside 96."""
    monkeypatch.setattr(generator, "SMALLEST_CAPACITY", 32)
    fields = {"num_layers": 2, "sliding_window": 40, "global_layers": (1,)}
    run, prompt = generating(max_kv_cache_len=96, **fields), some_tokens(20)
    pieces = run.stream(prompt, 76, GREEDY)
    tokens = [piece.token for piece in pieces]
    assert_greedy(run, prompt, tokens)
    assert pieces.prefilled_tokens == 20 + POINT + 1
    assert run.compilations["grow_cache"] == 3  # to 43 and 64, and from there to 96
