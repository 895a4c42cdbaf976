"""The comparison's tables."""

from collections.abc import Callable
from typing import Any

from rich import console

from benchmarks import peers, report

_Row = dict[str, Any]
_BUSY = 0.1  # share of the processor taken by others, from which it is said


def _spread(key: str) -> Callable[[_Row], str]:
    return lambda row: report.or_dash(row[key], report.least_and_most)


def _median(key: str) -> Callable[[_Row], str]:
    return lambda row: report.or_dash(
        row[key], lambda found: report.rate(found["median"])
    )


def _plain(key: str) -> Callable[[_Row], str]:
    return lambda row: report.or_dash(row[key], lambda value: f"{value:.2f}")


# Columns beside the peer's name: heading, and the cell of its results.
_COLUMNS = {
    "prefill": {
        "prefill\ntok/s": _median("prefill_tokens_per_second"),
        "\n(min-max)": _spread("prefill_tokens_per_second"),
        "\nours/peer": _median("prefill_ours_to_peer"),
        " \n(min-max)": _spread("prefill_ours_to_peer"),
        "of a\nproduct": _plain("prefill_product_share"),
    },
    "decode": {
        "decode\ntok/s": _median("decode_tokens_per_second"),
        "\n(min-max)": _spread("decode_tokens_per_second"),
        "\nours/peer": _median("decode_ours_to_peer"),
        " \n(min-max)": _spread("decode_ours_to_peer"),
        "\nMBU": _plain("mbu"),
        "same\ntokens": _plain("same_tokens"),
    },
    "int8": {
        "decode\nours_int8/peer": _median("decode_int8_to_peer"),
        "\n(min-max)": _spread("decode_int8_to_peer"),
    },
}


def show(result: dict[str, Any]) -> None:
    """A comparison's tables, with what their columns mean."""
    out = console.Console(highlight=False, soft_wrap=True)
    model = result["config"]["model"]
    out.print(
        f"{result['device']['name']}, {result['threads']} threads, jax "
        f"{result['versions']['jax']}, {model['dtype']}"
    )
    for name, peer in result["peers"].items():
        if peer["status"] != "ok":
            out.print(f"{name}: {peer['status']}", markup=False)
    for case in result["results"]:
        if not case["peers"]:
            continue
        out.print(
            f"\nbatch size {case['batch_size']}, context {case['context']} (prompt "
            f"{case['prompt_tokens']}); {case['product_gflop_per_s']:.0f} GFLOP/s, "
            f"reads {case['bandwidth_gb_per_s']:.1f} GB/s"
        )
        if (case["busy_before"] or 0.0) > _BUSY:
            out.print(
                f"others took {case['busy_before']:.0%} of the processor before it, "
                "which is unfair to\nprograms that wait by spinning: measure again"
            )
        for name, columns in _COLUMNS.items():
            if name != "int8" or peers.OURS_INT8 in case["peers"]:
                out.print(_grid(columns, case["peers"]))
    out.print(
        "\ntok/s: all rows together. ours/peer: median of the ratios within rounds.\n"
        "ours_int8/peer: the same with our kernels and cache in int8.\n"
        "of a product: FLOP/s over those of one large float32 product beside it.\n"
        "MBU: the bytes a step must read over its time, as a share of the bandwidth.\n"
        "same tokens: share of the tokens equal to ours until a row first differs.\n"
    )


def _grid(columns: dict[str, Callable[[_Row], str]], rows: dict[str, _Row]) -> Any:
    grid = report.grid("", *columns)
    grid.columns[0].justify, grid.columns[0].min_width = "left", 21
    for name, row in rows.items():
        grid.add_row(name, *(cell(row) for cell in columns.values()))
    return grid
