"""From logits to the next token: what a request asks for, as arrays with a row each.

The order is that of transformers' `generate`: logit_bias, repetition_penalty, frequency
and presence penalty, then temperature, top_k, top_p, min_p, then the draw. All numbers
are traced and belong to a row: no value of a field compiles anything anew, and rows
with different ones share an executable. Knows token ids, no model and no text.

Nothing sorts the vocabulary. What top_k and top_p keep is everything from a threshold
on: the smallest value above which lies less than k tokens, or less than a share of
the probability. It is found among the 64 largest logits where they suffice, else by
bisection over the bits of a float, exactly in both cases. Ties of the threshold are
kept, as transformers' top_k does.

Axes: B batch, V vocab, C candidates.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from minillm_jax import validation
from minillm_jax.validation import Range

MAX_STOP_IDS = 64  # of a row, EOS ids included
MAX_LOGPROBS = 20  # alternatives that are reported beside the sampled token
CANDIDATES = 64  # largest logits that are looked at before the whole row is
BLOCK = 128  # of the two-level draw
COLDEST = 1e-6  # lower temperatures are taken for this one: they would overflow
BIASES = Range(-1e30, 1e30)  # or -inf; far from what overflows float32


def _contradictions(values: dict, _: frozenset[str]) -> list[str]:
    bias = values.get("logit_bias") or {}
    problems = [
        (i, b, "an id is at least 0" if i < 0 else BIASES.problem(b))
        for i, b in bias.items()
        if i < 0 or b != -math.inf
    ]
    wrong = [(i, b, problem) for i, b, problem in problems if problem]
    return [f"logit_bias={{{i}: {b}}}: {problem}" for i, b, problem in wrong[:1]]


@validation.checked_fields(contradictions=_contradictions)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. 0, 1.0 and 0.0 turn top_k, top_p and min_p off.

    Raises:
      ConfigError: a ValueError that names every wrong field.
    """

    temperature: Annotated[float, Range(0.0, 1e6)] = 1.0  # 0 = greedy
    top_k: Annotated[int, Range(0, 2**31 - 1)] = 0  # the k likeliest
    # The likeliest that together have this probability (Holtzman et al. 2019,
    # arXiv:1904.09751).
    top_p: Annotated[float, Range(0.0, 1.0)] = 1.0
    # Those with this share of the likeliest's probability (Nguyen et al. 2024,
    # arXiv:2407.01082).
    min_p: Annotated[float, Range(0.0, 1.0)] = 0.0
    # Divides positive logits of tokens seen in prompt or completion, multiplies
    # negative ones (Keskar et al. 2019, arXiv:1909.05858).
    repetition_penalty: Annotated[float, Range(0.01, 100.0)] = 1.0
    frequency_penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0  # per time generated
    presence_penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0  # once generated
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these ids
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    stop: tuple[str, ...] = ()  # strings that end the text, and are not part of it
    stop_token_ids: tuple[int, ...] = ()  # ids that end it, beside the EOS ids
    # None, or report each token's log-probability, and those of as many likeliest.
    logprobs: Annotated[int | None, Range(0, MAX_LOGPROBS)] = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the largest raw logit, and nothing else is asked."""
        neutral = (1.0, 0.0, 0.0)
        penalties = (
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
        )
        rest = not self.logit_bias and self.logprobs is None
        return self.temperature == 0.0 and penalties == neutral and rest


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


class Rows(NamedTuple):
    """What each row was asked for; the same during a call."""

    stop_ids: jax.Array  # [B, MAX_STOP_IDS] int32, -1 = none
    budget: jax.Array  # [B] int32, tokens to generate in all
    known: jax.Array  # [V] bool, ids that may be chosen
    sampler: Sampler | None  # None = greedy, a smaller executable


class Progress(NamedTuple):
    """How far each row is; changes with every token."""

    tokens: jax.Array  # [B] int32, the last token, not yet in the cache
    active: jax.Array  # [B] bool, rows that go on
    generated: jax.Array  # [B] int32, tokens sampled so far
    counts: jax.Array | None  # [B, V] int32, how often each was; None when greedy


class Sampled(NamedTuple):
    """What a step gave; the logprobs are None when greedy, those of the raw logits."""

    tokens: jax.Array  # [B] int32, -1 for rows that are not active
    logprobs: jax.Array | None  # [B]
    top_ids: jax.Array | None  # [B, MAX_LOGPROBS] int32, the likeliest first
    top_logprobs: jax.Array | None  # [B, MAX_LOGPROBS]


def greedy_rows(stop_ids: Sequence[int], batch_size: int, vocab_size: int) -> Rows:
    """Rows that take the largest logit until one of `stop_ids`, without a budget."""
    arrays: dict[str, Any] = {
        "stop_ids": np.tile(_padded(stop_ids), (batch_size, 1)),
        "budget": np.full(batch_size, 2**31 - 1, np.int32),
        "known": np.ones(vocab_size, bool),
    }
    return Rows(**arrays, sampler=None)


def rows(
    params: Sequence[SamplingParams],
    *,
    sample_indices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    eos_token_ids: Sequence[int],
    known: Bool[np.ndarray | Array, " V"],
) -> Rows:
    """The arrays of a call's requests, on the host: one entry of each list per row."""
    arrays: dict[str, Any] = {
        "stop_ids": np.stack(
            [_padded((*eos_token_ids, *p.stop_token_ids)) for p in params]
        ),
        "budget": np.array(budgets, np.int32),
        "known": known,
    }
    if all(p.is_plain_greedy for p in params):
        return Rows(**arrays, sampler=None)
    sampler = _sampler(params, sample_indices, prompts, len(known))
    return Rows(**arrays, sampler=sampler)


