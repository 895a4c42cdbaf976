"""The parts around attention: RMSNorm, the gated MLP, and how parameters start.

Axes: B batch, T query length, D model dim, C gate and up, F ffn dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from minillm_jax.config import ModelConfig
from minillm_jax.model import products
from minillm_jax.model.quantized import Quantized, is_quantized

TOKEN_STD = 0.02  # GPT-2 and Llama start their embeddings with it
_CUT_STD = 0.87962566103423978  # std of a standard normal cut at +-2


def _truncated_normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.truncated_normal(std / _CUT_STD)


def _from_model(config: ModelConfig) -> nn.initializers.Initializer:
    """Truncated normal, std 1 / sqrt(fan_in), for a kernel whose first axis is D."""
    return _truncated_normal(config.dim_model**-0.5)


def _into_residual(config: ModelConfig) -> nn.initializers.Initializer:
    """Truncated normal, std 1 / sqrt(2 L fan_in), for a kernel whose last axis is D.

    Smaller by sqrt(2 L), for 2 L of them add to the residual stream, whose variance
    would else grow with depth (GPT-2, Radford et al. 2019).
    """

    def init(key, shape, dtype):
        fan_in = math.prod(shape[:-1])
        std = (2 * config.num_layers * fan_in) ** -0.5
        return _truncated_normal(std)(key, shape, dtype)

    return init


def _scale_start(config: ModelConfig) -> nn.initializers.Initializer:
    """Norms start as 1, offset and scale together."""
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    return zeros if config.norm_unit_offset else ones


# How each parameter starts, by its name.
INITIALIZERS = {
    "embedding": lambda config: nn.initializers.normal(TOKEN_STD),  # [V, D]
    "lm_head": lambda config: nn.initializers.normal(TOKEN_STD),  # [D, V]
    "scale": _scale_start,  # [D] or [H]
    "qkv": _from_model,  # [D, K, G + 2, H]
    "qkv_bias": lambda config: nn.initializers.zeros,  # [K, G + 2, H]
    "out": _into_residual,  # [K, G, H, D]
    "gate_up": _from_model,  # [D, 2, F]
    "down": _into_residual,  # [F, D]
}


def initializer(name: str, config: ModelConfig) -> nn.initializers.Initializer:
    """The one of `INITIALIZERS`, sampled in float32 whatever dtype is stored.

    Sampled in bfloat16, a normal has some hundred distinct values and a biased mean.
    """

    def init(key, shape, dtype):
        return INITIALIZERS[name](config)(key, shape, jnp.float32).astype(dtype)

    return init


def param(module: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
    """A parameter of `module`, in its config's `param_dtype` or `Quantized`."""
    if is_quantized(stored := module.get_variable("params", name)):
        return stored
    config = module.config  # pyright: ignore[reportAttributeAccessIssue]
    dtype = jnp.dtype(config.param_dtype)
    return module.param(name, initializer(name, config), shape, dtype)


def project(
    x: Float[Array, "*axes I"], kernel: Float[Array, "..."] | Quantized
) -> jax.Array:
    """`x` times a kernel whose first axes multiply to I; the rest come out as one.

    One plain matrix product: as an einsum that moves the token axis too, XLA on CPU
    transposes the weights instead, which costs more than a decode step's product.
    """
    return products.product(x, kernel, flat=True)


def rms_norm(
    x: Float[Array, "*axes D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*axes D"]:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), in float32 inside."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + eps)
    scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return (normed * scale).astype(x.dtype)


# By the config's `activation`; gelu_tanh is the approximation that Gemma was made with.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def gated_mlp(
    x: Float[Array, "B T D"],
    gate_up: Float[Array, "D C=2 F"] | Quantized,
    down: Float[Array, "F D"] | Quantized,
    activation: str = "silu",
) -> Float[Array, "B T D"]:
    """SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202), gate and up in one product."""
    both = products.product(x, gate_up)  # [B, T, C, F]
    return project(ACTIVATIONS[activation](both[:, :, 0]) * both[:, :, 1], down)


def softcap(x: Float[Array, "*axes"], cap: float | None) -> Float[Array, "*axes"]:
    """`cap tanh(x / cap)` (Gemma 2, arXiv:2408.00118), or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale; normalises the last axis."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        scale = param(self, "scale", (x.shape[-1],)).astype(jnp.float32)
        if self.config.norm_unit_offset:
            scale = 1.0 + scale
        return rms_norm(x, scale, self.config.norm_eps)


class MLP(nn.Module):
    """`gated_mlp` with its kernels."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        gate_up = param(self, "gate_up", (config.dim_model, 2, config.dim_ff))
        down = param(self, "down", (config.dim_ff, config.dim_model))
        return gated_mlp(x, gate_up, down, config.activation)
