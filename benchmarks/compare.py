"""The same model in this library and in others, measured in turn on this processor.

    python -m benchmarks.compare --config=configs/small.py
    python -m benchmarks.compare --config=medium --config.compare.batch_sizes=1
    python -m benchmarks.compare --model=FOLDER --config.compare.plot_path=compare.png

What is not installed is left out (`pip install minillm_jax[compare]` brings it all).
Prints tables, then one JSON object as the last line.
"""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import compare_report, compare_runs, measure, peers, report, workers
from minillm_jax import progress
from minillm_jax.cli import app, config_files, model_folder
from minillm_jax.config import ModelConfig
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import costs, machine
from minillm_jax.weights import save


def benchmark(config: Any) -> dict[str, Any]:
    """Measures a config file's model; returns the object that `main` prints.

    Raises:
      ConfigError: for a wrong config.
      UserError: if it does not go with this machine.
    """
    model = transformer.create_model(config_files.model_config(config))
    settings = config_files.compare_settings(config)
    names = compare_runs.checked_peers(settings)
    cases = compare_runs.cases(model.config, settings)
    _check_machine(model, settings, cases, names)

    results = []
    with tempfile.TemporaryDirectory(prefix="minillm_jax_compare_") as folder:
        _export(config, model, pathlib.Path(folder))
        steps = len(names) + 3 * len(cases)
        with progress.bar("", steps) as bar, _field(names, folder, bar) as field:
            probes = compare_runs.Probes(measure.Product(), measure.Bandwidth())
            for case in cases:
                row = f"{case.batch_size} x {case.context}"
                results.append(
                    compare_runs.run(
                        field,
                        model.config,
                        case,
                        repeats=settings.repeats,
                        probes=probes,
                        progress=lambda s, row=row: progress.advance(
                            bar, f"{row}: {s}"
                        ),
                    )
                )
    sections = {
        "model_path": config.get("model_path"),
        "model": model.config.to_dict(),
        "compare": dataclasses.asdict(settings) | {"peers": names},
    }
    return report.header("compare", sections) | {
        "threads": workers.threads(),
        "peers": _described(field.status),
        "results": results,
    }


def _check_machine(
    model: MiniLLM,
    settings: config_files.CompareSettings,
    cases: list[compare_runs.Case],
    names: tuple[str, ...],
) -> None:
    """Raises UserError for what would go wrong only after a while."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        raise app.UserError("compares on the CPU: set JAX_PLATFORMS=cpu before it")
    report.check_writable(settings.json_path, "config.compare.json_path")
    report.check_plot(settings.plot_path, "config.compare.plot_path")
    running = [name for name in names if not peers.missing(name)]
    held = sum(_held_bytes(name, model.config, cases) for name in running)
    available = machine.available_bytes(device)
    if held > available:
        raise app.UserError(
            f"{len(running)} peers hold {held / 1e9:.1f} GB together, "
            f"but {available / 1e9:.1f} GB are available; name fewer, such as "
            f"--config.compare.peers={','.join(running[:2])}"
        )


def _held_bytes(name: str, config: ModelConfig, cases: list[compare_runs.Case]) -> int:
    """Weights and the largest cache of a peer.

    The tutorial's cache has all slots, three times over: a step's input and output, and
    what its scan makes of it.
    """
    whole = name == peers.TUTORIAL
    slots = config.max_kv_cache_len
    most = max(case.batch_size * (slots if whole else case.context) for case in cases)
    cache = costs.cache_bytes(config, most, [1] * config.num_layers)
    return costs.weight_bytes(config) + cache * (3 if whole else 1)


def _export(config: Any, model: MiniLLM, folder: pathlib.Path) -> None:
    """Writes what the peers read: the config, and the weights in its dtype."""
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save.save_pretrained(folder / "model", model, model_folder.params(config, model))


@contextlib.contextmanager
def _field(
    names: tuple[str, ...], folder: str, bar: Any
) -> Iterator[compare_runs.Field]:
    """The peers, started one after the other; ended when the block is."""
    path = pathlib.Path(folder)
    field = compare_runs.Field({}, {})
    try:
        for name in names:
            progress.advance(bar, f"loading {name}")
            absent = peers.missing(name)
            if absent:
                field.status[name] = f"not installed: pip install {' '.join(absent)}"
                continue
            try:
                field.workers[name] = workers.start(
                    name, path / "model", path / "config.json"
                )
                field.status[name] = "ok"
            except workers.PeerError as error:
                field.status[name] = f"failed: {error}"
        yield field
    finally:
        field.stop()


def _described(status: dict[str, str]) -> dict[str, Any]:
    """Each peer's status, with the versions of what it needs."""
    return {
        name: {
            "status": said,
            "versions": {} if peers.missing(name) else peers.versions(name),
        }
        for name, said in status.items()
    }


def main(config: Any) -> None:
    """Measures, then prints."""
    result = benchmark(config)
    compare_report.show(result)
    settings = result["config"]["compare"]
    report.write_json(result, settings["json_path"])
    if settings["plot_path"] is not None:
        from benchmarks import compare_plot  # matplotlib is an extra

        compare_plot.draw(result, settings["plot_path"])


if __name__ == "__main__":
    app.run(main)
