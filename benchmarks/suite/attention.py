"""cuDNN's attention beside XLA's, and a cache allocated 16 times too large."""

from collections.abc import Iterator
from typing import Any

from benchmarks.suite import measured
from benchmarks.suite.scale import Scale
from minillm_jax.config import ModelConfig
from minillm_jax.model import cudnn, transformer

LAYERS, WIDER = 8, 16  # of each preset; what is allocated over what is used
PRESETS = ("medium", "xlarge")


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each preset cut to some layers, so that compiling does not take the time."""
    results: dict[str, Any] = {"layers": LAYERS, "presets": {}}
    for name in PRESETS:
        config = scale.configs[name]
        config = config.replace(num_layers=min(LAYERS, config.num_layers))
        for results["presets"][name] in _preset(scale, config):
            yield results


def _preset(scale: Scale, config: ModelConfig) -> Iterator[dict[str, Any]]:
    plain = config.replace(attention="xla", decode_attention="xla")
    model = transformer.create_model(plain)
    params = transformer.init_params(model)
    problem = cudnn.why_not(model.config)
    kernels = ["xla"] if problem else ["xla", "cudnn"]
    capacity = WIDER * scale.context
    result = {"cudnn": problem or "used", "decode": [], "prefill": []}
    for kernel in kernels:
        config = plain.replace(attention=kernel, decode_attention=kernel)
        model = transformer.create_model(config)
        for rows in scale.batch_sizes[:2]:
            for slots in (None, min(capacity, config.max_kv_cache_len)):
                decode = measured.Decode(
                    *(model, params, scale),
                    rows=rows,
                    context=scale.context,
                    capacity=slots,
                )
                result["decode"].append({"attention": kernel} | decode.figures())
                del decode  # and its cache
        prompts, chunk = scale.prompts, scale.prefill_chunks[0]
        for row in measured.prefill_figures(
            model, params, scale, prompts=prompts, chunk=chunk
        ):
            result["prefill"].append({"attention": kernel} | row)
        yield result
