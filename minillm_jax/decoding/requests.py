"""What a Generator is asked for and what it gives: prompts in, completions out.

Everything a caller can get wrong is found here, before any work.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from minillm_jax import validation
from minillm_jax.config import MAX_POSITIONS, ConfigError, ModelConfig
from minillm_jax.decoding import checks
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.model import cache as kv
from minillm_jax.text.streaming import TextStream
from minillm_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class CacheUse:
    """A row's share of the cache, in tokens."""

    tokens: int  # prompt and completion; the last one sampled is not written yet
    capacity: int  # what a row can hold, or see in a ring: max_kv_cache_len
    allocated: int  # what the cache was large enough for at the end

    @property
    def overwritten(self) -> int:
        """Tokens that a ring has given up for newer ones."""
        return max(self.tokens - self.capacity, 0)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    tokens: list[int]  # everything sampled, the stop token included
    text: str  # without the stop string or token; "" where there is no tokenizer
    # "stop" (an EOS or stop id, a stop string), "length" (max_new_tokens) or
    # "cache_full"; None only for what a stream has not finished.
    finish_reason: str | None
    logprobs: list[float] | None  # of each token, if asked for: of the raw logits
    top_logprobs: list[dict[int, float]] | None  # of the likeliest, if asked for
    prompt_tokens: int
    cache: CacheUse


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token added to a stream."""

    index: int  # the prompt's place in the call
    token: int | None  # None where a prompt leaves no room for any
    text: str  # what is certain now: "" inside a character or a possible stop string
    finish_reason: str | None  # set in the row's last piece


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt with everything that decides its completion."""

    prompt: list[int]
    sampling: SamplingParams
    sample_index: int
    max_new_tokens: int
    budget: int  # tokens that will be generated unless something stops them before


def make_requests(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    policy: kv.CachePolicy,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: SamplingParams | Sequence[SamplingParams],
) -> list[Request]:
    """Checks a call of `generate` or `stream`, and gives each prompt its request.

    Raises:
      CacheOverflowError: if a prompt is longer than the cache or, under "error", if
        prompt and `max_new_tokens` do not fit.
      ConfigError: for any other invalid argument.
    """
    bounds = validation.Range(1, MAX_POSITIONS)
    max_new_tokens = validation.whole_number("max_new_tokens", max_new_tokens, bounds)
    ids = [
        _token_ids(config, tokenizer, index, prompt)
        for index, prompt in enumerate(_as_list(prompts))
    ]
    shared = isinstance(sampling, SamplingParams)
    wanted = [sampling] * len(ids) if shared else _as_params(sampling)
    if len(wanted) != len(ids):
        raise ConfigError(
            f"sampling: {len(wanted)} SamplingParams for {len(ids)} prompts; give one, "
            "or one per prompt"
        )
    requests = []
    for index, (prompt, params) in enumerate(zip(ids, wanted, strict=True)):
        _check_params(config, tokenizer, params)
        room = _room(config, policy, index, prompt, max_new_tokens)
        place = index if shared else 0
        budget = min(max_new_tokens, room)
        requests.append(Request(prompt, params, place, max_new_tokens, budget))
    return requests


def prompt_ids(
    config: ModelConfig, tokenizer: Tokenizer | None, prompt: Any
) -> list[int]:
    """The ids of one prompt; raises ConfigError for anything else."""
    prompts = _as_list(prompt)
    if len(prompts) != 1:
        raise ConfigError(f"prompt: must be one, not {len(prompts)}")
    return _token_ids(config, tokenizer, 0, prompts[0])


def _as_params(sampling: Any) -> list[SamplingParams]:
    given = list(sampling) if isinstance(sampling, Sequence) else [sampling]
    wrong = [item for item in given if not isinstance(item, SamplingParams)]
    if wrong:
        raise ConfigError(
            f"sampling={validation.shown(wrong[0])}: must be a SamplingParams"
        )
    return given


