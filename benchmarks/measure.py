"""Clocks: the machine's read bandwidth, time spent compiling, repeats with a spread."""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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


class Product:
    """Multiplies two large float32 matrices, as a prefill of 512 tokens does.

    Processors are shared as memory is: a probe belongs beside what it is compared with.
    """

    def __init__(self) -> None:
        tokens, inner, outer = 512, 2048, 8192
        self._x = jnp.ones((tokens, inner), jnp.float32)
        self._kernel = jnp.ones((inner, outer), jnp.float32)
        self._flops = 2 * tokens * inner * outer
        self._product = jax.jit(jnp.dot)
        self.probe()  # compiles

    def probe(self) -> float:
        """FLOP/s, now: the best of some runs."""
        best = min(elapsed(self._product, self._x, self._kernel) for _ in range(3))
        return self._flops / best


def busy_share(seconds: float = 0.5) -> float | None:
    """Share of all cores that is taken while this process sleeps; None = not known."""
    try:
        before = _ticks()
        time.sleep(seconds)
        idle, total = (now - then for now, then in zip(_ticks(), before, strict=True))
    except OSError:  # not Linux
        return None
    return 1.0 - idle / max(total, 1)


def _ticks() -> tuple[int, int]:
    """Clock ticks of all cores since the start: idle ones, and all."""
    line = pathlib.Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, idle, iowait, *rest = map(int, line.split()[1:9])
    idle += iowait
    return idle, user + nice + system + idle + sum(rest)


def elapsed(function: Callable[..., Any], *args: Any, runs: int = 1) -> float:
    """Seconds until the result of `function(*args)` is there; of each of some runs."""
    out, start = None, time.perf_counter()
    for _ in range(runs):
        out = function(*args)  # the one before is freed
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / runs


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


class _CompileClock:
    """Adds up what JAX reports of tracing, lowering and compiling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._record)

    def _record(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile"):
            self.seconds += duration_secs


_clock: list[_CompileClock] = []


@contextlib.contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
    """A function that tells the seconds spent compiling since the block began."""
    if not _clock:  # listeners cannot be removed: one serves for good
        _clock.append(_CompileClock())
    start = _clock[0].seconds
    yield lambda: _clock[0].seconds - start
