"""The comparison's plot: a bar for each peer, a panel for each case."""

import logging
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]
from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

from benchmarks import peers, report

_OURS, _FLOAT32, _SMALLER = "#d95f02", "#4c72b0", "#a6b8d8"
_SMALL = ("bf16", "q8_0", "q4_0")


def draw(result: dict[str, Any], path: str) -> None:
    """Writes a PNG of the decode rates, with the memory's bound as a line each."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # absl shows the rest
    matplotlib.use("Agg")  # draws into files, without a display
    cases = [case for case in result["results"] if case["peers"]]
    columns = min(2, max(1, len(cases)))
    rows = max(1, -(-len(cases) // columns))
    names = max((len(case["peers"]) for case in cases), default=1)
    size = (6.0 * columns, rows * (0.36 * names + 1.1) + 0.9)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(cases) :]:
        ax.set_axis_off()
    for ax, case in zip(axes.flat, cases, strict=False):
        _draw_case(ax, case)
    model = result["config"]["model"]
    figure.suptitle(
        f"Decode, {model['num_layers']} layers of {model['dim_model']}, "
        f"{result['device']['name']}\n"
        "bars: median, whiskers: least and most; black line: what the memory allows"
    )
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _draw_case(ax: Any, case: dict[str, Any]) -> None:
    names, rows = list(case["peers"]), list(case["peers"].values())
    rates = [row["decode_tokens_per_second"] for row in rows]
    read = case["batch_size"] * case["bandwidth_gb_per_s"] * 1e9
    bounds = [read / row["bytes_per_step"] for row in rows]
    limit = 1.15 * max([*bounds, *(rate["max"] for rate in rates)])
    medians = [rate["median"] for rate in rates]
    below = [rate["median"] - rate["min"] for rate in rates]
    above = [rate["max"] - rate["median"] for rate in rates]
    ax.barh(names, medians, color=[_colour(name) for name in names], height=0.7)
    whiskers = {"fmt": "none", "ecolor": "0.25", "capsize": 3}
    ax.errorbar(medians, names, xerr=(below, above), **whiskers)
    for place, (bound, rate) in enumerate(zip(bounds, rates, strict=True)):
        ends = (place - 0.42, place + 0.42)
        ax.plot((bound, bound), ends, color="black", linewidth=2)
        end = rate["max"] + 0.01 * limit
        if end < bound < end + 0.12 * limit:  # the line would cross the number
            end = bound + 0.01 * limit
        ax.text(end, place, report.rate(rate["median"]), va="center", fontsize=9)
    ax.set_xlim(0, limit)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"batch size {case['batch_size']}, context {case['context']}")
    ax.set_xlabel("tokens/s, all rows")


def _colour(name: str) -> str:
    if name.startswith(peers.OURS):
        return _OURS
    return _SMALLER if name.endswith(_SMALL) else _FLOAT32
