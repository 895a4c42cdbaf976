"""Sampling against transformers' numbers, float64 references and counted draws.

goldens/warpers.json was written by goldens/make_warpers.py. The references here sort,
or compare every token with every other, in NumPy and float64: the library does not.

Axes: N draws or cases, V vocab.
"""

import functools
import json
import pathlib
import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.decoding import sampler as maths
from minillm_jax.decoding import sampling
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.validation import ConfigError

GOLDENS = json.loads(
    (pathlib.Path(__file__).parent / "goldens" / "warpers.json").read_text("ascii")
)
DOUBT = 1e-5  # of the probability: nearer to a boundary, float32 decides
UNDERFLOW = -87.0  # exp of less is no normal float32
SEVERAL_PATHS = (10, 130, 300)  # below and above 64 candidates and blocks of 128
GREEDY = SamplingParams(temperature=0.0)

BATCH = 24  # rows of every call here, so that each vocabulary compiles once

compiled_choose = jax.jit(sampling.sample_step)


def choose(logits, state, rows):
    """`sample_step`, on the host; the last row is repeated, and cut off again."""
    count = len(logits)

    def padded(leaf):
        return np.concatenate([leaf, np.repeat(leaf[-1:], BATCH - count, axis=0)])

    wide = jax.tree.map(padded, (logits, state, rows._replace(known=rows.budget)))
    logits, state, wide = wide
    result = compiled_choose(logits, state, wide._replace(known=rows.known))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], result)


def rows_of(params, vocab_size, **changes):
    """`sampling.rows`, with what a test does not care about filled in."""
    count = len(params)
    arguments = {
        "sample_indices": [0] * count,
        "prompts": [[0]] * count,
        "budgets": [1000] * count,
        "eos_token_ids": (),
        "known": np.ones(vocab_size, bool),
    }
    return sampling.request_arrays(params, **(arguments | changes))


def sampler_of(params, vocab_size, **changes):
    sampler = rows_of(params, vocab_size, **changes).sampler
    assert sampler is not None
    return sampler


def some_logits(shape, seed=0, scale=2.0):
    generator = np.random.default_rng(seed)
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def counted(ids, vocab_size):
    return np.bincount(ids, minlength=vocab_size).astype(np.int32)


# References, in float64


def reference_penalised(logits, params, prompt=(), history=()):
    x = np.asarray(logits, np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *history}:
        strength = params.repetition_penalty
        x[token] = x[token] / strength if x[token] > 0 else x[token] * strength
    counts = counted(np.array(history, int), len(x))
    x -= params.frequency_penalty * counts
    return x - params.presence_penalty * (counts > 0)


def reference_kept(x, params):
    """Which tokens are kept, and of which float32 may say otherwise.

    Args:
      x: logits over temperature, the largest at 0.
      params: top_k, top_p and min_p are read.
    """
    kept, doubt = np.ones(x.size, bool), x < UNDERFLOW
    if params.top_k:
        edge = np.sort(x)[::-1][min(params.top_k, x.size) - 1]
        kept = x >= edge
        with np.errstate(invalid="ignore"):
            doubt |= (x != edge) & (np.abs(x - edge) <= 1e-6 * np.abs(edge))
    if params.top_p < 1.0:
        probs = np.exp(x) * kept
        probs /= probs.sum()
        above = np.where(x[None] > x[:, None], probs[None], 0.0).sum(axis=-1)
        likeliest = x == x.max()
        doubt |= ~likeliest & (np.abs(above - params.top_p) < DOUBT)
        kept &= likeliest | (above < params.top_p)
    if params.min_p:
        edge = np.log(params.min_p)
        kept &= x >= edge
        doubt |= (np.abs(x - edge) < DOUBT * max(1.0, -edge)) & (x < 0)
    return kept, doubt


def reference_probabilities(logits, params, prompt=(), history=()):
    x = reference_penalised(logits, params, prompt, history)
    x = (x - x.max()) / params.temperature
    kept, doubt = reference_kept(x, params)
    assert not np.any(doubt & (x > UNDERFLOW)), "rounding decides; take other numbers"
    weights = np.where(kept, np.exp(x), 0.0)
    return weights / weights.sum()


# Goldens


def golden_settings(case):
    fields = dict(case["settings"])
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(k): float(v) for k, v in GOLDENS["bias"].items()}
    return SamplingParams(**fields)


