"""A product with a kernel, in the form that each backend runs best: chosen here alone.

The form follows from the platform that a function is lowered for, and the model knows
none of it. On CPU a single row is multiplied in parts, which keep the memory busier
than one product does; `benchmarks.products` measures that, and what did not help.

Axes: I input features, O output features, N parts of I.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

CPU_PARTS = 4  # of one row: enough of them to keep the cores of a CPU at the memory


def product(
    x: Float[Array, "*axes I"],
    kernel: Float[Array, "I ..."],
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`x` times `kernel`, which is cast to x's dtype; the result in `dtype`, or x's."""
    kernel = kernel.astype(x.dtype)
    dtype = x.dtype if dtype is None else dtype

    def whole(x, kernel):
        return jnp.tensordot(x, kernel, 1, preferred_element_type=dtype)

    def parts(x, kernel):
        return _in_parts(x, kernel).astype(dtype)

    one_row = math.prod(x.shape[:-1]) == 1
    if not one_row or x.shape[-1] % CPU_PARTS:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=parts, default=whole)


def _in_parts(x, kernel):
    """Sums the products of CPU_PARTS parts of I, in float32."""
    rows = x.reshape(CPU_PARTS, -1)
    parts = kernel.reshape(CPU_PARTS, -1, *kernel.shape[1:])
    axes = (((1,), (1,)), ((0,), (0,)))
    sums = jax.lax.dot_general(rows, parts, axes, preferred_element_type=jnp.float32)
    return jnp.sum(sums, axis=0).reshape(*x.shape[:-1], *kernel.shape[1:])
