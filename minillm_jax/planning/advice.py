"""What to change so that a plan needs less, each change planned before it is told.

Mildest first: the same model in fewer bytes, another model, less work.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from minillm_jax.planning import costs, memory
from minillm_jax.planning.memory import MemoryPlan

MEMORY_FRACTION = 0.95  # of a GPU that has nothing else to do


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

    def __or__(self, other: "Change") -> "Change":
        """Both."""
        both = {"model": self.model | other.model, **other._call()}
        return dataclasses.replace(self, **both)

    def _call(self) -> dict[str, Any]:
        given = {k: v for k, v in vars(self).items() if v is not None}
        return {name: value for name, value in given.items() if name != "model"}


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change, and the plan with it."""

    change: Change
    plan: MemoryPlan
    saves_bytes: int  # of the total; 0 of what gives more room instead


def singles(
    plan: MemoryPlan, *, trained: bool = False, model_only: bool = False
) -> list[Advice]:
    """Each change alone, those left out that neither save nor give room.

    Args:
      plan: what to change.
      trained: the weights are there already, and keep their shapes.
      model_only: only fields of the config.
    """
    changes = [*_of_model(plan, trained)]
    if not model_only:
        changes += _of_call(plan)
    found = [_advice(plan, change) for change in changes]
    limit = plan.limit_bytes
    return [a for a in found if a.saves_bytes > 0 or a.plan.limit_bytes > limit]


def until_it_fits(plan: MemoryPlan, found: list[Advice]) -> Advice | None:
    """The first of some `singles` that fits, or as many of them as it takes.

    None where all of them are not enough.
    """
    for advice in found:
        if advice.plan.fits:
            return advice
    together = Change()
    for advice in found:
        together |= advice.change
        if (both := _advice(plan, together)).plan.fits:
            return both
    return None


def _of_model(plan: MemoryPlan, trained: bool) -> Iterator[Change]:
    config, training = plan.config, plan.workload.training
    if training and not config.remat:
        yield Change({"remat": True})
    if not training and costs.itemsize(config.cache_dtype) == 4:
        yield Change({"cache_dtype": "bfloat16"})
    names = ("dtype",) if training else ("dtype", "param_dtype", "cache_dtype")
    if any(costs.itemsize(getattr(config, name)) == 4 for name in names):
        yield Change(dict.fromkeys(names, "bfloat16"))
    heads = config.num_kv_heads
    fewer = next((heads // part for part in (4, 2) if heads % part == 0), 0)
    if fewer and not trained and not training:
        yield Change({"num_kv_heads": fewer})


def _of_call(plan: MemoryPlan) -> Iterator[Change]:
    work, device = plan.workload, plan.device
    if device.platform == "gpu" and device.memory_fraction < MEMORY_FRACTION:
        yield Change(memory_fraction=MEMORY_FRACTION)
    if work.batch_size > 1:
        most = 0 if plan.fits else plan.max_batch_size
        yield Change(batch_size=most or work.batch_size // 2)
    if work.context > 1:
        most = 0 if plan.fits else plan.max_context
        yield Change(context=most or work.context // 2)


def _advice(plan: MemoryPlan, change: Change) -> Advice:
    work, device = plan.workload, plan.device
    config = work.config.replace(**change.model)
    rows = work.batch_size if change.batch_size is None else change.batch_size
    work = dataclasses.replace(work, config=config, batch_size=rows)
    if change.context is not None:
        work = dataclasses.replace(work, capacity=None).with_context(change.context)
    if change.memory_fraction is not None:
        device = dataclasses.replace(device, memory_fraction=change.memory_fraction)
    found = memory.plan(work, device)
    return Advice(change, found, max(0, plan.total_bytes - found.total_bytes))
