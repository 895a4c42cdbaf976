"""What XLA makes of a decode: no copy of the cache, little temporary memory.

Caches of at least 8 MB, so that logits and activations do not hide a copy.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from benchmarks import hlo
from minillm_jax.decoding import decode, sampling
from minillm_jax.planning import costs

CONFIG = mj.ModelConfig(
    max_seq_len=4096,
    max_kv_cache_len=8192,
    dim_model=256,
    num_heads=4,
    num_kv_heads=2,
    num_layers=3,
    vocab_size=512,
    dtype="float32",
    prefill_chunk=64,
)


@pytest.fixture(scope="module")
def model():
    return mj.create_model(CONFIG)


@pytest.fixture(scope="module")
def mixed():
    """Two layers with a ring of 1087 slots, and one that sees everything."""
    return mj.create_model(CONFIG.replace(sliding_window=1024, global_layers=(1,)))


@pytest.fixture(scope="module")
def rounded():
    """With kernels, keys and values in int8."""
    int8 = {"cache_dtype": "int8", "quantization": "w8a8"}
    return mj.create_model(CONFIG.replace(**int8, max_kv_cache_len=32768))


def _compiled(model, batch_size, kind, policy):
    """A decode, the bytes of its cache, and its leaves without repetition."""
    config = model.config
    params = jax.eval_shape(lambda: mj.init_params(model))
    cache = jax.eval_shape(lambda: mj.init_cache(config, batch_size, policy=policy))
    tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    if kind == "step":
        lowered = mj.decode_step.lower(model, params, cache, tokens, policy=policy)
    elif kind == "prefill":
        logits = jax.ShapeDtypeStruct((batch_size, config.vocab_size), jnp.float32)
        prompt = jax.ShapeDtypeStruct((batch_size, config.prefill_chunk), jnp.int32)
        lowered = decode.prefill_chunk.lower(
            model, params, cache, logits, prompt, tokens, policy=policy
        )
    elif kind == "sampling":
        rows = sampling.request_arrays(
            [mj.SamplingParams()] * batch_size,
            sample_indices=range(batch_size),
            prompts=[[0]] * batch_size,
            budgets=[8] * batch_size,
            eos_token_ids=(),
            known=np.ones(config.vocab_size, bool),
        )
        lowered = decode.decode_requests.lower(
            *(model, params, cache, sampling.initial_state(rows), rows),
            np.ones(batch_size, bool),
            steps=8,
            policy=policy,
        )
    else:
        active = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
        lowered = decode.decode_chunk.lower(
            model, params, cache, tokens, active, steps=8, policy=policy
        )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert size >= 8e6
    leaves = {leaf for leaf in jax.tree.leaves(cache) if leaf.ndim > 1}
    return lowered.compile(), size, leaves


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        *itertools.product(["step", "chunk"], ["error", "ring"]),
        *itertools.product(["prefill"], ["error", "ring"]),
        ("sampling", "error"),  # the same loop, and slower to compile
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_decode_never_copies_the_cache(model, batch_size, kind, policy):
    assert_in_place(model, batch_size, kind, policy)


def test_decode_with_mixed_layers_never_copies_a_leaf(mixed):
    assert_in_place(mixed, 1, "chunk", "error")


@pytest.mark.parametrize("policy", ["error", "ring"])
@pytest.mark.parametrize("kind", ["step", "chunk", "prefill"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_keys_and_values_in_int8_are_read_as_they_are(
    rounded, batch_size, kind, policy
):
    """No copy of them, and no array of their size in another dtype."""
    text = assert_in_place(rounded, batch_size, kind, policy)
    slots = 32768 + (CONFIG.prefill_chunk - 1 if policy == "ring" else 0)
    assert dtypes_of_size(text, batch_size * 2 * slots * 64) == {"s8"}


def dtypes_of_size(text, size):
    """Of the arrays with so many elements, whatever their shape."""
    found = re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text)
    return {d for d, dims in found if math.prod(map(int, dims.split(","))) == size}


def test_the_gate_sees_planted_floats():
    """Of int8 keys, which XLA on CPU would convert first."""

    def scores(q, k):
        return jnp.einsum("KTH,KSH->KTS", q, k.astype(jnp.float32))

    q = jax.ShapeDtypeStruct((2, 1, 64), jnp.float32)
    k = jax.ShapeDtypeStruct((2, 8192, 64), jnp.int8)
    text = jax.jit(scores).lower(q, k).compile().as_text()
    assert dtypes_of_size(text, 2 * 8192 * 64) == {"s8", "f32"}


def assert_in_place(model, batch_size, kind, policy):
    overflow = mj.CachePolicy(overflow=policy)
    compiled, size, leaves = _compiled(model, batch_size, kind, overflow)
    several = model.config.global_layers or model.config.cache_dtype == "int8"
    assert len(leaves) == (2 if several else 1)
    text = compiled.as_text()
    for leaf in leaves:
        kind = {"float32": "f32", "int8": "s8"}[leaf.dtype.name]
        dims = ",".join(map(str, leaf.shape))
        assert f"{kind}[{dims}]" in text, "not the leaf's shape"
        assert hlo.Module(text).copies(leaf.shape) == []
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 0.1 * size
    assert memory.alias_size_in_bytes >= size
    return text


def test_the_gate_sees_a_planted_copy(model):
    """Writing after reading the old leaf costs a copy: the gate must find it."""

    def read_then_write(leaf, new):
        total = jnp.einsum("KSH,KSH->", leaf, leaf)
        return leaf.at[:, 5].set(new + total), total + leaf[0, 3, 0]

    leaf = jax.ShapeDtypeStruct((2, 8192, 64), jnp.float32)
    new = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    undonated = jax.jit(read_then_write).lower(leaf, new).compile()
    assert hlo.Module(undonated.as_text()).copies(leaf.shape)


# What a step reads, by XLA's own count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("capacity", [256, 2048])
def test_a_step_accesses_the_bytes_that_costs_counts(batch_size, capacity):
    """Within 10 %: the weights once, and the cache once.

    For several rows XLA also counts each leaf three times more, as read and written by
    the scatter of the new slots and read by the gather of the old ones: these touch the
    slots alone.
    """
    model = mj.create_model(CONFIG.replace(dim_model=512, num_heads=8, num_kv_heads=8))
    config = model.config
    params = jax.eval_shape(lambda: mj.init_params(model))
    cache = jax.eval_shape(lambda: mj.init_cache(config, batch_size, capacity))
    tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    compiled = mj.decode_step.lower(model, params, cache, tokens).compile()
    accessed = compiled.cost_analysis()["bytes accessed"]
    if batch_size > 1:
        slots = [capacity] * config.num_layers
        accessed -= 3 * costs.cache_bytes(config, batch_size, slots)
    least = costs.decode_step_bytes(config, batch_size, capacity)
    assert least <= accessed <= 1.1 * least


def temporary_bytes(batch_size, **changes):
    """Of a prefill chunk of 512 tokens, for a variation of CONFIG."""
    model = mj.create_model(CONFIG.replace(prefill_chunk=512, **changes))
    compiled, *_ = _compiled(model, batch_size, "prefill", mj.CachePolicy())
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("batch_size", [1, 8])
def test_temporary_memory_of_a_prefill_chunk_does_not_grow_with_the_cache(batch_size):
    small = temporary_bytes(batch_size, max_kv_cache_len=8192)
    assert temporary_bytes(batch_size, max_kv_cache_len=32768) <= 1.1 * small


@pytest.mark.parametrize("batch_size", [1, 8])
def test_temporary_memory_of_a_prefill_chunk_does_not_grow_with_the_layers(batch_size):
    """Of the attention's blocks of queries XLA kept an array for every layer."""
    few = temporary_bytes(batch_size, num_layers=2)
    assert temporary_bytes(batch_size, num_layers=6) <= 1.05 * few
