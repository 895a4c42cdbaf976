"""A model's decode chunk, compiled, and the cache that it goes on from."""

import time
from typing import Any

import jax
import numpy as np

from minillm_jax.decoding import decode
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM


class DecodeChunk:
    """Greedy steps of all rows of a cache, each time from the same state.

    Args:
      model: whose rows run to the end here, whatever its stop tokens.
      params: the inner tree.
      cache: with room for what is decoded; it is dead afterwards.
      context: its tokens that are seen again each time.
      steps: of a chunk.
      tokens: `[B]` int32, what the rows go on from; None = any.
      options: the compiler's.

    Attributes:
      executable: of a chunk.
      compile_seconds: what XLA took for it.
    """

    def __init__(
        self,
        model: MiniLLM,
        params: decode.Params,
        cache: kv.Cache,
        *,
        context: int,
        steps: int,
        tokens: np.ndarray | None = None,
        options: dict[str, Any] | None = None,
    ):
        rows = len(cache["lengths"])
        tokens = np.ones(rows, np.int32) if tokens is None else tokens
        self._params, self._cache, self._context = params, cache, context
        self._first = jax.device_put((tokens, np.ones(rows, bool)))
        lowered = decode.decode_chunk.lower(
            *(MiniLLM(model.config.replace(eos_token_ids=())), params, cache),
            *self._first,
            steps=steps,
        )
        start = time.perf_counter()
        self.executable: Any = lowered.compile(compiler_options=options)
        self.compile_seconds = time.perf_counter() - start

    def seconds(self, chunks: int = 1) -> float:
        """Of so many chunks, one enqueued after the other, behind a rewound cache."""
        self._cache = jax.block_until_ready(rewound(self._cache, self._context))
        given, out = self._first, None
        start = time.perf_counter()
        for _ in range(chunks):
            out = self.executable(self._params, self._cache, *given)
            self._cache, given = out.cache, (out.tokens, out.active)
        jax.block_until_ready(out)
        return time.perf_counter() - start


def rewound(cache: kv.Cache, length: int) -> dict[str, Any]:
    """The cache as after its first `length` tokens: later ones are no longer seen."""
    batch = cache["lengths"].shape[0]
    lengths = jax.device_put(np.full(batch, length, np.int32))
    return dict(cache) | {"lengths": lengths}
