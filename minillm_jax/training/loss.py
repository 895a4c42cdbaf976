"""Next-token cross-entropy in chunks: logits `[B, T, V]` are never whole.

Its gradient is taken chunk by chunk too, beside the loss and from the same logits:
nothing of them is kept, and none are computed again.

Axes: B batch, T sequence length, C tokens of a chunk, D model dim, V vocab.
"""

import functools
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
    head = {name: params[name] for name in model.head_names}
    total: Any = _summed(model, head, params, x, targets, counted)
    return total, jnp.sum(counted, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    model: MiniLLM,
    head: Mapping[str, Any],
    params: Mapping[str, Any],
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """The loss of hidden states; `head` are those of `params` that gradients go to."""

    def add(total, chunk):
        return total + _chunk_loss(head, model, params, *chunk), None

    chunks = _chunks(model, x, targets, counted)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _chunk_loss(head, model, params, x, targets, counted):
    logits: Any = model.apply({"params": {**params, **head}}, x, method="unembed")
    wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - wanted
    return jnp.sum(jnp.where(counted, losses, 0.0))


def _summed_forward(model, head, params, x, targets, counted):
    """The loss, and its gradients by `head` and `x`, which are all that is kept."""

    def add(sums, chunk):
        loss, (d_head, d_x) = jax.value_and_grad(_chunk_loss, argnums=(0, 3))(
            head, model, params, *chunk
        )
        return jax.tree.map(jnp.add, sums, (loss, d_head)), d_x

    nothing = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, head)
    chunks = _chunks(model, x, targets, counted)
    (total, d_head), d_chunks = jax.lax.scan(add, nothing, chunks)
    d_x = jnp.moveaxis(d_chunks, 0, 1).reshape(x.shape[0], -1, x.shape[-1])
    return total, (d_head, d_x[:, : x.shape[1]])


def _summed_backward(model, grads, d_total):
    d_head, d_x = jax.tree.map(lambda grad: grad * d_total.astype(grad.dtype), grads)
    return d_head, None, d_x, None, None


_summed.defvjp(_summed_forward, _summed_backward)


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


def _chunks(model: MiniLLM, x, targets, counted):
    size = chunk_size(x.shape[0], x.shape[1], model.config.vocab_size)
    return jax.tree.map(lambda a: _split(a, size), (x, targets, counted))


def _split(x, size: int):
    """`[B, T, ...]` padded and cut into `[T / C, B, C, ...]`."""
    count = -(-x.shape[1] // size)
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, count * size - x.shape[1])
    x = jnp.pad(x, widths).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)
