"""The same code lowers for CPUs, NVIDIA GPUs and TPUs, in one exported function."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import decode, sampling
from minillm_jax.model import transformer

PLATFORMS = ("tpu", "cuda", "cpu")
VARIATIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "gemma": {
        "dtype": "bfloat16",
        "sliding_window": 8,
        "global_layers": (1,),
        "attention_softcap": 3.0,
        "tie_embeddings": True,
    },
    "w8a16": {"dtype": "bfloat16", "quantization": "w8a16", "tie_embeddings": True},
    "w8a8": {"dtype": "float32", "quantization": "w8a8"},
    "kv8": {"dtype": "float32", "cache_dtype": "int8"},
    "kv8 bfloat16": {"dtype": "bfloat16", "cache_dtype": "int8"},
}


def exported(function, *args):
    """`function` for all platforms at once."""
    return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)


DEFAULT = {
    *(("float32", "error", 1), ("gemma", "ring", 2)),
    *(("w8a16", "error", 1), ("w8a8", "error", 2), ("kv8", "ring", 1)),
}
CASES = [
    pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow)
    for case in itertools.product(VARIATIONS, ("error", "ring"), (1, 2))
]


@pytest.mark.parametrize(("name", "policy", "batch_size"), CASES)
def test_prefill_and_decode_chunk_lower_for_every_platform(name, policy, batch_size):
    """Here, on CPU, what was exported gives the tokens of what was not."""
    overflow = mj.CachePolicy(overflow=policy)
    model = mj.create_model(testing.tiny_config(**VARIATIONS[name]))
    plain = mj.create_model(model.config.replace(quantization="none"))
    params = mj.init_params(plain)
    params = jax.tree.map(lambda x: 4 * x, params)  # decided, also in bfloat16
    params = mj.quantize(params, model.config.quantization)

    def fresh():
        return mj.init_cache(model.config, batch_size, policy=overflow)

    tokens = np.arange(batch_size * 16, dtype=np.int32).reshape(batch_size, 16)
    remaining = np.array([16, 9][:batch_size], np.int32)
    logits = np.zeros((batch_size, 61), np.float32)
    prefill = functools.partial(decode.prefill_chunk, model, policy=overflow)
    call = (params, fresh(), logits, tokens, remaining)
    portable = exported(prefill, *call)
    assert portable.platforms == PLATFORMS
    found, _ = portable.call(*call)
    expected, cache = prefill(params, fresh(), logits.copy(), tokens, remaining)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=0)

    first, active = jnp.argmax(expected, -1), np.ones(batch_size, bool)
    chunk = functools.partial(decode.decode_chunk, model, policy=overflow, steps=4)
    portable = exported(chunk, params, cache, first, active)
    found = portable.call(params, cache, first, active)
    expected = chunk(params, cache, first, active)
    chex.assert_trees_all_equal(found.sampled, expected.sampled)


@pytest.mark.parametrize("params", [mj.SamplingParams(), sampling.GREEDY])
def test_a_chunk_of_requests_lowers_for_every_platform(params):
    model = mj.create_model(testing.tiny_config(dtype="bfloat16"))
    rows = sampling.equal_requests(params, 2, 61)
    cache = mj.init_cache(model.config, 2)
    call = (cache, sampling.initial_state(rows), rows, np.ones(2, bool))

    def chunk(params, *call):
        return decode.decode_requests(model, params, *call, steps=4)

    portable = exported(chunk, transformer.param_shapes(model), *call)
    assert portable.platforms == PLATFORMS
