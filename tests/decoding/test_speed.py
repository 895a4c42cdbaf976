"""Ratios of wall-clock times: run by hand and before an issue closes, never by default.

python -m pytest -m slow tests/decoding/test_speed.py -s
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.decoding import decode
from minillm_jax.decoding import generator as generators
from minillm_jax.model import cache as kv

pytestmark = pytest.mark.slow


def paired_ratio(first, second, repeats):
    """Median of time(second) / time(first), run in turn."""
    ratios = []
    for _ in range(repeats):
        times = []
        for run in (first, second):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    median = statistics.median(ratios)
    print(f"ratio {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return median


@pytest.mark.parametrize("rows", [(), (8,)])
@pytest.mark.parametrize("wraps", [False, True])
def test_a_cache_write_costs_the_same_at_32k_as_at_2k(rows, wraps):
    rule = kv.SlotRule(wraps=wraps)
    new = jnp.ones((*rows, 16, 1, 64))
    zero, one = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.int32)

    def writes(slots):
        def many(leaf):
            def body(step, leaf):
                return kv.write(leaf, new, zero + step, one, rule)

            return jax.lax.fori_loop(0, 2000, body, leaf)

        leaf = [jnp.zeros((*rows, 16, slots, 64))]
        compiled = jax.jit(many, donate_argnums=0).lower(leaf[0]).compile()

        def run():
            leaf[0] = jax.block_until_ready(compiled(leaf[0]))

        run()
        return run

    assert paired_ratio(writes(2048), writes(32768), repeats=9) <= 3


def decoding(config, capacity, batch_size, held, steps=32):
    """A function that decodes `steps` tokens again and again from `held` tokens."""
    model = mj.create_model(config)
    params = mj.init_params(model)
    cache = mj.init_cache(model.config, batch_size, capacity)
    prompt = np.ones((batch_size, held), np.int32)
    logits, cache = mj.prefill(model, params, cache, prompt)
    tokens, state = jnp.argmax(logits, axis=-1), [cache]
    lengths, active = np.full(batch_size, held, np.int32), np.ones(batch_size, bool)

    def run():
        cache = state[0] | {"lengths": jax.device_put(lengths)}
        out = decode.decode_chunk(model, params, cache, tokens, active, steps=steps)
        state[0] = out.cache
        jax.block_until_ready(out.sampled)

    run()
    return run


@pytest.mark.parametrize("batch_size", [1, 8])
def test_decode_keeps_its_speed_with_a_16x_larger_max_kv_cache_len(batch_size):
    """The cache is allocated in buckets: a config's limit costs nothing by itself."""
    config = mj.Configs.small().replace(max_seq_len=256, max_kv_cache_len=256)
    large = config.replace(max_kv_cache_len=16 * 256)
    runs = [
        decoding(c, kv.capacity_bucket(c, 256), batch_size, 200)
        for c in (large, config)
    ]
    assert paired_ratio(*runs, repeats=15) >= 0.95


GREEDY = mj.SamplingParams(temperature=0.0)
SAMPLING = mj.SamplingParams(temperature=0.8, top_k=50, top_p=0.95)


@functools.cache
def medium():
    model = mj.create_model(mj.Configs.medium())
    return model, mj.init_params(model)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(("params", "share"), [(GREEDY, 0.97), (SAMPLING, 0.9)])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_generator_keeps_the_speed_of_the_bare_chunk(
    batch_size, params, share, streamed
):
    """From the first token on; the bare greedy chunk has the same cache and steps."""
    steps, held = 64, 8
    model, weights = medium()
    generator = mj.Generator(model, weights)
    capacity = generators.SMALLEST_CAPACITY
    bare = decoding(model.config, capacity, batch_size, held, steps)
    prompts = np.ones((batch_size, held), np.int32)

    def generate():
        """Seconds of all tokens but the first."""
        pieces = generator.stream(prompts, steps + 1, params)
        if not streamed:
            pieces = generator._start(
                prompts, steps + 1, params, generators.GENERATE_STEPS
            )
        for _ in range(batch_size):
            next(pieces)
        start = time.perf_counter()
        for _ in pieces:
            pass
        return time.perf_counter() - start

    def alone():
        start = time.perf_counter()
        bare()
        return time.perf_counter() - start

    generate()
    ratios = []
    for _ in range(5):
        before, taken, after = alone(), generate(), alone()
        ratios.append((before + after) / 2 / taken)
    median = statistics.median(ratios)
    print(f"share {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    assert median >= share
