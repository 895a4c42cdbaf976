"""Refuses a benchmark that would not fit, before its weights are made.

The refusal names the numbers and a setting that fits by the same check.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import decode_runs, measure
from minillm_jax.cli.app import UserError
from minillm_jax.cli.config_files import MOST_ROWS, DecodeSettings
from minillm_jax.config import MAX_POSITIONS, ConfigError, Configs, ModelConfig
from minillm_jax.planning import advice as advices
from minillm_jax.planning import automatic, machine, memory
from minillm_jax.planning.devices import Device
from minillm_jax.planning.memory import MemoryPlan
from minillm_jax.planning.workload import Workload

# The least that a measurement asks for, where the settings ask for anything else.
SHORT = {
    "contexts": (128,),
    "batch_size": 1,
    "new_tokens": 32,
    "prompt_tokens": 96,
    "capacity": 128,
}


def numbers(config: ModelConfig, settings: DecodeSettings) -> DecodeSettings:
    """The settings with the largest that fits in place of what is automatic.

    Contexts are chosen first, for one row where the batch size is automatic too.
    """
    device = device_left()

    def fits(**changes: Any) -> bool:
        changed = dataclasses.replace(settings, **changes)
        return plan_for(config, changed, device).fits

    def context(asked: int | automatic.Auto, rows: int) -> int:
        if not isinstance(asked, automatic.Auto):
            return asked
        least = settings.new_tokens + 1
        most = automatic.largest(
            lambda n: fits(contexts=(max(n, least),), batch_size=rows),
            config.max_kv_cache_len,
        )
        return asked.choose(most, least=least)

    rows = automatic.parse("config.decode.batch_size", settings.batch_size, MOST_ROWS)
    some = 1 if isinstance(rows, automatic.Auto) else rows
    asked = [
        automatic.parse("config.decode.contexts", given, MAX_POSITIONS)
        for given in settings.contexts
    ]
    contexts = tuple(context(one, some) for one in asked)
    settings = dataclasses.replace(settings, contexts=contexts)
    if isinstance(rows, automatic.Auto):
        most = automatic.largest(lambda n: fits(batch_size=n), MOST_ROWS)
        rows = rows.choose(most)
    return dataclasses.replace(settings, batch_size=rows)


def check(
    config: ModelConfig, settings: DecodeSettings, *, trained: bool = False
) -> MemoryPlan:
    """The plan of the largest measurement; raises UserError if it does not fit.

    `trained` weights keep their shapes: no other model is advised.
    """
    device = device_left()
    plan = plan_for(config, settings, device)
    if plan.fits:
        return plan
    wider = _with_more(device)
    if wider is not None and (other := plan_for(config, settings, wider)).fits:
        advice = _advised(other, advices.fraction_words(wider.memory_fraction))
        raise UserError(f"{plan.refusal()}; {advice}")
    advice = "nothing smaller fits either"
    for flags, smaller, shorter in alternatives(config, settings, trained=trained):
        other = plan_for(smaller, shorter, device)
        if other.fits:
            advice = _advised(other, flags)
            break
    raise UserError(f"{plan.refusal()}; {advice}")


def _advised(plan: MemoryPlan, words: str) -> str:
    return f"this fits, with {memory.gigabytes(plan.total_bytes)}: {words}"


def _with_more(device: Device) -> Device | None:
    """The device with what JAX would leave to others; None where that is nothing."""
    fraction = advices.MEMORY_FRACTION
    if device.platform != "gpu" or device.memory_fraction >= fraction:
        return None
    return dataclasses.replace(device, memory_fraction=fraction)


def device_left() -> Device:
    """The device at hand without what the bandwidth's probe takes of it."""
    device = machine.this_device()
    probe = measure.probe_bytes(device.platform)
    left = device.memory_bytes - math.ceil(probe / max(device.memory_fraction, 0.01))
    return dataclasses.replace(device, memory_bytes=max(0, left))


def plan_for(
    config: ModelConfig, settings: DecodeSettings, device: Device
) -> MemoryPlan:
    """The plan of the largest measurement; shapes the config refuses raise as there."""
    shapes = decode_runs.shapes(config, settings)
    full = [s.context for s in shapes if s.context <= config.max_seq_len]
    work = Workload(
        config=config.resolve(device.platform),
        batch_size=int(settings.batch_size),
        context=max(shape.context for shape in shapes),
        capacity=max(shape.capacity for shape in shapes),
        forward_tokens=max(full, default=0) if settings.compare_no_cache else 0,
    )
    return memory.plan(work, device)


def alternatives(
    config: ModelConfig, settings: DecodeSettings, *, trained: bool
) -> Iterator[tuple[str, ModelConfig, DecodeSettings]]:
    """Flags that ask for less, mildest first, with what they make of the two configs.

    All of them measure one short context.
    """
    changes = {
        name: value
        for name, value in SHORT.items()
        if getattr(settings, name) not in (None, value)
    }
    short = dataclasses.replace(settings, **changes)
    flags = _flags("decode", changes)
    try:
        decode_runs.shapes(config, short)
    except ConfigError:
        return
    yield flags, config, short
    dtypes: dict[str, Any] = dict.fromkeys(
        ("dtype", "param_dtype", "cache_dtype"), "bfloat16"
    )
    yield f"{flags} {_flags('model', dtypes)}", config.replace(**dtypes), short
    if trained:
        return
    for layers in range(config.num_layers - 1, 0, -1):
        smaller = config.replace(num_layers=layers)
        yield f"{flags} --config.model.num_layers={layers}", smaller, short
    for name in reversed(Configs.names):
        yield f"--config={name} {flags}", Configs.by_name(name), short


def _flags(section: str, changes: Mapping[str, Any]) -> str:
    """The command line's words for fields of a section; a tuple has one element."""
    plain = {n: v[0] if isinstance(v, tuple) else v for n, v in changes.items()}
    return " ".join(f"--config.{section}.{n}={v}" for n, v in plain.items())
