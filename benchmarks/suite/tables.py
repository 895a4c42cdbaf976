"""The suite's tables, as text."""

import io
from collections.abc import Iterator
from typing import Any

from rich import console

from benchmarks import report
from minillm_jax.config import Configs


def text(result: dict[str, Any]) -> str:
    """What was measured, a table for each kind of part; every part's status last."""
    out = console.Console(file=io.StringIO(), highlight=False, width=110, record=True)
    device, versions = result.get("device", {}), result.get("versions", {})
    out.print(
        f"{device.get('name', 'no device answered')} ({device.get('platform', '-')}), "
        f"jax {versions.get('jax', '-')}, {result['date']}\n"
    )
    parts = {name: part["results"] for name, part in result["parts"].items()}
    for name, show in _TABLES.items():
        if parts.get(name):
            out.print(f"{name}\n")
            for shown in show(parts[name]):
                out.print(shown)
            out.print()
    presets = {name: parts[name] for name in Configs.names if parts.get(name)}
    if presets:
        out.print("decode\n")
        out.print(_decode(presets))
        out.print(
            "\nMBU: the bytes a step must read over its time, of the read bandwidth.\n"
            "x bound: the time over that of reading them and of starting the kernels.\n"
            "\nprefill, one row\n"
        )
        out.print(_prefill(presets))
        out.print("\nMFU: of the measured rate of bfloat16 products.\n")
    for name, part in result["parts"].items():
        out.print(f"{name}: {part['status']}, {part['seconds']:.0f} s")
    return out.export_text().rstrip()


def _correctness(found: dict[str, Any]) -> Iterator[Any]:
    grid = report.grid("dtype", "attention", "difference", "limit", "passed", "check")
    for row in found["checks"]:
        grid.add_row(
            *(row["dtype"], row["attention"], f"{row['difference']:.2g}"),
            report.or_dash(row["limit"], lambda x: f"{x:.2g}"),
            report.or_dash(row["passed"], lambda x: "yes" if x else "NO"),
            row["check"],
        )
    yield grid


def _ceilings(found: dict[str, Any]) -> Iterator[Any]:
    yield (
        f"read {found['read_bytes_per_second'] / 1e9:.0f} GB/s, copy "
        f"{found['copy_bytes_per_second'] / 1e9:.0f} GB/s, bfloat16 products "
        f"{found['bfloat16_flops_per_second'] / 1e12:.3g} TFLOP/s, a small kernel "
        f"{found['seconds_per_kernel'] * 1e6:.2f} us"
    )


def _decode(presets: dict[str, Any]) -> Any:
    grid = report.grid(
        *("preset", "batch", "context", "tok/s", "(min-max)", "us a step"),
        *("MBU", "x bound", "kernels", "a layer", "compile s"),
    )
    for name, found in presets.items():
        layers = found["model"]["num_layers"]
        for row in found["decode"]:
            rate = row["decode_tokens_per_second"]
            kernels = row["kernels"]
            grid.add_row(
                *(name, str(row["batch_size"]), str(row["context"])),
                *(report.rate(rate["median"]), report.least_and_most(rate)),
                f"{row['step_seconds']['median'] * 1e6:.0f}",
                *(_share(row, "mbu"), _share(row, "over_bound")),
                *(f"{kernels:.0f}", f"{kernels / layers:.1f}"),
                f"{row['compile_seconds']:.1f}",
            )
    return grid


def _prefill(presets: dict[str, Any]) -> Any:
    grid = report.grid(
        "preset", "prompt", "chunk", "tok/s", "(min-max)", "MFU", "compile s"
    )
    for name, found in presets.items():
        for row in found["prefill"]:
            rate = row["prefill_tokens_per_second"]
            grid.add_row(
                *(name, str(row["prompt_tokens"]), str(row["chunk"])),
                *(report.rate(rate["median"]), report.least_and_most(rate)),
                *(_share(row, "mfu"), f"{row['compile_seconds']:.1f}"),
            )
    return grid


