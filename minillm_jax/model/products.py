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

A kernel may be `Quantized`, in int8: what is multiplied then is up to its mode.

`benchmarks.products` measures the forms on CPU, and what did not help;
`benchmarks.ahead` shows what XLA makes of them on a GPU or TPU.

Axes: I input features, O output features, N parts of I.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8, Num

from minillm_jax.model.quantized import LARGEST, Quantized, rounded

DIGIT_BITS = 22  # of a row of floats in int8 digits: nearly those of a float32
CPU_PARTS = 4  # of one row: enough of them to keep the cores of a CPU at the memory


@functools.partial(jax.jit, static_argnames=("axis", "flat", "dtype"), inline=True)
def product(
    x: Float[Array, "*axes I"],
    kernel: Float[Array, "..."] | Quantized,
    *,
    axis: int = 0,
    flat: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`x` times `kernel`, whose `axis` has size I.

    With `flat` the kernel's first axes multiply to I, and the rest come out as one. The
    kernel is cast to x's dtype; the result is in `dtype`, or x's.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(kernel, Quantized):
        scales = kernel.scales.reshape(*(1,) * (x.ndim - 1), *kernel.outputs)
        # w8a16: the kernel's numbers as x's dtype has them, the sums in float32.
        sums = _w8a8(x, kernel) if kernel.mode == "w8a8" else _sums(x, kernel)
        found = (sums * scales).astype(dtype)
        return found.reshape(*x.shape[:-1], -1) if flat else found
    kernel = kernel.astype(x.dtype)
    if flat:
        kernel = kernel.reshape(x.shape[-1], -1)
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
    axes: str,
    rows: Float[Array, "*axes G T I"],
    matrices: Float[Array, "..."] | Int8[Array, "..."],
) -> Float[Array, "*axes G T O"]:
    """The einsum `axes` of G x T rows with a matrix of their own each, in float32."""
    if matrices.dtype == jnp.int8:
        return jax.lax.platform_dependent(
            rows,
            matrices,
            cpu=functools.partial(_in_digits, axes),
            default=lambda x, y: batched_product(axes, x, y.astype(x.dtype)),
        )

    def whole(rows, matrices):
        return jnp.einsum(axes, rows, matrices, preferred_element_type=jnp.float32)

    def twice(rows, matrices):
        return whole(_twice(rows[..., 0, :], -2), matrices)[..., :1, :]

    if rows.dtype.itemsize < 4 and rows.shape[-3:-1] == (1, 1):
        return jax.lax.platform_dependent(rows, matrices, cuda=whole, default=twice)
    return whole(rows, matrices)


def rows(
    table: Float[Array, "V D"] | Quantized, ids: Int[Array, "*axes"]
) -> Float[Array, "*axes D"]:
    """The rows of a table; ids outside it are clipped to it."""
    take = functools.partial(jnp.take, indices=ids, axis=0, mode="clip")
    if isinstance(table, Quantized):
        return take(table.values) * take(table.scales)[..., None]
    return take(table)


def _w8a8(x: Float[Array, "*axes I"], kernel: Quantized) -> Float[Array, "..."]:
    """Whole numbers on both sides, then the scales of x; float32.

    A product of matrices in int8 is what CPUs and tensor cores have; of one row XLA on
    CPU would convert the kernel.
    """
    given, scales = rounded(x)
    sums = _sums(given, kernel, jnp.int32).astype(jnp.float32)
    outputs = (1,) * len(kernel.outputs)
    return sums * scales.reshape(*x.shape[:-1], *outputs)


def _sums(
    x: Num[Array, "*axes I"], kernel: Quantized, dtype: DTypeLike = jnp.float32
) -> Num[Array, "..."]:
    """`x` times the numbers of a kernel, `[*axes, *outputs]`.

    On CPU a product of two matrices, as that of one row is everywhere, which is two.
    Elsewhere the axes are those that the caller has: on a TPU, which may order them
    otherwise in memory, a reshape to a matrix or from one would be a copy.
    """
    count = math.prod(x.shape[:-1])

    def multiplied(x, values):
        axes = ((x.ndim - 1,), (values.ndim - 1,))
        return jnp.tensordot(
            x, values.astype(x.dtype), axes, preferred_element_type=dtype
        )

    def as_matrices(x, values):
        rows = x.reshape(count, x.shape[-1])
        rows = _twice(rows[0], 0) if count == 1 else rows
        found = multiplied(rows, values)[:count]
        return found.reshape(*x.shape[:-1], *kernel.outputs)

    def as_they_are(x, values):
        return multiplied(x, values.reshape(*kernel.outputs, -1))

    if count == 1:
        return as_matrices(x, kernel.values)
    return jax.lax.platform_dependent(
        *(x, kernel.values), cpu=as_matrices, default=as_they_are
    )


def _in_digits(axes: str, rows, matrices):
    """int8 x int8 -> int32, each row as several: whole numbers, and what these leave.

    One alone would lose the weight that a softmax gives to most of many keys. The
    memory is read once for all of them, and several rows are what is native.
    """
    inputs = rows.shape[-1]
    largest = min(LARGEST, (2**31 - 1) // (LARGEST * inputs))  # no sum passes int32
    base = 2 * largest  # a digit leaves a half at most
    count = math.ceil(DIGIT_BITS / math.log2(base))  # 3, of up to 2**17 inputs
    first, scales = rounded(rows, largest)
    digits, left = [first], rows / scales - first
    for _ in range(count - 1):
        digit = jnp.round(left * base)
        digits, left = [*digits, digit.astype(jnp.int8)], left * base - digit
    given = jnp.concatenate(digits, axis=-2)
    sums = jnp.einsum(axes, given, matrices, preferred_element_type=jnp.int32)
    parts = jnp.split(sums.astype(jnp.float32), count, axis=-2)
    return sum(part / base**place for place, part in enumerate(parts)) * scales


def _twice(x, axis: int):
    return jnp.stack([x, x], axis)


def _in_parts(x, kernel):
    """Sums the products of CPU_PARTS parts of I, in float32."""
    rows = x.reshape(CPU_PARTS, -1)
    parts = kernel.reshape(CPU_PARTS, -1, *kernel.shape[1:])
    axes = (((1,), (1,)), ((0,), (0,)))
    sums = jax.lax.dot_general(rows, parts, axes, preferred_element_type=jnp.float32)
    return jnp.sum(sums, axis=0).reshape(*x.shape[:-1], *kernel.shape[1:])
