"""Counts from the config alone equal what the arrays and the compiler say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.model import cache as kv
from minillm_jax.planning import costs
from minillm_jax.testing import tiny_config

VARIATIONS = [
    {},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1, "head_dim": 16},
    {"qkv_bias": True, "qk_norm": True},
    {"tie_embeddings": True},
    {"param_dtype": "bfloat16", "cache_dtype": "bfloat16"},
    {"cache_dtype": "int8", "num_kv_heads": 2},
    {"sliding_window": 8, "global_layers": (1,), "post_norms": True},
]


def total_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("changes", VARIATIONS)
def test_parameters_and_bytes_equal_those_of_the_arrays(changes):
    model = mj.create_model(tiny_config(**changes))
    params = jax.eval_shape(lambda: mj.init_params(model))
    assert costs.parameters(model.config) == sum(
        x.size for x in jax.tree.leaves(params)
    )
    assert costs.weight_bytes(model.config) == total_bytes(params)
    for batch_size in (1, 3):
        cache = jax.eval_shape(lambda b=batch_size: mj.init_cache(model.config, b, 50))
        held = total_bytes(cache) - 4 * batch_size  # its lengths
        slots = kv.num_slots(model.config, 50, kv.CachePolicy())
        assert costs.cache_bytes(model.config, batch_size, slots) == held


@pytest.mark.parametrize("capacity", [1, 20, 23, 24, 96])
@pytest.mark.parametrize("overflow", ["stop", "ring"])
def test_cache_bytes_of_mixed_layers_are_those_of_the_arrays(overflow, capacity):
    """Local rings of 23 slots, once the capacity is larger."""
    config = tiny_config(num_layers=3, sliding_window=8, global_layers=(1,))
    config, policy = config.resolve("cpu"), kv.CachePolicy(overflow=overflow)
    cache = kv.cache_shapes(config, 2, capacity, policy=policy)
    slots = kv.num_slots(config, capacity, policy)
    assert costs.cache_bytes(config, 2, slots) == total_bytes(cache) - 8


@pytest.mark.parametrize("name", mj.Configs.names)
def test_the_presets_have_their_parameters(name):
    millions = {"small": 58, "medium": 374, "large": 1364, "xlarge": 6738}
    assert round(costs.parameters(mj.Configs.by_name(name)) / 1e6) == millions[name]


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 600, "global_layers": (1,)}],
    ids=["all", "mixed"],
)
def test_forward_flops_are_the_compilers(changes):
    """XLA counts every masked pair too: so one token on a full cache is compared."""
    config = tiny_config(
        dim_model=128,
        num_heads=4,
        num_kv_heads=4,
        dim_ff=512,
        max_kv_cache_len=2048,
        **changes,
    )
    model = mj.create_model(config)
    params = jax.eval_shape(lambda: mj.init_params(model))
    cache = jax.eval_shape(lambda: mj.init_cache(config))
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    analysis = mj.decode_step.lower(model, params, cache, tokens).compile()
    measured = analysis.cost_analysis()["flops"]
    counted = costs.forward_flops(config, tokens=1, context=2047)
    assert 0.85 * measured <= counted <= measured


@pytest.mark.parametrize(
    ("window", "seeing"), [(None, ()), (5, ()), (100, ()), (5, (0, 2)), (5, (0, 1, 2))]
)
def test_forward_flops_count_each_visible_pair(window, seeing):
    config = tiny_config(num_layers=3, sliding_window=window, global_layers=seeing)
    for context, tokens in ((0, 1), (0, 17), (3, 4), (40, 9)):
        query = np.arange(context, context + tokens)[:, None]
        key = np.arange(context + tokens)[None]
        pairs = 0
        for layer in range(3):
            oldest = query - window if window and layer not in seeing else -1
            pairs += int(np.sum((key <= query) & (key > oldest)))
        products = config.num_layers * costs.layer_kernels(config)
        products += config.vocab_size * config.dim_model
        heads = config.num_heads * config.head_dim
        expected = 2 * (tokens * products + 2 * heads * pairs)
        assert costs.forward_flops(config, tokens, context) == expected


def test_a_decode_step_reads_the_weights_and_the_tokens_held():
    config = mj.Configs.small().resolve("cpu")
    table = 4 * config.vocab_size * config.dim_model
    row = 4 * config.dim_model
    base = costs.weight_bytes(config) - table
    per_token = 2 * 4 * config.num_layers * config.dim_model
    assert costs.decode_step_bytes(config, 1, 100) == base + row + 100 * per_token
    assert costs.decode_step_bytes(config, 8, 100) == base + 8 * (row + 100 * per_token)
    tied = config.replace(tie_embeddings=True)
    assert costs.decode_step_bytes(tied, 1, 0) == costs.weight_bytes(tied)
    local = config.replace(sliding_window=10)
    assert costs.decode_step_bytes(local, 1, 100) == base + row + 10 * per_token
    mixed, per_layer = local.replace(global_layers=(0, 4)), per_token // 8
    for context, seen in ((7, 8 * 7), (10, 8 * 10), (100, 6 * 10 + 2 * 100)):
        read = base + row + seen * per_layer
        assert costs.decode_step_bytes(mixed, 1, context) == read