@jax.jit
def all_weights(logits, sampler, counts):
    return maths.kept_weights(maths.penalised(logits, sampler, counts), sampler)


def probabilities(logits, params, prompt, history):
    """Of each row of `logits`, in float64: what the library draws from."""
    size = logits.shape[-1]
    counts = np.tile(counted(history, size), (len(logits), 1))
    sampler = sampler_of(params, size, prompts=[prompt] * len(params))
    weights = np.asarray(all_weights(logits, sampler, counts), np.float64)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", GOLDENS["rows"])
def test_probabilities_equal_those_of_transformers(name):
    cases = [case for case in GOLDENS["cases"] if case["row"] == name]
    assert len(cases) > 40
    logits = np.tile(np.array(GOLDENS["rows"][name], np.float32), (80, 1))
    params = [golden_settings(case) for case in cases]
    params += [SamplingParams()] * (80 - len(cases))  # few shapes, little to compile
    ours = probabilities(logits, params, GOLDENS["prompt"], GOLDENS["completion"])
    for case, actual in zip(cases, ours, strict=False):
        kept = np.arange(actual.size) if case["kept"] == "all" else case["kept"]
        assert np.flatnonzero(actual > 1e-30).tolist() == list(kept), case["settings"]
        difference = np.abs(actual[kept] - case["probabilities"])
        assert difference.max() <= 1e-6, case["settings"]


# Distribution of the draws


@functools.partial(jax.jit, static_argnames="draws")
def many_tokens(logits, rows, state, varied, *, draws):
    """`choose` for one request again and again, `varied` being each draw's own."""

    def repeated(leaf):
        return jnp.broadcast_to(leaf, (draws, *leaf.shape[1:]))

    logits, state = repeated(logits), jax.tree.map(repeated, state)
    wide = rows._replace(known=rows.known[None])
    rows = jax.tree.map(repeated, wide)._replace(known=rows.known)
    keys = {k: v for k, v in varied.items() if k != "generated"}
    rows = rows._replace(sampler=rows.sampler._replace(**keys))
    state = state._replace(generated=varied["generated"])
    return sampling.sample_step(logits, state, rows)[0].tokens


def drawn(logits, params, vary, *, prompt=(0,), history=(), draws=8192):
    size = len(logits)
    rows = rows_of([params], size, prompts=[prompt], budgets=[2**31 - 1])
    counts = counted(np.array(history, int), size)[None]
    state = sampling.initial_state(rows)._replace(counts=counts)
    varied = {
        "seed": np.full(draws, params.seed, np.uint32),
        "sample_index": np.zeros(draws, np.int32),
        "generated": np.zeros(draws, np.int32),
    }
    varied[vary] = np.arange(draws, dtype=varied[vary].dtype)
    return np.asarray(many_tokens(logits[None], rows, state, varied, draws=draws))


def chi_square_excess(tokens, probs):
    """Pearson's statistic over its critical value, of probability 1e-4.

    Bins of less than 5 expected draws count as one; the critical value is Wilson and
    Hilferty's approximation.
    """
    expected = len(tokens) * probs
    order = np.argsort(-expected, kind="stable")
    starts = np.arange(np.sum(expected >= 5))
    seen = np.add.reduceat(counted(tokens, len(probs))[order], starts)
    expected = np.add.reduceat(expected[order], starts)
    freedom = len(starts) - 1
    if freedom == 0:
        return 0.0
    spread = 2 / (9 * freedom)
    critical = freedom * (1 - spread + 3.72 * np.sqrt(spread)) ** 3
    return np.sum((seen - expected) ** 2 / expected) / critical


def test_chi_square_tells_a_wrong_distribution():
    generator = np.random.default_rng(1)
    probs = generator.dirichlet(np.full(300, 0.7))
    other = probs ** (1 / 1.2)  # of temperature 1.2
    right = generator.choice(300, 8192, p=probs)
    wrong = generator.choice(300, 8192, p=other / other.sum())
    assert chi_square_excess(right, probs) < 1 < chi_square_excess(wrong, probs)


