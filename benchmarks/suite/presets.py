"""Decode at several batch sizes and contexts, and prefill, of one preset."""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.suite import measured
from benchmarks.suite.scale import Scale
from minillm_jax.model import transformer
from minillm_jax.planning import costs, machine


def run(
    scale: Scale, found: dict[str, Any], *, preset: str
) -> Iterator[dict[str, Any]]:
    """Shares are given where the part of the ceilings found them."""
    model = transformer.create_model(scale.configs[preset])
    params = transformer.init_params(model)
    ceilings, device = found.get("ceilings", {}), jax.devices()[0]
    results: dict[str, Any] = {
        "model": model.config.to_dict(),
        "weights_bytes": costs.weight_bytes(model.config),
        "decode": [],
        "prefill": [],
    }
    for row in measured.decode_figures(model, params, scale, scale.batch_sizes):
        results["decode"].append(row | _decode_shares(row, ceilings))
        yield results | {"peak_bytes": machine.peak_bytes(device)}
    for chunk in scale.prefill_chunks:
        for row in measured.prefill_figures(
            model, params, scale, prompts=scale.prompts, chunk=chunk
        ):
            results["prefill"].append(row | _prefill_shares(row, ceilings))
        yield results | {"peak_bytes": machine.peak_bytes(device)}


def _decode_shares(row: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    """MBU, and the time over what launches and reading take at the least."""
    if not ceilings:
        return {}
    seconds = row["step_seconds"]["median"]
    read = row["bytes_per_step"] / ceilings["read_bytes_per_second"]
    bound = read + row["kernels"] * ceilings["seconds_per_kernel"]
    return {
        "mbu": read / seconds,
        "bound_seconds": bound,
        "over_bound": seconds / bound,
    }


def _prefill_shares(row: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    if not ceilings:
        return {}
    rate = row["flops"] / row["prefill_seconds"]["median"]
    return {"mfu": rate / ceilings["bfloat16_flops_per_second"]}
