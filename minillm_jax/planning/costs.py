"""Parameters, FLOPs and bytes of a model, from its config alone: the one place.

Counts are exact for parameters and bytes. FLOPs count a multiply-add as two and leave
out what is not a matrix product. "auto" dtypes must be resolved first.
"""

import jax.numpy as jnp

from minillm_jax.config import ModelConfig


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return jnp.dtype(dtype).itemsize


def layer_kernels(config: ModelConfig) -> int:
    """Elements of one layer's matrices: qkv, out, gate and up, down."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.dim_model * (heads * config.head_dim + 3 * config.dim_ff)


def parameters(config: ModelConfig) -> int:
    """Parameters of the model, embeddings included."""
    layer = layer_kernels(config) + 2 * config.dim_model
    if config.qkv_bias:
        heads = config.num_heads + 2 * config.num_kv_heads
        layer += heads * config.head_dim
    if config.qk_norm:
        layer += 2 * config.head_dim
    tables = 1 if config.tie_embeddings else 2
    table = config.vocab_size * config.dim_model
    return config.num_layers * layer + tables * table + config.dim_model


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the parameters as stored."""
    return parameters(config) * itemsize(config.param_dtype)


def cache_bytes(config: ModelConfig, batch_size: int, slots: int) -> int:
    """Bytes of the keys and values in `slots` slots of every layer and row."""
    per_slot = 2 * config.num_kv_heads * config.head_dim
    elements = config.num_layers * batch_size * slots * per_slot
    return elements * itemsize(config.cache_dtype)


def decode_step_bytes(config: ModelConfig, batch_size: int, context: int) -> int:
    """Bytes a decode step cannot avoid reading: the least that any code could do.

    Every weight once (of an untied embedding one row per token), and of the cache the
    `context` tokens that each row holds, or the window of them that it sees.
    """
    size = itemsize(config.param_dtype)
    read = weight_bytes(config)
    if not config.tie_embeddings:
        read -= (config.vocab_size - batch_size) * config.dim_model * size
    seen = min(context, config.sliding_window or context)
    return read + cache_bytes(config, batch_size, seen)


def forward_flops(config: ModelConfig, tokens: int, context: int = 0) -> int:
    """FLOPs of a forward over `tokens` new tokens of one row that holds `context`.

    Causal: a token attends to those before it and itself, or to its window. The output
    head is counted for every token; a prefill needs it for one.
    """
    head = config.vocab_size * config.dim_model
    products = config.num_layers * layer_kernels(config) + head
    window = config.sliding_window or context + tokens
    grown = max(0, min(window - context, tokens))  # queries whose view still grows
    seen = grown * context + grown * (grown + 1) // 2 + (tokens - grown) * window
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * seen
    return 2 * (tokens * products + attention)
