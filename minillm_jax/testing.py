"""For tests, this package's and yours: a tiny config and the oracle of its logits.

`reference_logits` is written from the formulas, in NumPy and float64, a row and a head
at a time, with no cache. It shares no code with `minillm_jax.model`: that is its use.

Axes: B batch, T tokens of a row, K key/value heads, G queries per key/value head,
H head dim, D model dim, F ffn dim, V vocab.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from minillm_jax.config import ModelConfig

Rows = Any  # an array of integers, a row for each sequence


def tiny_config(**changes: Any) -> ModelConfig:
    """A config that compiles in a second and has every part of a big one."""
    fields: dict[str, Any] = {
        "max_seq_len": 64,
        "max_kv_cache_len": 96,
        "dim_model": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_layers": 2,
        "dim_ff": 64,
        "vocab_size": 61,
        "prefill_chunk": 16,
    }
    return ModelConfig(**(fields | changes))


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """The seconds of each compilation in the block, those ahead of time included."""
    compilations: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def perturbed(params: Mapping[str, Any], seed: int = 0, std: float = 0.2) -> Any:
    """`params` plus normal noise: no scale is 1, no bias is 0, logits are near 1."""
    generator = np.random.default_rng(seed)

    def noisy(node):
        if isinstance(node, Mapping):
            return {name: noisy(child) for name, child in sorted(node.items())}
        leaf = np.asarray(node)
        return (leaf + std * generator.standard_normal(leaf.shape)).astype(leaf.dtype)

    return noisy(params)


def reference_logits(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: Rows,
    *,
    lengths: Rows | None = None,
    segment_ids: Rows | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> np.ndarray:
    """Next-token logits of every token, float64 `[B, T, V]`.

    Args:
      config: its dtypes are not read.
      params: the inner tree, of any dtype.
      tokens: `[B, T]`, of any T.
      lengths: `[B]`, each row's valid tokens; logits of the rest are 0.
      segment_ids: `[B, T]`, packed documents from 1 on; logits of padding (0) are 0.
      window: what a query sees, sinks included; None = `config.sliding_window`, or all.
      sinks: first positions that every query after them sees, as in a ring.
    """
    tokens, weights = np.asarray(tokens), _float64(params)
    window = config.sliding_window if window is None else window
    logits = np.zeros((*tokens.shape, config.vocab_size))
    for row, ids in enumerate(tokens):
        segments = np.ones_like(ids) if segment_ids is None else segment_ids[row]
        segments = np.asarray(segments)
        mask = _mask(segments, window, sinks)
        x = weights["embedding"][ids]
        for layer in range(config.num_layers):
            block = weights[f"layers_{layer}"]
            normed = _rms_norm(config, x, block["attention_norm"])
            x = x + _attention(config, block["attention"], normed, segments, mask)
            x = x + _mlp(block["mlp"], _rms_norm(config, x, block["mlp_norm"]))
        head = weights["embedding"].T if config.tie_embeddings else weights["lm_head"]
        valid = segments > 0
        if lengths is not None:
            valid = valid & (np.arange(len(ids)) < np.asarray(lengths)[row])
        x = _rms_norm(config, x, weights["final_norm"])
        logits[row] = np.where(valid[:, None], x @ head, 0.0)
    return logits


def _float64(node) -> Any:
    if isinstance(node, Mapping):
        return {name: _float64(child) for name, child in node.items()}
    return np.asarray(node).astype(np.float64)


def _mask(segments, window: int | None, sinks: int) -> np.ndarray:
    """`[T, T]`, True where the query of that row sees the key of that column."""
    query, key = np.indices((len(segments), len(segments)))
    mask = (key <= query) & (segments[key] == segments[query])
    if window is not None:
        mask &= (key > query - (window - sinks)) | (key < sinks)
    return mask


def _rms_norm(config: ModelConfig, x, norm) -> np.ndarray:
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + config.norm_eps) * norm["scale"]


def _mlp(kernels, x) -> np.ndarray:
    gate, up = x @ kernels["gate_up"][:, 0], x @ kernels["gate_up"][:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ kernels["down"]


def _attention(config: ModelConfig, block, x, segments, mask) -> np.ndarray:
    """All heads' mixed values, projected and added up: `[T, D]`."""
    positions = np.zeros(len(segments))
    for i in range(1, len(segments)):  # each document's own start at 0
        positions[i] = positions[i - 1] + 1 if segments[i] == segments[i - 1] else 0
    groups = config.num_heads // config.num_kv_heads
    out = np.zeros_like(x)
    for kv_head in range(config.num_kv_heads):
        kernel = block["qkv"][:, kv_head]  # [D, G + 2, H]
        heads = [x @ kernel[:, i] for i in range(groups + 2)]  # of [T, H]
        if config.qkv_bias:
            biases = block["qkv_bias"][kv_head]
            heads = [head + bias for head, bias in zip(heads, biases, strict=True)]
        *queries, k, v = heads
        if config.qk_norm:
            k = _rms_norm(config, k, block["k_norm"])
            queries = [_rms_norm(config, q, block["q_norm"]) for q in queries]
        k = _rotate(config, k, positions)
        for group, q in enumerate(queries):
            scores = _rotate(config, q, positions) @ k.T / math.sqrt(config.head_dim)
            scores = np.where(mask, scores, -np.inf)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probs = scores / scores.sum(axis=-1, keepdims=True)
            out = out + probs @ v @ block["out"][kv_head, group]
    return out


def _rotate(config: ModelConfig, x, positions) -> np.ndarray:
    """RoPE of one head's `[T, H]`: the pairs (x[i], x[i + H/2]) turn together."""
    half = config.head_dim // 2
    angles = np.outer(positions, [_frequency(config, i) for i in range(half)])
    cos, sin, first, second = np.cos(angles), np.sin(angles), x[:, :half], x[:, half:]
    return np.hstack([first * cos - second * sin, second * cos + first * sin])


def _frequency(config: ModelConfig, pair: int) -> float:
    """Radians per token of a pair; `llama3` is told by wavelengths, in tokens."""
    frequency = 1.0 / config.rope_theta ** (2 * pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
