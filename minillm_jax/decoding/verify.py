"""Is this difference normal? What a model must compute alike, compared on this machine.

Each line has the logits of the same tokens in two ways that differ in what they run and
in what order they add, never in what they compute: so they differ by rounding. How much
of that is normal depends on the dtype, and is the line's budget.

    cached / uncached          prefill and decode steps; one forward without a cache
    chunked / one piece        a prompt in small prefill chunks; in one
    padded / alone             a chunk padded beyond the end of its cache; as it is
    batch / solo               three rows of three lengths; each by itself
    ring / window              a ring, three times around; a sliding-window forward
    Generator / uncached       tokens that it chose, beside the likeliest ones
    DTYPE / float32            one forward; the same parameters in float32 (int8
                               kernels as the floats that they stand for)
    float32 / float64          one forward; the formulas in NumPy (reference.py)

Axes: B rows, T tokens, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minillm_jax import reference
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode
from minillm_jax.decoding.decode import Params
from minillm_jax.decoding.generator import Generator
from minillm_jax.decoding.sampling import GREEDY
from minillm_jax.model import cache as kv
from minillm_jax.model import quantized, transformer
from minillm_jax.model.transformer import MiniLLM

SHORTEST = 16  # tokens; fewer would leave nothing to compare
REFERENCE_TOKENS = 48  # as far as the formulas are followed
_NAMES = (
    *("cached / uncached", "chunked / one piece", "padded / alone", "batch / solo"),
    *("ring / window", "Generator / uncached"),
)
_TURNS = 6  # windows of the ring that the tokens fill: it wraps three times


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is normal."""

    difference: float  # of two logits, as a share of the largest one
    divergence: float  # nats


