"""Prefill, decode step and decode chunk against the cache-free forward.

The cache of a row is right when its logits equal those of the whole sequence without
one, and when calls change no slot but those they write.
"""

import functools
import itertools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import reference, testing
from minillm_jax.decoding import checks, decode

PLAIN = mj.CachePolicy()
RING = mj.CachePolicy(overflow="ring")
SINKS = mj.CachePolicy(overflow="ring", num_sinks=2)
VOCABULARY = testing.tiny_config().vocab_size
# Layers with a window and one without; a local ring has 9 slots.
MIXED = {"num_layers": 2, "sliding_window": 6, "global_layers": (1,)}
GEMMA = MIXED | {
    "head_dim": 12,
    "activation": "gelu_tanh",
    "local_rope_theta": 100.0,
    "qk_norm": True,
    "query_pre_attn_scalar": 9.0,
    "attention_softcap": 3.0,
    "logits_softcap": 4.0,
    "norm_unit_offset": True,
    "post_norms": True,
    "embedding_scale": 32**0.5,
    "tie_embeddings": True,
}
ORIGINAL = 10  # tokens of the context that the scalings below stretch
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": (1.0, 1.1, 1.3, 1.7),
    "long_factor": (1.5, 2.0, 3.0, 4.0),
}
DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 2.0,
    "original_max_position_embeddings": ORIGINAL,
}


@functools.cache
def build(**changes):
    """A tiny model with nothing in its parameters at 0 or 1."""
    model = mj.create_model(testing.tiny_config(**changes))
    return model, testing.noisy_params(model)


def built(changes):
    """`build`, of a mapping with other mappings in it."""
    config = testing.tiny_config(**changes)
    return build(**{name: getattr(config, name) for name in changes})


def some_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape, np.int32)


@functools.partial(jax.jit, static_argnames=("model", "policy"))
def append(model, params, cache, tokens, lengths, policy=PLAIN):
    """A raw call of the module, under a trace and so unchecked; `cache` lives on."""
    variables = {"params": params, "cache": cache}
    logits, updated = model.apply(
        variables, tokens, lengths=lengths, policy=policy, mutable=["cache"]
    )
    return logits, updated["cache"]


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def feed(model, params, tokens, sizes, policy=PLAIN):
    """Logits of all tokens, given to an empty cache in calls of `sizes`, in turn."""
    cache = mj.init_cache(model.config, len(tokens), policy=policy)
    sizes, logits, start = itertools.cycle(sizes), [], 0
    while start < tokens.shape[1]:
        size = next(sizes)
        part, lengths = tokens[:, start : start + size], np.full(len(tokens), size)
        new, cache = append(model, params, cache, part, lengths, policy)
        logits.append(np.asarray(new))
        start += size
    return np.concatenate(logits, axis=1)


def host(tree):
    """A copy that donation cannot kill."""
    return jax.tree.map(lambda leaf: np.array(leaf), dict(tree))


def rows(cache):
    """Every leaf with its batch axis, which one row leaves out, in front."""
    return [leaf[None] if leaf.ndim == 3 else leaf for leaf in leaves(cache)]


def leaves(cache):
    return [leaf for leaf in jax.tree.leaves(host(cache)) if leaf.ndim > 1]


def assert_slots_kept(before, after, written):
    """`written`: a row's slots that may have changed; all others are bitwise equal."""
    for old, new in zip(rows(before), rows(after), strict=True):
        for row in range(len(old)):
            kept = np.setdiff1d(np.arange(old.shape[-2]), written.get(row, ()))
            np.testing.assert_array_equal(new[row][:, kept], old[row][:, kept])


def close(actual, expected, atol=1e-5):
    expected = np.asarray(expected, np.float32)
    chex.assert_trees_all_close(np.asarray(actual), expected, atol=atol, rtol=0)


# Cached equals uncached


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decode_steps_equal_the_full_forward(batch_size):
    model, params = build()
    tokens = some_tokens((batch_size, 24))
    full = np.asarray(forward(model, params, tokens))
    cache = mj.init_cache(model.config, batch_size)
    for i in range(tokens.shape[1]):
        logits, cache = mj.decode_step(model, params, cache, tokens[:, i])
        chex.assert_shape(logits, (batch_size, VOCABULARY))
        close(logits, full[:, i])
    assert cache["lengths"].tolist() == [24] * batch_size


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 16, 17, 39, 64])
def test_chunked_prefill_equals_one_forward(batch_size, length):
    model, params = build()
    tokens = some_tokens((batch_size, 64))
    cache = mj.init_cache(model.config, batch_size)
    logits, cache = mj.prefill(model, params, cache, tokens[:, :length])
    chex.assert_shape(logits, (batch_size, VOCABULARY))
    chex.assert_type(logits, jnp.float32)
    close(logits, forward(model, params, tokens)[:, length - 1])
    expected = testing.reference_logits(model.config, params, tokens[:, :length])
    close(logits, expected[:, -1])
    assert cache["lengths"].tolist() == [length] * batch_size


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "qk_norm": True, "num_kv_heads": 1},
        GEMMA | {"prefill_chunk": 4},
    ],
    ids=["mqa", "gemma"],
)
def test_prefills_and_steps_in_turn_equal_the_full_forward(changes):
    model, params = build(**changes)
    tokens, batch_size = some_tokens((3, 40)), 3
    full = testing.reference_logits(model.config, params, tokens)
    cache, start = mj.init_cache(model.config, batch_size), 0
    for size in (5, 1, 1, 21, 1, 6, 1):  # one token by decode_step, more by prefill
        part = tokens[:, start : start + size]
        if size == 1:
            logits, cache = mj.decode_step(model, params, cache, part[:, 0])
        else:
            logits, cache = mj.prefill(model, params, cache, part)
        start += size
        close(logits, full[:, start - 1])


