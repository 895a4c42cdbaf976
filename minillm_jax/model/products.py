"""Products in the form that each backend runs best: chosen here alone.

The form follows from the platform that a function is lowered for, and the model knows
none of it. On CPU:

- One row of float32 meets its kernel in parts, which keep the memory busier than one
  product does.
- XLA reads bfloat16 as it is stored where two rows or more meet a matrix and the sums
  are float32, and converts the whole matrix first where not. So one row goes twice.

Elsewhere XLA makes a multiplication and a sum of one row's product. Where something can
be fused into the first it stores that, as large as the kernel, and some kernels it
transposes before. Two rows are a matrix product: so one row goes twice there too.

`benchmarks.products` measures the forms on CPU, and what did not help;
`benchmarks.ahead` shows what XLA makes of them on a GPU or TPU.

Axes: I input features, O output features, N parts of I.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

CPU_PARTS = 4  # of one row: enough of them to keep the cores of a CPU at the memory


@functools.partial(jax.jit, static_argnames=("axis", "dtype"), inline=True)
def product(
    x: Float[Array, "*axes I"],
    kernel: Float[Array, "..."],
    *,
    axis: int = 0,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`x` times `kernel`, whose `axis` has size I.

    The kernel is cast to x's dtype; the result is in `dtype`, or x's.
    """
    kernel = kernel.astype(x.dtype)
    dtype = x.dtype if dtype is None else dtype
    one_row = math.prod(x.shape[:-1]) == 1

    def whole(x, kernel, dtype=dtype):
        axes = ((x.ndim - 1,), (axis,))
        return jnp.tensordot(x, kernel, axes, preferred_element_type=dtype)

    def in_parts(x, kernel):
        return _in_parts(x, kernel).astype(dtype)

    def twice(x, kernel, dtype=dtype):
        return whole(_twice(x, 0), kernel, dtype)[0]

    def narrow(x, kernel):
        form = twice if one_row else whole
        return form(x, kernel, jnp.float32).astype(dtype)

    on_cpu, elsewhere = whole, twice if one_row else whole
    if x.dtype.itemsize < 4:
        on_cpu = narrow
    elif one_row and axis == 0 and x.shape[-1] % CPU_PARTS == 0:
        on_cpu = in_parts
    if on_cpu is elsewhere:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.jit, static_argnames="axes", inline=True)
def batched_product(
    axes: str, rows: Float[Array, "*axes G T I"], matrices: Float[Array, "..."]
) -> Float[Array, "*axes G T O"]:
    """The einsum `axes` of G x T rows with a matrix of their own each, in float32."""

    def whole(rows, matrices):
        return jnp.einsum(axes, rows, matrices, preferred_element_type=jnp.float32)

    def twice(rows, matrices):
        return whole(_twice(rows[..., 0, :], -2), matrices)[..., :1, :]

    if rows.dtype.itemsize < 4 and rows.shape[-3:-1] == (1, 1):
        return jax.lax.platform_dependent(rows, matrices, cuda=whole, default=twice)
    return whole(rows, matrices)


def _twice(x, axis: int):
    return jnp.stack([x, x], axis)


def _in_parts(x, kernel):
    """Sums the products of CPU_PARTS parts of I, in float32."""
    rows = x.reshape(CPU_PARTS, -1)
    parts = kernel.reshape(CPU_PARTS, -1, *kernel.shape[1:])
    axes = (((1,), (1,)), ((0,), (0,)))
    sums = jax.lax.dot_general(rows, parts, axes, preferred_element_type=jnp.float32)
    return jnp.sum(sums, axis=0).reshape(*x.shape[:-1], *kernel.shape[1:])