DISTRIBUTIONS = {
    "plain": (10, {}),
    "plain 300": (300, {}),
    "cold": (130, {"temperature": 0.4}),
    "hot": (300, {"temperature": 3.0}),
    "top_k": (10, {"top_k": 4}),
    "top_k of ties": (130, {"top_k": 13, "temperature": 2.0}),
    "top_k beyond the candidates": (300, {"top_k": 100, "temperature": 4.0}),
    "top_p": (130, {"top_p": 0.6}),
    "top_p beyond the candidates": (300, {"top_p": 0.9, "temperature": 5.0}),
    "min_p": (300, {"min_p": 0.08, "temperature": 1.5}),
    "all three": (
        300,
        {"top_k": 180, "top_p": 0.92, "min_p": 0.06, "temperature": 4.0},
    ),
    "repetition": (10, {"repetition_penalty": 1.7}),
    "repetition wanted": (130, {"repetition_penalty": 0.5}),
    "frequency": (10, {"frequency_penalty": 0.6}),
    "presence": (130, {"presence_penalty": 1.4}),
    "both negative": (10, {"frequency_penalty": -0.3, "presence_penalty": -0.5}),
    "bias": (130, {"logit_bias": {0: 2.0, 4: -3.0, 5: -np.inf, 129: 6.0}}),
    "everything": (
        300,
        {
            "temperature": 2.5,
            "top_k": 150,
            "top_p": 0.95,
            "min_p": 0.02,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.4,
            "presence_penalty": -0.2,
            "logit_bias": {2: 3.0, 200: 7.0, 7: -np.inf},
        },
    ),
}


@pytest.mark.parametrize("vary", ["generated", "seed", "sample_index"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_distribution_asked_for(name, vary):
    size, fields = DISTRIBUTIONS[name]
    logits = some_logits(size, seed=size)
    if "ties" in name:
        logits = np.round(logits)
    params = SamplingParams(seed=11, **fields)
    prompt, history = (1, 6, 6), (2, 5, 2, 2, 9)
    probs = reference_probabilities(logits, params, prompt, history)
    if "beyond" in name:
        assert np.sum(probs > 0) > maths.NUM_CANDIDATES
    tokens = drawn(logits, params, vary, prompt=prompt, history=history)
    assert not np.any(probs[tokens] == 0)
    assert chi_square_excess(tokens, probs) < 1


# What is kept, whichever way it is found


@functools.cache
def kept_weights_with(candidates):
    """`kept_weights`, traced as if NUM_CANDIDATES were another number."""

    def weights(logits, sampler):
        with mock.patch.object(maths, "NUM_CANDIDATES", candidates):
            return maths.kept_weights(logits, sampler)

    return jax.jit(weights)


# XLA flushes subnormal numbers to 0, and a logit is divided by the temperature.
FINITE = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)


@st.composite
def some_rows(draw):
    """Logits padded with -inf to one of two sizes, so that little is compiled."""
    if draw(st.booleans()):
        values = st.one_of(st.integers(-3, 3).map(float), FINITE, st.just(-np.inf))
        logits = np.array([draw(FINITE), *draw(st.lists(values, max_size=39))])
        size = 40
    else:
        size = draw(st.sampled_from([40, 300]))
        generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        scale = draw(st.sampled_from([1e-3, 0.3, 1.0, 5.0, 100.0, 1e30]))
        logits = generator.standard_normal(draw(st.integers(1, size)))
        logits = scale * np.round(logits, draw(st.sampled_from([0, 1, 7])))
        hidden = generator.random(logits.shape) < draw(st.sampled_from([0, 0.3, 0.9]))
        logits[1:][hidden[1:]] = -np.inf
    padded = np.full(size, -np.inf, np.float32)
    padded[: len(logits)] = logits
    return padded


shares = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1e-9, 0.5, 0.999, 1.0]))
kept_settings = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.01, 100.0) | st.sampled_from([1e-7, 1.0, 1e6]),
        "top_k": st.integers(0, 305) | st.sampled_from([1, 64, 65, 2**31 - 1]),
        "top_p": shares,
        "min_p": st.just(0.0) | shares,
    }
)


