"""Attention by blocks of queries and keys, and its gradient in the same way.

A block's softmax is put right as the maximum of its scores grows (FlashAttention, Dao
et al. 2022, arXiv:2205.14135). For the gradient only the outputs and the logarithms of
the softmax's sums are kept: a second pass over the blocks computes the weights again.
Blocks without a key that a query may see are skipped in both.

Axes: B batch, T query length, S key/value length, K key/value heads, G query heads of
each, H head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model import scores
from minillm_jax.model.scores import Places, Scoring

# Queries and keys of a block where gradients are taken. On CPU the scores stay near the
# processor: 1.5 times as fast as blocks of 256.
TRAINING_BLOCK = 128


class Layout(NamedTuple):
    """How queries and keys are cut."""

    queries: int
    keys: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    q: Float[Array, "*B K G T H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    queries: Places,
    keys: Places,
    scoring: Scoring,
    layout: Layout,
) -> Float[Array, "*B K G T H"]:
    """softmax(scores) v. S is at least a block of keys."""
    return _forward(q, k, v, queries, keys, scoring, layout)[0]


def attend_block(q, k, v, queries: Places, keys: Places, scoring: Scoring, size: int):
    """One block of queries, over blocks of `size` keys.

    Returns:
      The output `[*B, K, G, T, H]`, and the logarithm of the softmax's sum
      `[*B, K, G, T]`, float32.
    """

    def add(sums, block):
        highest, total, mixed = sums  # of the blocks so far
        k, v, mask = block
        found = scores.masked(scores.scores(q, k, scoring), mask)
        higher = jnp.maximum(highest, jnp.max(found, axis=-1, keepdims=True))
        weights, faded = jnp.exp(found - higher), jnp.exp(highest - higher)
        total = total * faded + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = mixed * faded + scores.mix(weights, v, q.dtype)
        return higher, total, mixed

    highest = jnp.full((*q.shape[:-1], 1), scores.MASKED, jnp.float32)
    sums = highest, jnp.zeros_like(highest), jnp.zeros(q.shape, jnp.float32)
    over = _Keys(k, v, keys, queries, scoring, size)
    highest, total, mixed = over.scan(lambda sums, block, start: add(sums, block), sums)
    total = jnp.where(total > 0, total, 1.0)
    return (mixed / total).astype(q.dtype), (highest + jnp.log(total))[..., 0]


class _Keys(NamedTuple):
    """Blocks of keys and values, as some queries see them."""

    k: Any  # [*B, K, S, H], or in int8: `Rounded`
    v: Any
    places: Places
    queries: Places
    scoring: Scoring
    size: int

    def scan(self, add, sums):
        """`add(sums, (k, v, mask), start)` over the blocks with a key that is seen."""
        slots, size = self.k.shape[-2], self.size

        def step(sums, first):
            # The last block is moved inside; what it shares with the one before is
            # masked.
            start = jnp.minimum(first, slots - size)
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
            )
            places = jax.tree.map(lambda x: take(x, axis=-1), self.places)
            mask = scores.visible(self.queries, places, self.scoring.rule)
            mask &= jnp.broadcast_to(jnp.arange(size) >= first - start, mask.shape)

            def seen(sums):
                k, v = jax.tree.map(lambda x: take(x, axis=-2), (self.k, self.v))
                return add(sums, (k, v, mask), start)

            return jax.lax.cond(jnp.any(mask), seen, lambda sums: sums, sums), None

        return jax.lax.scan(step, sums, jnp.arange(0, slots, size))[0]


def _forward(q, k, v, queries, keys, scoring, layout):
    def one(blocks, index):
        q, places = jax.tree.map(lambda x: x[index], (blocks, query_blocks))
        out, log_sums = attend_block(q, k, v, places, keys, scoring, layout.keys)
        return blocks.at[index].set(out), log_sums  # in the place of its queries

    blocks, query_blocks = _in_blocks(layout, q, queries)
    out, log_sums = jax.lax.scan(one, blocks, jnp.arange(len(blocks)))
    length = q.shape[-2]
    out, log_sums = scores.join(out, -2, length), scores.join(log_sums, -1, length)
    return out, (q, k, v, queries, keys, out, log_sums)


def _backward(scoring, layout, kept, d_out):
    """Gradients of q, k and v, summed in float32."""
    q, k, v, queries, keys, out, log_sums = kept
    # What every score's gradient of a query has subtracted.
    shared = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    blocks, query_blocks = _in_blocks(layout, q, queries)
    d_out_blocks = scores.split(d_out, -2, layout.queries)
    rows = [scores.split(x, -1, layout.queries)[..., None] for x in (log_sums, shared)]

    def one(carry, index):
        sums, blocks = carry
        given = blocks, d_out_blocks, *rows, query_blocks
        *rows_here, places = jax.tree.map(lambda x: x[index], given)
        over = _Keys(k, v, keys, places, scoring, layout.keys)
        add = functools.partial(_add_gradients, scoring, rows_here)
        d_q = jnp.zeros(blocks.shape[1:], jnp.float32)
        d_q, *sums = over.scan(add, (d_q, *sums))
        blocks = blocks.at[index].set(
            d_q.astype(q.dtype)
        )  # in the place of its queries
        return (tuple(sums), blocks), None

    sums = _zeros(k, d_out), _zeros(v, d_out)
    carry, _ = jax.lax.scan(one, (sums, blocks), jnp.arange(len(blocks)))
    (d_k, d_v), d_q = carry
    d_q = scores.join(d_q, -2, q.shape[-2])
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


def _add_gradients(scoring: Scoring, rows, sums, block, start):
    """What a block of queries and one of keys add to the gradients of q, k and v."""
    (q, d_out, log_sums, shared), (k, v, mask), (d_q, d_k, d_v) = rows, block, sums
    found = scores.scores(q, k, scoring)
    weights = jnp.exp(scores.masked(found, mask) - log_sums)
    d_weights = scores.scores(d_out, v, Scoring(scoring.rule, 1.0, None))
    d_scores = weights * (d_weights - shared) * scoring.scale
    if scoring.softcap is not None:
        d_scores *= 1.0 - jnp.square(found / scoring.softcap)
    d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
    d_q = d_q + scores.mix(d_scores, k, q.dtype)
    return d_q, _added(d_k, d_scores, q, start), _added(d_v, weights, d_out, start)


def _added(sums, weights, rows, start):
    """`sums` `[*B, K, S, H]` with a block's share: `rows` by the keys' weights."""
    share = jnp.einsum(
        "...KGTS,...KGTH->...KSH", weights, rows, preferred_element_type=jnp.float32
    )
    size = share.shape[-2]
    share += jax.lax.dynamic_slice_in_dim(sums, start, size, axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(sums, share, start, axis=-2)


def _in_blocks(layout: Layout, q: jax.Array, queries: Places):
    """Queries `[*B, K, G, T, H]` and their places, cut into blocks."""
    cut = jax.tree.map(lambda x: scores.split(x, -1, layout.queries), queries)
    return scores.split(q, -2, layout.queries), cut


def _zeros(x: jax.Array, after: jax.Array) -> jax.Array:
    """float32 zeros of a shape, which cannot be made before `after` is there.

    XLA would make those of all layers at once, and keep them.
    """
    zero = jnp.minimum(jnp.abs(after[(0,) * after.ndim].astype(jnp.float32)), 0.0)
    return jnp.broadcast_to(zero, x.shape)


attend.defvjp(_forward, _backward)
