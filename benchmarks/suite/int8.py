"""Decode with kernels, keys and values in int8, beside bfloat16."""

from collections.abc import Iterator
from typing import Any

from benchmarks.suite import measured
from benchmarks.suite.scale import Scale
from minillm_jax.config import ModelConfig
from minillm_jax.model import transformer
from minillm_jax.planning import costs

PRESETS = ("large", "xlarge")
FORMS = {
    "floats": {},
    "w8a16": {"quantization": "w8a16"},
    "w8a8": {"quantization": "w8a8"},
    "kv8": {"cache_dtype": "int8"},
    "w8a16+kv8": {"quantization": "w8a16", "cache_dtype": "int8"},
}


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each preset's forms, the floats first; ratios are rates over theirs."""
    results: dict[str, Any] = {"presets": {}}
    for name in PRESETS:
        rows = results["presets"][name] = []
        for form in FORMS:
            for row in _form(scale, scale.configs[name], form):
                same = [r for r in rows if r["form"] == "floats" and _alike(r, row)]
                floats = (same or [row])[0]["step_seconds"]["median"]
                rows.append(row | {"ratio": floats / row["step_seconds"]["median"]})
                yield results


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("batch_size", "context"))


def _form(scale: Scale, config: ModelConfig, form: str) -> Iterator[dict[str, Any]]:
    model = measured.model_of(config.replace(**FORMS[form]))
    params = transformer.init_params(model)
    shapes = [(rows, scale.context) for rows in scale.batch_sizes[:2]]
    for rows, context in [*shapes, (1, scale.long_context)]:
        decode = measured.Decode(model, params, scale, rows=rows, context=context)
        row = {"form": form, "weights_bytes": costs.weight_bytes(model.config)}
        yield row | decode.figures()
        del decode  # and its cache