def check_kept(logits, fields):
    params = SamplingParams(**fields)
    sampler = sampler_of([params], logits.size)
    temperature = max(np.float32(params.temperature), np.float32(maths.MIN_TEMPERATURE))
    with np.errstate(over="ignore"):
        x = ((logits - logits.max()) / temperature).astype(np.float64)
    kept, doubt = reference_kept(x, params)
    known = np.where(kept & ~doubt, np.exp(x), 0.0)
    for candidates in (maths.NUM_CANDIDATES, 3, 300):
        weights = kept_weights_with(candidates)(logits[None], sampler)
        weights = np.asarray(weights)[0]
        assert np.all(np.isfinite(weights))
        assert weights[np.argmax(logits)] == 1.0
        np.testing.assert_array_equal((weights > 0)[~doubt], kept[~doubt])
        sure = known > 0
        np.testing.assert_allclose(weights[sure], known[sure], rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(some_rows(), kept_settings)
def test_kept_tokens_are_those_of_a_sort_on_either_path(logits, fields):
    check_kept(logits, fields)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(some_rows(), kept_settings)
def test_kept_tokens_are_those_of_a_sort_on_either_path_deep(logits, fields):
    check_kept(logits, fields)


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"top_k": 70}, 100), ({"top_p": 0.9}, 150), ({"min_p": 0.5}, 100)],
    ids=str,
)
def test_ties_of_the_threshold_are_kept(fields, count):
    logits = np.repeat(np.float32([2.0, 1.5, 1.0, -3.0]), 50)
    sampler = sampler_of([SamplingParams(**fields)], 200)
    weights = kept_weights_with(64)(logits[None], sampler)
    assert np.flatnonzero(np.asarray(weights)[0]).tolist() == list(range(count))


# The draw


def neighbourhoods(weights):
    """Uniform numbers at and around the places where one token follows another."""
    upto = np.cumsum(weights.astype(np.float64))
    steps = np.round(upto / upto[-1] * 2**23)[:, None] + np.arange(-4, 5)[None]
    return np.unique(np.clip(steps, 0, 2**23 - 1)).astype(np.float32) / 2**23


draw_each = jax.jit(
    jax.vmap(lambda weights, u: maths._draw(weights[None], u[None])[0], (None, 0))
)


# What is left of the target behind a block can be rounded below 0 (one fused multiply
# and subtract): a first token of weight 0 must not pass it.
@pytest.mark.parametrize("size", [1, 7, 128, 300, 1000])
def test_no_uniform_number_draws_a_token_of_weight_0(size):
    generator = np.random.default_rng(size)
    for _ in range(4):
        weights = np.exp(some_logits(size, int(generator.integers(99)), 4.0))
        weights[generator.random(size) < 0.5] = 0.0
        weights[generator.integers(size)] = 1.0
        uniform = np.resize(neighbourhoods(weights), 9 * size + 9)
        assert np.all(weights[np.asarray(draw_each(weights, uniform))] > 0)


# Beyond 256 blocks XLA adds up the blocks in another order at some places, so that the
# running sum moves, or falls, at a block without weight.
def test_no_uniform_number_draws_a_block_of_weight_0():
    generator, blocks = np.random.default_rng(0), 782
    weights = np.zeros((blocks, maths.BLOCK_SIZE), np.float32)
    for _ in range(4):
        sums = np.exp(3 * generator.standard_normal(blocks)).astype(np.float32)
        sums[generator.random(blocks) < 0.5] = 0.0
        weights[:, 5] = sums
        uniform = np.resize(neighbourhoods(sums), 9 * blocks)
        tokens = np.asarray(draw_each(weights.reshape(-1), uniform))
        assert np.all(weights.reshape(-1)[tokens] > 0)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_key_is_of_seed_sample_index_and_generated(seed):
    """Of 256 equally likely tokens, the token says what the uniform number was."""
    indices, generated = [0, 1, 7, 1000], [0, 3, 0, 2**20]
    params = [SamplingParams(seed=seed)] * 4
    sampler = sampler_of(params, 256, sample_indices=indices)
    logits = np.zeros((4, 256), np.float32)
    tokens = jax.jit(maths.sample)(logits, sampler, np.int32(generated))
    for token, index, number in zip(tokens, indices, generated, strict=True):
        key = jax.random.fold_in(jax.random.key(np.uint32(seed)), index)
        uniform = jax.random.uniform(jax.random.fold_in(key, number))
        assert int(token) == int(uniform * 256)


# Greedy, and rows among each other


