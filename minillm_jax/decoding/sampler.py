"""The sampler: processed logits, the tokens that are kept, and the draw.

The order is that of transformers' `generate`: logit bias, repetition penalty, then
temperature, top_k, top_p, min_p, then the draw. The frequency and presence penalties,
which it lacks, are those of OpenAI's API, and come after the repetition penalty.

Nothing sorts the vocabulary. What top_k and top_p keep is everything from a threshold
on: the smallest value above which lie less than k tokens, or less than a share of the
probability. It is found among the 64 largest logits where they suffice, else by a
search over the bits of a float; both are exact. On NVIDIA GPUs, where finding the
largest would sort, and deciding wait for the host, it is always the search. Ties of
the threshold are kept, as transformers' top_k does.

Axes: B batch, V vocab, C candidates, W weights of a draw.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

NUM_CANDIDATES = 64  # largest logits that are looked at before the whole row is
SEARCH_BITS = 4  # of a value that a round of the search settles on a GPU
BLOCK_SIZE = 128  # of the two-level draw
MIN_TEMPERATURE = 1e-6  # a lower one is taken for this one: it would overflow


class Sampler(NamedTuple):
    """The fields of SamplingParams that change logits or choose among them."""

    temperature: jax.Array  # [B] float32, as those below unless said
    top_k: jax.Array  # [B] int32
    top_p: jax.Array  # [B]
    min_p: jax.Array  # [B]
    repetition_penalty: jax.Array  # [B]
    frequency_penalty: jax.Array  # [B]
    presence_penalty: jax.Array  # [B]
    bias: jax.Array  # [B, V]
    prompt: jax.Array  # [B, V] bool, tokens of the prompt
    seed: jax.Array  # [B] uint32
    sample_index: jax.Array  # [B] int32, tells apart prompts with one SamplingParams


def first_largest(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`argmax` as two plain reductions: XLA on CPU takes five times as long for it."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(x == largest, index, x.shape[-1]), axis=-1)
    return jnp.minimum(first, x.shape[-1] - 1)  # where all are NaN


def penalised(
    logits: Float[Array, "B V"], sampler: Sampler, counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Logits with bias and penalties; `counts` are of the generated tokens."""
    logits = logits + sampler.bias
    repetition = sampler.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(sampler.prompt | (counts > 0), scaled, logits)
    times, once = counts.astype(jnp.float32), (counts > 0).astype(jnp.float32)
    logits = logits - sampler.frequency_penalty[:, None] * times
    return logits - sampler.presence_penalty[:, None] * once


