"""Decode and prefill speed of one model, with and without its cache.

Per context: a prompt is prefilled, `new_tokens` are decoded greedily from the same
state again and again, and a few tokens are decoded by full forwards instead. The read
bandwidth is probed between the repeats, so that each has its own bound beside it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import chunks, measure, prompts
from minillm_jax.cli.config_files import DecodeSettings
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.decoding import decode
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import compiled, costs

PREFILL_SECONDS = 10.0  # repeated for no longer than this
NO_CACHE_TOKENS, NO_CACHE_SECONDS = 3, 20.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """One measurement: how many rows, and how many tokens each."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    capacity: int  # tokens the cache is allocated for

    @property
    def context(self) -> int:
        """Tokens a row holds at the end."""
        return self.prompt_tokens + self.new_tokens


def shapes(config: ModelConfig, settings: DecodeSettings) -> list[Shape]:
    """The measurements that the settings ask for; raises ConfigError with numbers."""
    prompts.check(config.vocab_size)  # before there are weights
    found = []
    for context in settings.measured_contexts():
        capacity = settings.capacity or kv.capacity_bucket(config, context)
        if context > config.max_kv_cache_len:
            raise ConfigError(
                f"config.decode: a context of {context} tokens is longer than "
                f"max_kv_cache_len={config.max_kv_cache_len}; raise that, or shorten it"
            )
        if not context <= capacity <= config.max_kv_cache_len:
            raise ConfigError(
                f"config.decode.capacity={capacity}: must hold a context of {context} "
                f"tokens, within max_kv_cache_len={config.max_kv_cache_len}; write "
                f"{kv.capacity_bucket(config, context)}, or leave it unset"
            )
        prompt = context - settings.new_tokens
        found.append(
            Shape(int(settings.batch_size), prompt, settings.new_tokens, capacity)
        )
    return found


def run(
    model: MiniLLM,
    params: decode.Params,
    shape: Shape,
    *,
    repeats: int,
    compare_no_cache: bool = True,
    bandwidth: measure.Bandwidth,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Measures one shape; the keys are those of the benchmark's `results`."""
    config, rows = model.config, shape.batch_size
    prompt = prompts.source_tokens(rows, shape.prompt_tokens, config.vocab_size)
    cache = kv.init_cache(config, rows, shape.capacity)
    slots = kv.num_slots(config, shape.capacity, kv.CachePolicy())

    progress("prefill")
    with measure.compile_seconds() as compiling:
        prefilled, cache, tokens = _prefill(model, params, cache, prompt, repeats)
        progress("decode")
        chunk = chunks.DecodeChunk(
            *(model, params, cache),
            context=shape.prompt_tokens,
            steps=shape.new_tokens - 1,  # the prefill gave the first one
            tokens=tokens,
        )
        chunk_bytes = compiled.call_bytes(chunk.executable)
        del cache
        steps, bounds = _decode(chunk, shape.new_tokens - 1, repeats, bandwidth)
        compile_seconds = compiling()
    del chunk  # and its cache
    no_cache = no_cache_bytes = None
    if compare_no_cache and shape.context <= config.max_seq_len:
        progress("no cache")
        prompt = np.resize(prompt, (rows, shape.context))
        no_cache, no_cache_bytes = _no_cache(model, params, prompt)

    held = shape.prompt_tokens + shape.new_tokens // 2  # mean over the steps
    bytes_per_step = costs.decode_step_bytes(config, rows, held)
    rate = [rows / seconds for seconds in steps]
    achieved = [bytes_per_step / seconds for seconds in steps]
    ttft = statistics.median(prefilled)
    speed = measure.spread(rate)
    return {
        "batch_size": rows,
        "context": shape.context,
        "prompt_tokens": shape.prompt_tokens,
        "new_tokens": shape.new_tokens,
        "capacity": shape.capacity,
        "cache_bytes_allocated": costs.cache_bytes(config, rows, slots),
        "cache_bytes_used": costs.cache_bytes(
            config, rows, [min(shape.context, count) for count in slots]
        ),
        "compile_seconds": compile_seconds,
        "ttft_seconds": ttft,
        "prefill_tokens_per_second": rows * shape.prompt_tokens / ttft,
        "decode_tokens_per_second": speed,
        "ms_per_token": 1e3 * rows / speed["median"],
        "bytes_per_step": bytes_per_step,
        "gb_per_s": statistics.median(achieved) / 1e9,
        "bandwidth_gb_per_s": statistics.median(bounds) / 1e9,
        "mbu": statistics.median(a / b for a, b in zip(achieved, bounds, strict=True)),
        "step_memory_bytes": chunk_bytes,
        "no_cache_memory_bytes": no_cache_bytes,
        "no_cache_tokens_per_second": no_cache,
        "speedup": speed["median"] / no_cache if no_cache else None,
    }


def _prefill(model, params, cache, prompt, repeats: int):
    """Seconds from a prompt on the host to its first token there, per repeat."""
    seconds, spent, tokens = [], 0.0, None
    with measure.compile_seconds() as compiling:
        for repeat in range(repeats + 1):
            before, start = compiling(), time.perf_counter()
            logits, cache = decode.prefill(model, params, cache, prompt)
            tokens = np.asarray(jnp.argmax(logits, axis=-1))
            took = time.perf_counter() - start - (compiling() - before)
            cache["lengths"].block_until_ready()
            spent += took
            if repeat > 0 or took > PREFILL_SECONDS:  # the first one warms up
                seconds.append(took)
            if seconds and spent > PREFILL_SECONDS:
                break
            if repeat < repeats:
                cache = chunks.rewound(cache, 0)
    return seconds, cache, tokens


def _decode(
    chunk: chunks.DecodeChunk, steps: int, repeats: int, bandwidth: measure.Bandwidth
) -> tuple[list[float], list[float]]:
    """Seconds per step, and the probe beside it in bytes/s, per repeat."""
    chunk.seconds()  # warms up
    seconds, bounds = [], []
    for _ in range(repeats):
        bounds.append(bandwidth.probe())
        seconds.append(chunk.seconds() / steps)
    return seconds, bounds


def _no_cache(model, params, tokens: np.ndarray) -> tuple[float, int]:
    """Tokens per second, all rows, when every token is a forward over the context.

    And the bytes that such a forward takes.
    """
    forward = jax.jit(last_logits, static_argnames=("model",))
    call = forward.lower(model, params, tokens).compile()
    seconds = []
    while len(seconds) < NO_CACHE_TOKENS and sum(seconds) < NO_CACHE_SECONDS:
        seconds.append(measure.elapsed(call, params, tokens))
    rate = tokens.shape[0] / statistics.median(seconds)
    return rate, compiled.call_bytes(call)


def last_logits(model, params, tokens):
    """The logits that the next token is chosen from, and no others."""
    x, _ = model.apply({"params": params}, tokens, method="hidden")
    return model.apply({"params": params}, x[:, -1], method="unembed")