BUDGETS = {
    "float32": Budget(2e-5, 1e-9),
    "bfloat16": Budget(0.03, 1e-3),
    "float16": Budget(0.005, 1e-4),
    # Activations are rounded to 1 part in 127 of a row's largest: a difference in the
    # last place of float32 may be one in the last of these.
    "w8a8": Budget(0.06, 5e-3),
    "int8": Budget(0.06, 5e-3),  # keys and values, rounded in the same way
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A comparison of N pairs of logits; with `skipped` there is none, and why."""

    name: str
    skipped: str | None = None
    budget: Budget | None = None
    difference: float | None = None  # the largest of any two logits
    largest: float = 0.0  # the largest logit
    divergence: float | None = None  # KL(second, first), nats, the mean of the pairs
    agreement: float | None = None  # share of pairs with the same likeliest token

    @property
    def passed(self) -> bool | None:
        """Whether the differences are within the budget; None where it was skipped."""
        if self.skipped is not None or self.budget is None or self.difference is None:
            return None
        within = self.relative <= self.budget.difference
        return within and (self.divergence or 0.0) <= self.budget.divergence

    @property
    def relative(self) -> float:
        """The difference as a share of the largest logit."""
        return (self.difference or 0.0) / (self.largest or 1.0)


def compared(name: str, ours: Any, other: Any, budget: Budget) -> Line:
    """The line of two arrays of logits, `[..., V]`; one with a NaN does not pass."""
    ours, other = (np.asarray(x, np.float64) for x in (ours, other))
    logp, logq = (_log_softmax(x) for x in (other, ours))
    divergence = np.sum(np.exp(logp) * (logp - logq), axis=-1)
    return Line(
        name,
        budget=budget,
        difference=float(np.abs(ours - other).max()),
        largest=float(np.abs(other).max()),
        divergence=float(np.maximum(0.0, divergence.mean())),
        agreement=float(np.mean(ours.argmax(-1) == other.argmax(-1))),
    )


def lines(model: MiniLLM, params: Params, tokens: Sequence[int]) -> Iterator[Line]:
    """Compares, a line each.

    Args:
      model: from `create_model`.
      params: the inner tree.
      tokens: what the model reads, `SHORTEST` or more; of what it was trained on, or
        any. At most `longest(config)`.
    """
    check = _Check(model, params, np.asarray(tokens, np.int32))
    assert SHORTEST <= len(tokens) <= longest(model.config)
    # float32 means float32: GPUs and TPUs round its products where nobody asks.
    precision = "highest" if model.config.dtype == "float32" else None
    for name, compare in check.comparisons().items():
        reason = check.unavailable(name)
        with jax.default_matmul_precision(precision):  # left before the yield
            line = compare(name) if reason is None else Line(name, skipped=reason)
        yield line


def names(config: ModelConfig) -> tuple[str, ...]:
    """Of the lines, in their order."""
    kind = _kind(config)
    other = () if kind == "float32" else (f"{kind} / float32",)
    return (*_NAMES, *other, "float32 / float64")


def _kind(config: ModelConfig) -> str:
    """What products are of: activations, or whole numbers on both sides."""
    return config.quantization if config.quantization in BUDGETS else config.dtype


def longest(config: ModelConfig) -> int:
    """Tokens that can be compared at most."""
    most = min(config.max_seq_len, config.max_kv_cache_len)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type in ("longrope", "dynamic"):
        # Beyond it the keys of a cache are turned otherwise than those of a forward.
        most = min(most, scaling.original_max_position_embeddings)
    return most


class _Check:
    """The comparisons of a model, on the same tokens."""

    def __init__(self, model: MiniLLM, params: Params, tokens: np.ndarray):
        self._model, self._params, self._tokens = model, params, tokens
        self._prompt = max(1, 2 * len(tokens) // 3)
        budgets = [BUDGETS[_kind(model.config)], BUDGETS[model.config.cache_dtype]]
        self._budget = max(budgets, key=lambda budget: budget.difference)
        self._whole = self._with(prefill_chunk=self._prompt)

    def comparisons(self) -> dict[str, Callable[[str], Line]]:
        """By name, in the order of the table."""
        made = [
            *(self._cached, self._chunked, self._padded, self._batch),
            *(self._ring, self._generator, self._dtype, self._formulas),
        ]
        if _kind(self._model.config) == "float32":
            made.remove(self._dtype)
        return dict(zip(names(self._model.config), made, strict=True))

    def unavailable(self, name: str) -> str | None:
        """Why a comparison cannot be made with this config."""
        config = self._model.config
        if name == "ring / window" and config.local_rope_theta is not None:
            return "layers without a window turn keys by another base"
        return None

    def _cached(self, name: str) -> Line:
        start = self._prompt
        steps = _steps(self._model, self._params, [self._tokens[:start]], self._rest)
        return compared(name, steps[0], self._plain(self._model), self._budget)

    def _chunked(self, name: str) -> Line:
        small = self._with(prefill_chunk=max(1, self._prompt // 5))
        prompts = [self._tokens[: self._prompt]]
        ours, other = (
            _steps(model, self._params, prompts, self._rest)
            for model in (small, self._whole)
        )
        return compared(name, ours, other, self._budget)

    def _padded(self, name: str) -> Line:
        """The padding would pass the end of a cache that is as long as the tokens."""
        count, half = len(self._tokens), self._prompt // 2
        model, params = self._with(prefill_chunk=count), self._params
        found = []
        for width in (count, self._prompt - half):  # with padding, and without
            cache = kv.init_cache(model.config, 1, count)
            first, rest = self._tokens[None, :half], self._tokens[half : self._prompt]
            logits, cache = decode.prefill(model, params, cache, first)
            chunk = np.ones((1, width), np.int32)
            chunk[0, : len(rest)] = rest
            remaining = np.array([len(rest)], np.int32)
            logits, cache = decode.prefill_chunk(
                model, params, cache, logits, chunk, remaining
            )
            found.append(_behind(model, params, logits, cache, self._rest))
        ours, other = found
        return compared(name, ours, other, self._budget)

    def _batch(self, name: str) -> Line:
        count = len(self._tokens) - self._prompt
        ends = (self._prompt, max(1, self._prompt // 2), 1)
        prompts = [self._tokens[:end] for end in ends]
        rest = np.stack([self._tokens[end : end + count] for end in ends])
        together = _steps(self._model, self._params, prompts, rest)
        alone = [
            _steps(self._model, self._params, [prompt], row[None])[0]
            for prompt, row in zip(prompts, rest, strict=True)
        ]
        return compared(name, together, np.stack(alone), self._budget)

    def _ring(self, name: str) -> Line:
        config = self._model.config
        own = config.sliding_window or len(self._tokens)
        window = max(1, min(len(self._tokens) // _TURNS, own))
        policy, chunk = kv.CachePolicy(overflow="ring"), max(1, window // 2)
        ring = self._with(prefill_chunk=chunk)
        prompts = [self._tokens[: self._prompt]]
        steps = _steps(
            *(ring, self._params, prompts, self._rest), capacity=window, policy=policy
        )
        windowed = self._with(sliding_window=window, global_layers=())
        return compared(name, steps[0], self._plain(windowed), self._budget)

    def _generator(self, name: str) -> Line:
        """How far below the likeliest the chosen tokens are, where they are not it."""
        half, count = self._prompt // 2, len(self._tokens) - self._prompt
        prompts = [self._tokens[: self._prompt].tolist(), self._tokens[:half].tolist()]
        model = MiniLLM(self._model.config.replace(eos_token_ids=()))
        made = Generator(model, self._params)
        found = made.generate(prompts, max_new_tokens=count, sampling=GREEDY)
        below, same, largest = [0.0], [], 0.0
        for prompt, completion in zip(prompts, found, strict=True):
            row = np.asarray([*prompt, *completion.tokens], np.int32)
            logits = _forward(model, self._params, row[None])[0, len(prompt) - 1 : -1]
            logits = np.asarray(logits, np.float64)
            chosen = np.take_along_axis(logits, row[len(prompt) :, None], axis=-1)[:, 0]
            below.extend(logits.max(-1) - chosen)
            same.extend(logits.argmax(-1) == row[len(prompt) :])
            largest = max(largest, float(np.abs(logits).max()))
        return Line(
            name,
            budget=dataclasses.replace(  # two logits, each as far off as may be
                self._budget, difference=2 * self._budget.difference
            ),
            difference=float(np.max(below)),
            largest=largest,
            agreement=float(np.mean(same)),
        )

    def _dtype(self, name: str) -> Line:
        ours = _forward(self._model, self._params, self._tokens[None])
        return compared(name, ours, self._float32, self._budget)

    def _formulas(self, name: str) -> Line:
        tokens = self._tokens[:REFERENCE_TOKENS]
        params = quantized.restore(self._params)
        exact = reference.reference_logits(self._model.config, params, tokens[None])
        ours = self._float32[:, : len(tokens)]
        return compared(name, ours, exact, BUDGETS["float32"])

    @property
    def _rest(self) -> np.ndarray:
        return self._tokens[None, self._prompt :]

    def _plain(self, model: MiniLLM) -> jax.Array:
        """What follows the prompt and each token after it, without a cache."""
        return _forward(model, self._params, self._tokens[None])[0, self._prompt - 1 :]

    @functools.cached_property
    def _float32(self) -> jax.Array:
        """A forward of all tokens, in float32."""
        model, params = transformer.in_float32(self._model, self._params)
        with jax.default_matmul_precision("highest"):
            return _forward(model, params, self._tokens[None])

    def _with(self, **changes: Any) -> MiniLLM:
        return MiniLLM(self._model.config.replace(**changes))


@functools.partial(jax.jit, static_argnames="model")
def _forward(
    model: MiniLLM, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    logits: Any = model.apply({"params": params}, tokens)
    return logits


def _steps(
    model: MiniLLM,
    params: Params,
    prompts: Sequence[np.ndarray],
    rest: np.ndarray,
    capacity: int | None = None,
    *,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> np.ndarray:
    """Logits after each row's prompt and each token behind it: `[B, N + 1, V]`.

    Args:
      model: the module.
      params: the inner tree.
      prompts: one for each row.
      rest: `[B, N]`, a decode step for each column.
      capacity: of the cache; None = what the longest row needs.
      policy: of the cache.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if capacity is None:
        capacity = int(lengths.max()) + rest.shape[1]
    tokens = np.ones((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cache = kv.init_cache(model.config, len(prompts), capacity, policy=policy)
    logits, cache = decode.prefill(model, params, cache, tokens, lengths, policy=policy)
    return _behind(model, params, logits, cache, rest, policy)


def _behind(
    model: MiniLLM,
    params: Params,
    logits: jax.Array,
    cache: kv.Cache,
    rest: np.ndarray,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> np.ndarray:
    """Prompts' logits, and those after each token behind them: `[B, N + 1, V]`."""
    found = [logits]
    for column in rest.T:
        logits, cache = decode.decode_step(model, params, cache, column, policy=policy)
        found.append(logits)
    return np.stack([np.asarray(logits) for logits in found], axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
