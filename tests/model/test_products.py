"""Every form of a product is the same product."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.model import products

SHAPES = [(1, 1, 64), (2, 1, 64), (1, 3, 64), (64,), (1, 1, 63)]
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # relative to the largest


def made(key, shape, dtype):
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def close(actual, expected, dtype) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out", [None, "float32"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_float64(key, shape, axis, out, dtype):
    x_key, kernel_key = jax.random.split(key)
    x = made(x_key, shape, dtype)
    kernel = made(kernel_key, (shape[-1], 32), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    kernel = kernel if axis == 0 else kernel.T
    actual = products.product(x, kernel, axis=axis, dtype=out)
    chex.assert_shape(actual, (*shape[:-1], 32))
    assert actual.dtype == (out or dtype)
    close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_of_a_product_are_those_of_the_plain_one(key, shape, dtype):
    x_key, kernel_key = jax.random.split(key)
    x, kernel = made(x_key, shape, dtype), made(kernel_key, (shape[-1], 32), dtype)

    def total(form, x, kernel):
        return jnp.sum(jnp.sin(form(x, kernel).astype(jnp.float32)))

    actual = jax.grad(total, argnums=(1, 2))(products.product, x, kernel)
    wide = [a.astype(jnp.float32) for a in (x, kernel)]
    expected = jax.grad(total, argnums=(1, 2))(jnp.matmul, *wide)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        atol = 20 * TOLERANCE[dtype] * float(jnp.abs(other).max())
        chex.assert_trees_all_close(one.astype(jnp.float32), other, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 3)])
def test_a_batched_product_is_that_of_float64(key, rows, dtype):
    q_key, k_key = jax.random.split(key)
    q = made(q_key, (2, 3, *rows, 16), dtype)
    k = made(k_key, (2, 3, 40, 16), dtype)
    axes = "...KGTH,...KSH->...KGTS"
    actual = products.batched_product(axes, q, k)
    assert actual.dtype == jnp.float32
    wide = [np.asarray(a, np.float64) for a in (q, k)]
    close(actual, np.einsum(axes, *wide), dtype)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_bfloat16_kernel_is_not_converted_on_cpu(rows):
    """XLA would otherwise make a float32 copy of it, twice its size."""
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    for axis in (0, 1):
        stored = kernel if axis == 0 else jax.ShapeDtypeStruct((4096, 1024), x.dtype)
        multiply = jax.jit(products.product, static_argnames="axis")
        compiled = multiply.lower(x, stored, axis=axis).compile()
        temp = compiled.memory_analysis().temp_size_in_bytes
        assert temp <= 0.1 * 2 * 1024 * 4096


def test_a_bfloat16_cache_is_not_converted_on_cpu():
    """For one query a head; with grouped queries there are two rows or more anyway."""
    q = jax.ShapeDtypeStruct((8, 4, 1, 1, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((8, 4, 2048, 64), jnp.bfloat16)
    axes = "...KGTH,...KSH->...KGTS"
    multiply = jax.jit(lambda q, k: products.batched_product(axes, q, k))
    temp = multiply.lower(q, k).compile().memory_analysis().temp_size_in_bytes
    assert temp <= 0.1 * 2 * 8 * 4 * 2048 * 64


@pytest.mark.parametrize(
    ("platform", "rows", "given"),
    [("cuda", 1, "2x1x64"), ("cuda", 3, "3x64"), ("tpu", 1, "2x1x64")],
)
def test_each_backend_is_given_its_form(platform, rows, given):
    """On a GPU or TPU a matrix product, of two rows where there is one."""
    x = jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
    exported = jax.export.export(jax.jit(products.product), platforms=[platform])
    (dot,) = [
        line
        for line in exported(x, kernel).mlir_module().splitlines()
        if "stablehlo.dot_general" in line
    ]
    result = given.removesuffix("64") + "32"
    assert f"(tensor<{given}xbf16>, tensor<64x32xbf16>) -> tensor<{result}xbf16>" in dot
