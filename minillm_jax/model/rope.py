"""Rotary position embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864).

The pairs that turn together are (x[i], x[i + R]), the layout of Hugging Face weights.
Angles are float32 and computed from positions, so that no table bounds the context.

Two of the scalings, `dynamic` and `longrope`, turn by the length of the whole sequence,
while keys in a cache stay as they were turned: `turning_point` tells where a row that
grows must be prefilled again.

Axes: B batch, T query length, U 1 or T, H head dim, R pairs (rotary_dim / 2).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minillm_jax.config import ModelConfig, RopeScaling


def cos_sin(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B U"],
    *,
    local: bool = False,
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosine and sine of every pair's angle at each position, float32.

    Args:
      config: tells base, rotary_dim and scaling.
      positions: absolute.
      lengths: tokens of the sequence that each position is in.
      local: for the layers with the sliding window.
    """
    own_base = local and config.local_rope_theta is not None
    theta = config.local_rope_theta if own_base else config.rope_theta
    exponents = np.arange(0, config.rotary_dim, 2).astype(np.float32)
    exponents = (exponents / np.float32(config.rotary_dim)).astype(np.float64)
    powers = (float(theta or 0.0) ** exponents).astype(np.float32)
    scaling = None if own_base else config.rope_scaling
    frequencies, factor = _frequencies(powers, scaling, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def _frequencies(
    powers: np.ndarray, scaling: RopeScaling | None, lengths: Int[Array, "B U"]
) -> tuple[Float[Array, "#B #U R"], float]:
    """Radians per token of each pair, and the factor of cosine and sine.

    `powers` are the base's, theta^(i / R). All of it is float32 and in the order of the
    models' own code: a unit in the last place is multiplied by the position.
    """
    if scaling is None:
        return jnp.asarray(1.0 / powers)[None, None], 1.0
    if scaling.rope_type in _BY_LENGTH:
        longer = lengths[..., None].astype(jnp.float32)
        return _BY_LENGTH[scaling.rope_type](powers, scaling, longer)
    frequencies, factor = _SCALINGS[scaling.rope_type](powers, scaling)
    assert frequencies.dtype == np.float32
    return jnp.asarray(frequencies)[None, None], factor


def _linear(powers: np.ndarray, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return 1.0 / powers / scaling.factor, 1.0


def _llama3(powers: np.ndarray, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Llama 3.1's rule (arXiv:2407.21783): slow pairs / factor, fast ones unchanged.

    A pair's share of the unscaled frequency grows linearly with the number of turns it
    makes over the original context, from 0 at low_freq_factor to 1 at high_freq_factor.
    """
    plain, original = 1.0 / powers, scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / plain
    share = (original / wavelengths - low) / (high - low)
    between = (1 - share) * plain / scaling.factor + share * plain
    slow, fast = wavelengths > original / low, wavelengths < original / high
    return np.where(slow, plain / scaling.factor, np.where(fast, plain, between)), 1.0


def _yarn(powers: np.ndarray, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2 and 3.4.

    A ramp over the pairs, from those that turn beta_fast times in the original context
    (unscaled) to those that turn beta_slow times (/ factor).
    """
    original, pairs = scaling.original_max_position_embeddings, len(powers)
    per_pair = math.log(powers[1])  # of theta^(1 / R)

    def pair(turns: float) -> float:
        return math.log(original / (2 * math.pi * turns)) / per_pair

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first if last != first else 0.001
    slow = np.clip((np.arange(pairs, dtype=np.float32) - first) / width, 0.0, 1.0)
    frequencies = 1.0 / (scaling.factor * powers) * slow + 1.0 / powers * (1 - slow)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    return frequencies, 0.1 * math.log(scaling.factor) + 1.0


def _dynamic(
    powers: np.ndarray, scaling: RopeScaling, lengths: Float[Array, "B U 1"]
) -> tuple[Float[Array, "B U R"], float]:
    """Dynamic NTK-aware scaling (YaRN's appendix B.2, arXiv:2309.00071).

    The base grows with the sequence beyond the original context n:
    theta (factor length / n - (factor - 1))^(d / (d - 2)), d = 2 R.
    """
    original, dim = scaling.original_max_position_embeddings, 2 * len(powers)
    share = jnp.maximum(lengths, original) / original
    stretch = scaling.factor * share - (scaling.factor - 1.0)
    exponents = (np.arange(0, dim, 2) / (dim - 2)).astype(np.float32)
    slower = jnp.exp(-jnp.log(stretch) * exponents[None, None])
    return jnp.asarray(1.0 / powers)[None, None] * slower, 1.0


def _longrope(
    powers: np.ndarray, scaling: RopeScaling, lengths: Float[Array, "B U 1"]
) -> tuple[Float[Array, "B U R"], float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753), as Phi-3 uses it.

    A divisor for each pair, another set of them beyond the original context n; cosine
    and sine times sqrt(1 + log(factor) / log(n)).
    """
    original = scaling.original_max_position_embeddings
    sets = (scaling.long_factor, scaling.short_factor)
    long, short = [(1.0 / (np.array(f, np.float32) * powers))[None, None] for f in sets]
    frequencies = jnp.where(lengths > original, long, short)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    growth = math.log(scaling.factor) / math.log(original) if original > 1 else 0.0
    return frequencies, math.sqrt(1 + growth)


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
_BY_LENGTH = {"dynamic": _dynamic, "longrope": _longrope}


def turning_point(config: ModelConfig) -> int | None:
    """Tokens beyond which keys of a shorter sequence are no good; None = no such point.

    `longrope` has one: its original context. The keys of `dynamic` change a little with
    every token and are kept as they are, as in transformers.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "longrope":
        return None
    return scaling.original_max_position_embeddings


def same_turns(
    config: ModelConfig, length: int, other: int, *, exactly: bool = False
) -> bool:
    """Whether keys of a sequence of one length are good for one of the other.

    `exactly` does not count those of `dynamic` as good that have changed a little.
    """
    scaling, point = config.rope_scaling, turning_point(config)
    if exactly and scaling is not None and scaling.rope_type == "dynamic":
        longest = max(length, other)
        return longest <= scaling.original_max_position_embeddings or length == other
    return point is None or (length > point) == (other > point)


def rotate(
    x: Float[Array, "*heads T H"],
    cos: Float[Array, "*#heads T R"],
    sin: Float[Array, "*#heads T R"],
) -> Float[Array, "*heads T H"]:
    """Turns the first R pairs of `x`, in float32; returns `x`'s dtype."""
    with jax.named_scope("rope"):
        pairs = cos.shape[-1]
        turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        parts = [part.astype(x.dtype) for part in turned]
        return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
