"""int8: half the bytes of bfloat16, and what they are multiplied with.

A kernel is stored as whole numbers from -127 to 127 and, for each of its output
features, the scale that makes the numbers of it again (symmetric, by the largest one).
Both modes apply the scale behind the product, so that no kernel is made of it:

    w8a16   the numbers alone are int8; they are exact in bfloat16 and float32, and are
            converted where they are multiplied (LLM.int8's vector-wise weights,
            arXiv:2208.07339, without its outliers)
    w8a8    each row of activations is rounded to int8 too, by its own largest one
            (ZeroQuant's dynamic token-wise activations, arXiv:2206.01861), and the
            product is int8 x int8 -> int32

Keys and values of a cache are rounded in the same way, each head of a token by its own
largest number; see `Rounded`.

Axes: I input features, O output features.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.config import ConfigError

MODES = ("w8a16", "w8a8")
LARGEST = 127
# Leading axes of a kernel that a product sums over, by the parameter's name.
KERNELS = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1, "lm_head": 1}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("shape", "inputs", "mode"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel in int8. `shape` is that of the kernel it stands for."""

    values: Any  # int8 [O, I], in the order in which a row's product reads them
    scales: Any  # float32 [O]
    shape: tuple[int, ...]
    inputs: int  # leading axes of `shape` that are I; -1: I is the last axis alone
    mode: str

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes of `shape` that are O."""
        return self.shape[:-1] if self.inputs < 0 else self.shape[self.inputs :]


class Rounded(NamedTuple):
    """Rows of whole numbers: `values * scales` is about what they stand for."""

    values: Any  # int8 [*rows, I]
    scales: Any  # float32 [*rows, 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape


def rounded(x: Float[Array, "*rows I"], largest: int = LARGEST) -> Rounded:
    """Each row as whole numbers up to `largest`."""
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scales = jnp.maximum(most, jnp.finfo(jnp.float32).tiny * largest) / largest
    return Rounded(jnp.round(x / scales).astype(jnp.int8), scales)


@functools.partial(jax.jit, static_argnames=("inputs", "mode"))
def quantized(kernel: Float[Array, "..."], inputs: int, mode: str) -> Quantized:
    """A kernel whose `inputs` leading axes are summed over, or the last one for -1."""
    if inputs < 0:
        rows = kernel.reshape(-1, kernel.shape[-1])
    else:
        rows = kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T
    values, scales = rounded(rows)
    return Quantized(values, scales[:, 0], kernel.shape, inputs, mode)


@jax.jit
def restored(kernel: Quantized) -> Float[Array, "..."]:
    """The float32 kernel that the numbers stand for."""
    rows = kernel.values.astype(jnp.float32) * kernel.scales[:, None]
    return (rows if kernel.inputs < 0 else rows.T).reshape(kernel.shape)


def inputs_of(name: str, *, tied: bool) -> int | None:
    """Of a parameter, as `Quantized` has it; None for one that stays as it is.

    An embedding is quantized where it is the output head too.
    """
    return -1 if tied and name == "embedding" else KERNELS.get(name)


def quantize(params: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The tree with its kernels in int8, one after another; the rest as it is.

    Args:
      params: the inner tree of a model, in floats.
      mode: "w8a16" or "w8a8", such as a created model's `config.quantization`; with
        "none" nothing is done.

    Raises:
      ConfigError: for another mode, or parameters that are quantized already.
    """
    if mode not in ("none", *MODES):
        known = ", ".join(("none", *MODES))
        raise ConfigError(f"mode={mode!r}: must be one of {known}")
    if any(isinstance(leaf, Quantized) for leaf in leaves(params)):
        raise ConfigError("params: are quantized already; quantize those in floats")
    if mode == "none":
        return dict(params)
    tied = "lm_head" not in params

    def one(path, leaf):
        inputs = inputs_of(path[-1].key, tied=tied)
        return leaf if inputs is None else quantized(leaf, inputs, mode)

    return jax.tree_util.tree_map_with_path(one, dict(params))


def restore(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree in floats: its int8 kernels in float32, the rest as it is."""

    def one(leaf):
        return restored(leaf) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(one, dict(params), is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree is a `Quantized`."""
    return isinstance(leaf, Quantized)


def leaves(params: Mapping[str, Any]) -> list[Any]:
    """The parameters, each `Quantized` as one."""
    return jax.tree.leaves(dict(params), is_leaf=is_quantized)