def _sampler(
    params: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
) -> Sampler:
    bias = np.zeros((len(params), vocab_size), np.float32)
    seen = np.zeros((len(params), vocab_size), bool)
    for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        for token, value in (p.logit_bias or {}).items():
            bias[row, token] = value
        seen[row, np.asarray(prompt)] = True

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], dtype)

    arrays: dict[str, Any] = {name: column(name, np.float32) for name in _NUMBERS}
    arrays |= {"top_k": column("top_k", np.int32), "seed": column("seed", np.uint32)}
    arrays["sample_index"] = np.array(sample_indices, np.int32)
    arrays |= {"bias": bias, "prompt": seen}
    return Sampler(**arrays)


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


def _padded(stop_ids: Sequence[int]) -> np.ndarray:
    ids = list(dict.fromkeys(stop_ids))
    if len(ids) > MAX_STOP_IDS:
        raise validation.ConfigError(
            f"stop_token_ids: {len(ids)} ids with the EOS ids, but {MAX_STOP_IDS} is "
            "the most there may be"
        )
    return np.array(ids + [-1] * (MAX_STOP_IDS - len(ids)), np.int32)


def start(rows: Rows) -> Progress:
    """The progress before the first token, on the host."""
    batch_size = len(rows.budget)
    arrays: dict[str, Any] = {"counts": None}
    arrays |= {k: np.zeros(batch_size, np.int32) for k in ("tokens", "generated")}
    if rows.sampler is not None:
        arrays["counts"] = np.zeros((batch_size, len(rows.known)), np.int32)
    arrays["active"] = np.asarray(rows.budget) > 0
    return Progress(**arrays)


def choose(
    logits: Float[Array, "B V"], progress: Progress, rows: Rows
) -> tuple[Sampled, Progress]:
    """The next token of every active row, and which rows go on behind it."""
    active, counts = progress.active, progress.counts
    logits = logits.astype(jnp.float32)
    if rows.sampler is None:
        best = _first_largest(jnp.where(rows.known[None], logits, -jnp.inf))
        sampled = Sampled(jnp.where(active, best, -1), None, None, None)
    else:
        assert counts is not None
        processed = penalised(logits, rows.sampler, counts)
        processed = jnp.where(rows.known[None], processed, -jnp.inf)
        tokens = sample(processed, rows.sampler, progress.generated)
        sampled = _with_logprobs(logits, jnp.where(active, tokens, -1))
        row = jnp.arange(len(tokens))
        counts = counts.at[row, tokens].add(active.astype(jnp.int32))
    tokens = jnp.where(active, sampled.tokens, progress.tokens)
    generated = progress.generated + active
    stopped = jnp.any(tokens[:, None] == rows.stop_ids, axis=-1)
    going = active & ~stopped & (generated < rows.budget)
    return sampled, Progress(tokens, going, generated, counts)


