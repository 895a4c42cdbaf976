"""What a request asks of the next token, as arrays with a row for each request.

All numbers are traced and belong to a row: no value of a field compiles anything anew,
and rows with different ones share an executable. Knows token ids, no model and no text.
The mathematics is in sampler.py.

Axes: B batch, V vocab.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minillm_jax import validation
from minillm_jax.decoding import sampler
from minillm_jax.validation import Range

MAX_STOP_IDS = 64  # of a row, EOS ids included
MAX_LOGPROBS = 20  # alternatives that are reported beside the sampled token
_BIASES = Range(-1e30, 1e30)  # or -inf; far from what overflows float32


def _contradictions(values: dict, _: frozenset[str]) -> list[str]:
    for token, bias in (values.get("logit_bias") or {}).items():
        problem = None if bias == -math.inf else _BIASES.problem(bias)
        if token < 0:
            problem = "an id is at least 0"
        if problem:
            return [f"logit_bias={{{token}: {bias}}}: {problem}"]
    return []


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
    # None, or report each token's log-probability and the top `logprobs` alternatives
    # (0 = the token's alone).
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


GREEDY = SamplingParams(temperature=0.0)


class RequestArrays(NamedTuple):
    """What each row was asked for; the same during a call."""

    stop_ids: jax.Array  # [B, MAX_STOP_IDS] int32, -1 = none
    budget: jax.Array  # [B] int32, tokens to generate in all
    known: jax.Array  # [V] bool, ids that may be chosen
    sampler: sampler.Sampler | None  # None = greedy, a smaller executable


class DecodeState(NamedTuple):
    """How far each row is; changes with every token."""

    tokens: jax.Array  # [B] int32, the last token, not yet in the cache
    active: jax.Array  # [B] bool, rows still generating
    generated: jax.Array  # [B] int32, tokens sampled so far
    counts: jax.Array | None  # [B, V] int32, how often each was; None when greedy


class Sampled(NamedTuple):
    """What a step gave; the logprobs are None when greedy, those of the raw logits."""

    tokens: jax.Array  # [B] int32, -1 for rows that are not active
    logprobs: jax.Array | None  # [B]
    top_ids: jax.Array | None  # [B, MAX_LOGPROBS] int32, the likeliest first
    top_logprobs: jax.Array | None  # [B, MAX_LOGPROBS]


def request_arrays(
    params: Sequence[SamplingParams],
    *,
    sample_indices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    eos_token_ids: Sequence[int],
    known: Bool[np.ndarray | Array, " V"],
) -> RequestArrays:
    """The arrays of a call's requests, on the host: one entry of each list per row."""
    arrays: dict[str, Any] = {
        "stop_ids": np.stack(
            [_padded((*eos_token_ids, *p.stop_token_ids)) for p in params]
        ),
        "budget": np.array(budgets, np.int32),
        "known": known,
    }
    if all(p.is_plain_greedy for p in params):
        return RequestArrays(**arrays, sampler=None)
    arrays["sampler"] = _sampler(params, sample_indices, prompts, len(known))
    return RequestArrays(**arrays)


def equal_requests(
    params: SamplingParams,
    batch_size: int,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
) -> RequestArrays:
    """The arrays of rows that all ask the same, without a budget."""
    return request_arrays(
        [params] * batch_size,
        sample_indices=range(batch_size),
        prompts=[[0]] * batch_size,
        budgets=[2**31 - 1] * batch_size,
        eos_token_ids=eos_token_ids,
        known=np.ones(vocab_size, bool),
    )


def _sampler(
    params: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
) -> sampler.Sampler:
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
    return sampler.Sampler(**arrays)


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


def initial_state(
    requests: RequestArrays, generated: Sequence[Sequence[int]] | None = None
) -> DecodeState:
    """The state before the next token, on the host; `generated` has each row's."""
    rows = generated or [()] * len(requests.budget)
    lengths = np.array([len(tokens) for tokens in rows], np.int32)
    arrays: dict[str, Any] = {"generated": lengths, "counts": None}
    arrays["tokens"] = np.zeros_like(lengths)
    if requests.sampler is not None:
        arrays["counts"] = np.zeros((len(rows), len(requests.known)), np.int32)
        for counts, tokens in zip(arrays["counts"], rows, strict=True):
            np.add.at(counts, np.asarray(tokens, np.int32), 1)
    arrays["active"] = np.asarray(requests.budget) > lengths
    return DecodeState(**arrays)


def sample_step(
    logits: Float[Array, "B V"], state: DecodeState, requests: RequestArrays
) -> tuple[Sampled, DecodeState]:
    """The next token of every active row, and which rows continue after it."""
    with jax.named_scope("sample"):
        return _sample_step(logits, state, requests)


def _sample_step(logits, state: DecodeState, requests: RequestArrays):
    active, counts = state.active, state.counts
    logits = logits.astype(jnp.float32)
    if requests.sampler is None:
        masked = jnp.where(requests.known[None], logits, -jnp.inf)
        best = jnp.where(active, sampler.first_largest(masked), -1)
        sampled = Sampled(best, None, None, None)
    else:
        assert counts is not None
        processed = sampler.penalised(logits, requests.sampler, counts)
        processed = jnp.where(requests.known[None], processed, -jnp.inf)
        tokens = sampler.sample(processed, requests.sampler, state.generated)
        sampled = _with_logprobs(logits, jnp.where(active, tokens, -1))
        row = jnp.arange(len(tokens))
        counts = counts.at[row, tokens].add(active.astype(jnp.int32))
    tokens = jnp.where(active, sampled.tokens, state.tokens)
    generated = state.generated + active.astype(jnp.int32)
    stopped = jnp.any(tokens[:, None] == requests.stop_ids, axis=-1)
    active = active & ~stopped & (generated < requests.budget)
    return sampled, DecodeState(tokens, active, generated, counts)


def _with_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Sampled:
    total = jax.nn.logsumexp(logits, axis=-1)
    index = jnp.maximum(tokens, 0)[:, None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[:, 0] - total
    top, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return Sampled(tokens, chosen, ids, top - total[:, None])
