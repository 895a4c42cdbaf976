"""What `cli.plan` shows: a table read in ten seconds, one JSON object, the presets."""

from typing import Any

from rich import console, table, text

from minillm_jax.config import Configs
from minillm_jax.planning import advice, bounds, memory
from minillm_jax.planning.devices import DEVICES
from minillm_jax.planning.memory import MemoryPlan

# What the classes of a plan are, beside their bytes.
_NOTES = {
    "compiled": "activations and copies, as XLA compiles them",
    "workspace": "allocator, small buffers, libraries",
    "runtime": "Python, JAX and the compiler",
    "growth": "a leaf copied as the cache grows",
    "random weights": "the largest matrix as it is made",
    "converted copies": "of weights or cache in another dtype",
    "optimizer": "AdamW's two moments",
}


def show(plan: MemoryPlan, *, trained: bool = False) -> None:
    """Prints the table; `trained` weights fix the shapes of the model."""
    out = console.Console(highlight=False, soft_wrap=True)
    out.print(f"{_headline(plan)}\n")
    out.print(_bytes_table(plan))
    if plan.exact:
        out.print("\nThe bytes above are XLA's; all below is estimated.")
    out.print(f"\n{_room(plan)}")
    _show_bounds(plan, out)
    if changes := advice.singles(plan, trained=trained):
        out.print("\nWhat would need less, each alone:")
        out.print(_advice_table(changes))
    if not plan.fits:
        fitting = advice.until_it_fits(plan, changes)
        out.print(
            "\nNothing fits: not 1 row of 1 token, with all of these."
            if fitting is None
            else f"\nThis fits, with {_gb(fitting.plan.total_bytes)}: {fitting.change}"
        )
    out.print()


def as_dict(plan: MemoryPlan, *, trained: bool = False) -> dict[str, Any]:
    """The plan as plain JSON values, units in the keys."""
    device, changes = plan.device, advice.singles(plan, trained=trained)
    fitting = None if plan.fits else advice.until_it_fits(plan, changes)
    return {
        "plan": "training" if plan.workload.training else "decode",
        "config": plan.config.to_dict(),
        "device": {
            "name": device.name,
            "platform": device.platform,
            "memory_bytes": device.memory_bytes,
            "memory_fraction": device.memory_fraction,
            "bytes_per_second": device.bytes_per_second,
            "flops_per_second": device.flops_per_second,
            "source": device.source,
        },
        "batch_size": plan.batch_size,
        "context": plan.context,
        "fits": plan.fits,
        "exact": plan.exact,  # XLA's bytes; what is fitted or saved is estimated
        "total_bytes": plan.total_bytes,
        "limit_bytes": plan.limit_bytes,
        "peak": plan.peak,
        "bytes_by_class": plan.bytes_by_class,
        "bytes_by_moment": plan.moments,
        "cache_allocated_bytes": plan.cache_bytes,
        "cache_used_bytes": plan.cache_used_bytes,
        "max_batch_size": plan.max_batch_size,
        "max_context": plan.max_context,
        "best_case": [bound._asdict() for bound in _bounds(plan)],
        "advice": [_advice_dict(found) for found in changes],
        "fits_with": None if fitting is None else _advice_dict(fitting),
    }


def _advice_dict(found: advice.Advice) -> dict[str, Any]:
    return {
        "flags": str(found.change),
        "saves_bytes": found.saves_bytes,
        "total_bytes": found.plan.total_bytes,
        "fits": found.plan.fits,
    }


def _headline(plan: MemoryPlan) -> str:
    config, work = plan.config, plan.workload
    rows = _rows(plan.batch_size)
    what = "training on" if work.training else "generating with"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    return (
        f"{fits}: {_gb(plan.total_bytes)} of {_gb(plan.limit_bytes)} on "
        f"{plan.device.name}\n{what} {rows} of {plan.context} tokens, {config.dtype}; "
        f"most is alive {_WHEN[plan.peak]}"
    )


_WHEN = {
    "init": "while random weights are made",
    "prefill": "in prefill",
    "growth": "as the cache grows",
    "decode": "in decode",
    "forward": "in a forward without cache",
    "train": "in a training step",
}


def _bytes_table(plan: MemoryPlan) -> table.Table:
    shown = _grid("", "", "")
    shown.columns[0].justify = shown.columns[2].justify = "left"
    for name, size in plan.bytes_by_class.items():
        if size:
            shown.add_row(name, _gb(size), _note(plan, name))
    shown.add_row("in all", _gb(plan.total_bytes), "")
    device = plan.device
    note = f"all of it ({device.source})"
    if device.memory_fraction < 1:
        share = f"{device.memory_fraction:.0%} of {_gb(device.memory_bytes)}"
        note = f"{share}: XLA_CLIENT_MEM_FRACTION"
    shown.add_row("limit", _gb(plan.limit_bytes), note)
    return shown