def test_every_logit_of_a_cached_call_equals_the_full_forward():
    model, params = build()
    tokens = some_tokens((2, 39))
    full = testing.reference_logits(model.config, params, tokens)
    close(feed(model, params, tokens, [13]), full)


@pytest.mark.parametrize("prompt_lengths", [(9,), (30, 1, 17)])
def test_256_greedy_tokens_equal_those_without_a_cache(prompt_lengths):
    model, params = build(
        max_seq_len=300, max_kv_cache_len=300, num_layers=1, prefill_chunk=16
    )
    lengths, batch_size = np.array(prompt_lengths), len(prompt_lengths)
    prompt = some_tokens((batch_size, max(lengths)), seed=3)
    cache = mj.init_cache(model.config, batch_size)
    logits, cache = mj.prefill(model, params, cache, prompt, lengths)
    tokens, active = np.argmax(logits, axis=-1), np.ones(batch_size, bool)
    generated = [np.asarray(tokens)[:, None]]
    for _ in range(5):
        out = decode.decode_chunk(model, params, cache, tokens, active, steps=51)
        tokens, active, cache = out.tokens, out.active, out.cache
        generated.append(np.asarray(out.sampled))
    generated = np.concatenate(generated, axis=1)
    assert generated.shape == (batch_size, 256)
    for row, length in enumerate(lengths):
        # Given its own output, the forward must choose the same token everywhere.
        whole = np.concatenate([prompt[row, :length], generated[row]])[None]
        assert len(set(whole[0, length:])) > 10  # not one token again and again
        padded = np.zeros((1, 300), np.int32)
        padded[:, : whole.shape[1]] = whole
        full = forward(model, params, padded)
        reference = testing.reference_logits(model.config, params, whole)
        places = slice(length - 1, length + 255)
        for logits in (np.asarray(full), reference):
            chosen = np.argmax(logits[0, places], axis=-1)
            np.testing.assert_array_equal(chosen, generated[row])


# Ragged batches


def test_a_ragged_prefill_equals_each_row_alone():
    model, params = build()
    tokens, lengths = some_tokens((3, 39)), np.array([39, 5, 17])
    cache = mj.init_cache(model.config, 3)
    logits, cache = mj.prefill(model, params, cache, tokens, lengths)
    assert cache["lengths"].tolist() == lengths.tolist()
    following = some_tokens((3,), seed=1)
    next_logits, _ = mj.decode_step(model, params, cache, following)
    for row, length in enumerate(lengths):
        alone = mj.init_cache(model.config)
        prompt = tokens[row : row + 1, :length]
        expected, alone = mj.prefill(model, params, alone, prompt)
        close(logits[row], expected[0])
        expected, _ = mj.decode_step(model, params, alone, following[row : row + 1])
        close(next_logits[row], expected[0])


@pytest.mark.parametrize("policy", [PLAIN, SINKS])
@pytest.mark.parametrize("lengths", [[0], [5, 0, 16]])
def test_a_row_of_length_0_is_untouched(lengths, policy):
    model, params = build()
    batch_size, lengths = len(lengths), np.array(lengths)
    held = some_tokens((batch_size, 16), seed=1)
    cache = mj.init_cache(model.config, batch_size, policy=policy)
    _, cache = append(model, params, cache, held, np.full(batch_size, 16), policy)
    before, tokens = host(cache), some_tokens((batch_size, 16))

    raw, after = append(model, params, cache, tokens, lengths, policy)
    written = {row: range(16, 16 + length) for row, length in enumerate(lengths)}
    assert_slots_kept(before, after, written)
    assert after["lengths"].tolist() == (16 + lengths).tolist()
    for row, length in enumerate(lengths):
        assert np.all(np.asarray(raw)[row, length:] == 0)
    if np.any(lengths > 0):
        logits, after = mj.prefill(model, params, cache, tokens, lengths, policy=policy)
        assert_slots_kept(before, after, written)
        assert after["lengths"].tolist() == (16 + lengths).tolist()
        assert np.any(np.asarray(logits) != 0, axis=-1).tolist() == [True, False, True]


