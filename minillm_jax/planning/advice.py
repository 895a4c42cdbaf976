"""What to change so that a plan needs less, each change planned before it is told.

Mildest first: the same model in fewer bytes, another model, less work.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from minillm_jax.config import ModelConfig
from minillm_jax.planning import automatic, costs, memory
from minillm_jax.planning.memory import MemoryPlan

MEMORY_FRACTION = 0.95  # of a GPU that has nothing else to do
MOST_CUT = 8  # what rows or context alone are divided by, where there is another way


@dataclasses.dataclass(frozen=True)
class Change:
    """Something else to ask for; None = as it was."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # config fields
    batch_size: int | None = None
    context: int | None = None
    memory_fraction: float | None = None

    def __str__(self) -> str:
        """As the words of a command line."""
        named = {f"config.model.{name}": value for name, value in self.model.items()}
        named |= {name: value for name, value in self._call().items()}
        return " ".join(f"--{name}={value}" for name, value in named.items())

    def settings(self, given: ModelConfig, planned: ModelConfig) -> str:
        """As a program has it that knows a config, but no flags of a plan.

        Args:
          given: the config that it has.
          planned: of the plan with this change.
        """
        fields = dict(self.model)
        if self.context is not None:
            names = ("max_kv_cache_len", "max_seq_len", "prefill_chunk")
            new, old = planned.given(), given.given()
            fields |= {n: new[n] for n in names if new.get(n) != old.get(n)}
        words = " ".join(f"--config.model.{name}={v}" for name, v in fields.items())
        if self.memory_fraction is None:
            return words
        environment = fraction_words(self.memory_fraction)
        return f"{words} with {environment}" if words else environment

    def __or__(self, other: "Change") -> "Change":
        """Both."""
        both = {"model": self.model | other.model, **other._call()}
        return dataclasses.replace(self, **both)

    def _call(self) -> dict[str, Any]:
        given = {k: v for k, v in vars(self).items() if v is not None}
        return {name: value for name, value in given.items() if name != "model"}


