"""transformers on PyTorch, on the same GPU and shapes, in bfloat16.

Its growing cache step by step, and a static cache with a step that torch.compile has
made into CUDA graphs. The weights are random; attention is "sdpa" in both.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from benchmarks import measure
from benchmarks.suite.scale import Scale
from minillm_jax.config import ModelConfig

WARM_UP = 3


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Decode rates, and ours over theirs where the preset's part found ours."""
    results: dict[str, Any] = {
        "versions": {"torch": torch.__version__} | {"device": _device()},
        "presets": {},
    }
    results["versions"]["transformers"] = transformers.__version__
    for name, config in scale.configs.items():
        rows = results["presets"][name] = []
        model = _model(config)
        ours = {
            row["batch_size"]: row["decode_tokens_per_second"]["median"]
            for row in found.get(name, {}).get("decode", [])
            if row["context"] == scale.context
        }
        for batch_size in (scale.batch_sizes[0], scale.batch_sizes[-1]):
            for compiled in (False, True):
                row = _figures(model, scale, batch_size, compiled=compiled)
                if batch_size in ours:
                    theirs = row["decode_tokens_per_second"]["median"]
                    row["ours_to_theirs"] = ours[batch_size] / theirs
                rows.append(row)
                yield results
        del model


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _model(config: ModelConfig) -> Any:
    described = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim_model,
        intermediate_size=config.dim_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_kv_cache_len,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(_device()):
            return transformers.LlamaForCausalLM(described).eval()
    finally:
        torch.set_default_dtype(previous)


def _figures(
    model: Any, scale: Scale, batch_size: int, *, compiled: bool
) -> dict[str, Any]:
    """A decode of as many tokens as ours, up to the same context."""
    new = scale.steps * scale.chunks
    prompt = (batch_size, scale.context - new)
    prompt = torch.ones(prompt, dtype=torch.long, device=_device())
    start = time.perf_counter()
    with torch.inference_mode():
        if compiled:
            torch._dynamo.reset()
            # CUDA graphs, and the step's own compiler on a CPU.
            mode = "reduce-overhead" if torch.cuda.is_available() else None
            step = torch.compile(
                model.forward, mode=mode, fullgraph=True, dynamic=False
            )
            cache = transformers.StaticCache(
                config=model.config, max_cache_len=scale.context
            )
        else:
            step, cache = model.forward, None
        for _ in range(WARM_UP if compiled else 1):
            _decode_seconds(model, step, prompt, cache, new)
        warm = time.perf_counter() - start
        seconds = [
            _decode_seconds(model, step, prompt, cache, new) / new
            for _ in range(scale.repeats)
        ]
    return {
        "program": "static cache and torch.compile" if compiled else "eager",
        "batch_size": batch_size,
        "context": scale.context,
        "warm_up_seconds": warm,
        "step_seconds": statistics.median(seconds),
        "decode_tokens_per_second": measure.spread([batch_size / s for s in seconds]),
    }


def _decode_seconds(
    model: Any, step: Any, prompt: Any, cache: Any | None, steps: int
) -> float:
    """Prefills the prompt, then times so many steps behind it."""
    if cache is None:
        cache = transformers.DynamicCache(config=model.config)
    else:
        cache.reset()
    token = _next(model, prompt, cache)
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        if torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()
        token = _next(step, token[:, None], cache).clone()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _next(forward: Any, tokens: Any, cache: Any) -> Any:
    out = forward(
        input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1].argmax(dim=-1)
