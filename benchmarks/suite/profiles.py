"""The kernels of a decode step and the time they take, from a profile.

In a process of its own: the profiler may not be allowed on a machine, and what it needs
of the driver may fail in ways that end a process.
"""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.suite import measured
from benchmarks.suite.scale import Scale
from minillm_jax.model import transformer


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each preset at batch size 1; None where the profiler saw no GPU."""
    results: dict[str, Any] = {"presets": {}}
    for name, config in scale.configs.items():
        model = transformer.create_model(config)
        params = transformer.init_params(model)
        decode = measured.Decode(model, params, scale, rows=1, context=scale.context)
        for _ in range(measured.WARM_UP):
            decode.run(1)
        kernels = _profiled(decode, scale.steps)
        results["presets"][name] = {"layers": config.num_layers} | kernels
        del params, decode  # before the next ones
        yield results


def _profiled(decode: measured.Decode, steps: int) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory(prefix="minillm_jax_profile_") as folder:
        with jax.profiler.trace(folder):
            decode.run(1)
        kernels = _kernels(pathlib.Path(folder))
    if not kernels:
        return {"kernels_per_step": None, "kernel_seconds_per_step": None}
    return {
        "kernels_per_step": len(kernels) / steps,
        "kernel_seconds_per_step": sum(kernels) / 1e9 / steps,
    }


def _kernels(folder: pathlib.Path) -> list[float]:
    """Nanoseconds of everything that the streams of a GPU ran."""
    return [
        event.duration_ns
        for path in folder.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
