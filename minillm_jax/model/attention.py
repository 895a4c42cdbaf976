"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over tokens or cache.

What a query may see is a comparison of absolute positions, so that one code serves the
full forward, a prefill chunk at any offset, a decode step and a wrapped ring:

    kv position     0 1 2 3 4 5 6 7     window = 4, sinks = 1
    query at 6      x . . . x x x .     the sink, then the last window - sinks

Axes: B batch, T query length, S key/value length, N query heads, K key/value heads,
G = N // K, P = G + 2 (a group's queries, its key, its value), H head dim, R = H/2,
D model dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from minillm_jax.config import ModelConfig
from minillm_jax.model import blockwise, cudnn, layers, rope, scores
from minillm_jax.model import cache as kv
from minillm_jax.model.quantized import Rounded, rounded
from minillm_jax.model.scores import Places, Scoring

# Scores of one block of queries and keys, bytes: what keeps memory linear.
SCORE_BYTES = 64 * 2**20
MAX_QUERY_BLOCK, MIN_QUERY_BLOCK = 256, 8
KEY_BLOCK = 256


class Span(NamedTuple):
    """The tokens of one call; every layer reads the same."""

    places: Places  # [B, T]
    counts: jax.Array  # [B] valid tokens of this call, the first ones of each row
    turns: tuple[jax.Array, jax.Array]  # cosine and sine, [B, T, R] each
    local_turns: tuple[jax.Array, jax.Array]  # those of sliding-window layers


