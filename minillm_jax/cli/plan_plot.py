"""A picture of a plan: bytes by class over the context, beside the device's limit."""

import dataclasses
import pathlib

from minillm_jax.cli.app import UserError
from minillm_jax.config import MAX_POSITIONS
from minillm_jax.planning import memory
from minillm_jax.planning.memory import MemoryPlan

_SHORTEST, _STEPS = 256, 8  # tokens, and points for each doubling of them
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
    """Writes the PNG file, up to twice the context that is planned or that fits.

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
    limit = plan.limit_bytes / 1e9
    ax.axhline(limit, color="black", linestyle="--", linewidth=1)
    ax.text(*(contexts[0], limit, f" limit {limit:.3g} GB"), va="bottom", ha="left")
    if contexts[0] <= plan.max_context <= contexts[-1]:
        ax.axvline(plan.max_context, color="black", linestyle=":", linewidth=1)
        ax.annotate(
            f"{plan.max_context} tokens fit ",
            (plan.max_context, 0.97),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
        )
    ax.set_xscale("log", base=2)
    ax.set_xlim(contexts[0], contexts[-1])
    octaves = contexts[::_STEPS]
    ax.set_xticks(octaves[:: 1 + len(octaves) // 12])
    ax.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    ax.set_ylim(0, 1.15 * max(limit, plans[-1].total_bytes / 1e9))
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


def _contexts(plan: MemoryPlan) -> list[int]:
    """Powers of two, and some between them."""
    longest = min(2 * max(plan.context, plan.max_context, _SHORTEST), MAX_POSITIONS)
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
    return f"{value / 1024:.0f}K" if value >= 1024 else f"{value:.0f}"