def test_a_prefill_of_only_length_0_is_like_any_other():
    model, params = build()
    cache = mj.init_cache(model.config, 2)
    before, lengths = host(cache), np.array([0, 0])
    logits, after = mj.prefill(model, params, cache, some_tokens((2, 4)), lengths)
    assert isinstance(logits, jax.Array)
    assert not np.any(logits)
    chex.assert_trees_all_equal(host(after), before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("held", [13, 19])
def test_padding_at_the_end_of_a_cache_destroys_nothing(held):
    model, params = build()
    cache = mj.init_cache(model.config, 2, 20)
    first, tokens = some_tokens((2, 20)), some_tokens((2, 5), seed=1)
    _, cache = mj.prefill(model, params, cache, first, np.array([held, 3]))
    before = host(cache)
    # 5 tokens are a bucket of 16, whose end lies beyond the capacity of row 0.
    logits, cache = mj.prefill(model, params, cache, tokens, np.array([1, 5]))
    assert_slots_kept(before, cache, {0: [held], 1: range(3, 8)})
    for row, (old, new) in enumerate([(held, 1), (3, 5)]):
        whole = np.concatenate([first[row, :old], tokens[row, :new]])[None]
        expected = testing.reference_logits(model.config, params, whole)
        close(logits[row], expected[0, -1])


def test_a_prompt_in_a_bucket_beyond_the_capacity_fits():
    model, params = build()
    tokens = some_tokens((1, 10))
    cache = mj.init_cache(model.config, 1, 10)
    logits, _ = mj.prefill(model, params, cache, tokens)
    expected = testing.reference_logits(model.config, params, tokens)
    close(logits, expected[:, -1])


@pytest.mark.parametrize("capacity", [3, 10])
def test_a_prompt_in_a_bucket_beyond_a_sliding_windows_capacity_fits(capacity):
    model, params = build(sliding_window=20)
    tokens = some_tokens((1, capacity))
    cache = mj.init_cache(model.config, 1, capacity)
    logits, _ = mj.prefill(model, params, cache, tokens)
    expected = testing.reference_logits(model.config, params, tokens)
    close(logits, expected[:, -1])


# Full rows


def full_beside_active():
    """A cache of 20 slots whose row 0 is full and whose row 1 holds 5."""
    model, params = build()
    tokens = some_tokens((2, 20))
    cache = mj.init_cache(model.config, 2, 20)
    _, cache = mj.prefill(model, params, cache, tokens, np.array([20, 5]))
    return model, params, cache, tokens


@pytest.mark.parametrize("active", [(True, True), (False, True)])
def test_a_full_row_beside_an_active_one_keeps_its_slots_in_a_chunk(active):
    model, params, cache, tokens = full_beside_active()
    before, last = host(cache), np.array([1, 2], np.int32)
    out = decode.decode_chunk(model, params, cache, last, np.array(active), steps=8)
    assert_slots_kept(before, out.cache, {1: range(5, 13)})
    assert out.cache["lengths"].tolist() == [20, 13]
    assert out.active.tolist() == [False, True]
    whole = np.concatenate([tokens[1, :5], last[1:], out.sampled[1]])[None]
    full = testing.reference_logits(model.config, params, whole)
    chosen = np.argmax(full[0, 5:13], axis=-1)
    np.testing.assert_array_equal(chosen, np.asarray(out.sampled)[1])


def test_a_full_row_beside_an_active_one_keeps_its_slots_in_a_raw_call():
    model, params, cache, tokens = full_beside_active()
    before, new = host(cache), some_tokens((2, 6), seed=1)
    logits, after = append(model, params, cache, new, np.array([6, 6]))
    assert_slots_kept(before, after, {1: range(5, 11)})
    assert after["lengths"].tolist() == [20, 11]
    assert np.all(np.asarray(logits)[0] == 0)
    whole = np.concatenate([tokens[1, :5], new[1]])[None]
    expected = testing.reference_logits(model.config, params, whole)
    close(logits[1], expected[0, 5:])


def test_a_raw_call_stores_what_fits_and_drops_the_rest():
    model, params, cache, tokens = full_beside_active()
    new = some_tokens((2, 18), seed=1)
    for start in (0, 6):
        call = new[:, start : start + 6]
        _, cache = append(model, params, cache, call, np.array([0, 6]))
    before = host(cache)
    logits, after = append(model, params, cache, new[:, 12:], np.array([6, 6]))
    assert_slots_kept(before, after, {1: [17, 18, 19]})
    assert after["lengths"].tolist() == [20, 20]
    whole = np.concatenate([tokens[1, :5], new[1, :15]])[None]
    expected = testing.reference_logits(model.config, params, whole)
    close(logits[1, :3], expected[0, 17:])
    assert np.all(np.asarray(logits)[1, 3:] == 0)


@pytest.mark.parametrize("length", [19, 20])
def test_prefill_takes_what_fits(length):
    model, params = build()
    tokens, lengths = some_tokens((2, 20)), np.array([3, length])
    cache = mj.init_cache(model.config, 2, 20)
    logits, cache = mj.prefill(model, params, cache, tokens, lengths)
    assert cache["lengths"].tolist() == [3, length]
    expected = testing.reference_logits(model.config, params, tokens)
    close(logits, expected[[0, 1], lengths - 1])


@pytest.mark.parametrize("overflow", ["error", "stop"])
def test_prefill_refuses_one_token_more_than_fits(overflow):
    model, params = build()
    policy = mj.CachePolicy(overflow=overflow)
    cache = mj.init_cache(model.config, 2, 20, policy=policy)
    tokens, lengths = some_tokens((2, 21)), np.array([3, 21])
    numbers = r"row 1 holds 0 tokens and 21 more .* capacity is 20: 20 would fit"
    with pytest.raises(mj.CacheOverflowError, match=numbers):
        mj.prefill(model, params, cache, tokens, lengths, policy=policy)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(host(cache)))  # no work


