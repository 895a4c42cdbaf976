"""Next-token cross-entropy in chunks: logits `[B, T, V]` are never whole.

Axes: B batch, T sequence length, C tokens of a chunk, D model dim, V vocab.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.model.transformer import MiniLLM

LOGITS_BYTES = 64 * 2**20  # of a chunk's logits


def next_token_loss(
    model: MiniLLM,
    params: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    chosen: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of -log p(next token) in nats, and how many tokens it is the sum of.

    Of packed documents a token predicts the next one of its own document alone; without
    `segment_ids` a row is one document. Of those predicted only the `chosen` count.
    """
    x, _ = model.apply(
        {"params": params}, tokens, segment_ids=segment_ids, method="hidden"
    )  # pyright: ignore[reportAssignmentType]
    targets, counted = _next_tokens(tokens, segment_ids)
    if chosen is not None:  # by where a token is, not by where it is predicted
        counted &= jnp.roll(chosen, -1, axis=1)

    @jax.checkpoint
    def chunk_loss(chunk):
        x, targets, counted = chunk
        logits: Any = model.apply({"params": params}, x, method="unembed")
        wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - wanted
        return jnp.sum(jnp.where(counted, losses, 0.0))

    size = chunk_size(tokens.shape[0], tokens.shape[1], model.config.vocab_size)
    chunks = jax.tree.map(lambda a: _split(a, size), (x, targets, counted))

    def add(total, chunk):
        return total + chunk_loss(chunk), None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)
    return total, jnp.sum(counted, dtype=jnp.int32)


def chunk_size(rows: int, length: int, vocab_size: int) -> int:
    """C: a power of two whose logits fit, or the whole sequence."""
    fitting = max(1, LOGITS_BYTES // (4 * rows * vocab_size))
    return min(length, 1 << (fitting.bit_length() - 1))


def _next_tokens(tokens, segment_ids):
    """Each token's target, and whether it has one: the last of a document has none."""
    targets = jnp.roll(tokens, -1, axis=1)
    counted = jnp.broadcast_to(
        jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1, tokens.shape
    )
    if segment_ids is not None:
        same = segment_ids == jnp.roll(segment_ids, -1, axis=1)
        counted &= same & (segment_ids > 0)
    return targets, counted


def _split(x, size: int):
    """`[B, T, ...]` padded and cut into `[T / C, B, C, ...]`."""
    count = -(-x.shape[1] // size)
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, count * size - x.shape[1])
    x = jnp.pad(x, widths).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)
