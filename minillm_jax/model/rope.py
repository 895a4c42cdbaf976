"""Rotary position embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864).

The pairs that turn together are (x[i], x[i + H/2]), the layout of Hugging Face weights.
Angles are float32 and computed from positions, so that no table bounds the context.

Axes: B batch, T query length, H head dim, R = H/2 pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minillm_jax.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of each pair, `[R]` float32, scaled as the config says."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return plain.astype(np.float32)
    return _SCALINGS[config.rope_scaling.rope_type](plain, config.rope_scaling).astype(
        np.float32
    )


def _linear(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return plain / scaling.factor


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule (arXiv:2407.21783): slow pairs / factor, fast ones unchanged.

    A pair's share of the unscaled frequency grows linearly with the number of turns it
    makes over the original context, from 0 at low_freq_factor to 1 at high_freq_factor.
    """
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return share * plain + (1 - share) * plain / scaling.factor


_SCALINGS = {"linear": _linear, "llama3": _llama3}


def cos_sin(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosine and sine of every pair's angle at each position, float32."""
    per_token = frequencies(config)[None, None]
    angles = positions[..., None].astype(jnp.float32) * per_token
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "*heads T H"],
    cos: Float[Array, "*#heads T R"],
    sin: Float[Array, "*#heads T R"],
) -> Float[Array, "*heads T H"]:
    """Turns each pair of `x` by its angle, in float32; returns `x`'s dtype."""
    with jax.named_scope("rope"):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
