"""Tokens per second of a KV-cached decode, beside none and beside the memory's limit.

    python -m benchmarks.decode --config=configs/small.py
    python -m benchmarks.decode --config=medium --config.decode.contexts=256,2048
    python -m benchmarks.decode --model=FOLDER

Prints a table, then one JSON object as the last line.
"""

import dataclasses
from typing import Any

import jax

from benchmarks import decode_runs, fit, measure, report
from minillm_jax import progress
from minillm_jax.cli import app, config_files, model_folder
from minillm_jax.model import transformer
from minillm_jax.planning import costs, machine


def benchmark(config: Any) -> dict[str, Any]:
    """Measures a config file's model; returns the object that `main` prints.

    Raises:
      ConfigError: for a wrong config.
      UserError: if it does not fit this machine.
    """
    model = transformer.create_model(config_files.model_config(config))
    settings = fit.numbers(model.config, config_files.decode_settings(config))
    report.check_writable(settings.json_path)
    report.check_plot(settings.plot_path, "config.decode.plot_path")
    shapes = decode_runs.shapes(model.config, settings)
    trained = model_folder.folder(config) is not None
    fit.check(model.config, settings, trained=trained)

    results: list[dict[str, Any]] = []
    params = model_folder.params(config, model)
    with progress.bar("", 3 * len(shapes)) as bar:

        def stage(name: str) -> None:
            shown = shapes[min(len(results), len(shapes) - 1)]
            progress.advance(bar, f"{shown.context}: {name}")

        bandwidth = measure.Bandwidth()
        for shape in shapes:
            results.append(
                decode_runs.run(
                    model,
                    params,
                    shape,
                    repeats=settings.repeats,
                    compare_no_cache=settings.compare_no_cache,
                    bandwidth=bandwidth,
                    progress=stage,
                )
            )
    sections = {
        "model_path": config.get("model_path"),
        "model": model.config.to_dict(),
        "decode": dataclasses.asdict(settings),
    }
    return report.header("decode", sections) | {
        "bandwidth_gb_per_s": max(row["bandwidth_gb_per_s"] for row in results),
        "memory": {
            "weights_bytes": costs.weight_bytes(model.config),
            "cache_bytes": max(row["cache_bytes_allocated"] for row in results),
            "cache_used_bytes": max(row["cache_bytes_used"] for row in results),
            "peak_bytes": machine.peak_bytes(jax.devices()[0]),
        },
        "results": results,
    }


def main(config: Any) -> None:
    """Measures, then prints."""
    result = benchmark(config)
    report.show_decode(result)
    if path := result["config"]["decode"]["plot_path"]:
        from benchmarks import decode_plot  # matplotlib is an extra

        decode_plot.draw(result, path)
    report.write_json(result, result["config"]["decode"]["json_path"])


if __name__ == "__main__":
    app.run(main)
