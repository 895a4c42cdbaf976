"""The oracle of a model's logits: NumPy, float64, and no code of `minillm_jax.model`.

Written from the formulas, a row and a head at a time, without a cache; not fast. What
the model computes is compared with it, by the tests and by `cli.verify`.

Axes: B batch, T tokens of a row, K key/value heads, G queries per key/value head,
H head dim, D model dim, F ffn dim, V vocab.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from minillm_jax.config import ModelConfig

Rows = Any  # an array of integers, a row for each sequence


def reference_logits(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: Rows,
    *,
    lengths: Rows | None = None,
    segment_ids: Rows | None = None,
    window: int | None = None,
    sinks: int = 0,
    reach: int = 0,
) -> np.ndarray:
    """Next-token logits of every token, float64 `[B, T, V]`.

    Args:
      config: its dtypes are not read.
      params: the inner tree, of any dtype.
      tokens: `[B, T]`, of any T.
      lengths: `[B]`, each row's valid tokens; logits of the rest are 0.
      segment_ids: `[B, T]`, packed documents from 1 on; logits of padding (0) are 0.
      window: what a query sees in every layer, sinks included; None = as the config
        says.
      sinks: first positions that every query after them sees, as in a ring.
      reach: tokens that RoPE turns for, where a sequence has fewer.
    """
    tokens = np.asarray(tokens)
    rows = [
        _Row(tokens, row, lengths=lengths, segment_ids=segment_ids)
        for row in range(len(tokens))
    ]
    embedding = _float64(params["embedding"])
    xs = [embedding[row.ids] * config.embedding_scale for row in rows]
    for layer in range(config.num_layers):
        own = None if layer in config.global_layers else config.sliding_window
        block = _float64(params[f"layers_{layer}"])  # one at a time
        for index, row in enumerate(rows):
            mask = _mask(row.segments, own if window is None else window, sinks)
            turns = _turns(config, row.segments, own is not None, row.length, reach)
            xs[index] = _block(config, block, xs[index], mask, turns)
    head = embedding.T if config.tie_embeddings else _float64(params["lm_head"])
    norm = _float64(params["final_norm"])
    logits = [
        _capped(_rms_norm(config, x, norm) @ head, config.logits_softcap) for x in xs
    ]
    valid = np.stack([row.valid for row in rows])
    return np.where(valid[..., None], np.stack(logits), 0.0)


class _Row:
    """The ids of a sequence, their documents, and which of them are valid."""

    def __init__(self, tokens, row: int, *, lengths, segment_ids):
        self.ids = tokens[row]
        segments = np.ones_like(self.ids) if segment_ids is None else segment_ids[row]
        self.segments = np.asarray(segments)
        self.length = (
            len(self.ids) if lengths is None else int(np.asarray(lengths)[row])
        )
        self.valid = (self.segments > 0) & (np.arange(len(self.ids)) < self.length)


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


def _capped(x, cap: float | None) -> np.ndarray:
    return x if cap is None else np.tanh(x / cap) * cap


def _rms_norm(config: ModelConfig, x, norm) -> np.ndarray:
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    scale = norm["scale"] + (1 if config.norm_unit_offset else 0)
    return x / np.sqrt(mean_square + config.norm_eps) * scale


def _block(config: ModelConfig, block, x, mask, turns) -> np.ndarray:
    """One layer: attention and MLP, added to `x` `[T, D]`."""
    normed = _rms_norm(config, x, block["attention_norm"])
    added = _attention(config, block["attention"], normed, mask, turns)
    if config.post_norms:
        added = _rms_norm(config, added, block["attention_post_norm"])
    x = x + added
    added = _mlp(config, block["mlp"], _rms_norm(config, x, block["mlp_norm"]))
    if config.post_norms:
        added = _rms_norm(config, added, block["mlp_post_norm"])
    return x + added


def _mlp(config: ModelConfig, kernels, x) -> np.ndarray:
    gate, up = x @ kernels["gate_up"][:, 0], x @ kernels["gate_up"][:, 1]
    if config.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:  # GELU by its tanh approximation (Hendrycks & Gimpel, arXiv:1606.08415)
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gate = gate * (1 + np.tanh(inner)) / 2
    return (gate * up) @ kernels["down"]


def _attention(config: ModelConfig, block, x, mask, turns) -> np.ndarray:
    """All heads' mixed values, projected and added up: `[T, D]`."""
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
        k = _rotate(k, *turns)
        for group, q in enumerate(queries):
            scores = _rotate(q, *turns) @ k.T / math.sqrt(config.query_pre_attn_scalar)
            scores = _capped(scores, config.attention_softcap)
            scores = np.where(mask, scores, -np.inf)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probs = scores / scores.sum(axis=-1, keepdims=True)
            out = out + probs @ v @ block["out"][kv_head, group]
    return out


