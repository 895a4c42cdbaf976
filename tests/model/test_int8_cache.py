"""Keys and values in int8: what is stored, what attention makes of it, what stays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import decode, generator
from minillm_jax.model import attention, quantized
from minillm_jax.model import cache as kv
from minillm_jax.model.scores import Places

PLAIN = mj.CachePolicy()
RING = mj.CachePolicy(overflow="ring", num_sinks=2)
VARIATIONS = {
    "all heads": {"num_kv_heads": 4},
    "groups": {"num_kv_heads": 2, "attention_softcap": 5.0},
    "window": {"sliding_window": 7, "global_layers": (1,)},
}


@functools.cache
def build(name="groups", **changes):
    config = testing.tiny_config(**VARIATIONS[name], cache_dtype="int8", **changes)
    model = mj.create_model(config)
    return model, testing.noisy_params(model)


def some_tokens(*shape):
    return np.random.default_rng(0).integers(0, 61, shape, np.int32)


def restored(held):
    return held.values * held.scales


def shifted(held):
    """With the largest scales a thousand times the smallest."""
    shape, draw = held.scales.shape, np.random.default_rng(5)
    factors = 10 ** draw.uniform(-3, 0, shape).astype(np.float32)
    return held._replace(scales=held.scales * factors)


@pytest.mark.parametrize("rule", [kv.SlotRule(), kv.SlotRule(window=9, sinks=2)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("rows", "groups"), [((), 1), ((2,), 3)])
@pytest.mark.parametrize("in_place", [True, False])
def test_attention_is_that_to_the_floats_they_stand_for(
    rows, groups, tokens, rule, in_place, monkeypatch
):
    """At once and in blocks."""
    monkeypatch.setattr(attention, "KEY_BLOCK", 16)
    draw = np.random.default_rng(1)
    q = jnp.asarray(draw.normal(size=(*rows, 2, groups, tokens, 8)), jnp.float32)
    kv_shape = (*rows, 2, 50, 8)
    k, v = (
        shifted(quantized.rounded(jnp.asarray(draw.normal(size=kv_shape))))
        for _ in range(2)
    )
    first = 50 - tokens
    places = [np.arange(first, 50), np.where(np.arange(50) == 20, -1, np.arange(50))]
    queries, keys = (
        Places(jnp.broadcast_to(jnp.asarray(p, jnp.int32), (*rows, len(p))))
        for p in places
    )
    attend = functools.partial(
        attention.attend, queries=queries, keys=keys, rule=rule, in_place=in_place
    )
    ours, expected = attend(q, k, v), attend(q, restored(k), restored(v))
    chex.assert_equal_shape([ours, expected])
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("slots", "dtype", "error"),
    [
        *((2**16, "float32", 1e-3), (2**19, "float32", 1e-3)),
        *((2**16, "bfloat16", 0.05), (2**16, "float16", 0.05)),
    ],
)
def test_a_key_with_little_weight_is_not_lost(slots, dtype, error):
    """Half of it is on one key, and the rest of it on all the others."""
    q = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(np.log(slots))
    k = jnp.zeros((1, slots, 4)).at[0, 0, 0].set(1.0)
    v = jnp.full((1, slots, 4), 0.4).at[0, 0].set(-0.4)
    q = q.astype(dtype)
    held = [quantized.rounded(x) for x in (k, v)]
    queries = Places(jnp.asarray([slots - 1], jnp.int32))
    keys = Places(jnp.arange(slots, dtype=jnp.int32))
    attend = functools.partial(
        attention.attend, queries=queries, keys=keys, scale=1.0, in_place=True
    )
    assert np.abs(attend(q, k, v)).max() < error  # the one against the many
    assert np.abs(attend(q, *held)).max() < error


@pytest.mark.parametrize("tokens", [2**17 + 5, 2**20])
def test_no_sum_over_many_slots_passes_its_integers(tokens):
    v = jnp.full((1, tokens, 2), -3.0)
    q, k = jnp.ones((1, 1, 1, 2)), jnp.ones((1, tokens, 2))
    found = attention.attend(
        *(q, quantized.rounded(k), quantized.rounded(v)),
        queries=Places(jnp.asarray([tokens], jnp.int32)),
        keys=Places(jnp.arange(tokens, dtype=jnp.int32)),
        in_place=True,
    )
    assert np.abs(found + 3.0).max() < 3e-3


# In the model


def rounded_forward(model, params, tokens):
    """Logits without a cache, from keys and values as int8 would have them."""
    project = attention.Attention._project_in

    def rounding(self, x, span):
        q, k, v = project(self, x, span)
        return q, *(restored(quantized.rounded(x)) for x in (k, v))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.Attention, "_project_in", rounding)
        return jax.jit(lambda *given: model.apply(*given))({"params": params}, tokens)


def cached_logits(model, params, tokens, prompt, policy, capacity=None):
    """Those after a prompt and after each token behind it."""
    cache = mj.init_cache(model.config, len(tokens), capacity, policy=policy)
    logits, cache = mj.prefill(model, params, cache, tokens[:, :prompt], policy=policy)
    found = [logits]
    for column in tokens.T[prompt:]:
        logits, cache = mj.decode_step(model, params, cache, column, policy=policy)
        found.append(logits)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", VARIATIONS)
def test_cached_logits_are_those_of_rounded_keys_and_values(name, rows):
    model, params = build(name)
    tokens = some_tokens(rows, 40)
    ours = cached_logits(model, params, tokens, 21, PLAIN)
    expected = np.asarray(rounded_forward(model, params, tokens))[:, 20:]
    floats = model.apply({"params": params}, jnp.asarray(tokens))[:, 20:]
    off, unrounded = (np.abs(ours - x).max() for x in (expected, floats))
    # A number at the edge between two may be rounded either way.
    assert off <= 2e-3 * np.abs(expected).max()
    assert unrounded > off


def test_a_ring_over_three_wraps_is_the_windowed_forward():
    model, params = build("all heads", prefill_chunk=4)
    tokens = some_tokens(2, 44)
    ours = cached_logits(model, params, tokens, 9, mj.CachePolicy(overflow="ring"), 10)
    windowed = mj.create_model(model.config.replace(sliding_window=10))
    expected = np.asarray(rounded_forward(windowed, params, tokens))[:, 8:]
    assert np.abs(ours - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 2])
def test_the_first_layers_slots_are_its_keys_and_values_rounded(rows):
    model, params = build("all heads")
    floats = mj.create_model(model.config.replace(cache_dtype="float32"))
    tokens, lengths = some_tokens(rows, 20), np.array([20, 13])[:rows]
    held = []
    for one in (model, floats):
        cache = mj.init_cache(one.config, rows, 32)
        _, cache = mj.prefill(one, params, cache, tokens, lengths)
        held.append(kv.held(cache["layers_0"]["attention"]))
    for ours, exact in zip(*held, strict=True):
        assert ours.values.dtype == jnp.int8
        assert ours.scales.dtype == jnp.float32
        assert (np.abs(restored(ours) - exact) <= 0.51 * ours.scales).all()
        empty = ours.values[..., 20:, :], ours.scales[..., 20:, :]
        assert not any(np.any(x) for x in empty)


@pytest.mark.parametrize("policy", [PLAIN, RING])
def test_no_slot_changes_but_those_that_are_written(policy):
    """Of a row that is full, and of one that is not touched."""
    model, params = build("all heads")
    cache = mj.init_cache(model.config, 3, 20, policy=policy)
    lengths = np.array([20, 5, 9])
    _, cache = mj.prefill(
        model, params, cache, some_tokens(3, 20), lengths, policy=policy
    )
    before = jax.tree.map(np.array, cache)
    out = decode.decode_chunk(
        *(model, params, cache, np.ones(3, np.int32), np.array([True, True, False])),
        steps=4,
        policy=policy,
    )
    changed = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(out.cache):
        old = functools.reduce(lambda tree, key: tree[key.key], path, before)
        for row in range(3):
            differs = (leaf != old)[row]
            if differs.ndim > 1:
                changed.setdefault(row, set()).update(np.nonzero(differs)[1].tolist())
    full = set(range(20, 24)) if policy is RING else set()
    assert changed == {0: full, 1: set(range(5, 9)), 2: set()}


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_are_inserted_grown_and_evicted_with_their_scales(rows):
    model, params = build("all heads")
    tokens = some_tokens(1, 12)
    _, source = mj.prefill(model, params, mj.init_cache(model.config, 1, 16), tokens)
    cache = kv.insert(mj.init_cache(model.config, rows, 16), rows - 1, source)
    cache = mj.grow_cache(cache, 32, config=model.config)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        cache, kv.cache_shapes(model.config, rows, 32)
    )
    given = np.full(rows, 7, np.int32)
    kept = jax.tree.map(jnp.array, cache)
    ours, _ = mj.decode_step(model, params, cache, given)
    alone, _ = mj.decode_step(model, params, source, given[:1])
    assert np.abs(ours[-1] - alone[0]).max() <= 1e-4 * np.abs(alone).max()
    empty = kv.evict(kept, rows - 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(empty))


def test_the_leaf_decides_and_not_the_config():
    model, params = build("all heads")
    floats = mj.create_model(model.config.replace(cache_dtype="float32"))
    found = []
    for one in (model, floats):
        cache = mj.init_cache(model.config, 1, 16)
        found.append(mj.prefill(one, params, cache, some_tokens(1, 9)))
    chex.assert_trees_all_equal(*found)


def test_a_generator_grows_it_and_chooses_the_same_tokens(monkeypatch):
    monkeypatch.setattr(generator, "SMALLEST_CAPACITY", 16)
    model, params = build("all heads")
    floats = mj.create_model(model.config.replace(cache_dtype="float32"))
    prompts = [some_tokens(30).tolist(), some_tokens(4).tolist()]
    greedy = mj.SamplingParams(temperature=0.0)
    run, other = (mj.Generator(one, params) for one in (model, floats))
    run.warmup(batch_sizes=(2,))
    with run.forbid_compile():
        found = [made.generate(prompts, 40, greedy) for made in (run, other)]
    assert run.compilations["grow_cache"] > 1
    same = [
        np.mean([a == b for a, b in zip(x.tokens, y.tokens, strict=True)])
        for x, y in zip(*found, strict=True)
    ]
    assert all(len(x.tokens) == 40 for x in found[0])
    assert max(same) > 0.5  # one token that differs changes those behind it


def test_int8_is_a_dtype_of_the_cache_alone():
    config = testing.tiny_config(cache_dtype="int8")
    assert config.resolve("gpu").cache_dtype == "int8"
    for name in ("dtype", "param_dtype"):
        with pytest.raises(mj.ConfigError, match=f"{name}='int8'"):
            testing.tiny_config(**{name: "int8"})
