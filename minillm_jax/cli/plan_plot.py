"""A picture of a plan: bytes by class over the context, beside the device's limit."""

import dataclasses
import pathlib
from typing import Any

from minillm_jax.cli.app import UserError
from minillm_jax.config import MAX_POSITIONS
from minillm_jax.planning import memory
from minillm_jax.planning.memory import MemoryPlan

_SHORTEST, _STEPS = 256, 8  # tokens, and points for each doubling of them
_FARTHEST = 16  # times the context that is planned, however much would fit
_HIGHEST = 4  # times the largest total: a limit above is named, and not drawn
_COLOURS = {
    "weights": "#4c72b0",
    "optimizer": "#64b5cd",
    "gradients": "#8172b3",
    "cache": "#dd8452",
    "activations": "#55a868",
    "compiled": "#55a868",
    "growth": "#ccb974",
    "converted copies": "#c44e52",
    "the rest": "#8c8c8c",  # workspace, runtime, what the start takes more
}


def draw(plan: MemoryPlan, path: pathlib.Path) -> None:
    """Writes the PNG file, to beyond the context that is planned or that fits.

    Raises:
      UserError: where it cannot be written, or matplotlib is not installed.
    """
    if not path.parent.is_dir():
        raise UserError(f"--plot={path}: there is no such folder")
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--plot: needs matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")  # draws into files, without a display
    contexts = _contexts(plan)
    plans = [_at(plan, context) for context in contexts]
    classes = [_classes(plan) for plan in plans]
    names = [name for name in _COLOURS if any(found.get(name) for found in classes)]
    sizes = [[found.get(name, 0) / 1e9 for found in classes] for name in names]

    figure, ax = pyplot.subplots(figsize=(8.5, 4.5), layout="constrained")
    colours = [_COLOURS[name] for name in names]
    ax.stackplot(contexts, sizes, labels=names, colors=colours)
    ax.set_ylim(0, _top(plan, plans[-1]))
    _mark_limits(ax, plan, contexts)
    ax.set_xscale("log", base=2)
    ax.set_xlim(contexts[0], contexts[-1])
    octaves = contexts[::_STEPS]
    ax.set_xticks(octaves[:: 1 + len(octaves) // 12])
    ax.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    ax.set_xlabel("context, tokens of each row")
    ax.set_ylabel("GB")
    what = "training" if plan.workload.training else "generating"
    ax.set_title(
        f"{what}, {plan.batch_size} row{'s' if plan.batch_size > 1 else ''}, "
        f"{plan.config.dtype}, on {plan.device.name}",
        fontsize=11,
    )
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        *(handles[::-1], labels[::-1]),
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _top(plan: MemoryPlan, largest: MemoryPlan) -> float:
    """GB at the upper end."""
    total, limit = largest.total_bytes, plan.limit_bytes
    return 1.15 * max(total, limit if limit <= _HIGHEST * total else 0) / 1e9


def _mark_limits(ax: Any, plan: MemoryPlan, contexts: list[int]) -> None:
    """The device's limit and the longest context, each with its figure."""
    limit, (_, top) = plan.limit_bytes / 1e9, ax.get_ylim()
    ax.axhline(limit, color="black", linestyle="--", linewidth=1)
    above = limit > top
    ax.annotate(
        f"limit {limit:.3g} GB{' ↑' if above else ''}",
        (contexts[0], top if above else limit),
        xytext=(6, -6 if above else 5),
        textcoords="offset points",
        va="top" if above else "bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )
    longest = plan.max_context
    if longest < contexts[0]:
        return
    beyond = longest > contexts[-1]
    ax.axvline(longest, color="black", linestyle=":", linewidth=1)
    ax.annotate(
        f"{longest} tokens fit {'→ ' if beyond else ''}",
        (min(longest, contexts[-1]), 0.97),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
    )


def _contexts(plan: MemoryPlan) -> list[int]:
    """Powers of two, and some between them."""
    fitting = min(2 * plan.max_context, _FARTHEST * plan.context)
    longest = min(max(2 * plan.context, fitting, 2 * _SHORTEST), MAX_POSITIONS)
    steps = range(_STEPS * longest.bit_length())
    sizes = [round(_SHORTEST * 2 ** (step / _STEPS)) for step in steps]
    return [size for size in sizes if size <= longest]


def _classes(plan: MemoryPlan) -> dict[str, int]:
    """Bytes by class of the largest moment behind the start, in all the plan's total.

    Those of the start would take the cache's place where the context is short.
    """
    running = [alive for name, alive in plan.moments.items() if name != "init"]
    alive = max(running, key=lambda found: sum(found.values()))
    return {**alive, "the rest": plan.total_bytes - sum(alive.values())}


def _at(plan: MemoryPlan, context: int) -> MemoryPlan:
    work = dataclasses.replace(plan.workload, capacity=None).with_context(context)
    return memory.plan(work, plan.device)


def _tokens(value: float) -> str:
    if value >= 2**20:
        return f"{value / 2**20:.0f}M"
    return f"{value / 1024:.0f}K" if value >= 1024 else f"{value:.0f}"
