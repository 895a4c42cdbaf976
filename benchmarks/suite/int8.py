"""Decode with kernels, keys and values in int8, beside bfloat16."""

from collections.abc import Iterator
from typing import Any

from benchmarks import int8_forms
from benchmarks.suite import measured
from benchmarks.suite.scale import Scale
from minillm_jax.model import transformer
from minillm_jax.planning import costs

PRESETS = ("large", "xlarge")
FORMS = ("w8a16", "w8a8", int8_forms.CACHE, f"w8a16+{int8_forms.CACHE}")


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each preset's forms, the floats first; ratios are rates over theirs."""
    results: dict[str, Any] = {"presets": {}}
    for name in PRESETS:
        rows = results["presets"][name] = []
        for form in (int8_forms.FLOATS, *FORMS):
            config = int8_forms.with_form(scale.configs[name], form)
            model = transformer.create_model(config)
            params = transformer.init_params(model)
            told = {"form": form, "weights_bytes": costs.weight_bytes(model.config)}
            sizes = scale.batch_sizes[:2]
            for row in measured.decode_figures(model, params, scale, sizes):
                same = [r for r in rows if _alike(r, row)]  # the floats first
                floats = (same or [row])[0]["step_seconds"]["median"]
                ratio = floats / row["step_seconds"]["median"]
                rows.append(told | row | {"ratio": ratio})
                yield results
            del params  # before the next ones


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("batch_size", "context"))
