"""int8 kernels: what they stand for, what they are multiplied with, what XLA makes."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import decode
from minillm_jax.model import products, quantized, transformer
from minillm_jax.planning import costs

MODES = quantized.MODES


@functools.cache
def parts(mode="none", tied=False):
    """A model and its parameters, those of the same floats in each mode."""
    config = testing.tiny_config(tie_embeddings=tied, quantization=mode)
    model = mj.create_model(config)
    if mode == "none":
        return model, testing.noisy_params(model)
    return model, mj.quantize(parts(tied=tied)[1], mode)


def some_tokens(*shape):
    return np.random.default_rng(0).integers(0, 61, shape, np.int32)


def test_rounding_is_off_by_half_a_step_at_most():
    x = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    x[3] = 0.0
    values, scales = quantized.rounded(jnp.asarray(x))
    assert values.dtype == jnp.int8
    assert np.abs(values).max(axis=-1).tolist() == [127, 127, 127, 0, 127]
    assert (np.abs(values * scales - x) <= scales * 0.5001).all()


@pytest.mark.parametrize(
    ("shape", "inputs"), [((8, 6), 1), ((8, 2, 3), 1), ((2, 2, 2, 6), 3)]
)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_product_is_that_with_the_floats_it_stands_for(mode, rows, shape, inputs):
    draw = np.random.default_rng(1)
    kernel = draw.normal(size=shape).astype(np.float32)
    x = jnp.asarray(draw.normal(size=(*rows, 8)), jnp.float32)
    leaf = quantized.quantized(jnp.asarray(kernel), inputs, mode)
    restored = quantized.restored(leaf)
    assert np.abs(restored - kernel).max() <= np.abs(kernel).max() / 127
    exact = np.asarray(x) @ np.asarray(restored).reshape(8, -1)
    flat = products.product(x, leaf, flat=True)
    assert flat.dtype == jnp.float32
    chex.assert_shape(flat, (*rows, 6))
    error = 1e-5 if mode == "w8a16" else 0.03  # of the largest
    assert np.abs(flat - exact).max() <= error * np.abs(exact).max()
    if inputs == 1:
        chex.assert_shape(products.product(x, leaf), (*rows, *shape[1:]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_model_computes_with_the_floats_that_they_stand_for(mode, tied):
    model, params = parts(mode, tied)
    assert quantized.is_quantized(params["embedding"]) == tied
    plain, _ = parts(tied=tied)
    tokens, restored = some_tokens(2, 12), quantized.restore(params)
    ours, other = (
        jax.jit(m.apply)({"params": p}, tokens)
        for m, p in ((model, params), (plain, restored))
    )
    difference, largest = np.abs(ours - other).max(), np.abs(other).max()
    assert difference <= (1e-5 if mode == "w8a16" else 0.06) * largest
    assert mode == "w8a16" or difference > 0  # activations are rounded, too
    for row in (tokens[:1], tokens):  # one row, and several
        cache = mj.init_cache(model.config, len(row))
        logits, _ = mj.prefill(model, params, cache, row)
        assert np.abs(logits - ours[: len(row), -1]).max() <= 0.06 * largest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_random_ones_shapes_and_bytes_are_those_of_the_tree(mode, tied):
    model, _ = parts(mode, tied)
    plain, _ = parts(tied=tied)
    params = mj.init_params(model, seed=4)
    other = mj.quantize(mj.init_params(plain, seed=4), mode)
    chex.assert_trees_all_equal(params, other)
    assert transformer.are_random(params)
    shapes = transformer.param_shapes(model)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert size == costs.weight_bytes(model.config)
    kernel = params["layers_0"]["attention"]["out"]
    assert kernel.shape == plain_shape(plain, "out")
    floats = quantized.restore(params)
    assert jax.tree.structure(floats) == jax.tree.structure(mj.init_params(plain))


def plain_shape(model, name):
    return transformer.param_shapes(model)["layers_0"]["attention"][name].shape


def test_what_is_not_as_the_config_has_it_is_refused():
    plain, floats = parts()
    model, params = parts("w8a8")
    for one, given in ((plain, params), (model, floats), (parts("w8a16")[0], params)):
        with pytest.raises(mj.ConfigError, match=r"mj\.quantize\(params, '"):
            mj.Generator(one, given)
    with pytest.raises(mj.ConfigError, match="quantized already"):
        mj.quantize(params, "w8a16")
    with pytest.raises(mj.ConfigError, match="mode='int4': must be one of none, w8a1"):
        mj.quantize(floats, "int4")
    assert mj.quantize(floats, "none") == floats


def test_the_native_mode_is_the_platforms():
    config = testing.tiny_config(quantization="int8")
    modes = {p: config.resolve(p).quantization for p in ("cpu", "gpu", "tpu")}
    assert modes == {"cpu": "w8a8", "gpu": "w8a16", "tpu": "w8a16"}
    assert mj.create_model(config).config.quantization == "w8a8"


def test_they_are_neither_trained_nor_saved(tmp_path):
    model, params = parts("w8a8")
    with pytest.raises(mj.ConfigError, match="cannot be trained"):
        mj.plan_memory(model.config, training=True, device="h100")
    with pytest.raises(mj.ConfigError, match="quantized; save those in floats"):
        mj.save_pretrained(tmp_path / "model", model, params)


def test_a_folder_is_read_as_it_would_be_quantized(tmp_path):
    model, params = parts()
    mj.save_pretrained(tmp_path, model, params)
    found, read, _ = mj.load_pretrained(tmp_path, "float32", quantization="int8")
    assert found.config.quantization == "w8a8"
    chex.assert_trees_all_equal(read, mj.quantize(params, "w8a8"))
    with pytest.raises(mj.ConfigError, match="quantization"):
        mj.load_pretrained(tmp_path, quantization="int4")


def test_a_generator_takes_them():
    model, params = parts("w8a8")
    (found,) = mj.Generator(model, params).generate(
        [some_tokens(9).tolist()], 12, mj.SamplingParams(temperature=0.0)
    )
    assert len(found.tokens) == 12


WIDE = mj.ModelConfig(
    max_seq_len=256,
    max_kv_cache_len=256,
    dim_model=192,
    num_heads=3,
    num_layers=2,
    dim_ff=704,
    vocab_size=1031,
    dtype="float32",
    prefill_chunk=20,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("kind", ["chunk", "prefill"])
def test_no_kernel_is_made_of_the_numbers(kind, rows, tied, dtype):
    """Nothing as large as a kernel but the kernels themselves, on this platform."""
    floats = dict.fromkeys(("dtype", "param_dtype"), dtype)
    config = WIDE.replace(quantization="int8", tie_embeddings=tied, **floats)
    model = mj.create_model(config)
    params = transformer.param_shapes(model)
    cache = jax.eval_shape(lambda: mj.init_cache(model.config, rows))
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    if kind == "chunk":
        active = jax.ShapeDtypeStruct((rows,), bool)
        lowered = decode.decode_chunk.lower(
            model, params, cache, tokens, active, steps=4
        )
    else:
        logits = jax.ShapeDtypeStruct((rows, config.vocab_size), jnp.float32)
        prompt = jax.ShapeDtypeStruct((rows, config.prefill_chunk), jnp.int32)
        lowered = decode.prefill_chunk.lower(
            model, params, cache, logits, prompt, tokens
        )
    ours, floats = [], []
    for leaf in quantized.leaves(params):
        (ours if quantized.is_quantized(leaf) else floats).append(leaf)
    # An embedding that is not the head has as many elements as the head.
    kernels = {leaf.values.size for leaf in ours} - {leaf.size for leaf in floats}
    assert len(kernels) == (5 if tied else 4)
    text, found = lowered.compile().as_text(), set()
    for dtype, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", text):
        if (size := math.prod(map(int, shape.split(",")))) in kernels:
            found.add((dtype, size))
    assert found == {("s8", size) for size in kernels}