@pytest.mark.parametrize("size", SEVERAL_PATHS)
def test_temperature_0_takes_the_first_of_the_largest_beside_sampling_rows(size):
    logits = np.round(some_logits((8, size), seed=3))
    logits = np.minimum(logits, 2.0) / 2  # many ties, and numbers without rounding
    logits[:, [3, 9]] = 1.0
    fields = [
        {},
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 0.5, "presence_penalty": -0.25},
        {"logit_bias": {3: 2.0, 9: 2.0, 1: -np.inf}, "top_k": 3, "top_p": 0.1},
    ]
    greedy = [SamplingParams(temperature=0.0, **given) for given in fields]
    params = [p for own in greedy for p in (own, SamplingParams())]
    prompt, history = [2, 8], [4, 4, 9]
    rows = rows_of(params, size, prompts=[prompt] * 8)
    counts = np.tile(counted(history, size), (8, 1))
    sampled, _ = choose(
        logits, sampling.initial_state(rows)._replace(counts=counts), rows
    )
    for row in range(0, 8, 2):
        x = reference_penalised(logits[row], params[row], prompt, history)
        assert size == 10 or np.sum(x == x.max()) > 1
        assert int(sampled.tokens[row]) == np.argmax(x)


@pytest.mark.parametrize("size", SEVERAL_PATHS)
def test_rows_that_are_all_greedy_take_the_first_of_the_largest(size):
    logits = np.round(some_logits((5, size), seed=4))
    logits[4] = -np.inf
    logits[4, 7] = -1e30
    rows = rows_of([GREEDY] * 5, size)
    assert rows.sampler is None
    sampled, state = choose(logits, sampling.initial_state(rows), rows)
    assert sampled.tokens.tolist() == np.argmax(logits, axis=-1).tolist()
    assert (sampled.logprobs, sampled.top_ids, state.counts) == (None, None, None)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-30, 1e-8, 1e-6])
def test_a_tiny_temperature_draws_the_likeliest(temperature):
    logits = np.random.default_rng(0).permutation(300).astype(np.float32)[None] / 100
    rows = rows_of([SamplingParams(temperature=temperature, seed=5)], 300)
    sampled, _ = choose(logits, sampling.initial_state(rows), rows)
    assert int(sampled.tokens[0]) == np.argmax(logits)


MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0.0, repetition_penalty=1.2),
    SamplingParams(temperature=1.7, top_k=5, seed=2),
    SamplingParams(temperature=2.5, top_p=0.9, seed=3),
    SamplingParams(min_p=0.1, logit_bias={4: 3.0}, seed=4),
    SamplingParams(temperature=9.0, frequency_penalty=1.0, top_p=0.97, seed=5),
]


def mixed_call(logits, params, places, generated):
    """Everything that `choose` gives, and the weights, on the host."""
    size = logits.shape[1]
    prompts = [[place, 40] for place in places]
    rows = rows_of(params, size, prompts=prompts, sample_indices=places)
    counts = np.stack([counted([place, 8, 8], size) for place in places])
    state = sampling.initial_state(rows)._replace(
        counts=counts, generated=np.int32(generated)
    )
    weights = np.asarray(all_weights(logits, rows.sampler, counts))
    return jax.tree.leaves((choose(logits, state, rows), weights))


PLACES, GENERATED = [0, 1, 2, 3, 4, 5], np.arange(6) * 3


@pytest.mark.parametrize("row", range(len(MIXED)))
def test_a_row_does_not_depend_on_its_neighbours(row):
    logits = some_logits((6, 300), seed=7)
    alone = mixed_call(logits, MIXED, PLACES, GENERATED)
    others = np.arange(6) != row
    neighbours = [  # logits and fields: on the short path, on the long one, greedy
        (some_logits((6, 300), 8), SamplingParams(top_k=2, seed=9)),
        (logits * 0.01, SamplingParams(top_k=200, top_p=0.99)),
        (np.full_like(logits, -np.inf), GREEDY),
    ]
    for other, fields in neighbours:
        params = [MIXED[i] if i == row else fields for i in range(6)]
        mixed = np.where(others[:, None], other, logits)
        mixed[others, 3] = 4.0
        beside = mixed_call(mixed, params, PLACES, GENERATED + 100 * others)
        for before, after in zip(alone, beside, strict=True):
            np.testing.assert_array_equal(before[row], after[row])


def test_a_row_does_not_depend_on_its_place_in_the_batch():
    logits = some_logits((6, 300), seed=7)
    straight = mixed_call(logits, MIXED, PLACES, GENERATED)
    order = [3, 5, 0, 4, 1, 2]
    turned = [MIXED[i] for i in order]
    turned = mixed_call(logits[order], turned, order, GENERATED[order])
    for before, after in zip(straight, turned, strict=True):
        np.testing.assert_array_equal(before[order], after)


