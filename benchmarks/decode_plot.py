"""The context sweep's plot: tokens/s and memory, with the cache and without."""

from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]
import matplotlib.ticker  # pyright: ignore[reportMissingImports]
from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

_CACHED, _FULL = "#d95f02", "#4c72b0"


def draw(result: dict[str, Any], path: str) -> None:
    """Writes a PNG of a decode benchmark's results."""
    matplotlib.use("Agg")  # draws into files, without a display
    rows = sorted(result["results"], key=lambda row: row["context"])
    full = [row for row in rows if row["no_cache_tokens_per_second"] is not None]
    figure, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(10.0, 4.2), layout="constrained"
    )
    _draw_speed(speed, rows, full)
    _draw_memory(memory, rows, full)
    for ax in (speed, memory):
        ax.set_xscale("log", base=2)
        ax.set_xticks([row["context"] for row in rows])
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.set_xlabel("context, tokens of each row")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    model = result["config"]["model"]
    figure.suptitle(
        f"Decode, {model['num_layers']} layers of {model['dim_model']}, "
        f"{model['dtype']}, batch size {rows[0]['batch_size']}, "
        f"{result['device']['name']}"
    )
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _draw_speed(ax: Any, rows: list[dict[str, Any]], full: list[dict[str, Any]]):
    contexts = [row["context"] for row in rows]
    rates = [row["decode_tokens_per_second"] for row in rows]
    medians = [rate["median"] for rate in rates]
    below = [rate["median"] - rate["min"] for rate in rates]
    above = [rate["max"] - rate["median"] for rate in rates]
    ax.errorbar(
        *(contexts, medians, (below, above)),
        marker="o",
        capsize=3,
        color=_CACHED,
        label="with the cache",
    )
    bounds = [
        row["batch_size"] * row["bandwidth_gb_per_s"] * 1e9 / row["bytes_per_step"]
        for row in rows
    ]
    label = "what the memory allows"
    ax.plot(contexts, bounds, color="black", linestyle="--", linewidth=1, label=label)
    if full:
        ax.plot(
            [row["context"] for row in full],
            [row["no_cache_tokens_per_second"] for row in full],
            *("o-",),
            color=_FULL,
            label="without",
        )
    for row in full:
        ax.annotate(
            f"{row['speedup']:.0f}x",
            (row["context"], row["no_cache_tokens_per_second"]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    ax.set_yscale("log")
    ax.set_ylabel("tokens/s, all rows")


def _draw_memory(ax: Any, rows: list[dict[str, Any]], full: list[dict[str, Any]]):
    ax.plot(
        [row["context"] for row in rows],
        [row["step_memory_bytes"] / 1e9 for row in rows],
        *("o-",),
        color=_CACHED,
        label="decode with the cache",
    )
    if full:
        ax.plot(
            [row["context"] for row in full],
            [row["no_cache_memory_bytes"] / 1e9 for row in full],
            *("o-",),
            color=_FULL,
            label="a forward without",
        )
    most = max(row["step_memory_bytes"] for row in rows)
    most = max(most, *(row["no_cache_memory_bytes"] for row in full), 0)
    ax.set_ylim(0, 1.1 * most / 1e9)
    ax.set_ylabel("GB, weights included")