def _first_largest(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`argmax` as two plain reductions: XLA on CPU takes five times as long for it."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(x == largest, index, x.shape[-1]), axis=-1)
    return jnp.minimum(first, x.shape[-1] - 1)  # where all are NaN


def _with_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Sampled:
    total = jax.nn.logsumexp(logits, axis=-1)
    index = jnp.maximum(tokens, 0)[:, None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[:, 0] - total
    top, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return Sampled(tokens, chosen, ids, top - total[:, None])


def penalised(
    logits: Float[Array, "B V"], sampler: Sampler, counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Logits with bias and penalties; `counts` are of the generated tokens."""
    logits = logits + sampler.bias
    repetition = sampler.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(sampler.prompt | (counts > 0), scaled, logits)
    logits = logits - sampler.frequency_penalty[:, None] * counts
    return logits - sampler.presence_penalty[:, None] * (counts > 0)


def sample(
    logits: Float[Array, "B V"], sampler: Sampler, generated: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A token of each row from its processed logits; the largest at temperature 0.

    The draw is one uniform number a row, of the key
    `fold_in(fold_in(key(seed), sample_index), generated)`.
    """
    with jax.named_scope("sample"):
        greedy = _first_largest(logits)
        uniform = jax.vmap(_uniform)(sampler.seed, sampler.sample_index, generated)
        drawn = _draw(kept_weights(logits, sampler), uniform)
        return jnp.where(sampler.temperature == 0.0, greedy, drawn)


def _uniform(seed, sample_index, generated):
    key = jax.random.fold_in(jax.random.key(seed), sample_index)
    return jax.random.uniform(jax.random.fold_in(key, generated))


def kept_weights(
    logits: Float[Array, "B V"], sampler: Sampler
) -> Float32[Array, "B V"]:
    """Unnormalised probabilities after temperature, top_k, top_p and min_p."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    x = logits - jnp.where(jnp.isfinite(largest), largest, 0.0)
    x = x / jnp.maximum(sampler.temperature, COLDEST)[:, None]
    candidates, _ = jax.lax.top_k(x, min(CANDIDATES, x.shape[-1]))

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
    upto = jnp.cumsum(weigh(candidates), axis=-1)
    above = jnp.pad(upto[:, :-1], ((0, 0), (1, 0)))
    among = jnp.where(above < target[:, None], candidates, jnp.inf).min(axis=-1)
    beyond = wanted & (upto[:, -1] < target)  # these need the whole row
    whole = jax.lax.cond(
        jnp.any(beyond), lambda: _bisect(x, weigh(x), target), lambda: among
    )
    return jnp.where(wanted, jnp.where(beyond, whole, among), -jnp.inf)


def _bisect(
    x: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]
) -> Float[Array, " B"]:
    """`_threshold` over the whole row, by the bits of the values: 31 halvings."""
    order = _ordered(x)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.where(order > middle[:, None], weights, 0.0).sum(axis=-1)
        fits = above < target
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    high = jnp.zeros(x.shape[:1], jnp.int32)
    low = jnp.full_like(high, _ordered(jnp.float32(-jnp.inf)))
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    bits = jnp.where(low < 0, low ^ 0x7FFFFFFF, low)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _ordered(x: jax.Array) -> jax.Array:
    """Floats as whole numbers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _draw(
    weights: Float32[Array, "B V"], uniform: Float32[Array, " B"]
) -> Int[Array, " B"]:
    """The token where the weights, added up, pass a `uniform` share of their sum.

    Added up in two levels, blocks and then one block: a running sum over the whole
    vocabulary is slow. Tokens of weight 0 are never drawn, however sums are rounded.
    """
    batch_size, vocab_size = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -vocab_size % BLOCK)))
    blocks = weights.reshape(batch_size, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    passed = uniform * jnp.cumsum(sums, axis=-1)[:, -1]
    block, passed = _passing(sums, passed)
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _passing(inner, passed)[0]


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