def _profiles(found: dict[str, Any]) -> Iterator[Any]:
    grid = report.grid("preset", "kernels a step", "a layer", "us in kernels")
    for name, row in found["presets"].items():
        kernels, seconds = row["kernels_per_step"], row["kernel_seconds_per_step"]
        grid.add_row(
            name,
            report.or_dash(kernels, lambda x: f"{x:.0f}"),
            report.or_dash(kernels, lambda x, row=row: f"{x / row['layers']:.1f}"),
            report.or_dash(seconds, lambda x: f"{x * 1e6:.0f}"),
        )
    yield grid


def _int8(found: dict[str, Any]) -> Iterator[Any]:
    grid = report.grid(
        *("preset", "form", "weights GB", "batch", "context", "us a step"),
        *("tok/s", "of floats'", "temp. MB"),
    )
    for name, rows in found["presets"].items():
        for row in rows:
            rate = row["decode_tokens_per_second"]["median"]
            temporary = row["temporary_bytes"]
            grid.add_row(
                *(name, row["form"], f"{row['weights_bytes'] / 1e9:.2f}"),
                *(str(row["batch_size"]), str(row["context"])),
                f"{row['step_seconds']['median'] * 1e6:.0f}",
                *(report.rate(rate), f"{row['ratio']:.2f}x"),
                report.or_dash(temporary, lambda x: f"{x / 1e6:.0f}"),
            )
    yield grid


def _attention(found: dict[str, Any]) -> Iterator[Any]:
    yield f"{found['layers']} layers of each preset"
    for name, preset in found["presets"].items():
        if preset["cudnn"] != "used":
            yield f"{name}: cuDNN {preset['cudnn']}"
    grid = report.grid(
        "preset", "attention", "batch", "context", "capacity", "decode tok/s"
    )
    prefill = report.grid("preset", "attention", "prompt", "chunk", "prefill tok/s")
    for name, preset in found["presets"].items():
        for row in preset["decode"]:
            rate = report.rate(row["decode_tokens_per_second"]["median"])
            shape = [str(row[key]) for key in ("batch_size", "context", "capacity")]
            grid.add_row(name, row["attention"], *shape, rate)
        for row in preset["prefill"]:
            rate = report.rate(row["prefill_tokens_per_second"]["median"])
            shape = [str(row[key]) for key in ("prompt_tokens", "chunk")]
            prefill.add_row(name, row["attention"], *shape, rate)
    yield from (grid, "", prefill)


def _launches(found: dict[str, Any]) -> Iterator[Any]:
    grid = report.grid("preset", "us a step", "tok/s", "option")
    for name, rows in found["presets"].items():
        for row in rows:
            if "failed" in row:
                grid.add_row(name, "-", "-", f"{row['option']}: {row['failed']}")
                continue
            seconds = row["step_seconds"]["median"]
            rate = report.rate(row["decode_tokens_per_second"]["median"])
            grid.add_row(name, f"{seconds * 1e6:.0f}", rate, row["option"])
    yield grid


def _transformers(found: dict[str, Any]) -> Iterator[Any]:
    versions = found["versions"]
    yield (
        f"transformers {versions['transformers']}, torch {versions['torch']}, on "
        f"{versions['device']}"
    )
    grid = report.grid(
        "preset", "batch", "context", "tok/s", "ours", "warm-up s", "program"
    )
    for name, rows in found["presets"].items():
        for row in rows:
            ratio = row.get("ours_to_theirs")
            grid.add_row(
                *(name, str(row["batch_size"]), str(row["context"])),
                report.rate(row["decode_tokens_per_second"]["median"]),
                report.or_dash(ratio, lambda x: f"{x:.2f}x"),
                *(f"{row['warm_up_seconds']:.0f}", row["program"]),
            )
    yield grid


def _share(row: dict[str, Any], key: str) -> str:
    return report.or_dash(row.get(key), lambda x: f"{x:.2f}")


_TABLES = {
    "correctness": _correctness,
    "ceilings": _ceilings,
    "int8": _int8,
    "profiles": _profiles,
    "attention": _attention,
    "launches": _launches,
    "transformers": _transformers,
}