def sample(
    logits: Float[Array, "B V"], sampler: Sampler, generated: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A token of each row from its processed logits; the largest at temperature 0.

    The draw is one uniform number a row, of the key
    `fold_in(fold_in(key(seed), sample_index), generated)`.
    """
    greedy = first_largest(logits)
    uniform = jax.vmap(_uniform)(sampler.seed, sampler.sample_index, generated)
    drawn = _draw(kept_weights(logits, sampler), uniform)
    return jnp.where(sampler.temperature == 0.0, greedy, drawn)


def _uniform(seed, sample_index, generated):
    key = jax.random.fold_in(jax.random.key(seed), sample_index)
    return jax.random.uniform(jax.random.fold_in(key, generated), dtype=jnp.float32)


def kept_weights(
    logits: Float[Array, "B V"], sampler: Sampler
) -> Float32[Array, "B V"]:
    """Unnormalised probabilities after temperature, top_k, top_p and min_p."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    x = logits - jnp.where(jnp.isfinite(largest), largest, 0.0)
    x = x / jnp.maximum(sampler.temperature, MIN_TEMPERATURE)[:, None]
    candidates, _ = jax.lax.top_k(x, min(NUM_CANDIDATES, x.shape[-1]))

    k = jnp.maximum(sampler.top_k, 1).astype(jnp.float32)
    lowest = _threshold(x, candidates, jnp.ones_like, k, sampler.top_k > 0)

    def weigh(x):
        return jnp.where(x >= lowest[:, None], jnp.exp(x), 0.0)

    weights = weigh(x)
    mass = sampler.top_p * jnp.sum(weights, axis=-1)
    mass = jnp.maximum(mass, jnp.finfo(jnp.float32).tiny)  # the likeliest always stays
    nucleus = _threshold(x, candidates, weigh, mass, sampler.top_p < 1.0)
    lowest = jnp.maximum(nucleus, jnp.log(sampler.min_p))
    return jnp.where(x >= lowest[:, None], weights, 0.0)


def _threshold(
    x: Float[Array, "B V"],
    candidates: Float[Array, "B C"],
    weigh: Callable[[jax.Array], jax.Array],
    target: Float[Array, " B"],
    wanted: Bool[Array, " B"],
) -> Float[Array, " B"]:
    """The smallest value above which less than `target` of the weight lies.

    Args:
      x: values, at most 0.
      candidates: the largest of them, descending.
      weigh: a value's weight.
      target: more than 0.
      wanted: rows that need a threshold; the others get -inf.
    """

    def among_candidates(x, candidates):
        upto = jnp.cumsum(weigh(candidates), axis=-1)
        above = jnp.pad(upto[:, :-1], ((0, 0), (1, 0)))
        among = jnp.where(above < target[:, None], candidates, jnp.inf).min(axis=-1)
        beyond = wanted & (upto[:, -1] < target)  # these need the whole row
        whole = jax.lax.cond(
            jnp.any(beyond), lambda: _search(x, weigh(x), target, 1), lambda: among
        )
        return jnp.where(beyond, whole, among)

    def in_whole_rows(x, candidates):
        return _search(x, weigh(x), target, SEARCH_BITS)

    found = jax.lax.platform_dependent(
        x, candidates, cuda=in_whole_rows, default=among_candidates
    )
    return jnp.where(wanted, found, -jnp.inf)


def _search(
    x: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    target: Float[Array, " B"],
    bits: int,
) -> Float[Array, " B"]:
    """`_threshold` over the whole row, some bits of the values in each round."""
    order = _ordered(x)

    def narrow(turn, low):
        step = jnp.uint32(1) << jnp.uint32(32 - bits * (turn + 1))
        parts = jnp.arange(1, 1 << bits, dtype=jnp.uint32)[None]
        ends = low[:, None] + parts * step - 1
        heavier = order[:, None] > ends[..., None]
        above = jnp.where(heavier, weights[:, None], 0.0).sum(axis=-1)
        return low + step * jnp.sum(above >= target[:, None], -1, dtype=jnp.uint32)

    low = jnp.zeros(x.shape[:1], jnp.uint32)
    low = jax.lax.fori_loop(0, 32 // bits, narrow, low, unroll=bits > 1)
    low = jnp.maximum(low, _ordered(jnp.float32(-jnp.inf)))
    return jax.lax.bitcast_convert_type(
        jnp.where(low >> 31 == 1, low ^ jnp.uint32(1 << 31), ~low), jnp.float32
    )


def _ordered(x: jax.Array) -> jax.Array:
    """Floats as whole numbers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _draw(
    weights: Float32[Array, "B V"], uniform: Float32[Array, " B"]
) -> Int[Array, " B"]:
    """The token where the weights, added up, pass a `uniform` share of their sum.

    Added up in two levels, blocks and then one block: a running sum over the whole
    vocabulary is slow. Tokens of weight 0 are never drawn, however sums are rounded.
    """
    batch_size, vocab_size = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -vocab_size % BLOCK_SIZE)))
    blocks = weights.reshape(batch_size, -1, BLOCK_SIZE)
    sums = blocks.sum(axis=-1)
    passed = uniform * jnp.cumsum(sums, axis=-1)[:, -1]
    block, passed = _passing(sums, passed)
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK_SIZE + _passing(inner, passed)[0]


def _passing(
    weights: Float32[Array, "B W"], target: Float32[Array, " B"]
) -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
    """Where the running sum passes `target`, and what of it is left there."""
    upto = jnp.cumsum(weights, axis=-1)
    positions = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    # Rounded, a sum may stay below its target, and a target lie below 0 or a running
    # sum move where the weight is 0: only what has weight is ever taken.
    there = weights > 0
    last = jnp.max(jnp.where(there, positions[None], 0), axis=-1, keepdims=True)
    passes = there & (upto > target[:, None])
    index = jnp.min(jnp.where(passes, positions[None], last), axis=-1)
    before = jnp.where(positions[None] == index[:, None] - 1, upto, 0.0).sum(axis=-1)
    return index, target - before
