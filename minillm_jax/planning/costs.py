"""Parameters, FLOPs and bytes of a model, from its config alone: the one place.

Counts are exact for parameters and bytes. FLOPs count a multiply-add as two and leave
out what is not a matrix product. "auto" dtypes must be resolved first.
"""

from collections.abc import Sequence

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
    norms = 4 if config.post_norms else 2
    layer = layer_kernels(config) + norms * config.dim_model
    if config.qkv_bias:
        heads = config.num_heads + 2 * config.num_kv_heads
        layer += heads * config.head_dim
    if config.qk_norm:
        layer += 2 * config.head_dim
    tables = 1 if config.tie_embeddings else 2
    table = config.vocab_size * config.dim_model
    return config.num_layers * layer + tables * table + config.dim_model


def quantized_kernels(config: ModelConfig) -> tuple[int, int]:
    """Elements of the kernels that are in int8, and their output features."""
    if config.quantization == "none":
        return 0, 0
    heads = config.num_heads + 2 * config.num_kv_heads
    outputs = heads * config.head_dim + 2 * config.dim_model + 2 * config.dim_ff
    head = config.vocab_size * config.dim_model
    elements = config.num_layers * layer_kernels(config) + head
    return elements, config.num_layers * outputs + config.vocab_size


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the parameters as stored, the float32 scales of int8 ones included."""
    elements, outputs = quantized_kernels(config)
    floats = (parameters(config) - elements) * itemsize(config.param_dtype)
    return floats + elements + 4 * outputs


def cache_bytes(config: ModelConfig, batch_size: int, slots: Sequence[int]) -> int:
    """Bytes of the keys and values in each layer's `slots`, of every row.

    The float32 scales of int8 ones included.
    """
    head = config.head_dim * itemsize(config.cache_dtype)
    head += 4 if config.cache_dtype == "int8" else 0
    return batch_size * sum(slots) * 2 * config.num_kv_heads * head


def seen(config: ModelConfig, context: int) -> list[int]:
    """Tokens that a query sees in each layer, of `context` held and itself included."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return [min(context, window or context) for window in windows]


def decode_step_bytes(config: ModelConfig, batch_size: int, context: int) -> int:
    """Bytes a decode step cannot avoid reading: the least that any code could do.

    Every weight once (of an untied embedding one row per token), and of the cache the
    `context` tokens that each row holds, or the windows of them that it sees.
    """
    size = itemsize(config.param_dtype)
    read = weight_bytes(config)
    if not config.tie_embeddings:
        read -= (config.vocab_size - batch_size) * config.dim_model * size
    return read + cache_bytes(config, batch_size, seen(config, context))


def forward_flops(config: ModelConfig, tokens: int, context: int = 0) -> int:
    """FLOPs of a forward over `tokens` new tokens of one row that holds `context`.

    Causal: a token attends to those before it and itself, or to its window. The output
    head is counted for every token; a prefill needs it for one.
    """
    head = config.vocab_size * config.dim_model
    products = config.num_layers * layer_kernels(config) + head
    pairs = 0  # of a query and a key that it sees
    for window in seen(config, context + tokens):
        grown = max(0, min(window - context, tokens))  # queries whose view still grows
        pairs += grown * context + grown * (grown + 1) // 2 + (tokens - grown) * window
    attention = 2 * config.num_heads * config.head_dim * pairs
    return 2 * (tokens * products + attention)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs from a row's prompt to the logits of its last token alone."""
    head = 2 * config.vocab_size * config.dim_model
    return forward_flops(config, tokens) - (tokens - 1) * head


def train_flops(config: ModelConfig, rows: int, tokens: int) -> int:
    """FLOPs of a training step over rows of so many tokens: three forwards.

    Each row counts as one document; of packed ones attention does less.

    The backward pass takes a gradient of both factors of every product. What `remat`
    computes again is not counted.
    """
    return 3 * rows * forward_flops(config, tokens)