def _note(plan: MemoryPlan, name: str) -> str:
    config = plan.config
    if name == "weights":
        return config.param_dtype
    if name == "cache":
        used = plan.cache_used_bytes
        filled = f", {_gb(used)} of it used" if used < plan.cache_bytes else ""
        return f"{config.cache_dtype}{filled}"
    return _NOTES.get(name, "")


def _room(plan: MemoryPlan) -> str:
    rows = f"{plan.context} tokens"
    lines = f"Most rows of {rows}: {plan.max_batch_size or 'none'}"
    many = _rows(plan.batch_size)
    return f"{lines}. Longest context of {many}: {plan.max_context or 'none'}."


def _bounds(plan: MemoryPlan) -> list[bounds.Bound]:
    """Of one row, and of the most that fit."""
    if plan.workload.training:
        return []
    most = max(1, plan.max_batch_size)
    sizes = sorted({1, min(plan.batch_size, most), most})
    found = [
        bounds.best_case(plan.config, plan.device, size, plan.context) for size in sizes
    ]
    return [bound for bound in found if bound is not None]


def _show_bounds(plan: MemoryPlan, out: console.Console) -> None:
    if plan.workload.training:
        return
    if found := _bounds(plan):
        out.print()
        out.print(_bounds_table(found))
        out.print(f"tok/s: all rows together, each holding {plan.context} tokens.")
        out.print("TTFT: of a prompt of that length in every row.")
    else:
        out.print("\nNo best case: give --bandwidth_gbs and --tflops.")


def _bounds_table(found: list[bounds.Bound]) -> table.Table:
    shown = _grid("at best,\nrows", "decode\ntok/s", "TTFT\ns")
    for bound in found:
        shown.add_row(
            str(bound.batch_size),
            _number(bound.decode_tokens_per_second),
            f"{bound.ttft_seconds:.2g}",
        )
    return shown


def _advice_table(changes: list[advice.Advice]) -> table.Table:
    shown = _grid("", "saves", "in all", "")
    shown.columns[0].justify = shown.columns[3].justify = "left"
    for found in changes:
        saved = _gb(found.saves_bytes) if found.saves_bytes else "-"
        fits = "fits" if found.plan.fits else "does not fit"
        words = str(found.change).replace("--config.model.", "").split()
        if len({word.split("=")[1] for word in words}) == 1:  # one value for all
            *names, last = words
            words = [*(name.split("=")[0] for name in names), last]
        total = _gb(found.plan.total_bytes)
        shown.add_row(", ".join(words), saved, total, fits)
    return shown


def presets_by_device(training: bool = False) -> list[dict[str, Any]]:
    """Every preset on every device, one row of its full context."""
    found = []
    for name in Configs.names:
        config = Configs.by_name(name)
        for short, device in DEVICES.items():
            plan = memory.plan_memory(config, device=device, training=training)
            found.append(
                {
                    "preset": name,
                    "device": short,
                    "context": plan.context,
                    "weights_bytes": plan.weights_bytes,
                    "cache_bytes": plan.cache_bytes,
                    "total_bytes": plan.total_bytes,
                    "limit_bytes": plan.limit_bytes,
                    "fits": plan.fits,
                    "max_batch_size": plan.max_batch_size,
                    "max_context": plan.max_context,
                }
            )
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """`presets_by_device` as a table in Markdown."""
    presets = list(dict.fromkeys(row["preset"] for row in found))
    by_key = {(row["preset"], row["device"]): row for row in found}
    lines = ["| | " + " | ".join(f"`{name}`" for name in presets) + " |"]
    lines.append("|---|" + "---|" * len(presets))
    first = [by_key[name, found[0]["device"]] for name in presets]

    def add(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    add("weights", [_gb(row["weights_bytes"]) for row in first])
    if any(row["cache_bytes"] for row in first):  # training has none
        add("cache of one row", [_gb(row["cache_bytes"]) for row in first])
    add("in all, one row", [_gb(row["total_bytes"]) for row in first])
    for short in dict.fromkeys(row["device"] for row in found):
        rows = [by_key[name, short] for name in presets]
        label = f"{short}, {_gb(rows[0]['limit_bytes'])} of {_memory(short)}"
        add(label, [_most(row) for row in rows])
    return "\n".join(lines)


def _memory(short: str) -> str:
    return f"{DEVICES[short].memory_bytes / 1e9:.0f}"


def _most(row: dict[str, Any]) -> str:
    """The most rows of the full context, or the longest context of one."""
    if row["max_batch_size"]:
        return _rows(row["max_batch_size"])
    return f"{row['max_context']} tokens" if row["max_context"] else "-"


def _grid(*headings: str) -> table.Table:
    shown = table.Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(headings)
    )
    for heading in headings:
        shown.add_column(text.Text(heading), justify="right", no_wrap=True)
    return shown


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _gb(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{max(size / 1e9, 0):.3g} GB"
