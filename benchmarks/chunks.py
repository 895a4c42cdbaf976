"""A model's decode chunk, compiled, and the cache that it goes on from."""

import time
from typing import Any

import jax
import numpy as np

from benchmarks import decode_runs
from minillm_jax.decoding import decode
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM


class DecodeChunk:
    """`steps` greedy steps of some rows, each time behind `context` tokens."""

    def __init__(
        self,
        model: MiniLLM,
        params: decode.Params,
        rows: int,
        *,
        context: int,
        steps: int,
    ):
        self._params, self._context = params, context
        model = MiniLLM(model.config.replace(eos_token_ids=()))  # to the end
        self._cache = kv.init_cache(model.config, rows, context + steps)
        self._given = np.zeros(rows, np.int32), np.ones(rows, bool)
        lowered = decode.decode_chunk.lower(
            *(model, params, self._cache, *self._given), steps=steps
        )
        self._call = lowered.compile()
        analysis: Any = self._call.memory_analysis()
        self.temp_bytes = analysis.temp_size_in_bytes

    def seconds(self) -> float:
        """Of a chunk, now."""
        cache = decode_runs.rewound(self._cache, self._context)
        start = time.perf_counter()
        out = self._call(self._params, cache, *self._given)
        jax.block_until_ready(out.sampled)
        self._cache = out.cache
        return time.perf_counter() - start
