"""What a benchmark shows: a table for people, then one JSON line for machines."""

import datetime
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from rich import console, table, text

from minillm_jax.cli import app
from minillm_jax.cli.app import UserError
from minillm_jax.planning import machine


def header(benchmark: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys that every benchmark's object starts with."""
    return asked(benchmark, config) | this_machine()


def asked(benchmark: str, config: dict[str, Any]) -> dict[str, Any]:
    """What was run, and when; no device is touched."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks." + benchmark, *sys.argv[1:]]),
        "config": config,
    }


def this_machine() -> dict[str, Any]:
    """The device, and the versions that a measurement depends on."""
    device = jax.devices()[0]
    return {
        "device": {"platform": device.platform, "name": machine.device_name(device)},
        "versions": machine.versions(),
    }


# Columns of the decode table: heading, and the cell of a result.
_DECODE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "context": lambda row: str(row["context"]),
    "TTFT\ns": lambda row: f"{row['ttft_seconds']:.3f}",
    "prefill\ntok/s": lambda row: rate(row["prefill_tokens_per_second"]),
    "decode\ntok/s": lambda row: rate(row["decode_tokens_per_second"]["median"]),
    "\n(min-max)": lambda row: least_and_most(row["decode_tokens_per_second"]),
    "\nMBU": lambda row: f"{row['mbu']:.2f}",
    "memory\nGB": lambda row: _gigabytes(row["step_memory_bytes"]),
    "no cache\ntok/s": lambda row: or_dash(row["no_cache_tokens_per_second"], rate),
    "\nGB ": lambda row: or_dash(row["no_cache_memory_bytes"], _gigabytes),
    "\nspeed-up": lambda row: or_dash(row["speedup"], lambda x: f"{x:.1f}x"),
}


def show_decode(result: dict[str, Any]) -> None:
    """The decode benchmark's table, with what its columns mean."""
    out = console.Console(highlight=False)
    memory, versions = result["memory"], result["versions"]
    out.print(
        f"{result['device']['name']} ({result['device']['platform']}), jax "
        f"{versions['jax']}, {result['config']['model']['dtype']}, batch size "
        f"{result['config']['decode']['batch_size']}\n"
        f"weights {_gb(memory['weights_bytes'])}, cache {_gb(memory['cache_bytes'])} "
        f"of which {_gb(memory['cache_used_bytes'])} used, peak "
        f"{_gb(memory['peak_bytes'])}\n"
        f"read bandwidth {result['bandwidth_gb_per_s']:.1f} GB/s\n"
    )
    shown = grid(*_DECODE_COLUMNS)
    for row in result["results"]:
        shown.add_row(*(cell(row) for cell in _DECODE_COLUMNS.values()))
    out.print(shown)
    out.print(
        "\ntok/s: all rows together. MBU: what a step must read over its time, as a\n"
        "share of the read bandwidth probed beside each repeat (median).\n"
        "memory: what XLA says the decode chunk takes, weights and cache included.\n"
        "no cache: one full forward over the context for each token.\n"
    )


def grid(*headings: str) -> table.Table:
    """An empty table without lines, its columns aligned on the right."""
    found = table.Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        found.add_column(text.Text(heading), justify="right", no_wrap=True)
    return found


def or_dash(value: Any, shown: Callable[[Any], str]) -> str:
    """A value as `shown` shows it, and a dash for none."""
    return "-" if value is None else shown(value)


def rate(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def least_and_most(found: dict[str, float]) -> str:
    """The ends of a `measure.spread`."""
    return f"({rate(found['min'])}-{rate(found['max'])})"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _gb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.3g} GB"


def write_json(result: dict[str, Any], path: str | None) -> None:
    """The object as the last line on stdout, and into a file where one is named."""
    line = json.dumps(result)
    if path is not None:  # first: whoever reads stdout may have left
        pathlib.Path(path).write_text(line + "\n")
    print(line, flush=True)


def check_writable(path: str | None, name: str = "config.decode.json_path") -> None:
    """Raises UserError where a file is asked for that could not be written."""
    if path is not None:
        app.check_writable(path, name)


def check_plot(path: str | None, name: str) -> None:
    """The same of a plot, which also needs matplotlib."""
    check_writable(path, name)
    if path is not None and not importlib.util.find_spec("matplotlib"):
        raise UserError(f"{name}: needs pip install matplotlib")
