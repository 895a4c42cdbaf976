"""What the device can do: reading, copying, multiplying, and starting a kernel."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.suite.scale import Scale

RUNS, ROUNDS = 10, 5  # enqueued together; the best round counts
LOOP_STEPS, LOOP_KERNELS = 100, 50


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """GB/s, FLOP/s and seconds; the best of some rounds each."""
    results, key = {}, jax.random.key(0)
    vector = jnp.ones((scale.probe_bytes // 4,), jnp.float32)
    read = _seconds(jax.jit(jnp.sum), vector)
    results["read_bytes_per_second"] = scale.probe_bytes / read
    copy = _seconds(jax.jit(lambda x: x + 1), vector)
    results["copy_bytes_per_second"] = 2 * scale.probe_bytes / copy
    del vector
    size = (scale.probe_size, scale.probe_size)
    matrices = [jax.random.normal(k, size, jnp.bfloat16) for k in jax.random.split(key)]
    product = _seconds(jax.jit(jnp.matmul), *matrices)
    results["bfloat16_flops_per_second"] = 2 * scale.probe_size**3 / product
    results["seconds_per_kernel"] = _launch_seconds()
    yield results


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    """Of one run, of several that are enqueued together."""
    jax.block_until_ready(function(*args))
    return min(measure.elapsed(function, *args, runs=RUNS) for _ in range(ROUNDS))


def _launch_seconds() -> float:
    """Of a kernel that does next to nothing, behind another in a loop."""
    small = jnp.eye(16, dtype=jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames="kernels")
    def loop(x: jax.Array, kernels: int) -> jax.Array:
        def step(x, _):
            for _ in range(kernels):
                x = x @ small
            return x, None

        return jax.lax.scan(step, x, length=LOOP_STEPS)[0]

    # The difference of two lengths: what the loop itself takes is not a kernel's.
    few, many = LOOP_KERNELS, 2 * LOOP_KERNELS
    seconds = [_seconds(loop, small, kernels) for kernels in (few, many)]
    return max(0.0, seconds[1] - seconds[0]) / (LOOP_STEPS * (many - few))
