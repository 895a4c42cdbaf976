"""How XLA starts the kernels of a decode chunk: what its options change."""

from collections.abc import Iterator
from typing import Any

from benchmarks.suite import measured
from benchmarks.suite.scale import Scale
from minillm_jax.model import transformer

# Kinds of work that XLA records into CUDA graphs ("command buffers").
_KERNELS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
OPTIONS: dict[str, dict[str, Any]] = {
    "as XLA chooses": {},
    "no command buffers": {"xla_gpu_enable_command_buffer": ""},
    "command buffers with loops": {
        "xla_gpu_enable_command_buffer": f"{_KERNELS},WHILE,CONDITIONAL"
    },
    "no Triton products": {"xla_gpu_enable_triton_gemm": False},
}
PRESETS = ("small", "medium")


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each option alone, at batch size 1; what XLA refuses is told."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in PRESETS}
    for name, rows in results.items():
        model = transformer.create_model(scale.configs[name])
        params = transformer.init_params(model)
        for label, options in OPTIONS.items():
            try:
                decode = measured.Decode(
                    *(model, params, scale),
                    rows=1,
                    context=scale.context,
                    options=options,
                )
                figures = decode.figures()
            except Exception as error:  # options come and go with versions of XLA
                figures = {"failed": " ".join(str(error).split())[:200]}
            rows.append({"option": label} | figures)
            yield {"presets": results}
