"""What a Generator keeps from call to call: its executables, and Sessions.

After `warmup` nothing compiles, by the count of JAX itself. A Session changes what is
prefilled, and no token.
"""

import functools
import itertools
import random
import re

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import decode, executables, generator
from minillm_jax.model import cache as kv

GREEDY = mj.SamplingParams(temperature=0.0)
SAMPLED = mj.SamplingParams(temperature=1.5, repetition_penalty=1.2, seed=11)
VOCABULARY, FULL = 256, 90
# A local ring of 73 slots: it grows less than the layer that sees everything.
MIXED = {"num_layers": 2, "sliding_window": 70, "global_layers": (1,)}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 40,
    "short_factor": (1.0, 1.1, 1.3, 1.7),
    "long_factor": (1.5, 2.0, 3.0, 4.0),
}
BYTES = mj.ByteTokenizer()


@pytest.fixture(autouse=True, scope="module")
def small_buckets():
    """Capacities from 64 tokens on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "SMALLEST_CAPACITY", 64)
        yield


@functools.cache
def noise(**changes):
    fields = {"vocab_size": VOCABULARY, "max_seq_len": 16, "max_kv_cache_len": FULL}
    fields |= {"num_layers": 1, "prefill_chunk": 4}
    model = mj.create_model(testing.tiny_config(**(fields | changes)))
    return model, testing.noisy_params(model, seed=3)


@functools.cache
def warm():
    """A generator after a warmup, the compilations JAX counted, and the seconds."""
    run = mj.Generator(*noise(**MIXED), BYTES)
    jax.clear_caches()  # of other tests
    with testing.counted_compilations() as compilations:
        seconds = run.warmup((1, 2))
    return run, len(compilations), seconds


@functools.cache
def other(overflow="stop", num_sinks=0, **changes):
    return mj.Generator(*noise(**changes), BYTES, overflow, num_sinks)


def some_tokens(length, seed=0):
    draw = np.random.default_rng(seed).integers
    return draw(0, VOCABULARY, length).tolist()


# Executables


def test_warmup_compiles_what_the_formula_says_and_tells_it():
    run, compilations, seconds = warm()
    assert generator.capacities(run.model.config, run.policy) == (64, 90)
    chunks, buckets = len(decode.chunk_sizes(run.model.config)), 2
    assert chunks == 2
    expected = {"first_token": 2, "init_cache": buckets, "prefill": chunks * buckets}
    expected |= {"decode": 4 * buckets, "grow_cache": 2}
    assert run.compilations == {name: 2 * count for name, count in expected.items()}
    assert compilations == sum(run.compilations.values()) == len(seconds)
    assert seconds == run.compile_seconds
    assert all(value > 0 for value in seconds.values())
    assert "decode(batch_size=2, capacity=64, steps=4, sampling)" in seconds
    assert "prefill(batch_size=1, capacity=90, chunk=4)" in seconds
    for slots in (73, 90):
        assert f"grow_cache(batch_size=2, capacity=64, slots={slots})" in seconds


def test_a_second_warmup_compiles_nothing():
    run, *_ = warm()
    with testing.counted_compilations() as compilations, run.forbid_compile():
        assert run.warmup((2, 1)) == {}
    assert not compilations


def random_params(draw):
    """Any value of any field, each half of the time."""
    ids = [draw.randrange(VOCABULARY) for _ in range(5)]
    fields = {
        "temperature": draw.choice([0.0, 0.5, 3.0]),
        "top_k": draw.choice([1, 7, 100, 10**6]),
        "top_p": draw.choice([0.0, 0.3, 0.999]),
        "min_p": draw.choice([0.01, 1.0]),
        "repetition_penalty": draw.uniform(0.5, 2.0),
        "frequency_penalty": draw.uniform(-2.0, 2.0),
        "presence_penalty": draw.uniform(-2.0, 2.0),
        "logit_bias": dict.fromkeys(ids, draw.uniform(-9.0, 9.0)),
        "seed": draw.randrange(2**32),
        "stop": tuple(draw.choices(["a", "\n", "ab", "é", "never"], k=2)),
        "stop_token_ids": tuple(ids[: draw.randrange(5)]),
        "logprobs": draw.choice([None, 0, 3, 20]),
    }
    if draw.random() < 0.2:
        return mj.SamplingParams(temperature=0.0, stop=fields["stop"])
    return mj.SamplingParams(
        **{name: value for name, value in fields.items() if draw.random() < 0.5}
    )


def request_anything(run, draw, session):
    """One call of `generate` or `stream`, perhaps closed early; returns the prompts."""
    lengths = [draw.choice([1, 8, 9, draw.randrange(1, FULL), FULL])]
    if draw.random() < 0.5:
        lengths.append(draw.randrange(1, FULL + 1))
    prompts = [some_tokens(length, draw.randrange(99)) for length in lengths]
    if draw.random() < 0.2:
        prompts[0] = "some text: é"
    params = random_params(draw)
    if draw.random() < 0.5:
        params = [params, *(random_params(draw) for _ in prompts[1:])]
    most = 200 if run.policy.overflow == "ring" else 10**6
    count = draw.choice([1, 2, 5, draw.randrange(1, 60), most])
    if draw.random() < 0.4:
        return run.generate(prompts, count, params)
    kept = session if len(prompts) == 1 and draw.random() < 0.7 else None
    if kept is not None and draw.random() < 0.7:
        prompts = [[*kept.tokens, 5, 6, 7][-draw.randrange(3, 80) :]]
    taken = draw.choice([0, 1, 3, 1000])
    with run.stream(prompts, count, params, session=kept) as pieces:
        for _ in itertools.islice(pieces, taken):
            pass
    return pieces.completions


def run_random_requests(run, count):
    draw, session = random.Random(count), mj.Session()
    with testing.counted_compilations() as compilations, run.forbid_compile():
        for _ in range(count):
            for completion in request_anything(run, draw, session):
                assert run.policy == kv.RING or completion.cache.tokens <= FULL
    assert not compilations


def test_random_requests_compile_nothing_after_warmup():
    run_random_requests(warm()[0], 25)


@pytest.mark.slow
def test_many_random_requests_compile_nothing_after_warmup():
    run_random_requests(warm()[0], 200)


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["stop", "ring"])
def test_many_random_requests_across_a_turning_point_compile_nothing(overflow):
    config = testing.tiny_config(rope_scaling=LONGROPE)
    run = other(overflow, **MIXED, rope_scaling=config.rope_scaling)
    run.warmup((1, 2))
    run_random_requests(run, 200)


def test_forbid_compile_names_what_is_missing_and_ends_with_its_block():
    run = mj.Generator(*noise())
    prompts = [[1, 2, 3]] * 3
    message = (
        "init_cache(batch_size=3, capacity=64) is not compiled yet: call "
        "warmup(batch_sizes=(3,)) before forbid_compile()"
    )
    with run.forbid_compile():
        with run.forbid_compile(), pytest.raises(executables.CompileForbiddenError):
            run.generate(prompts, 2, GREEDY)
        error = pytest.raises(
            executables.CompileForbiddenError, match=re.escape(message)
        )
        with error:
            run.generate(prompts, 2, GREEDY)
    assert run.compilations == {}
    once = run.generate(prompts, 3, GREEDY)
    with run.forbid_compile():
        assert run.generate(prompts, 3, GREEDY) == once
        with pytest.raises(
            executables.CompileForbiddenError, match=r"decode.*sampling"
        ):
            run.generate(prompts, 3, SAMPLED)
    assert run.generate(prompts, 3, GREEDY) == once


def test_a_warm_generator_refuses_other_batch_sizes_and_goes_on():
    run, *_ = warm()
    before = run.generate([[1, 2]] * 2, 20, GREEDY)
    with run.forbid_compile():
        with pytest.raises(executables.CompileForbiddenError, match="batch_size=3"):
            run.generate([[1, 2]] * 3, 20, GREEDY)
        assert run.generate([[1, 2]] * 2, 20, GREEDY) == before


@pytest.mark.parametrize("kind", ["committed", "numpy"])
def test_parameters_on_a_device_or_of_numpy_compile_once(kind):
    model, params = noise(**MIXED)
    if kind == "numpy":
        params = jax.device_get(params)
    else:
        params = jax.device_put(params, jax.devices()[0])
    run, prompt = mj.Generator(model, params), some_tokens(52)
    jax.clear_caches()
    with testing.counted_compilations() as compilations:
        tokens = run.generate(prompt, 24, GREEDY)[0].tokens
    assert len(compilations) == sum(run.compilations.values())
    assert run.compilations["grow_cache"] == 2
    with testing.counted_compilations() as compilations:
        again = run.generate(prompt, 24, GREEDY)[0].tokens
    assert not compilations
    assert tokens == again == warm()[0].generate(prompt, 24, GREEDY)[0].tokens


def test_other_executables_compile_once_each():
    run = mj.Generator(*noise(), overflow="ring")
    prompt = some_tokens(8)
    for _ in range(3):
        assert len(run.generate(prompt, 5, GREEDY)[0].tokens) == 5
        assert run.compilations == {
            "init_cache": 1,
            "prefill": 1,
            "first_token": 1,
            "decode": 1,
        }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0,), "batch_sizes=0: must be a number in"),
        ((1.5,), "batch_sizes=1.5: must be a whole number"),
        ((1, "2"), "batch_sizes='2': must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_warmup_refuses_what_is_no_batch_size(sizes, message):
    run = mj.Generator(*noise())
    with pytest.raises(mj.ConfigError, match=message):
        run.warmup(sizes)
    assert run.compilations == {}


# Sessions


def assert_turn(run, session, prompt, count, params=GREEDY, taken=None):
    """One turn in a session equals the same without; returns tokens and prefilled."""
    with run.stream(prompt, count, params, session=session) as pieces:
        tokens = [piece.token for piece in itertools.islice(pieces, taken)]
    expected = [p.token for p in run.stream(prompt, count, params)]
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == (len(expected) if taken is None else taken)
    return tokens, pieces.prefilled_tokens


RINGS = {"stop": (), "ring": ("ring",), "ring-sinks": ("ring", 2)}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_turns_of_a_conversation_prefill_what_is_new(params):
    run, session, history = warm()[0], mj.Session(), []
    for turn, (said, count) in enumerate([(9, 12), (1, 5), (20, 20), (3, 18)]):
        history += some_tokens(said, seed=turn)
        tokens, prefilled = assert_turn(run, session, history, count, params)
        # The last token of a completion has been sampled, and not been in the model.
        assert prefilled == said + (1 if turn else 0)
        history += tokens
    assert len(history) == 88


@pytest.mark.parametrize("taken", [1, 2, 5, 6, 9])
def test_after_an_early_close_what_was_read_is_kept(taken):
    run, session, prompt = warm()[0], mj.Session(), some_tokens(9)
    tokens, _ = assert_turn(run, session, prompt, 20, taken=taken)
    history = [*prompt, *tokens, *some_tokens(4, seed=1)]
    _, prefilled = assert_turn(run, session, history, 8)
    assert prefilled in (4, 5)


def test_a_session_that_was_never_read_is_as_it_was():
    run, session, prompt = warm()[0], mj.Session(), some_tokens(9)
    tokens, _ = assert_turn(run, session, prompt, 8)
    run.stream([1, 2, 3], 8, GREEDY, session=session).close()
    _, prefilled = assert_turn(run, session, [*prompt, *tokens, 1], 8)
    assert prefilled == 2


def test_after_a_stop_string_a_session_goes_on():
    run, session, prompt = warm()[0], mj.Session(), some_tokens(9)
    (free,) = run.generate(prompt, 16, GREEDY)
    readable = [i for i, token in enumerate(free.tokens[:-2]) if token < 128]
    stop = mj.SamplingParams(temperature=0.0, stop=(chr(free.tokens[readable[-1]]),))
    tokens, _ = assert_turn(run, session, prompt, 16, stop)
    assert len(tokens) < 16
    history = [*prompt, *tokens, *some_tokens(4, seed=1)]
    _, prefilled = assert_turn(run, session, history, 8)
    assert prefilled in (4, 5)


def edits(prompt, tokens):
    """Prompts after a turn, and what of them has to be prefilled."""
    whole, middle = [*prompt, *tokens], len(prompt) // 2
    changed = (whole[middle] + 1) % VOCABULARY
    return {
        "the same again": (prompt, 1),
        "shorter": (prompt[:-3], 1),
        "edited": ([*whole[:middle], changed, 7], 2),
        "edited and longer": ([*whole[:middle], changed, *whole], 1 + len(whole)),
        "all of it": (whole, 1),
        "another": ([(prompt[0] + 1) % VOCABULARY, 5, 6], 3),
        "one token": (prompt[:1], 1),
    }


@pytest.mark.parametrize("policy", RINGS)
@pytest.mark.parametrize("edit", edits([0, 0], [0]))
def test_a_prompt_that_departs_from_the_last_one(policy, edit):
    """Before any ring has wrapped."""
    run = other(*RINGS[policy]) if policy != "stop" else warm()[0]
    session, prompt = mj.Session(), some_tokens(20)
    tokens, _ = assert_turn(run, session, prompt, 9)
    after, new = edits(prompt, tokens)[edit]
    _, prefilled = assert_turn(run, session, after, 9)
    assert prefilled == new
    _, prefilled = assert_turn(run, session, [*prompt, *tokens, 3], 9)


@pytest.mark.parametrize("policy", ["ring", "ring-sinks"])
@pytest.mark.parametrize("edit", edits([0, 0], [0]))
def test_a_wrapped_ring_goes_on_or_begins_anew(policy, edit):
    run, session, prompt = other(*RINGS[policy]), mj.Session(), some_tokens(70)
    tokens, _ = assert_turn(run, session, prompt, 50)  # of 90, and 93 slots
    history = [*prompt, *tokens, 1, 2]
    tokens, prefilled = assert_turn(run, session, history, 9)
    assert prefilled == 3
    after, _ = edits(history, tokens)[edit]
    _, prefilled = assert_turn(run, session, after, 9)
    assert prefilled == (1 if edit == "all of it" else len(after))


@pytest.mark.parametrize("policy", ["stop", "ring"])
def test_a_sliding_window_forgets_what_an_edit_needs_again(policy):
    run = other(*RINGS[policy], sliding_window=6)
    session, prompt = mj.Session(), some_tokens(40)
    tokens, _ = assert_turn(run, session, prompt, 9)
    history = [*prompt, *tokens, 1, 2]
    tokens, prefilled = assert_turn(run, session, history, 9)
    assert prefilled == 3
    for after, _ in edits(history, tokens).values():
        assert_turn(run, session, after, 9)
        assert_turn(run, session, history, 9)


def test_a_failed_call_leaves_a_session_as_it_was():
    run, session, prompt = warm()[0], mj.Session(), some_tokens(9)
    tokens, _ = assert_turn(run, session, prompt, 8)
    with pytest.raises(mj.CacheOverflowError):
        run.stream([*prompt, *tokens, *some_tokens(FULL)], 8, GREEDY, session=session)
    with pytest.raises(mj.ConfigError, match="max_new_tokens=0"):
        run.stream([*prompt, *tokens, 1], 0, GREEDY, session=session)
    _, prefilled = assert_turn(run, session, [*prompt, *tokens, 1], 8)
    assert prefilled == 2


def test_a_prompt_that_fills_the_cache_leaves_a_session_usable():
    run, session, prompt = warm()[0], mj.Session(), some_tokens(9)
    tokens, _ = assert_turn(run, session, prompt, 8)
    full = [*prompt, *tokens, *some_tokens(FULL - 17)]
    pieces = list(run.stream(full, 8, GREEDY, session=session))
    assert pieces == [mj.Piece(0, None, "", "cache_full")]
    _, prefilled = assert_turn(run, session, [*prompt, *tokens, 1], 8)
    assert prefilled == 2


def test_a_session_keeps_the_cache_of_one_prompt():
    with pytest.raises(mj.ConfigError, match="session: keeps the cache of one prompt"):
        warm()[0].stream([[1], [2]], 3, GREEDY, session=mj.Session())


def test_a_session_of_another_generator_is_refused():
    run, session = warm()[0], mj.Session()
    assert_turn(run, session, [1, 2, 3], 8)
    with pytest.raises(mj.ConfigError, match="session: belongs to another Generator"):
        other("ring").stream([1, 2, 3], 8, GREEDY, session=session)
    assert_turn(run, session, [1, 2, 3, 4], 8)


def test_two_streams_may_have_one_session_at_once():
    run, session, prompt = warm()[0], mj.Session(), some_tokens(9)
    assert_turn(run, session, prompt, 8)
    streams = [
        run.stream([*prompt, extra], 8, GREEDY, session=session) for extra in (1, 2)
    ]
    turns = list(zip(*streams, strict=True))
    for row, extra in enumerate((1, 2)):
        (alone,) = run.generate([*prompt, extra], 8, GREEDY)
        assert [turn[row].token for turn in turns] == alone.tokens
    assert_turn(run, session, [*prompt, 1, 2], 8)
