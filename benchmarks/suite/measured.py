"""Decode and prefill of one shape: compiled ahead, timed, and counted from a profile.

Rows start as if they held tokens already: their keys and values are random numbers, so
that nothing has to be prefilled before a decode.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import decode_runs, hlo, measure
from benchmarks.suite.scale import Scale
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import costs

WARM_UP = 3  # runs: the first ones of an executable record its graphs


def model_of(config: ModelConfig) -> MiniLLM:
    """The model of a config, whose rows run to the end."""
    return transformer.create_model(config.replace(eos_token_ids=()))


def decode_figures(
    model: MiniLLM,
    params: decode.Params,
    scale: Scale,
    *,
    rows: int,
    context: int,
    capacity: int | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A greedy decode up to `context` tokens a row, in chunks enqueued in turn.

    `options` are the compiler's; without a `capacity` the cache is the context's.
    """
    config, new = model.config, scale.steps * scale.chunks
    capacity = kv.capacity_bucket(config, context) if capacity is None else capacity
    cache, held = held_cache(config, rows, capacity), context - new - 1
    tokens, active = jax.device_put((np.ones(rows, np.int32), np.ones(rows, bool)))
    lowered = decode.decode_chunk.lower(
        model, params, cache, tokens, active, steps=scale.steps
    )
    start = time.perf_counter()
    chunk = lowered.compile(compiler_options=options)
    compiled = time.perf_counter() - start

    def run(chunks: int) -> None:
        nonlocal cache
        cache, out = decode_runs.rewound(cache, held), None
        given = tokens, active
        for _ in range(chunks):
            out = chunk(params, cache, *given)
            cache, given = out.cache, (out.tokens, out.active)
        jax.block_until_ready(out)

    seconds = [s / new for s in _times(lambda: run(scale.chunks), scale.repeats)]
    memory: Any = chunk.memory_analysis()
    return {
        "batch_size": rows,
        "context": context,
        "capacity": capacity,
        "compile_seconds": compiled,
        "decode_tokens_per_second": measure.spread([rows / s for s in seconds]),
        "step_seconds": measure.spread(seconds),
        "bytes_per_step": costs.decode_step_bytes(config, rows, held + new // 2),
        "kernels_in_hlo": hlo.Module(chunk.as_text() or "").loop_kernels(),
        "temporary_bytes": memory.temp_size_in_bytes,
        **_profiled(lambda: run(1), scale.steps),
    }


def prefill_figures(
    model: MiniLLM,
    params: decode.Params,
    scale: Scale,
    *,
    prompts: tuple[int, ...],
    chunk: int,
) -> list[dict[str, Any]]:
    """Prompts of one row, in chunks of one size; they share an executable."""
    model = MiniLLM(model.config.replace(prefill_chunk=chunk))
    capacity = kv.capacity_bucket(model.config, max(prompts))
    cache = held_cache(model.config, 1, capacity)
    logits = jax.device_put(np.zeros((1, model.config.vocab_size), np.float32))
    ids = jax.device_put(np.ones((1, chunk), np.int32))
    left = jax.device_put(np.array([chunk], np.int32))
    lowered = decode.prefill_chunk.lower(model, params, cache, logits, ids, left)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds, rows = time.perf_counter() - start, []
    memory: Any = compiled.memory_analysis()

    def run(prompt: int) -> None:
        nonlocal cache, logits
        cache = decode_runs.rewound(cache, 0)
        for _ in range(prompt // chunk):
            logits, cache = compiled(params, cache, logits, ids, left)
        jax.block_until_ready(logits)

    for prompt in (p for p in prompts if p % chunk == 0):
        seconds = _times(lambda prompt=prompt: run(prompt), scale.repeats)
        heads = 2 * (prompt - prompt // chunk)  # only a chunk's last token has logits
        flops = costs.forward_flops(model.config, prompt)
        flops -= heads * model.config.vocab_size * model.config.dim_model
        row = {
            "prompt_tokens": prompt,
            "chunk": chunk,
            "compile_seconds": compile_seconds,
            "prefill_seconds": measure.spread(seconds),
            "prefill_tokens_per_second": measure.spread([prompt / s for s in seconds]),
            "flops": flops,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        rows.append(row)
    return rows


def held_cache(config: ModelConfig, rows: int, capacity: int) -> dict[str, Any]:
    """A cache of random keys and values, as if its rows held tokens."""
    key = jax.random.key(0)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) == 1:
            return jax.device_put(np.zeros(shape.shape, np.int32))
        return _normal(key, shape.shape, shape.dtype)

    return jax.tree.map(leaf, kv.cache_shapes(config, rows, capacity))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(key, shape, dtype)


def _times(run: Callable[[], None], repeats: int) -> list[float]:
    seconds = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def _profiled(run: Callable[[], None], steps: int) -> dict[str, float | None]:
    """Kernels of a step and the time they take, where the profiler sees a device."""
    with tempfile.TemporaryDirectory(prefix="minillm_jax_profile_") as folder:
        try:
            with jax.profiler.trace(folder):
                run()
            kernels = _kernels(pathlib.Path(folder))
        except Exception:  # a profile is an addition; the times are there without it
            kernels = []
    if not kernels:
        return {"kernels_per_step": None, "kernel_seconds_per_step": None}
    return {
        "kernels_per_step": len(kernels) / steps,
        "kernel_seconds_per_step": sum(kernels) / 1e9 / steps,
    }


def _kernels(folder: pathlib.Path) -> list[float]:
    """Nanoseconds of everything that the streams of a GPU ran."""
    return [
        event.duration_ns
        for path in folder.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