# Choose: who goes on, what is counted and reported


SAMPLED = SamplingParams(top_k=1)  # the largest too, by the other executable
BOTH = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def forced(tokens, size):
    """Logits whose largest are `tokens`."""
    return 9 * np.eye(size, dtype=np.float32)[np.asarray(tokens)]


@BOTH
def test_inactive_rows_give_minus_1_and_change_nothing(params):
    rows = rows_of([params] * 4, 10, budgets=[5, 0, 5, 5])
    start = sampling.initial_state(rows)
    assert start.active.tolist() == [True, False, True, True]
    active = start.active & [True, True, False, True]
    before = start._replace(active=active, tokens=np.int32([6, 7, 8, 9]))
    sampled, after = choose(forced([1, 2, 3, 4], 10), before, rows)
    assert sampled.tokens.tolist() == [1, -1, -1, 4]
    assert after.tokens.tolist() == [1, 7, 8, 4]
    assert after.generated.tolist() == [1, 0, 0, 1]
    assert after.active.tolist() == [True, False, False, True]
    if before.counts is not None:
        assert after.counts.sum(axis=-1).tolist() == [1, 0, 0, 1]
        assert after.counts[0, 1] == after.counts[3, 4] == 1


@BOTH
def test_stop_ids_eos_ids_and_budgets_end_rows(params):
    own = SamplingParams(
        temperature=params.temperature, top_k=params.top_k, stop_token_ids=(4,)
    )
    budgets = [9, 9, 9, 2, 1]
    rows = rows_of(
        [own, params, params, params, params], 10, budgets=budgets, eos_token_ids=(8,)
    )
    state, given = sampling.initial_state(rows), []
    for tokens in [[1, 4, 5, 1, 2], [4, 4, 8, 2, 2], [3, 3, 3, 3, 3]]:
        sampled, state = choose(forced(tokens, 10), state, rows)
        given.append(sampled.tokens.tolist())
    assert given == [[1, 4, 5, 1, 2], [4, 4, 8, 2, -1], [-1, 3, -1, -1, -1]]
    assert state.active.tolist() == [False, True, False, False, False]
    assert state.generated.tolist() == [2, 3, 2, 2, 1]
    assert state.tokens.tolist() == [4, 3, 8, 2, 2]
    if state.counts is not None:
        assert state.counts.sum(axis=-1).tolist() == [2, 3, 2, 2, 1]


def test_counts_are_of_all_tokens_sampled_and_penalise_them():
    params = [SamplingParams(seed=2), SamplingParams(frequency_penalty=2.0)]
    rows = rows_of(params, 10)
    state, given = sampling.initial_state(rows), []
    for step in range(12):
        logits = np.zeros((2, 10), np.float32)
        logits[1] -= 100 * (state.counts[1] == 0)  # only the penalty can tell
        logits[1, :2] = 30.0
        sampled, state = choose(logits, state, rows)
        given.append(sampled.tokens)
        assert state.generated.tolist() == [step + 1] * 2
    for row, tokens in enumerate(np.array(given).T):
        np.testing.assert_array_equal(state.counts[row], counted(tokens, 10))
    assert state.counts[1, :2].tolist() == [6, 6]


@pytest.mark.parametrize("size", SEVERAL_PATHS)
def test_logprobs_are_the_log_softmax_of_the_raw_logits(size):
    logits = np.round(some_logits((3, size), seed=6), 1)  # with ties
    odd = {"logit_bias": {2: 5.0, 3: -np.inf}, "repetition_penalty": 3.0}
    params = [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.2, top_k=2, presence_penalty=2.0, **odd),
        SamplingParams(temperature=0.0, frequency_penalty=1.0, **odd),
    ]
    known = np.ones(size, bool)
    known[1] = False
    rows = rows_of(params, size, prompts=[[2, 5, 7]] * 3, known=known)
    state = sampling.initial_state(rows)._replace(counts=np.ones((3, size), np.int32))
    sampled = choose(logits, state, rows)[0]
    exact = logits.astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    width = min(sampling.MAX_LOGPROBS, size)
    chex.assert_shape([sampled.top_ids, sampled.top_logprobs], (3, width))
    for row in range(3):
        token = sampled.tokens[row]
        assert sampled.logprobs[row] == pytest.approx(expected[row, token], abs=1e-5)
        likeliest = np.argsort(-expected[row], kind="stable")[:width]
        assert sampled.top_ids[row].tolist() == likeliest.tolist()
        np.testing.assert_allclose(
            sampled.top_logprobs[row], expected[row, likeliest], atol=1e-5
        )