def fraction_words(fraction: float) -> str:
    """What JAX is told to take of a GPU."""
    return f"XLA_CLIENT_MEM_FRACTION={fraction:g} in the environment"


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change, and the plan with it."""

    change: Change
    plan: MemoryPlan
    saves_bytes: int  # of the total; 0 of what gives more room instead


def singles(
    plan: MemoryPlan, *, trained: bool = False, least_context: int | None = None
) -> list[Advice]:
    """Each change alone, those left out that neither save nor give room.

    Args:
      plan: what to change.
      trained: the weights are there already, and keep their shapes.
      least_context: no shorter one will do; None = the shortest there can be.
    """
    least = plan.workload.least_context if least_context is None else least_context
    found = [_advice(plan, change) for change in _changes(plan, trained, least)]
    limit = plan.limit_bytes
    return [a for a in found if a.saves_bytes > 0 or a.plan.limit_bytes > limit]


def until_it_fits(
    plan: MemoryPlan, found: list[Advice], *, least_context: int | None = None
) -> Advice | None:
    """The first of some `singles` that fits, or as many of them as it takes.

    Less work, rows and context, comes last and goes as far as it must: sooner both than
    hardly any of one. None where one row of the least context is too much with all the
    rest, and without it.
    """
    for advice in found:
        if advice.plan.fits and _leaves_most(plan, advice.change):
            return advice
    together = Change()
    for change in (advice.change for advice in found):
        if change.batch_size is None and change.context is None:
            together |= change
            if (both := _advice(plan, together)).plan.fits:
                return both
    least = plan.workload.least_context if least_context is None else least_context
    return _less_work(plan, together, least) or _less_work(plan, Change(), least)


def _changes(plan: MemoryPlan, trained: bool, least: int) -> Iterator[Change]:
    """Mildest first; those of accuracy after those that have none."""
    yield from _of_floats(plan)
    device = plan.device
    small = device.memory_fraction < MEMORY_FRACTION
    if device.platform == "gpu" and small and not plan.fits:
        yield Change(memory_fraction=MEMORY_FRACTION)
    if not plan.workload.training:
        yield from _of_generation(plan.config, trained)
    yield from _of_call(plan, least)


def _of_floats(plan: MemoryPlan) -> Iterator[Change]:
    config, training = plan.config, plan.workload.training
    if training and not config.remat:
        yield Change({"remat": True})
    if not training and costs.itemsize(config.cache_dtype) == 4:
        yield Change({"cache_dtype": "bfloat16"})
    names = ("dtype",) if training else ("dtype", "param_dtype", "cache_dtype")
    if any(costs.itemsize(getattr(config, name)) == 4 for name in names):
        yield Change(dict.fromkeys(names, "bfloat16"))


def _of_generation(config: ModelConfig, trained: bool) -> Iterator[Change]:
    if config.cache_dtype != "int8":  # which cuDNN does not read
        by_xla = {"decode_attention": "xla"}
        asked = config.decode_attention == "cudnn"
        yield Change({"cache_dtype": "int8", **(by_xla if asked else {})})
    if config.quantization == "none":
        yield Change({"quantization": "int8"})
    heads = config.num_kv_heads
    fewer = next((heads // part for part in (4, 2) if heads % part == 0), 0)
    if fewer and not trained:
        yield Change({"num_kv_heads": fewer})


def _of_call(plan: MemoryPlan, least: int) -> Iterator[Change]:
    work = plan.workload
    if (rows := work.batch_size) > 1:
        most = 0 if plan.fits else plan.max_batch_size
        yield Change(batch_size=most if 0 < most < rows else rows // 2)
    if (length := _length(plan)) > least:
        most = 0 if plan.fits else plan.max_context
        shorter = most if least <= most < length else max(least, work.context // 2)
        yield Change(context=shorter)


def _leaves_most(plan: MemoryPlan, change: Change) -> bool:
    rows, tokens = change.batch_size, change.context
    few = rows is not None and rows * MOST_CUT < plan.batch_size
    short = tokens is not None and tokens * MOST_CUT < plan.context
    return not few and not short


def _less_work(plan: MemoryPlan, change: Change, least: int) -> Advice | None:
    """A change with as many rows and tokens as fit, found by halving them in turn."""
    work = plan.workload
    rows, tokens = work.batch_size, work.context

    def of(tokens: int) -> Advice:
        fewer = rows if rows < work.batch_size else None
        shorter = tokens if tokens < _length(plan) else None
        return _advice(plan, change | Change(batch_size=fewer, context=shorter))

    while not of(tokens).plan.fits:
        rows_first = rows * work.context >= tokens * work.batch_size
        if rows > 1 and (rows_first or tokens <= least):
            rows //= 2
        elif tokens > least:
            tokens = max(least, tokens // 2)
        else:
            return None
    more = automatic.largest(lambda n: of(tokens + n).plan.fits, work.context - tokens)
    return of(tokens + more)


def _length(plan: MemoryPlan) -> int:
    """Tokens that a row takes the bytes of."""
    work = plan.workload
    return work.context if work.training else work.allocated


def _advice(plan: MemoryPlan, change: Change) -> Advice:
    """Saved is the difference of two estimates, for a plan that is exact too."""
    work, device = plan.workload, plan.device
    before = memory.plan(work, device).total_bytes
    rows = work.batch_size if change.batch_size is None else change.batch_size
    work = work.with_model(device.platform, **change.model)
    work = dataclasses.replace(work, batch_size=rows)
    if change.context is not None:
        work = dataclasses.replace(work, capacity=None).with_context(change.context)
    if change.memory_fraction is not None:
        device = dataclasses.replace(device, memory_fraction=change.memory_fraction)
    found = memory.plan(work, device)
    return Advice(change, found, max(0, before - found.total_bytes))
