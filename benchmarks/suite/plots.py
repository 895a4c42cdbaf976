"""The suite's plots: decode beside its bound, and prefill beside the products' rate."""

import pathlib
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]
from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

from benchmarks import report
from minillm_jax.config import Configs

_COLOURS = ("#d95f02", "#4c72b0", "#55a868", "#8172b3")


def draw(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes decode.png and prefill.png, as far as there is something to draw."""
    matplotlib.use("Agg")  # draws into files, without a display
    parts = {name: part["results"] for name, part in result["parts"].items()}
    presets = {name: parts[name] for name in Configs.names if parts.get(name)}
    title = f"{result.get('device', {}).get('name', '')}, {result['date'][:10]}"
    if any(preset["decode"] for preset in presets.values()):
        _draw_decode(presets, title, out / "decode.png")
    if any(preset["prefill"] for preset in presets.values()):
        _draw_prefill(presets, title, out / "prefill.png")


def _draw_decode(presets: dict[str, Any], title: str, path: pathlib.Path) -> None:
    """A group of bars for each preset: the share of the read bandwidth, or the rate."""
    shares = all("mbu" in row for p in presets.values() for row in p["decode"])

    def value(row: dict[str, Any]) -> float:
        return row["mbu"] if shares else row["decode_tokens_per_second"]["median"]

    def label(row: dict[str, Any]) -> str:
        return f"{report.rate(row['decode_tokens_per_second']['median'])} tok/s"

    rows = {name: preset["decode"] for name, preset in presets.items()}
    keys = ("batch_size", "context")
    names = ("batch size {}, context {}", "share of the measured read bandwidth")
    if not shares:
        names = (names[0], "tokens/s, all rows")
    _draw_groups(rows, value, label, keys, names, f"Decode, {title}", path)


def _draw_prefill(presets: dict[str, Any], title: str, path: pathlib.Path) -> None:
    shares = all("mfu" in row for p in presets.values() for row in p["prefill"])

    def value(row: dict[str, Any]) -> float:
        return row["mfu"] if shares else row["prefill_tokens_per_second"]["median"]

    def label(row: dict[str, Any]) -> str:
        return f"{report.rate(row['prefill_tokens_per_second']['median'])} tok/s"

    rows = {name: preset["prefill"] for name, preset in presets.items()}
    keys = ("prompt_tokens", "chunk")
    names = ("prompt of {}, in chunks of {}", "share of the measured products")
    if not shares:
        names = (names[0], "tokens/s")
    _draw_groups(rows, value, label, keys, names, f"Prefill, {title}", path)


def _draw_groups(
    rows: dict[str, list[dict[str, Any]]],
    value: Any,
    label: Any,
    keys: tuple[str, ...],
    names: tuple[str, str],
    title: str,
    path: pathlib.Path,
) -> None:
    """A panel for each preset, a bar for each of its rows."""
    most = max(len(found) for found in rows.values())
    figure, axes = pyplot.subplots(
        *(len(rows), 1),
        figsize=(7.0, len(rows) * (0.34 * most + 0.5) + 1.0),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    limit = 1.2 * max(value(row) for found in rows.values() for row in found)
    for ax, colour, (name, found) in zip(
        axes.flat, _COLOURS, rows.items(), strict=False
    ):
        ticks = [names[0].format(*(row[key] for key in keys)) for row in found]
        ax.barh(ticks, [value(row) for row in found], color=colour, height=0.7)
        for place, row in enumerate(found):
            end = value(row) + 0.01 * limit
            ax.text(end, place, label(row), va="center", fontsize=9)
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_xlim(0, limit)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].set_xlabel(names[1])
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