@pytest.mark.parametrize("size", SEVERAL_PATHS)
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1e6},
        {"top_k": 1},
        {"top_k": 250, "temperature": 50.0},
        {"top_p": 0.0},
        {"top_p": 0.9, "temperature": 50.0},
        {"min_p": 1.0},
        {"min_p": 0.5, "logit_bias": {0: 100.0, 9: 100.0}},
        {"frequency_penalty": -2.0, "repetition_penalty": 0.01},
    ],
    ids=str,
)
def test_unknown_ids_are_never_chosen(size, fields):
    known = np.random.default_rng(1).random(size) < 0.4
    known[[0, 9, -1]], known[4] = False, True
    logits = some_logits((BATCH, size), seed=size)
    logits[:, ~known] += 3.0
    params = [SamplingParams(seed=seed, **fields) for seed in range(BATCH)]
    rows = rows_of(params, size, known=known)
    sampled, _ = choose(logits, sampling.initial_state(rows), rows)
    tokens = sampled.tokens
    assert np.all(known[tokens])
    single = fields in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0})
    if single or fields == {"min_p": 1.0}:
        expected = np.argmax(np.where(known[None], logits, -np.inf), axis=-1)
        assert tokens.tolist() == expected.tolist()


# Fields, checked


NO_FLOATS = [np.nan, np.inf, -np.inf, "0.5", True, np.True_, [0.5], 1j, 10**400, {}]
NO_INTS = [np.nan, np.inf, 1.5, 1.0, "3", True, np.False_, [3], 10**400, -(10**400)]
NO_IDS = ["a", 1.0, True, [1, True], [None], [[1]], {1: 2}, {1}]
WRONG = {
    "temperature": [*NO_FLOATS, -0.1, -1e-300, 1.1e6],
    "top_k": [*NO_INTS, -1, 2**31],
    "top_p": [*NO_FLOATS, -1e-9, 1.000001],
    "min_p": [*NO_FLOATS, -1e-9, 1.000001],
    "repetition_penalty": [*NO_FLOATS, 0.0, -1.0, 0.0099, 101],
    "frequency_penalty": [*NO_FLOATS, -2.01, 2.01],
    "presence_penalty": [*NO_FLOATS, -2.01, 2.01],
    "seed": [*NO_INTS, -1, 2**32],
    "logprobs": [*NO_INTS, -1, 21],
    "stop": ["", [""], ["a", ""], b"a", 3, ["a", 3], True, {"a": 1}, ["a", None]],
    "stop_token_ids": NO_IDS,
    "logit_bias": [
        *[{3: value} for value in NO_FLOATS if value != -np.inf],
        *[{value: 1.0} for value in ("3", 1.0, True, np.nan, -1)],
        {3: None},
        {3: 1e39},  # finite here, but infinite in float32: any token would be drawn
        [3],
        "3",
        7,
        True,
    ],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda x: repr(x)[:30],
)
def test_a_wrong_value_is_a_config_error_that_names_the_field(field, value):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{field: value})
    assert isinstance(caught.value, ValueError)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{field}=")
    assert len(str(caught.value)) < 200


def test_every_wrong_field_is_named_at_once():
    wrong = {field: values[-1] for field, values in WRONG.items()}
    assert {"derived", *wrong} >= set(vars(SamplingParams()))  # no field without a case
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**wrong, top_q=3)
    named = {re.match(r"\w+", problem).group() for problem in caught.value.problems}
    assert named == {*wrong, "top_q"}


