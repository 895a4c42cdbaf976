"""The cache-free forward against the oracle, its limits, and how parameters start."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.config import RopeScaling
from minillm_jax.model import attention, blockwise, layers, scores
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import param_shapes

LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=8.0,
    original_max_position_embeddings=256,  # one pair of each kind: fast, between, slow
)


def scaling(rope_type, original=64, **fields):
    return RopeScaling(
        rope_type=rope_type, original_max_position_embeddings=original, **fields
    )


LONGROPE = scaling(
    "longrope",
    factor=4.0,
    short_factor=(1.0, 1.1, 1.3, 1.7),
    long_factor=(1.5, 2.0, 3.0, 4.0),
)
VARIATIONS = {
    "mha": {"num_kv_heads": 4},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "tied": {"tie_embeddings": True},
    "sliding_window": {"sliding_window": 5},
    "head_dim": {"head_dim": 12},
    "theta_and_eps": {"rope_theta": 100.0, "norm_eps": 0.1},
    "linear": {"rope_scaling": RopeScaling(rope_type="linear", factor=4.0)},
    "llama3": {"rope_scaling": LLAMA3},
    "dynamic": {"rope_scaling": scaling("dynamic", factor=2.0)},
    "dynamic_beyond": {"rope_scaling": scaling("dynamic", original=16, factor=3.0)},
    "yarn": {"rope_scaling": scaling("yarn", original=16, factor=4.0)},
    "yarn_fields": {
        "rope_scaling": scaling(
            *("yarn", 16),
            factor=4.0,
            attention_factor=1.2,
            beta_fast=2.0,
            beta_slow=0.3,
            truncate=False,
        )
    },
    "longrope": {"rope_scaling": LONGROPE},
    "longrope_beyond": {
        "rope_scaling": dataclasses.replace(
            LONGROPE, original_max_position_embeddings=16
        )
    },
    "partial_rotary": {"head_dim": 12, "rotary_dim": 8},
    "odd_head_dim": {"head_dim": 7, "rotary_dim": 4},
    "global_layers": {"sliding_window": 5, "global_layers": (1,), "num_layers": 3},
    "local_theta": {
        "rope_scaling": LLAMA3,
        "sliding_window": 5,
        "global_layers": (0,),
        "local_rope_theta": 50.0,
    },
    "gelu": {"activation": "gelu_tanh"},
    "soft_caps": {"attention_softcap": 0.5, "logits_softcap": 2.0},
    "query_scalar": {"query_pre_attn_scalar": 3.0},
    "unit_offset": {"norm_unit_offset": True, "qk_norm": True},
    "post_norms": {"post_norms": True},
    "embedding_scale": {"embedding_scale": 5.5},
    "all": {
        "head_dim": 12,
        "num_layers": 3,
        "rope_scaling": LLAMA3,
        "sliding_window": 7,
        "qkv_bias": True,
        "qk_norm": True,
        "tie_embeddings": True,
    },
    "all_of_gemma": {
        "head_dim": 12,
        "num_layers": 3,
        "activation": "gelu_tanh",
        "sliding_window": 7,
        "global_layers": (2,),
        "local_rope_theta": 100.0,
        "qk_norm": True,
        "query_pre_attn_scalar": 9.0,
        "attention_softcap": 3.0,
        "logits_softcap": 4.0,
        "norm_unit_offset": True,
        "post_norms": True,
        "embedding_scale": 32**0.5,
        "tie_embeddings": True,
    },
}


def build(**changes):
    """A tiny model with nothing in its parameters at 0 or 1."""
    model = mj.create_model(testing.tiny_config(**changes))
    return model, testing.noisy_params(model)


@pytest.fixture(scope="module")
def tiny():
    return build()


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens, **call):
    return model.apply({"params": params}, tokens, **call)


def some_tokens(shape, seed=0):
    ids = np.random.default_rng(seed).integers(0, 61, shape, np.int32)
    return jax.device_put(ids)


def close(actual, expected, atol=1e-5):
    expected = np.asarray(expected, np.float32)
    chex.assert_trees_all_close(np.asarray(actual), expected, atol=atol, rtol=0)


def influence(model, params, tokens, **call):
    """Largest |d logits[t] / d embedding of token s|, `[T, T]`; tokens must differ."""
    assert len(set(tokens)) == len(tokens)
    assert not model.config.tie_embeddings
    mix = np.random.default_rng(0).normal(size=model.config.vocab_size)

    def mixed_logits(embedding):
        changed = {**params, "embedding": embedding}
        logits = forward(model, changed, tokens[None], **call)[0]
        return logits @ jnp.asarray(mix, jnp.float32)

    jacobian = jax.jit(jax.jacrev(mixed_logits))(params["embedding"])  # [T, V, D]
    return np.abs(jacobian).max(axis=-1)[:, tokens]


# The oracle


@pytest.mark.parametrize("name", VARIATIONS)
def test_forward_equals_the_float64_reference(name):
    model, params = build(**VARIATIONS[name])
    tokens = some_tokens((2, 24))
    logits = forward(model, params, tokens)
    chex.assert_shape(logits, (2, 24, 61))
    chex.assert_type(logits, jnp.float32)
    expected = testing.reference_logits(model.config, params, tokens)
    assert 0.5 < np.std(expected) < 5  # or the tolerance means nothing
    close(logits, expected, atol=2e-5)


def test_forward_of_a_sequence_of_max_seq_len_equals_the_reference(tiny):
    model, params = tiny
    tokens = some_tokens((1, model.config.max_seq_len))
    expected = testing.reference_logits(model.config, params, tokens)
    close(forward(model, params, tokens), expected, atol=2e-5)


def test_tokens_outside_the_vocabulary_are_clipped_to_it(tiny):
    model, params = tiny
    wild, clipped = np.array([[-5, 3, 61, 1000]]), np.array([[0, 3, 60, 60]])
    actual = forward(model, params, wild)
    chex.assert_trees_all_equal(actual, forward(model, params, clipped))


# What a logit may depend on


@pytest.mark.parametrize("name", ["gqa", "qk_norm", "all"])
def test_no_logit_depends_on_a_later_token(name):
    model, params = build(**VARIATIONS[name] | {"tie_embeddings": False})
    tokens = np.random.default_rng(1).permutation(61)[:12]
    seen = influence(model, params, tokens)
    causal = np.tril(np.ones((12, 12), bool))
    assert np.all(seen[~causal] == 0)
    assert np.all(seen[causal] > 1e-4)  # three layers of a window of 7 reach all 12


def test_one_layer_of_a_sliding_window_sees_exactly_its_window():
    model, params = build(num_layers=1, sliding_window=5)
    seen = influence(model, params, np.arange(12))
    query, key = np.indices(seen.shape)
    inside = (key <= query) & (key > query - 5)
    assert np.all((seen > 0) == inside)


def test_packed_documents_do_not_leak(tiny):
    model, params = tiny
    segments = np.array([1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0])
    seen = influence(model, params, np.arange(11), segment_ids=segments[None])
    query, key = np.indices(seen.shape)
    same = (segments[query] == segments[key]) & (key <= query)
    documents = segments > 0
    assert np.all((seen > 0)[documents] == same[documents])


def shorter(name, original=6):
    """A variation whose original context some documents here are longer than."""
    changed = {"original_max_position_embeddings": original}
    scaling = dataclasses.replace(VARIATIONS[name]["rope_scaling"], **changed)
    return VARIATIONS[name] | {"rope_scaling": scaling}


@pytest.mark.parametrize(
    "changes",
    [VARIATIONS["gqa"], VARIATIONS["all"], shorter("dynamic"), shorter("longrope")],
    ids=["gqa", "all", "dynamic", "longrope"],
)
def test_packed_documents_equal_separate_ones(changes):
    model, params = build(**changes)
    tokens = some_tokens((2, 20))
    # Any id may follow any other, and the second row ends in padding.
    segments = jnp.array([[3] * 8 + [1] * 4 + [2] * 8, [1] * 8 + [2] * 4 + [0] * 8])
    packed = np.asarray(forward(model, params, tokens, segment_ids=segments))
    expected = testing.reference_logits(
        model.config, params, tokens, segment_ids=segments
    )
    close(np.where(segments[..., None] > 0, packed, 0), expected)
    for row, start, end in [(0, 0, 8), (0, 8, 12), (0, 12, 20), (1, 0, 8), (1, 8, 12)]:
        alone = forward(model, params, tokens[row : row + 1, start:end])
        close(packed[row, start:end], alone[0])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_document_ends_where_its_row_does(name):
    """Of 9 tokens 5 are valid: no more than the original context."""
    model, params = build(**shorter(name))
    tokens, ones = some_tokens((1, 9)), jnp.ones((1, 9), jnp.int32)
    call = {"lengths": jnp.array([5]), "segment_ids": ones}
    alone = forward(model, params, tokens[:, :5])
    close(forward(model, params, tokens, **call)[:, :5], alone)


def test_padding_changes_no_valid_logit(tiny):
    model, params = tiny
    tokens, lengths = some_tokens((4, 20)), np.array([20, 7, 1, 0])
    padded = np.asarray(forward(model, params, tokens, lengths=lengths))
    expected = testing.reference_logits(model.config, params, tokens, lengths=lengths)
    close(padded, expected, atol=2e-5)
    for row, length in enumerate(lengths):
        assert np.all(padded[row, length:] == 0)
    alone = forward(model, params, tokens[1:2, :7])
    close(padded[1, :7], alone[0])


# Blocks of queries and keys


@pytest.fixture
def small_blocks(monkeypatch):
    """When called: blocks of 8 queries and keys; returns the sizes that are used."""
    sizes, by_blocks = set(), blockwise.attend_block

    def spy(q, k, *rest):
        sizes.add((q.shape[-2], k.shape[-2]))
        return by_blocks(q, k, *rest)

    def begin():
        monkeypatch.setattr(attention, "SCORE_BYTES", 1)
        monkeypatch.setattr(attention, "KEY_BLOCK", 8)
        monkeypatch.setattr(blockwise, "TRAINING_BLOCK", 8)
        monkeypatch.setattr(blockwise, "attend_block", spy)
        jax.clear_caches()  # of what was traced with other blocks
        return sizes

    yield begin
    jax.clear_caches()


@pytest.mark.parametrize("length", [16, 21])
def test_blocks_equal_the_whole_and_so_do_their_gradients(length, small_blocks):
    model, params = build(sliding_window=11, num_layers=1)
    tokens = some_tokens((2, length))
    lengths = jnp.array([length, length - 3])
    segments = jnp.array([[1] * 6 + [2] * (length - 6)] * 2)

    def loss(params):
        call = {"lengths": lengths, "segment_ids": segments}
        logits = model.apply({"params": params}, tokens, **call)
        return jnp.mean(jnp.sum(jnp.square(logits), axis=-1)), logits

    whole = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    sizes = small_blocks()
    blocked = jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(params)
    assert sizes == {(8, length)}
    chex.assert_trees_all_close(blocked, whole, atol=3e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("variation", ["gqa", "sliding_window", "all"])
def test_blocks_of_a_cached_call_equal_the_whole(batch_size, variation, small_blocks):
    model, params = build(**VARIATIONS[variation])
    tokens = some_tokens((batch_size, 13))
    cache = mj.init_cache(model.config, batch_size)

    def calls(variables):
        params, cache, logits = variables["params"], variables["cache"], []
        for _ in range(2):  # the second one behind the first
            out, updated = model.apply(
                {"params": params, "cache": cache}, tokens, mutable=["cache"]
            )
            logits.append(out)
            cache = updated["cache"]
        return logits, cache

    variables = {"params": params, "cache": cache}
    whole = jax.jit(calls)(variables)
    sizes = small_blocks()
    blocked = jax.jit(lambda variables: calls(variables))(variables)
    assert {size for size, _ in sizes} == {8}
    chex.assert_trees_all_close(blocked, whole, atol=1e-5, rtol=0)


def test_blocks_of_a_wrapped_ring_with_sinks_equal_the_whole(small_blocks):
    model, params = build(**VARIATIONS["gqa"])
    ring = mj.CachePolicy(overflow="ring", num_sinks=2)
    tokens = some_tokens((2, 13))

    def calls(params, cache):
        logits = []
        for _ in range(4):  # 52 tokens through a window of 20
            out, updated = model.apply(
                {"params": params, "cache": cache},
                tokens,
                lengths=jnp.array([13, 11]),
                policy=ring,
                mutable=["cache"],
            )
            logits.append(out)
            cache = updated["cache"]
        return logits

    cache = mj.init_cache(model.config, 2, 20, policy=ring)
    whole = jax.jit(calls)(params, cache)
    sizes = small_blocks()
    blocked = jax.jit(lambda params, cache: calls(params, cache))(params, cache)
    assert {size for size, _ in sizes} == {8}
    chex.assert_trees_all_close(blocked, whole, atol=1e-5, rtol=0)


def test_blocks_that_no_query_sees_are_skipped(small_blocks):
    """NaN in V poisons even a sum that it has no weight in, unless it is not read."""
    small_blocks()
    q, k = jnp.ones((1, 1, 16, 4)), jnp.ones((1, 44, 4))
    v = jnp.ones((1, 44, 4)).at[:, :8].set(jnp.nan).at[:, 32:].set(jnp.nan)
    queries = scores.Places(jnp.arange(16, 32))
    keys = scores.Places(jnp.where(jnp.arange(44) < 32, jnp.arange(44), -1))
    rule = kv.SlotRule(window=8)  # the first query sees from slot 9 on
    out = attention.attend(q, k, v, queries=queries, keys=keys, rule=rule)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_of_two_key_blocks_count_once(dtype, in_place, small_blocks):
    """21 keys are the blocks 0-7, 8-15 and 13-20."""
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    q = jax.random.normal(jax.random.key(0), (2, 1, 9, 4)).astype(dtype)
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 21, 4)).astype(dtype)
    queries = scores.Places(jnp.arange(12, 21))
    keys = scores.Places(jnp.arange(21))
    wide = (a.astype(jnp.float32) for a in (q, k, v))
    whole = attention.attend(*wide, queries=queries, keys=keys)
    small_blocks()
    places = {"queries": queries, "keys": keys}
    blocked = attention.attend(q, k, v, **places, in_place=in_place)
    assert blocked.dtype == dtype
    blocked = blocked.astype(jnp.float32)
    chex.assert_trees_all_close(blocked, whole, atol=tolerance, rtol=0)


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_memory_is_linear_in_the_sequence(what):
    model = mj.create_model(
        testing.tiny_config(max_seq_len=4096, max_kv_cache_len=4096, num_layers=1)
    )
    params = param_shapes(model)

    def logits(params, tokens):
        return model.apply({"params": params}, tokens)

    def gradient(params, tokens):
        return jax.grad(lambda params: jnp.mean(logits(params, tokens)))(params)

    def temp_bytes(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lowered = jax.jit(logits if what == "forward" else gradient).lower
        return lowered(params, tokens).compile().memory_analysis().temp_size_in_bytes

    temps = [temp_bytes(length) for length in (1024, 2048, 4096)]
    assert temps[1] <= 2.6 * temps[0]
    assert temps[2] <= 2.6 * temps[1]


# Errors


@pytest.mark.parametrize(
    ("length", "message"), [(65, "65 per row, but max_seq_len=64"), (0, "at least one")]
)
def test_a_sequence_of_a_wrong_length_is_refused(length, message, tiny):
    model, params = tiny
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, jnp.zeros((1, length), jnp.int32))


def test_segment_ids_with_a_cache_are_refused(tiny):
    model, params = tiny
    variables = {"params": params, "cache": mj.init_cache(model.config)}
    ones = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="segment_ids: only without a cache"):
        model.apply(variables, ones, segment_ids=ones, mutable=["cache"])


@pytest.mark.parametrize("sliding_window", [None, 20])
def test_a_ring_refuses_more_than_a_prefill_chunk_in_one_call(sliding_window):
    model, params = build(sliding_window=sliding_window)
    ring = mj.CachePolicy(overflow="error" if sliding_window else "ring")
    cache = mj.init_cache(model.config, policy=ring)
    with pytest.raises(ValueError, match="17 per row, but a ring takes prefill_chunk"):
        model.apply(
            {"params": params, "cache": cache},
            jnp.zeros((1, 17), jnp.int32),
            policy=ring,
            mutable=["cache"],
        )


def test_a_cache_that_may_not_change_is_refused_with_advice(tiny):
    model, params = tiny
    variables = {"params": params, "cache": mj.init_cache(model.config)}
    with pytest.raises(ValueError, match="mutable"):
        model.apply(variables, jnp.zeros((1, 3), jnp.int32))


# Parameters and the cache's tree


@pytest.mark.parametrize(
    ("name", "param_dtype"), [("gqa", "float32"), ("all", "bfloat16")]
)
def test_init_params_makes_the_tree_of_the_module(name, param_dtype):
    config = testing.tiny_config(**VARIATIONS[name], param_dtype=param_dtype)
    model = mj.create_model(config)
    params = mj.init_params(model, seed=3)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, testing.plain_params(model))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {param_dtype}


def test_the_seed_decides_the_parameters(tiny):
    model, _ = tiny
    params = mj.init_params(model, seed=0)
    chex.assert_trees_all_equal(params, mj.init_params(model, seed=0))
    other = mj.init_params(model, seed=1)
    layers_differ = params["layers_0"]["mlp"]["down"], params["layers_1"]["mlp"]["down"]
    seeds_differ = params["embedding"], other["embedding"]
    for one, two in (layers_differ, seeds_differ):
        assert np.mean(np.asarray(one) == np.asarray(two)) < 0.01


@pytest.mark.parametrize("mutable", [True, ["params", "cache"]])
def test_init_creates_no_cache_even_when_asked(mutable, tiny, key):
    model, _ = tiny
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = functools.partial(model.init, mutable=mutable)
    assert list(jax.eval_shape(init, key, tokens)) == ["params"]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({}, mj.CachePolicy()),
        ({}, mj.CachePolicy(overflow="ring", num_sinks=2)),
        ({"sliding_window": 7, "cache_dtype": "bfloat16"}, mj.CachePolicy()),
        ({"cache_dtype": "int8"}, mj.CachePolicy()),
    ],
)
def test_init_cache_makes_the_tree_that_the_module_returns(batch_size, changes, policy):
    model = mj.create_model(testing.tiny_config(**changes))
    cache = mj.init_cache(model.config, batch_size, policy=policy)
    variables = {"params": param_shapes(model), "cache": cache}

    def call(variables, tokens):
        return model.apply(variables, tokens, policy=policy, mutable=["cache"])

    tokens = jax.ShapeDtypeStruct((batch_size, 4), jnp.int32)
    logits, updated = jax.eval_shape(call, variables, tokens)
    assert logits.shape == (batch_size, 4, 61)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated["cache"], cache)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_kernels_start_with_the_documented_spread():
    config = testing.tiny_config(
        dim_model=128, head_dim=16, dim_ff=256, num_layers=3, qkv_bias=True
    )
    params = mj.init_params(mj.create_model(config))
    block = params["layers_1"]
    stds = {
        "embedding": (params["embedding"], 0.02),
        "lm_head": (params["lm_head"], 0.02),
        "qkv": (block["attention"]["qkv"], 128**-0.5),
        "gate_up": (block["mlp"]["gate_up"], 128**-0.5),
        "out": (block["attention"]["out"], (2 * 3 * 4 * 16) ** -0.5),
        "down": (block["mlp"]["down"], (2 * 3 * 256) ** -0.5),
    }
    for name, (kernel, std) in stds.items():
        assert np.std(kernel) == pytest.approx(std, rel=0.03), name
        assert abs(np.mean(kernel)) < 0.05 * std, name
        if kernel.ndim > 2 or name == "down":  # cut at two of its own deviations
            assert np.max(np.abs(kernel)) <= 2 * std / layers._CUT_STD * 1.001, name
    assert np.all(params["final_norm"]["scale"] == 1)
    assert np.all(block["attention"]["qkv_bias"] == 0)


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [("small", 58, 0), ("medium", 374, 0), ("large", 1360, -1), ("xlarge", 6700, -2)],
)
def test_presets_have_the_documented_number_of_parameters(name, millions, digits):
    shapes = param_shapes(mj.create_model(mj.Configs.by_name(name)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, digits) == millions


# Sizes and dtypes


@pytest.mark.parametrize("context", [16384, 32768])
def test_a_model_too_big_to_run_here_has_the_right_shapes(context):
    model = mj.create_model(
        mj.ModelConfig(
            max_seq_len=context,
            max_kv_cache_len=2 * context,
            dim_model=4096,
            num_heads=64,
            vocab_size=100000,
        )
    )
    before = sum(array.nbytes for array in jax.live_arrays())
    cache = kv.cache_shapes(model.config, 2)
    variables = {"params": param_shapes(model), "cache": cache}

    def call(variables, tokens):
        return model.apply(variables, tokens, mutable=["cache"])

    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    logits, updated = jax.eval_shape(call, variables, tokens)
    assert logits.shape == (2, 512, 100000)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated["cache"], cache)
    assert cache["layers_7"]["attention"]["k"].shape == (2, 64, 2 * context, 64)
    without = jax.ShapeDtypeStruct((1, context), jnp.int32)
    whole = jax.eval_shape(model.apply, {"params": variables["params"]}, without)
    assert whole.shape == (1, context, 100000)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20


@pytest.mark.parametrize("cached", [False, True])
def test_bfloat16_gives_float32_logits_near_the_reference(cached):
    model, params = build(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    tokens = some_tokens((2, 16))
    if cached:
        cache = mj.init_cache(model.config, 2)
        assert cache["layers_0"]["attention"]["k"].dtype == jnp.bfloat16
        variables = {"params": params, "cache": cache}
        logits, _ = jax.jit(lambda v: model.apply(v, tokens, mutable=["cache"]))(
            variables
        )
    else:
        logits = forward(model, params, tokens)
    chex.assert_type(logits, jnp.float32)
    expected = testing.reference_logits(model.config, params, tokens)
    difference = np.abs(np.asarray(logits) - expected)
    assert 1e-4 < np.max(difference) < 0.15  # bfloat16 keeps 8 bits


def test_bfloat16_computes_from_float32_parameters(tiny):
    _, params = tiny
    model = mj.create_model(
        testing.tiny_config(dtype="bfloat16", param_dtype="float32")
    )
    tokens = some_tokens((2, 16))
    logits = forward(model, params, tokens)
    chex.assert_type(logits, jnp.float32)
    expected = testing.reference_logits(model.config, params, tokens)
    assert 1e-4 < np.max(np.abs(np.asarray(logits) - expected)) < 0.15


def test_a_document_far_into_a_pack_equals_itself_alone():
    """Its RoPE angles are those of its own positions, rounded alike."""
    config = testing.tiny_config(max_seq_len=8192, max_kv_cache_len=8192)
    model = mj.create_model(config)
    params = testing.noisy_params(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 8192))
    segment_ids = np.where(np.arange(8192) < 8160, 1, 2)[None]

    @jax.jit
    def last(params, tokens, segment_ids):
        x, _ = model.apply(
            {"params": params}, tokens, segment_ids=segment_ids, method="hidden"
        )
        return model.apply({"params": params}, x[:, -32:], method="unembed")

    packed = last(params, tokens, segment_ids)
    alone = last(params, tokens[:, -32:], np.ones((1, 32), np.int32))
    chex.assert_trees_all_close(packed, alone, atol=1e-5, rtol=0)


def test_bfloat16_parameters_are_the_float32_ones_rounded():
    """Sampled in bfloat16 they would have few distinct values and a biased mean."""
    half, full = (
        mj.init_params(mj.create_model(testing.tiny_config(param_dtype=dtype)))
        for dtype in ("bfloat16", "float32")
    )
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full)
    chex.assert_trees_all_equal(half, rounded)