@pytest.mark.parametrize("overflow", ["error", "stop"])
def test_decode_step_refuses_a_full_row(overflow):
    model, params, cache, _ = full_beside_active()
    policy = mj.CachePolicy(overflow=overflow)
    before, tokens = host(cache), np.array([1, 2], np.int32)
    numbers = r"row 0 holds 20 tokens and 1 more .* capacity is 20: 0 would fit"
    with pytest.raises(mj.CacheOverflowError, match=numbers):
        mj.decode_step(model, params, cache, tokens, policy=policy)
    chex.assert_trees_all_equal(host(cache), before)
    assert issubclass(mj.CacheOverflowError, ValueError)


def test_a_row_can_be_filled_to_its_last_slot_step_by_step():
    model, params = build()
    tokens = some_tokens((2, 20))
    cache = mj.init_cache(model.config, 2, 20)
    _, cache = mj.prefill(model, params, cache, tokens[:, :18])
    for i in (18, 19):
        logits, cache = mj.decode_step(model, params, cache, tokens[:, i])
    expected = testing.reference_logits(model.config, params, tokens)
    close(logits, expected[:, -1])
    with pytest.raises(mj.CacheOverflowError, match="row 0 holds 20 tokens"):
        mj.decode_step(model, params, cache, tokens[:, 0])


# Rings


RING_SHAPE = {"max_seq_len": 8, "max_kv_cache_len": 10, "prefill_chunk": 4}


@pytest.mark.parametrize("policy", [RING, SINKS])
@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 1, 4)])
def test_a_ring_over_three_wraps_equals_the_windowed_forward(sizes, policy):
    model, params = build(**RING_SHAPE)
    tokens = some_tokens((2, 48))  # three times 13 slots, and more
    expected = testing.reference_logits(
        model.config, params, tokens, window=10, sinks=policy.num_sinks
    )
    close(feed(model, params, tokens, sizes, policy), expected)


def ring_logits(config, params, tokens):
    """The reference where no layer sees more than `max_kv_cache_len` tokens."""
    mask, longest = reference._mask, config.max_kv_cache_len

    def bounded(segments, window, sinks):
        return mask(segments, min(window or longest, longest), sinks)

    with mock.patch.object(reference, "_mask", bounded):
        return testing.reference_logits(config, params, tokens)


@pytest.mark.parametrize(
    ("policy", "changes"),
    [(PLAIN, {"max_kv_cache_len": 64}), (RING, {"sliding_window": 12})],
    ids=["plain", "ring-below-the-window"],
)
def test_mixed_layers_over_three_wraps_equal_the_full_forward(policy, changes):
    model, params = build(**MIXED | RING_SHAPE | changes)
    tokens = some_tokens((2, 48))
    expected = ring_logits(model.config, params, tokens)
    close(feed(model, params, tokens, (4,), policy), expected)


def test_a_ragged_prefill_of_mixed_layers_equals_the_full_forward():
    """Of ten chunks, most of them padding for the shorter rows."""
    model, params = build(**MIXED, prefill_chunk=4)
    tokens, lengths, rows = some_tokens((3, 43)), np.array([40, 5, 17]), np.arange(3)
    full = testing.reference_logits(model.config, params, tokens)
    cache = mj.init_cache(model.config, 3)
    logits, cache = mj.prefill(model, params, cache, tokens, lengths)
    close(logits, full[rows, lengths - 1])
    for step in range(3):
        following = tokens[rows, lengths + step]
        logits, cache = mj.decode_step(model, params, cache, following)
        close(logits, full[rows, lengths + step])


def test_a_mixed_cache_that_grows_goes_on_as_before():
    """From 8 slots everywhere to a local ring of 9 beside 32."""
    model, params = build(**MIXED, prefill_chunk=4)
    tokens = some_tokens((1, 32))
    full = testing.reference_logits(model.config, params, tokens)
    cache, start = mj.init_cache(model.config, 1, 8), 0
    for capacity, slots in [(8, (8, 8)), (32, (9, 32))]:
        cache = mj.grow_cache(cache, capacity, config=model.config)
        shapes = [cache[f"layers_{i}"]["attention"]["k"].shape[-2] for i in range(2)]
        assert tuple(shapes) == slots
        logits, cache = mj.prefill(model, params, cache, tokens[:, start:capacity])
        close(logits, full[:, capacity - 1])
        start = capacity
    with pytest.raises(mj.CacheOverflowError, match="capacity is 32"):
        mj.decode_step(model, params, cache, tokens[:, 0])