def test_an_unknown_field_is_told_the_likely_one():
    with pytest.raises(ConfigError, match=r"temprature: .*did you mean temperature\?"):
        SamplingParams(temprature=1.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop": "END"}, ("END",)),
        ({"stop": ["a", "b"]}, ("a", "b")),
        ({"stop": ()}, ()),
        ({"stop_token_ids": 7}, (7,)),
        ({"stop_token_ids": np.array([1, 2])}, (1, 2)),
        ({"stop_token_ids": [np.int64(3)]}, (3,)),
        ({"logit_bias": {np.int32(3): 1, 4: -np.inf}}, {3: 1.0, 4: -np.inf}),
        ({"temperature": 0}, 0.0),
        ({"temperature": np.float32(0.5)}, 0.5),
        ({"top_k": np.int64(5)}, 5),
        ({"top_k": 2**31 - 1}, 2**31 - 1),
        ({"top_p": 0.0}, 0.0),
        ({"min_p": 1}, 1.0),
        ({"seed": 2**32 - 1}, 2**32 - 1),
        ({"logprobs": 0}, 0),
        ({"logprobs": 20}, 20),
    ],
    ids=str,
)
def test_a_right_value_is_kept_in_its_own_type(fields, expected):
    ((field, _),) = fields.items()
    value = getattr(SamplingParams(**fields), field)
    assert value == expected
    assert type(value) is type(expected)


def test_the_caller_can_change_its_bias_afterwards():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[3] = 2.0
    assert params.logit_bias == {3: 1.0}


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3}, True),
        ({"stop_token_ids": (3,), "logit_bias": {}}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"logprobs": 0}, False),
    ],
    ids=str,
)
def test_rows_have_no_sampler_only_where_nothing_asks_for_it(fields, plain):
    params = SamplingParams(**({"temperature": 0.0} | fields))
    assert params.is_plain_greedy == plain
    assert (rows_of([GREEDY, params], 12).sampler is None) == plain


def test_a_row_holds_so_many_stop_ids_and_no_more():
    most = range(sampling.MAX_STOP_IDS)
    params = SamplingParams(stop_token_ids=(*most, 0, 1))  # twice is once
    assert rows_of([params], 99).stop_ids.tolist() == [list(most)]
    with pytest.raises(ConfigError, match="stop_token_ids: 65 ids"):
        rows_of([params], 99, eos_token_ids=(98,))


# What XLA makes of it


VALUES = [
    {"temperature": 0.3},
    {"temperature": 0.0, "logprobs": 3},
    {"top_k": 1},
    {"top_k": 999},
    {"top_p": 0.1, "min_p": 0.2},
    {"repetition_penalty": 1.1, "frequency_penalty": -1.0, "presence_penalty": 1.0},
    {"logit_bias": {3: 1.0, 4: -np.inf}, "seed": 2**32 - 1},
    {"stop": ("x",), "stop_token_ids": (1, 2, 3), "logprobs": 0},
]


def test_no_value_of_a_field_compiles_anew():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def counted_choose(logits, state, rows):
        return sampling.sample_step(logits, state, rows)

    for i, fields in enumerate(VALUES):
        rows = rows_of(
            [SamplingParams(**fields), SAMPLED],
            50,
            sample_indices=[i, 0],
            prompts=[list(range(i + 1)), [3]],
            budgets=[i, 7],
            eos_token_ids=range(i),
            known=np.arange(50) > i,
        )
        logits = some_logits((2, 50), seed=i)
        sampled, state = counted_choose(logits, sampling.initial_state(rows), rows)
        counted_choose(logits + 1, state, rows)
        assert int(sampled.tokens[1]) >= 0


@pytest.fixture(scope="module")
def lowered():
    rows = rows_of([SamplingParams()] * 3, 1000)
    logits = np.zeros((3, 1000), np.float32)
    return compiled_choose.lower(logits, sampling.initial_state(rows), rows)


def test_choose_sorts_nothing_and_looks_for_few_of_the_largest(lowered):
    text = lowered.as_text()
    assert "stablehlo.sort" not in text
    sizes = re.findall(r"chlo\.top_k\(%\w+, k = (\d+)\) : tensor<3x1000xf32>", text)
    assert len(sizes) == text.count("top_k(") == 2
    assert max(map(int, sizes)) <= maths.NUM_CANDIDATES


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU makes of it")
def test_xla_finds_the_largest_without_a_sort(lowered):
    text = lowered.compile().as_text()
    assert len(re.findall(r'custom_call_target="TopK"', text)) == 2
    assert not re.findall(r"= \S+ sort\(", text)
    sort = jax.jit(jnp.sort).lower(np.zeros((3, 1000), np.float32)).compile()
    assert re.findall(r"= \S+ sort\(", sort.as_text())  # the pattern would see one