@functools.partial(
    jax.jit, static_argnames=("rule", "scale", "softcap", "in_place"), inline=True
)
def attend(
    q: Float[Array, "*B K G T H"],
    k: Float[Array, "*B K S H"] | Rounded,
    v: Float[Array, "*B K S H"] | Rounded,
    *,
    queries: Places,
    keys: Places,
    rule: kv.SlotRule = kv.SlotRule(),
    scale: float | None = None,
    softcap: float | None = None,
    in_place: bool = False,
) -> Float[Array, "*B K G T H"]:
    """softmax(scale q kᵀ) v, softmax in float32.

    Several queries go block by block, and memory is linear in T and S: in training too,
    where a block is computed again rather than stored. A block of queries meets the
    keys block by block too (blockwise.py). On NVIDIA GPUs, where each decision to skip
    a block would wait for the host, it meets all keys at once. `scale` None is
    1 / sqrt(H); `softcap` caps the scaled scores. `in_place` is for what no gradient is
    taken of: see `_in_query_blocks`.

    A query that sees no key has an output, and gradients, that mean nothing. By blocks
    there are no forward-mode derivatives (`jax.jvp`, `jax.hessian`).
    """
    scoring = Scoring(rule, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    length, slots = q.shape[-2], k.shape[-2]
    in_blocks = functools.partial(_in_query_blocks, in_place=in_place)

    def at_once(q, k, v, queries, keys):
        def one(q, queries):
            mask = scores.visible(queries, keys, rule)
            return _attend_at_once(q, k, v, mask, scoring)

        return in_blocks(one, q, queries, query_block(q.shape, slots))

    def by_blocks(q, k, v, queries, keys):
        if not in_place:
            size = min(blockwise.TRAINING_BLOCK, slots)
            layout = blockwise.Layout(min(size, query_block(q.shape, size)), size)
            out: Any = blockwise.attend(q, k, v, queries, keys, scoring, layout)
            return out

        def one(q, queries):
            out, _ = blockwise.attend_block(
                *(q, k, v, queries, keys, scoring, KEY_BLOCK)
            )
            return out

        return in_blocks(one, q, queries, query_block(q.shape, KEY_BLOCK))

    few = slots <= (KEY_BLOCK if in_place else blockwise.TRAINING_BLOCK)
    if length == 1 or (few and (in_place or query_block(q.shape, slots) >= length)):
        return at_once(q, k, v, queries, keys)
    return jax.lax.platform_dependent(
        *(q, k, v, queries, keys), cuda=at_once, default=by_blocks
    )


def query_block(q_shape: tuple[int, ...], keys: int) -> int:
    """Queries of a block: a power of two whose scores of so many keys fit."""
    heads = math.prod(q_shape[:-2])
    fitting = max(1, SCORE_BYTES // (4 * heads * keys))
    return min(MAX_QUERY_BLOCK, max(MIN_QUERY_BLOCK, 2 ** (fitting.bit_length() - 1)))


def _in_query_blocks(attend_one, q, queries: Places, block: int, *, in_place: bool):
    """`attend_one(q, queries)` of each block of queries, put together.

    In place, a block's output replaces its queries. Otherwise the outputs have an array
    of their own, which a gradient needs, but of which XLA keeps one for every layer.
    """
    length = q.shape[-2]
    if block >= length:
        again = not in_place and length > blockwise.TRAINING_BLOCK
        return (jax.checkpoint(attend_one) if again else attend_one)(q, queries)
    q_blocks = scores.split(q, -2, block)
    query_blocks = jax.tree.map(lambda x: scores.split(x, -1, block), queries)

    def replaced(index, blocks):
        one = jax.tree.map(lambda x: x[index], (blocks, query_blocks))
        return blocks.at[index].set(attend_one(*one))

    if in_place:
        out = jax.lax.fori_loop(0, len(q_blocks), replaced, q_blocks)
    else:
        out = jax.lax.map(
            lambda xs: jax.checkpoint(attend_one)(*xs), (q_blocks, query_blocks)
        )
    return scores.join(out, -2, length)


def _attend_at_once(q, k, v, mask, scoring: Scoring):
    found = scores.masked(scores.scores(q, k, scoring), mask)
    probs = jax.nn.softmax(found, axis=-1)
    return scores.mix(probs, v, q.dtype).astype(q.dtype)


class Attention(nn.Module):
    """Projections, RoPE and `attend`; appends to its cache leaves if it has them."""

    config: ModelConfig
    window: int | None = None  # tokens that a query sees, itself included

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], span: Span, policy: kv.CachePolicy
    ) -> Float[Array, "B T D"]:
        config = self.config
        q, k, v = self._project_in(x, span)
        if self.has_variable("cache", "k"):
            mixed = self._attend_cached(q, k, v, span, policy)
        else:
            rule, places = kv.SlotRule(window=self.window), span.places
            packed, flash = places.segment_ids is not None, None
            if cudnn.attends(config, x.shape[1], rule, cached=False, packed=packed):
                flash = functools.partial(
                    *(cudnn.attend_alone, q, k, v), window=rule.window, scale=self.scale
                )
            mixed = self._attend(q, k, v, places, places, rule, flash)
        groups = (config.num_kv_heads, config.queries_per_kv_head, config.head_dim)
        out = layers.param(self, "out", (*groups, config.dim_model))
        mixed = jnp.moveaxis(mixed, 3, 1)  # [B, T, K, G, H]
        return layers.project(mixed.reshape(*x.shape[:2], -1), out)

    def _project_in(self, x, span: Span):
        """q `[B, K, G, T, H]`, k and v `[B, K, T, H]`, from one product."""
        config = self.config
        per_group = config.queries_per_kv_head + 2
        heads = (config.num_kv_heads, per_group, config.head_dim)
        kernel = layers.param(self, "qkv", (config.dim_model, *heads))
        qkv = layers.project(x, kernel).reshape(*x.shape[:2], *heads)
        if config.qkv_bias:
            qkv += layers.param(self, "qkv_bias", heads).astype(x.dtype)[None, None]
        qkv = jnp.moveaxis(qkv, 1, 3)  # [B, K, P, T, H]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if config.qk_norm:
            q = layers.RMSNorm(config, name="q_norm")(q)
            k = layers.RMSNorm(config, name="k_norm")(k)
        cos, sin = span.turns if self.window is None else span.local_turns
        cos, sin = cos[:, None], sin[:, None]
        q = rope.rotate(q, cos[:, None], sin[:, None])
        return q, rope.rotate(k, cos, sin), v

    def _attend_cached(self, q, k, v, span: Span, policy: kv.CachePolicy):
        """Writes k and v to the leaves, then attends to all that these hold."""
        leaves: Any = self.variables["cache"]
        slots = leaves["k"].shape[-2]
        rule = kv.slot_rule(self.config, self.window, slots, policy)
        call = (q, k, v, span.places, span.counts)
        one_row = leaves["k"].ndim == 3
        if one_row:  # its leaves have no batch axis
            call = jax.tree.map(lambda axis: axis[0], call)
        q, k, v, places, counts = call
        new = (k, v) if "k_scale" not in leaves else (rounded(k), rounded(v))

        with jax.named_scope("cache_write"):
            first = places.positions[..., 0]
            leaves = {
                name: kv.write(leaves[name], entry, first, counts, rule)
                for name, entry in kv.named(*new).items()
            }
        for name, leaf in leaves.items():
            self.put_variable("cache", name, leaf)
        held = kv.held(leaves)
        flash = None
        floats = not isinstance(held[0], Rounded)
        if floats and cudnn.attends(self.config, q.shape[-2], rule, cached=True):
            flash = functools.partial(self._flash_cached, q, k, v, held, first, counts)
        keys = Places(kv.slot_positions(first + counts, slots, rule))
        mixed = self._attend(q, *held, places, keys, rule, flash)
        return mixed[None] if one_row else mixed

    def _flash_cached(self, q, k, v, held, first, counts):
        """cuDNN's form of what follows a write; one row has no batch axis here."""
        one_row, call = held[0].ndim == 3, (q, k, v, *held, first, counts)
        if one_row:
            call = [x[None] for x in call]
        q, k, v, *held, first, counts = call
        if q.shape[-2] == 1:
            lengths = first + counts
            mixed = cudnn.attend_held(q, *held, held=lengths, scale=self.scale)
        else:
            mixed = cudnn.attend_after(*(q, k, v, *held), first=first, scale=self.scale)
        return mixed[0] if one_row else mixed

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.config.query_pre_attn_scalar**-0.5

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array | Rounded,
        v: jax.Array | Rounded,
        queries: Places,
        keys: Places,
        rule: kv.SlotRule,
        flash: Callable[[], jax.Array] | None,
    ) -> jax.Array:
        """By `attend`, or on an NVIDIA GPU by `flash` where there is one."""

        def by_xla():
            return attend(
                *(q, k, v),
                queries=queries,
                keys=keys,
                rule=rule,
                scale=self.scale,
                softcap=self.config.attention_softcap,
                in_place=self.has_variable("cache", "k"),
            )

        with jax.named_scope("attend"):
            if flash is None:
                return by_xla()
            return jax.lax.platform_dependent(cuda=flash, default=by_xla)
