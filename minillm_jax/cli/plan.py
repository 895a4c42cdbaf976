"""Whether a config fits a device, what takes the memory, and how fast it could be.

    python -m minillm_jax.cli.plan --config=configs/large.py --device=rtx4090
    python -m minillm_jax.cli.plan --config=large --batch_size=auto --memory_gb=48
    python -m minillm_jax.cli.plan --all

Nothing is allocated, and of the device only its name is needed: h200, h100, a100-80gb,
l4, rtx4090, v5e and others; "cpu" and "this" are the machine at hand. Prints a table,
or with --json one object; --plot=FILE draws the bytes over the context.
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from minillm_jax import validation
from minillm_jax.cli import app, config_files, plan_plot, plan_report
from minillm_jax.cli.app import UserError
from minillm_jax.planning import automatic, memory
from minillm_jax.planning.devices import FRACTIONS, Device

FLAGS = flags.FLAGS
_OF_ONE = (  # flags of a single plan
    *("device", "batch_size", "context", "exact", "plot"),
    *("memory_gb", "bandwidth_gbs", "tflops", "memory_fraction"),
)


def define_flags() -> None:
    """Defines everything but --config and --model."""
    flags.DEFINE_string("device", None, 'A name, "cpu" or "this", the default.')
    flags.DEFINE_string("batch_size", "1", 'Rows, or "auto": the most that fit.')
    flags.DEFINE_string(
        *("context", None),
        'Tokens of a row, "auto" or "auto:65536", in the place of max_kv_cache_len.',
    )
    flags.DEFINE_bool("train", False, "Plan training, not generation.")
    flags.DEFINE_bool("exact", False, "Compile it here, and take XLA's figures.")
    flags.DEFINE_float("memory_gb", None, "Memory of the device, 10^9 bytes.")
    flags.DEFINE_float("bandwidth_gbs", None, "What it reads, 10^9 bytes/s.")
    flags.DEFINE_float("tflops", None, "What it multiplies, 10^12 FLOP/s.")
    flags.DEFINE_float(
        *("memory_fraction", None),
        "What JAX takes of the memory: XLA_CLIENT_MEM_FRACTION.",
    )
    flags.DEFINE_bool("all", False, "The four presets beside the devices.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")
    flags.DEFINE_string("plot", None, "Also draw the bytes into this PNG file.")


def device() -> Device:
    """The device of the flags; figures that are given replace those of its name."""
    given = {
        "memory_bytes": _scaled("memory_gb", 1e9),
        "bytes_per_second": _scaled("bandwidth_gbs", 1e9),
        "flops_per_second": _scaled("tflops", 1e12),
        "memory_fraction": _within("memory_fraction", validation.Range(0, 1)),
    }
    if FLAGS.device is None and FLAGS.memory_gb is not None:
        found = Device("the GPU given", "gpu", 0, memory_fraction=FRACTIONS["gpu"])
    else:
        found = memory.find_device("this" if FLAGS.device is None else FLAGS.device)
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    return dataclasses.replace(found, **changes)


def _scaled(name: str, unit: float) -> int | None:
    number = _within(name, validation.Range(0.001, 1e6))
    return None if number is None else int(number * unit)


def _within(name: str, bounds: validation.Range) -> float | None:
    """A flag's number; absl's own bounds let NaN through."""
    number = FLAGS[name].value
    problem = None if number is None else bounds.problem(number)
    if problem is not None:
        raise UserError(f"--{name}={number}: {problem}")
    return number


def plan(config: Any) -> memory.MemoryPlan:
    """The plan that the flags ask for."""
    target = device()
    return memory.plan_memory(
        config_files.model_config(config, target),
        automatic.from_text(FLAGS.batch_size),
        None if FLAGS.context is None else automatic.from_text(FLAGS.context),
        target,
        training=FLAGS.train,
        exact=FLAGS.exact,
    )


def _check_all(config: Any) -> None:
    """Raises UserError for flags that the table of presets has no use for."""
    if config is not None:
        raise UserError("--all: plans the presets; leave --config and --model out")
    given = [f"--{name}" for name in _OF_ONE if FLAGS[name].present]
    if given:
        raise UserError(
            f"--all: plans one row on every device; leave {', '.join(given)} out"
        )


def main(config: Any) -> None:
    """Plans, then prints and draws."""
    if FLAGS.all:
        _check_all(config)
        found = plan_report.presets_by_device(FLAGS.train)
        print(json.dumps(found) if FLAGS.json else plan_report.markdown(found))
        return
    if config is None:
        raise UserError("--config is missing; or give --model=FOLDER, or --all")
    found = plan(config)
    trained = config.get("model_path") is not None
    if FLAGS.plot is not None:
        plan_plot.draw(found, pathlib.Path(FLAGS.plot))
    report = plan_report.as_dict(found, trained=trained)
    if FLAGS.json:
        print(json.dumps(report), flush=True)
    else:
        plan_report.show(found, trained=trained)


if __name__ == "__main__":
    define_flags()
    app.run(main, optional=True)