def _turns(config: ModelConfig, segments, local: bool, length: int, reach: int):
    """Cosine and sine `[T, R]` of each token's place in its document."""
    cos, sin = [], []
    bounds = [0, *(np.flatnonzero(np.diff(segments)) + 1), len(segments)]
    for first, end in itertools.pairwise(bounds):
        total = length if len(bounds) == 2 else end - first
        frequencies, factor = _frequencies(config, local, max(total, reach))
        angles = np.outer(np.arange(end - first), frequencies)
        cos.append(np.cos(angles) * factor)
        sin.append(np.sin(angles) * factor)
    return np.vstack(cos), np.vstack(sin)


def _rotate(x, cos, sin) -> np.ndarray:
    """RoPE of one head's `[T, H]`: the pairs (x[i], x[i + R]) turn together."""
    pairs = cos.shape[-1]
    first, second, rest = x[:, :pairs], x[:, pairs : 2 * pairs], x[:, 2 * pairs :]
    return np.hstack([first * cos - second * sin, second * cos + first * sin, rest])


def _frequencies(config: ModelConfig, local: bool, length: int):
    """Radians per token of each pair, in a sequence of `length`; cosine's factor."""
    theta, scaling, dim = config.rope_theta, config.rope_scaling, config.rotary_dim
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    if scaling is not None and scaling.rope_type == "dynamic":
        original = scaling.original_max_position_embeddings
        grown = scaling.factor * max(length, original) / original - scaling.factor + 1
        theta *= grown ** (dim / (dim - 2))
    # In float32, step by step: such numbers the models were trained with.
    powers = [
        np.float32(theta ** float(np.float32(2 * i / dim))) for i in range(dim // 2)
    ]
    if scaling is None or scaling.rope_type == "dynamic":
        return np.array([1 / power for power in powers], float), 1.0
    scaled = [_scaled(scaling, p, i, length, theta, dim) for i, p in enumerate(powers)]
    return np.array(scaled, float), _cosine_factor(scaling)


def _scaled(scaling, power, pair: int, length: int, theta, dim) -> float:
    """A pair's frequency; `llama3` and `yarn` are told by wavelengths, in tokens."""
    original, kind = scaling.original_max_position_embeddings, scaling.rope_type
    frequency = 1 / power
    if kind == "linear":
        return frequency / scaling.factor
    if kind == "longrope":
        divisors = scaling.long_factor if length > original else scaling.short_factor
        return 1 / (divisors[pair] * power)
    if kind == "yarn":
        bounds = [
            dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        ]
        if scaling.truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], dim - 1)
        ramp = (pair - low) / (high - low if high != low else 0.001)
        kept = 1 - min(max(ramp, 0), 1)
        return kept * frequency + (1 - kept) * frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _cosine_factor(scaling) -> float:
    if scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type == "yarn":
        return 1 + math.log(scaling.factor) / 10
    ratio = math.log(scaling.factor) / math.log(
        scaling.original_max_position_embeddings
    )
    return math.sqrt(1 + ratio)