@pytest.mark.parametrize(
    ("policy", "changes"),
    [(RING, {}), (SINKS, {}), (RING, MIXED)],
    ids=["ring", "sinks", "mixed"],
)
def test_a_ragged_ring_equals_the_windowed_forward_of_each_row(policy, changes):
    model, params = build(**RING_SHAPE | changes)
    ids = np.random.default_rng(0).permuted([np.arange(61)] * 2, axis=1)
    tokens = ids[:, :60].astype(np.int32)  # each once, so that any write is a change
    if changes:
        expected = ring_logits(model.config, params, tokens)
    else:
        expected = testing.reference_logits(
            model.config, params, tokens, window=10, sinks=policy.num_sinks
        )
    counts = np.random.default_rng(1).integers(0, 5, (24, 2))
    assert np.all(counts.sum(axis=0) > 3 * 13)
    cache = mj.init_cache(model.config, 2, policy=policy)
    starts = np.zeros(2, int)
    for lengths in counts:  # the rest of each call is padding, in wrapped rings too
        call = np.stack(
            [
                np.concatenate([row[start : start + n], np.full(4 - n, 60)])
                for row, start, n in zip(tokens, starts, lengths, strict=True)
            ]
        ).astype(np.int32)
        before = host(cache)
        logits, cache = append(model, params, cache, call, lengths, policy)
        for row, n in enumerate(lengths):
            close(logits[row, :n], expected[row, starts[row] : starts[row] + n])
        changed = [np.any(a != b, axis=(1, 3)) for a, b in zip_rows(before, cache)]
        assert all(np.array_equal(c.sum(axis=1), lengths) for c in changed)
        starts += lengths


def zip_rows(before, after):
    return zip(rows(before), rows(after), strict=True)


@pytest.mark.parametrize(("batch_size", "policy"), [(1, SINKS), (2, RING)])
def test_prefill_and_decode_in_a_ring_equal_the_windowed_forward(batch_size, policy):
    model, params = build(**RING_SHAPE)
    tokens = some_tokens((batch_size, 48))
    expected = testing.reference_logits(
        model.config, params, tokens, window=10, sinks=policy.num_sinks
    )
    cache = mj.init_cache(model.config, batch_size, policy=policy)
    logits, cache = mj.prefill(model, params, cache, tokens[:, :23], policy=policy)
    close(logits, expected[:, 22])
    for i in range(23, 48):
        logits, cache = mj.decode_step(
            model, params, cache, tokens[:, i], policy=policy
        )
        close(logits, expected[:, i])


def test_decode_chunks_in_a_ring_equal_the_windowed_forward():
    model, params = build(**RING_SHAPE)
    cache = mj.init_cache(model.config, 2, policy=SINKS)
    prompt, active = some_tokens((2, 6)), np.ones(2, bool)
    _, cache = mj.prefill(model, params, cache, prompt[:, :5], policy=SINKS)
    out = decode.decode_chunk(
        model, params, cache, prompt[:, 5], active, steps=50, policy=SINKS
    )
    assert out.active.all()
    assert out.cache["lengths"].tolist() == [55, 55]
    whole = np.concatenate([prompt, out.sampled], axis=1)
    full = testing.reference_logits(model.config, params, whole, window=10, sinks=2)
    np.testing.assert_array_equal(np.argmax(full[:, 5:-1], axis=-1), out.sampled)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 1, 4)])
def test_the_window_of_a_ring_is_its_capacity_whatever_the_chunking(sizes, sinks):
    model, params = build(num_layers=1, **RING_SHAPE)
    policy = mj.CachePolicy(overflow="ring", num_sinks=sinks)
    tokens, last = some_tokens((1, 32)), 31
    oldest = last - (10 - sinks) + 1
    plain = feed(model, params, tokens, sizes, policy)[0, last]

    def change(position):
        changed = tokens.copy()
        changed[0, position] = (changed[0, position] + 1) % VOCABULARY
        other = feed(model, params, changed, sizes, policy)[0, last]
        return np.max(np.abs(other - plain))

    assert change(oldest) > 1e-3
    assert change(oldest - 1) == 0
    assert change(sinks) == 0
    if sinks:
        assert change(sinks - 1) > 1e-3


@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 1, 4)])
def test_a_sliding_window_over_many_wraps_equals_the_full_forward(sizes):
    model, params = build(sliding_window=6, prefill_chunk=4)
    tokens = some_tokens((2, 48))  # over five times 9 slots
    expected = testing.reference_logits(model.config, params, tokens)
    close(feed(model, params, tokens, sizes), expected)


@pytest.mark.parametrize("policy", [PLAIN, RING])
def test_a_long_decode_with_a_sliding_window_equals_the_full_forward(policy):
    model, params = build(sliding_window=6, prefill_chunk=4)
    prompt = some_tokens((1, 15))
    cache = mj.init_cache(model.config, policy=policy)
    _, cache = mj.prefill(model, params, cache, prompt[:, :14], policy=policy)
    active = np.ones(1, bool)
    out = decode.decode_chunk(
        model, params, cache, prompt[:, 14], active, steps=70, policy=policy
    )
    whole = np.concatenate([prompt, out.sampled], axis=1)
    full = testing.reference_logits(model.config, params, whole)
    np.testing.assert_array_equal(np.argmax(full[:, 14:-1], axis=-1), out.sampled)


@pytest.mark.parametrize(
    ("capacity", "slots"), [(96, 21), (22, 21), (21, 21), (20, 20), (5, 5)]
)
def test_a_sliding_window_holds_its_window_and_not_the_context(capacity, slots):
    config = testing.tiny_config(sliding_window=6, prefill_chunk=16)
    for leaf in leaves(mj.init_cache(config, 2, capacity)):
        chex.assert_shape(leaf, (2, 2, slots, 8))


