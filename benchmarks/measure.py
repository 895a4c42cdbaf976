"""Clocks: the machine's read bandwidth, time spent compiling, repeats with a spread."""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from minillm_jax.planning.probes import PROBE_BYTES as PROBE_BYTES
from minillm_jax.planning.probes import Bandwidth as Bandwidth
from minillm_jax.planning.probes import elapsed as elapsed
from minillm_jax.planning.probes import probe_bytes as probe_bytes


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
