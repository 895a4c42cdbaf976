"""Decode and prefill of one shape: compiled ahead, timed, its kernels counted.

Rows start as if they held tokens already: their keys and values are random numbers, so
that nothing has to be prefilled before a decode.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import chunks, hlo, measure
from benchmarks.suite.scale import Scale
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import compiled, costs

WARM_UP = 3  # runs: the first ones of an executable record its graphs


class Decode:
    """A greedy decode up to `context` tokens a row, in chunks enqueued in turn.

    Args:
      model: whose rows run to the end, as `DecodeChunk` has it.
      params: the inner tree.
      scale: steps of a chunk, chunks of a run, and repeats.
      rows: of the batch.
      context: tokens that a row holds after a run.
      capacity: tokens that a row could hold; None = the context's bucket.
      options: the compiler's.
    """

    def __init__(
        self,
        model: MiniLLM,
        params: decode.Params,
        scale: Scale,
        *,
        rows: int,
        context: int,
        capacity: int | None = None,
        options: dict[str, Any] | None = None,
    ):
        self._config, self._scale = model.config, scale
        self._rows, self._context = rows, context
        self._capacity = capacity or kv.capacity_bucket(model.config, context)
        self._new = scale.steps * scale.chunks
        self._chunk = chunks.DecodeChunk(
            *(model, params, held_cache(model.config, rows, self._capacity)),
            context=context - self._new - 1,
            steps=scale.steps,
            options=options,
        )

    def run(self, count: int) -> float:
        """Seconds of so many chunks, from the same state each time."""
        return self._chunk.seconds(count)

    def figures(self) -> dict[str, Any]:
        """Rates with their spread, and what the executable tells."""
        scale, rows, executable = self._scale, self._rows, self._chunk.executable
        seconds = [self.run(scale.chunks) for _ in range(WARM_UP + scale.repeats)]
        seconds = [s / self._new for s in seconds[WARM_UP:]]
        held = self._context - self._new // 2 - 1  # mean over the steps
        return {
            "batch_size": rows,
            "context": self._context,
            "capacity": self._capacity,
            "compile_seconds": self._chunk.compile_seconds,
            "decode_tokens_per_second": measure.spread([rows / s for s in seconds]),
            "step_seconds": measure.spread(seconds),
            "bytes_per_step": costs.decode_step_bytes(self._config, rows, held),
            "kernels": hlo.Module(executable.as_text() or "").loop_kernels(),
            "temporary_bytes": compiled.temporary_bytes(executable),
        }


def decode_figures(
    model: MiniLLM, params: decode.Params, scale: Scale, batch_sizes: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Some batch sizes at the scale's context, then one row at its long one."""
    shapes = [(rows, scale.context) for rows in batch_sizes]
    for rows, context in [*shapes, (1, scale.long_context)]:
        yield Decode(model, params, scale, rows=rows, context=context).figures()


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
    executable: Any = lowered.compile()
    compile_seconds, rows = time.perf_counter() - start, []

    def run(prompt: int) -> float:
        nonlocal cache, logits
        cache = jax.block_until_ready(chunks.rewound(cache, 0))
        start = time.perf_counter()
        for _ in range(prompt // chunk):
            logits, cache = executable(params, cache, logits, ids, left)
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    for prompt in (p for p in prompts if p % chunk == 0):
        seconds = [run(prompt) for _ in range(WARM_UP + scale.repeats)][WARM_UP:]
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
            "temporary_bytes": compiled.temporary_bytes(executable),
        }
        rows.append(row)
    return rows


def held_cache(config: ModelConfig, rows: int, capacity: int) -> dict[str, Any]:
    """A cache of random keys and values, as if its rows held tokens."""
    key = jax.random.key(0)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) == 1:
            return jax.device_put(np.zeros(shape.shape, np.int32))
        if shape.dtype == np.int8:
            return _numbers(key, shape.shape, -127, 128, shape.dtype)
        if shape.shape[-1] == 1:  # scales of such numbers
            return jax.device_put(np.full(shape.shape, 1 / 127, shape.dtype))
        return _normal(key, shape.shape, shape.dtype)

    return jax.tree.map(leaf, kv.cache_shapes(config, rows, capacity))


_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
_numbers = jax.jit(jax.random.randint, static_argnums=(1, 2, 3, 4))