def _as_list(prompts: Any) -> list[Any]:
    """One prompt, a text or ids, becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "__array__") and np.ndim(prompts) > 0:  # of NumPy or JAX
        prompts = list(np.asarray(prompts))
    if not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError(
            f"prompts={validation.shown(prompts)}: must be a text, a list of token "
            "ids, or a list of these"
        )
    several = any(isinstance(p, Sequence) or np.ndim(p) > 0 for p in prompts)
    return list(prompts) if several else [prompts]


def _token_ids(
    config: ModelConfig, tokenizer: Tokenizer | None, index: int, prompt: Any
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError(
                f"prompt {index} is text, which needs a tokenizer: give the Generator "
                "one, or token ids"
            )
        prompt = tokenizer.encode(prompt)
    try:
        ids: Any = np.asarray(prompt)
    except ValueError:  # lists of different lengths inside
        ids = np.empty((0, 0))
    if ids.ndim != 1:
        raise ConfigError(f"prompt {index}: must be a text or a flat list of token ids")
    if ids.size == 0:
        raise ConfigError(f"prompt {index} is empty: give at least one token")
    checks.check_tokens(config, ids, f"prompt {index}")
    return ids.tolist()


def _check_params(
    config: ModelConfig, tokenizer: Tokenizer | None, params: SamplingParams
) -> None:
    """Raises ConfigError for fields that do not go with the model or tokenizer."""
    if params.stop and tokenizer is None:
        raise ConfigError(f"stop={params.stop}: needs a tokenizer; use stop_token_ids")
    for field in ("stop_token_ids", "logit_bias"):
        if ids := getattr(params, field):
            checks.check_range(config, min(ids), max(ids), field)


def _room(
    config: ModelConfig,
    policy: kv.CachePolicy,
    index: int,
    prompt: Sequence[int],
    max_new_tokens: int,
) -> int:
    """Tokens that can follow a prompt; raises CacheOverflowError."""
    capacity = config.max_kv_cache_len
    if policy.overflow == "ring":
        capacity = MAX_POSITIONS
    room = capacity - len(prompt)
    if room < 0:
        raise kv.CacheOverflowError(
            f"prompt {index} has {len(prompt)} tokens, but the cache holds "
            f"{capacity}: shorten it by {-room}, raise max_kv_cache_len, or use "
            "overflow='ring'"
        )
    if policy.overflow == "error" and max_new_tokens > room:
        fits = f"max_new_tokens={room} would fit" if room else "not even one would fit"
        raise kv.CacheOverflowError(
            f"prompt {index} has {len(prompt)} tokens and max_new_tokens="
            f"{max_new_tokens} were asked, but the cache holds {capacity}: {fits}, and "
            "overflow='stop' ends there"
        )
    return room


class Row:
    """A request as its tokens come in; knows when it is over."""

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
    ):
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.finish_reason = None if request.budget else "cache_full"
        self._stop_ids = {*eos_token_ids, *request.sampling.stop_token_ids}
        self._stream = TextStream(tokenizer, request.sampling.stop)
        self._text: list[str] = []
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self.request.sampling.logprobs is not None

    def push(self, token: int) -> Piece:
        """Takes the next token."""
        self.tokens.append(token)
        stop_id = token in self._stop_ids
        text = "" if stop_id else self._stream.push(token)
        full = len(self.tokens) >= self.request.budget
        if (stop_id or full) and not self._stream.stopped:
            text += self._stream.flush()
        if stop_id or self._stream.stopped:
            self.finish_reason = "stop"
        elif full:
            asked = self.request.budget == self.request.max_new_tokens
            self.finish_reason = "length" if asked else "cache_full"
        self._text.append(text)
        return Piece(self.index, token, text, self.finish_reason)

    def push_logprobs(self, chosen: float, ids: np.ndarray, top: np.ndarray) -> None:
        """Takes the log-probabilities of the next token, and of the likeliest."""
        count = self.request.sampling.logprobs
        assert count is not None
        pairs = zip(ids[:count].tolist(), top[:count].tolist(), strict=True)
        self._logprobs.append(chosen)
        self._top.append(dict(pairs))

    def completion(self, capacity: int, allocated: int) -> Completion:
        """What there is so far."""
        wanted, prompt = self.request.sampling.logprobs, len(self.request.prompt)
        return Completion(
            tokens=list(self.tokens),
            text="".join(self._text),
            finish_reason=self.finish_reason,
            logprobs=None if wanted is None else list(self._logprobs),
            top_logprobs=list(self._top) if wanted else None,
            prompt_tokens=prompt,
            cache=CacheUse(prompt + len(self.tokens), capacity, allocated),
        )
