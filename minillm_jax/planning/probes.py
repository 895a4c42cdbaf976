"""Short measurements of the machine at hand: reading, and writing to a cache.

Machines are shared: a probe says what is there now.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.model import cache as kv

PROBE_BYTES = 256 * 2**20  # several times any last-level cache
ACCELERATOR_PROBE_BYTES = 2 * 2**30  # reading it takes longer than to start


def probe_bytes(platform: str) -> int:
    """What a `Bandwidth` holds on JAX's platform of that name."""
    return PROBE_BYTES if platform == "cpu" else ACCELERATOR_PROBE_BYTES


class Bandwidth:
    """Reads one large float32 array in the ways XLA reads fastest.

    A probe is the best of a sum and of a matrix-vector product, two runs each: memory
    is shared with whatever else the machine does, so a probe belongs beside each
    measurement it is compared with. On a GPU or TPU a run is some, enqueued together.
    """

    def __init__(self) -> None:
        rows, platform = 4096, jax.devices()[0].platform
        self._runs = 1 if platform == "cpu" else 8
        columns = probe_bytes(platform) // 4 // rows
        self._matrix = jnp.ones((rows, columns), jnp.float32)
        self._vector = jnp.ones((self._matrix.shape[1],), jnp.float32)
        self._reads = (
            jax.jit(lambda matrix, vector: jnp.sum(matrix) + vector[0]),
            jax.jit(lambda matrix, vector: matrix @ vector),
        )
        self.probe()  # compiles

    def probe(self) -> float:
        """Bytes per second, now."""
        best = min(
            elapsed(read, self._matrix, self._vector, runs=self._runs)
            for read in self._reads
            for _ in range(2)
        )
        return self._matrix.nbytes / best


def cache_write_seconds(slots: int, dtype: str, writes: int = 500) -> float:
    """Seconds of a write of one token to a cache leaf [16, slots, 64], on average.

    In place it does not depend on the slots. The best of some loops.
    """
    new, one = jnp.ones((16, 1, 64), dtype), jnp.ones((), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def write_all(leaf):
        def body(step, leaf):
            return kv.write(leaf, new, step, one)

        return jax.lax.fori_loop(0, writes, body, leaf)

    leaf = jax.block_until_ready(write_all(jnp.zeros((16, slots, 64), dtype)))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        leaf = jax.block_until_ready(write_all(leaf))
        best = min(best, time.perf_counter() - start)
    return best / writes


def elapsed(function: Callable[..., Any], *args: Any, runs: int = 1) -> float:
    """Seconds until the result of `function(*args)` is there; of each of some runs."""
    out, start = None, time.perf_counter()
    for _ in range(runs):
        out = function(*args)  # the one before is freed
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / runs