def test_a_sliding_window_is_still_bounded_by_max_kv_cache_len():
    model, params = build(sliding_window=6, prefill_chunk=4)
    cache, prompt = mj.init_cache(model.config), some_tokens((1, 96))
    logits, cache = mj.prefill(model, params, cache, prompt)
    expected = testing.reference_logits(model.config, params, prompt)
    close(logits, expected[:, -1])
    with pytest.raises(mj.CacheOverflowError, match="its capacity is 96: 0 would fit"):
        mj.decode_step(model, params, cache, np.array([1]))


# RoPE that turns by the length of the whole sequence


@pytest.mark.parametrize("scaling", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_a_prompt_beyond_the_original_context_may_come_in_chunks(scaling):
    """Each row turns by its own length, whatever its neighbours' and the chunks."""
    model, params = built({"rope_scaling": scaling, "prefill_chunk": 4})
    lengths = np.array([ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 27])
    tokens = some_tokens((4, 27))
    cache = mj.init_cache(model.config, 4)
    logits, cache = mj.prefill(model, params, cache, tokens, lengths)
    expected = testing.reference_logits(model.config, params, tokens, lengths=lengths)
    close(logits, expected[np.arange(4), lengths - 1])
    for row, length in enumerate(lengths[2:], start=2):  # the forward takes one length
        alone = forward(model, params, tokens[row : row + 1, :length])
        close(alone[0], expected[row, :length])
    short = testing.reference_logits(model.config, params, tokens[3:, :ORIGINAL])
    assert np.max(np.abs(short - expected[3, :ORIGINAL])) > 0.1  # the lengths matter
    plain = model.config.replace(rope_scaling=None)
    if scaling is DYNAMIC:  # up to the original context there is none
        close(short, testing.reference_logits(plain, params, tokens[3:, :ORIGINAL]))


@pytest.mark.parametrize("length", [4, 19])
def test_longrope_steps_on_either_side_of_its_original_context(length):
    model, params = built({"rope_scaling": LONGROPE, "prefill_chunk": 4})
    tokens = some_tokens((1, 32))
    cache = mj.init_cache(model.config)
    _, cache = mj.prefill(model, params, cache, tokens[:, :length])
    for i in range(length, ORIGINAL if length < ORIGINAL else 32):
        logits, cache = mj.decode_step(model, params, cache, tokens[:, i])
        expected = testing.reference_logits(model.config, params, tokens[:, : i + 1])
        close(logits, expected[:, -1])


@pytest.mark.parametrize("held", [ORIGINAL - 2, ORIGINAL])
def test_longrope_keys_are_never_mixed(held):
    """A row may come to the original context, or begin beyond it; it may not cross."""
    model, params = built({"rope_scaling": LONGROPE, "prefill_chunk": 4})
    tokens = some_tokens((3, 32))
    cache = mj.init_cache(model.config, 3)
    _, cache = mj.prefill(model, params, cache, tokens, np.array([20, held, 0]))
    before = host(cache)
    new = ORIGINAL - held + 1
    message = rf"row 1 grows from {held} to 11 tokens.* prefill all its tokens again"
    with pytest.raises(mj.ConfigError, match=message):
        mj.prefill(model, params, cache, tokens[:, :new])
    if held == ORIGINAL:
        with pytest.raises(mj.ConfigError, match=message):
            mj.decode_step(model, params, cache, tokens[:, 0])
    chex.assert_trees_all_equal(host(cache), before)
    fits = np.array([5, ORIGINAL - held, 30])
    logits, cache = mj.prefill(model, params, cache, tokens[:, 1:31], fits)
    assert cache["lengths"].tolist() == [25, ORIGINAL, 30]
    expected = testing.reference_logits(model.config, params, tokens[2:, 1:31])
    close(logits[2], expected[0, -1])


# Wrong arguments


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_refused(wrong):
    model, params = build()
    cache = mj.init_cache(model.config)
    message = f"{wrong} is outside the vocabulary, 0 to {VOCABULARY - 1}"
    with pytest.raises(ValueError, match=message):
        mj.prefill(model, params, cache, np.array([[1, wrong, 3]]))
    with pytest.raises(ValueError, match=message):
        mj.decode_step(model, params, cache, np.array([wrong]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_tokens_that_are_not_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="whole numbers, not float32"):
        checks.check_tokens(testing.tiny_config(), np.ones(1, np.float32))


@pytest.mark.parametrize("lengths", [[-1, 2], [2, 4]])
def test_lengths_beyond_the_tokens_are_refused(lengths):
    model, params = build()
    cache = mj.init_cache(model.config, 2)
    with pytest.raises(ValueError, match="must lie in 0 to 3"):
        mj.prefill(model, params, cache, some_tokens((2, 3)), np.array(lengths))


# Decode chunks


def test_an_eos_token_finishes_its_row_alone():
    model, params = build()
    prompt, active = some_tokens((2, 6)), np.ones(2, bool)

    def decoded(model):
        cache = mj.init_cache(model.config, 2, 20)
        _, cache = mj.prefill(model, params, cache, prompt[:, :5])
        return decode.decode_chunk(model, params, cache, prompt[:, 5], active, steps=8)

    free = np.asarray(decoded(model).sampled)
    # A token that row 0 samples after two others, and row 1 never.
    ends = next(i for i in range(2, 7) if free[0, i] not in [*free[0, :i], *free[1]])
    eos = (int(free[0, ends]), int(np.setdiff1d(np.arange(VOCABULARY), free)[0]))
    out = decoded(mj.create_model(model.config.replace(eos_token_ids=eos)))
    sampled = np.asarray(out.sampled)
    np.testing.assert_array_equal(sampled[0, : ends + 1], free[0, : ends + 1])
    assert np.all(sampled[0, ends + 1 :] == -1)
    np.testing.assert_array_equal(sampled[1], free[1])
    assert out.active.tolist() == [False, True]
    assert out.tokens.tolist() == [eos[0], free[1, -1]]
    # The end itself is not in the cache, and nothing was written after it.
    assert out.cache["lengths"].tolist() == [5 + ends + 1, 13]
    for leaf in rows(out.cache):
        assert np.all(leaf[0, :, 5 + ends + 1 :] == 0)
        assert np.all(np.any(leaf[0, :, : 5 + ends + 1] != 0, axis=-1))


def test_chunks_end_when_prompt_and_sampled_tokens_fill_the_cache():
    model, params = build()
    cache = mj.init_cache(model.config, 2, 20)
    tokens, lengths = some_tokens((2, 12)), np.array([12, 7])
    logits, cache = mj.prefill(model, params, cache, tokens, lengths)
    last, active, sampled = np.argmax(logits, axis=-1), np.ones(2, bool), []
    for _ in range(2):
        out = decode.decode_chunk(model, params, cache, last, active, steps=8)
        last, active, cache = out.tokens, out.active, out.cache
        sampled.append(np.asarray(out.sampled))
    counts = 1 + np.sum(np.concatenate(sampled, axis=1) >= 0, axis=1)
    assert (lengths + counts).tolist() == [20, 20]
    assert np.asarray(active).tolist() == [False, False]
    assert cache["lengths"].tolist() == [19, 19]  # the last is sampled, not stored


@pytest.mark.parametrize("held", [19, 20])
def test_a_chunk_samples_nothing_for_a_row_that_its_last_token_fills(held):
    model, params = build()
    cache = mj.init_cache(model.config, 2, 20)
    tokens = some_tokens((2, 20))
    _, cache = mj.prefill(model, params, cache, tokens, np.array([held, 5]))
    last, active = tokens[:, 0], np.ones(2, bool)
    out = decode.decode_chunk(model, params, cache, last, active, steps=8)
    assert np.all(np.asarray(out.sampled)[0] == -1)


def test_two_chunks_equal_one_of_twice_the_steps():
    model, params = build()
    tokens, active = some_tokens((2, 4)), np.ones(2, bool)

    def decoded(chunks):
        cache = mj.init_cache(model.config, 2, 20)
        _, cache = mj.prefill(model, params, cache, tokens[:, :3])
        last, going, sampled = tokens[:, 3], active, []
        for steps in chunks:
            out = decode.decode_chunk(model, params, cache, last, going, steps=steps)
            last, going, cache = out.tokens, out.active, out.cache
            sampled.append(np.asarray(out.sampled))
        return np.concatenate(sampled, axis=1), cache

    once, cache = decoded([16])
    twice, other = decoded([8, 8])
    np.testing.assert_array_equal(once, twice)
    chex.assert_trees_all_close(cache, other, atol=1e-5, rtol=0)


# Compiled calls


@pytest.mark.parametrize(
    ("call", "batch_size"),
    [("prefill", 1), ("prefill", 3), ("step", 1), ("step", 3), ("chunk", 2)],
)
def test_the_cache_given_is_dead_afterwards(call, batch_size):
    model, params = build()
    cache = mj.init_cache(model.config, batch_size, 20 if call == "chunk" else None)
    tokens, active = some_tokens((batch_size, 4)), np.ones(batch_size, bool)
    if call == "prefill":
        _, new = mj.prefill(model, params, cache, tokens)
    elif call == "step":
        _, new = mj.decode_step(model, params, cache, tokens[:, 0])
    else:
        last = tokens[:, 0]
        out = decode.decode_chunk(model, params, cache, last, active, steps=8)
        new = out.cache
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, new)


def test_decode_step_lowers_to_a_step_that_runs():
    model, params = build()
    tokens, cache = some_tokens((3,)), mj.init_cache(model.config, 3)
    compiled = mj.decode_step.lower(model, params, cache, tokens).compile()
    logits, after = compiled(params, cache, tokens)
    other = mj.init_cache(model.config, 3)
    expected = mj.decode_step(model, params, other, tokens)
    chex.assert_trees_all_close((logits, after), expected, atol=1e-5, rtol=0)


def test_under_a_trace_nothing_is_checked_and_nothing_destroyed():
    model, params, cache, prompt = full_beside_active()
    before, wild = host(cache), some_tokens((2, 18), seed=1)  # two chunks
    wild[0, 2], wild[1, 0], wild[1, 14] = 1000, -1, 1000
    clipped = np.clip(wild[1], 0, VOCABULARY - 1)
    whole = np.concatenate([prompt[1, :5], clipped])[None, :20]
    expected = testing.reference_logits(model.config, params, whole)[0]

    @jax.jit
    def step(params, cache, tokens):
        return mj.decode_step(model, params, cache, tokens)

    @jax.jit
    def fill(params, cache, tokens, lengths):
        return mj.prefill(model, params, cache, tokens, lengths)

    logits, after = step(params, cache, wild[:, 0])
    assert_slots_kept(before, after, {1: [5]})
    assert after["lengths"].tolist() == [20, 6]
    assert np.all(np.asarray(logits)[0] == 0)
    close(logits[1], expected[5])
    for length in (2, 15):
        logits, after = fill(params, cache, wild, np.array([18, length]))
        assert_slots_kept(before, after, {1: range(5, 5 + length)})
        assert after["lengths"].tolist() == [20, 5 + length]
        assert np.all(np.asarray(logits)[0] == 0)
        close(logits[1], expected[4 + length])


def test_nothing_is_compiled_again_for_other_lengths_and_steps():
    model, params = build(num_layers=1)  # a model that no other test has compiled
    cache = mj.init_cache(model.config, 2, 20)
    tokens, active = some_tokens((2, 20)), np.ones(2, bool)

    def once(cache, length, lengths):
        _, cache = mj.prefill(model, params, cache, tokens[:, :length], lengths)
        _, cache = mj.decode_step(model, params, cache, tokens[:, 0])
        last = tokens[:, 1]
        for _ in range(2):
            out = decode.decode_chunk(model, params, cache, last, active, steps=8)
            last, cache = out.tokens, out.cache
        return evicted(cache)

    def evicted(cache):
        return jax.device_put(jax.tree.map(np.zeros_like, host(cache)))

    for length in (16, 4, 1, 19):  # every bucket once, and two in turn
        cache = once(cache, length, None)
    with testing.counted_compilations() as compilations:
        for length, lengths in [(2, None), (13, [1, 13]), (18, [17, 0]), (17, None)]:
            lengths = None if lengths is None else np.array(lengths)
            cache = once(cache, length, lengths)
    assert not compilations
    with testing.counted_compilations() as compilations:  # the counter counts
        jax.jit(lambda x: x + 1)(1)
    assert len(compilations) == 1


def test_prefill_has_at_most_four_executables():
    for chunk in (1, 2, 5, 16, 100, 512):
        config = testing.tiny_config(
            max_seq_len=512, max_kv_cache_len=512, prefill_chunk=chunk
        )
        sizes = decode.chunk_sizes(config)
        assert sizes[0] == chunk
        assert len(sizes) <= 4
        assert sorted(sizes, reverse=True) == list(sizes)


@pytest.mark.parametrize("rows", [1, 2])
def test_shapes_that_do_not_go_with_the_caches_rows_are_refused(rows):
    model, params = build()
    cache, wrong = mj.init_cache(model.config, rows), 3 - rows
    with pytest.raises(ValueError, match=rf"tokens: must have shape \({rows}, 4\)"):
        mj.prefill(model, params, cache, some_tokens((wrong, 4)))
    with pytest.raises(ValueError, match=rf"tokens: must have shape \({rows},\)"):
        mj.decode_step(model, params, cache, some_tokens((wrong,)))


def test_padding_may_be_any_id():
    model, params = build()
    prompt = np.array([[5, 6, 7, -100], [8, -100, -100, -100]])
    lengths = np.array([3, 1])
    clean = np.where(prompt < 0, 0, prompt)
    results = [
        mj.prefill(model, params, mj.init_cache(model.config, 2), tokens, lengths)[0]
        for tokens in (prompt, clean)
    ]
    chex.assert_trees_all_equal(*results)


def test_decode_works_in_64_bit_mode():
    model, params = build()
    with jax.enable_x64(True):
        cache = mj.init_cache(model.config)
        logits, cache = mj.prefill(model, params, cache, some_tokens((1, 4)))
        tokens = jnp.argmax(logits, axis=-1)
        out = decode.decode_chunk(
            model, params, cache, tokens, np.array([True]), steps=3
        )
    assert out.tokens.dtype == jnp.int32


def test_a_dead_cache_is_refused_with_advice():
    model, params = build()
    cache = mj.init_cache(model.config)
    mj.prefill(model, params, cache, some_tokens((1, 4)))
    with pytest.raises(ValueError, match="go on with the one which that returned"):
        mj.prefill(model, params, cache, some_tokens((1, 4)))
    with pytest.raises(ValueError, match="go on with the one which that returned"):
        mj.decode_step(model, params, cache, some_tokens((1,)))


def test_one_prompt_without_a_batch_axis_is_refused():
    model, params = build()
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        mj.prefill(model, params, mj.init_cache(model.config), some_tokens((4,)))


@pytest.mark.parametrize("cached_rows", [1, 2])
def test_apply_refuses_rows_that_the_cache_does_not_have(cached_rows):
    model, params = build()
    variables = {"params": params, "cache": mj.init_cache(model.config, cached_rows)}
    tokens = jnp.zeros((3 - cached_rows, 4), jnp.int32)
    with pytest.raises(ValueError, match=f"but the cache has {cached_rows}"):
        model.apply(variables, tokens, mutable=["cache"])
