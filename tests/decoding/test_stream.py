"""Streams that are left or interrupted, sessions that go back, unusual surroundings."""

import functools
import gc
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import executables, generator
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer

ROOT = pathlib.Path(__file__).parents[2]
GREEDY = mj.SamplingParams(temperature=0.0)
RING = {"overflow": "ring", "num_sinks": 2}


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch):
    monkeypatch.setattr(generator, "SMALLEST_CAPACITY", 16)


@functools.cache
def generating(overflow="stop", num_sinks=0, **changes):
    """A Generator that the tests of one set-up share."""
    fields = {"vocab_size": 64, "max_kv_cache_len": 64, "prefill_chunk": 4} | changes
    model = mj.create_model(testing.tiny_config(**fields))
    params = testing.noisy_params(model, seed=3)
    return mj.Generator(model, params, None, overflow, num_sinks)


def some_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


def tokens_of(stream):
    return [piece.token for piece in stream]


def test_a_stream_that_is_left_frees_its_cache_at_once():
    run = generating()
    run.generate([1, 2], 4, GREEDY)
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        for _ in range(3):
            for _ in run.stream([1, 2, 3], 30, GREEDY):
                break
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_a_stream_that_ends_late_does_not_disturb_the_session_it_had():
    run, session = generating(), mj.Session()
    old = run.stream(some_tokens(9), 20, GREEDY, session=session)
    next(old)
    prompt = some_tokens(12, seed=1)
    new = tokens_of(run.stream(prompt, 5, GREEDY, session=session))
    old.close()
    stream = run.stream([*prompt, *new, 3], 5, GREEDY, session=session)
    again = tokens_of(stream)
    assert stream.prefilled_tokens == 2
    assert again == run.generate([[*prompt, *new, 3]], 5, GREEDY)[0].tokens


@pytest.mark.parametrize(
    "fields",
    [{"sliding_window": 6}, RING, {"overflow": "ring"}],
    ids=["window", "ring and sinks", "ring"],
)
@pytest.mark.parametrize("back", [0, 1, 4, 5, 30])
def test_a_session_goes_back_as_far_as_its_cache_still_holds(fields, back):
    """Up to a prefill chunk, wherever the ring has got to; then from the beginning."""
    run, session = generating(max_kv_cache_len=70, **fields), mj.Session()
    for length in (100, 103):  # the ring's turn, and the place within a chunk
        prompt = some_tokens(length, seed=length)
        if "overflow" not in fields:
            prompt = prompt[:50]
        reply = tokens_of(run.stream(prompt, 6, GREEDY, session=session))
        held = len(prompt) + 5  # the last token is not in the cache yet
        kept = [*prompt, *reply][: held - back]
        following = [*kept, (reply[-1 - back] if back < 6 else kept[-1]) ^ 1, 7]
        stream = run.stream(following, 9, GREEDY, session=session)
        assert tokens_of(stream) == run.generate(following, 9, GREEDY)[0].tokens
        new = 2 if back <= 4 else len(following)
        assert stream.prefilled_tokens == new
        session = mj.Session()


def test_before_the_first_wrap_a_session_goes_back_anywhere():
    run, session = generating(max_kv_cache_len=70, **RING), mj.Session()
    prompt = some_tokens(40)
    tokens_of(run.stream(prompt, 6, GREEDY, session=session))
    following = [*prompt[:10], prompt[10] ^ 1, 9]
    stream = run.stream(following, 9, GREEDY, session=session)
    assert tokens_of(stream) == run.generate(following, 9, GREEDY)[0].tokens
    assert stream.prefilled_tokens == 2


@pytest.mark.parametrize("calls", range(2, 22, 3))
def test_an_interrupt_at_any_call_leaves_the_session_usable(monkeypatch, calls):
    """Ctrl-C, say, between two executables: while prefilling, decoding or growing."""
    run, session = generating(), mj.Session()
    prompt = some_tokens(10)
    first = tokens_of(run.stream(prompt, 3, GREEDY, session=session))
    counter, original = itertools.count(1), executables.Executables.__call__

    def interrupted(self, key, **arrays):
        if next(counter) == calls:
            raise KeyboardInterrupt
        return original(self, key, **arrays)

    following = [*prompt, *first, 5, 6]
    with monkeypatch.context() as patch:
        patch.setattr(executables.Executables, "__call__", interrupted)
        stream = run.stream(following, 40, GREEDY, session=session)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    done = stream.completions[0].tokens
    following = [*following, *done, 8]
    again = tokens_of(run.stream(following, 5, GREEDY, session=session))
    assert again == run.generate(following, 5, GREEDY)[0].tokens


def test_rewinding_is_a_fact_of_the_leaves():
    config = testing.tiny_config(prefill_chunk=4, max_kv_cache_len=32, max_seq_len=8)
    ring = kv.CachePolicy(overflow="ring")
    plain = mj.init_cache(config, 1, 16)
    assert kv.can_rewind(config, plain, kv.CachePolicy(), 16, 0)
    cache = mj.init_cache(config, 1, 16, policy=ring)  # 19 slots
    assert kv.can_rewind(config, cache, ring, 19, 0)
    assert not kv.can_rewind(config, cache, ring, 20, 15)
    assert kv.can_rewind(config, cache, ring, 20, 16)


def test_without_jit_everything_is_the_same():
    run = generating(max_seq_len=16, max_kv_cache_len=16, num_layers=1)
    expected = run.generate(some_tokens(4), 2, GREEDY)
    with jax.disable_jit():
        assert run.generate(some_tokens(4), 2, GREEDY) == expected


ELSEWHERE = """
import jax, minillm_jax as mj
from minillm_jax import testing
from minillm_jax.decoding import generator
generator.SMALLEST_CAPACITY = 16
fields = {"max_seq_len": 8, "max_kv_cache_len": 32, "num_layers": 1, "prefill_chunk": 4}
model = mj.create_model(testing.tiny_config(vocab_size=64, **fields))
params = mj.init_params(model)
there = jax.device_put(params, jax.devices()[1])
greedy = mj.SamplingParams(temperature=0.0)
here, there = mj.Generator(model, params), mj.Generator(model, there)
for key in there._executables.keys(1):  # a warmup without the sampler
    if not key.sampling:
        there._executables.compile(key)
with there.forbid_compile():
    out = there.generate([1, 2, 3], 25, greedy)
assert out[0].tokens == here.generate([1, 2, 3], 25, greedy)[0].tokens
"""


def test_everything_runs_where_the_parameters_are():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_parameters_of_another_model_are_named():
    model = mj.create_model(testing.tiny_config(vocab_size=64))
    params = transformer.param_shapes(model)
    other = mj.create_model(testing.tiny_config(vocab_size=65))
    with pytest.raises(mj.ConfigError, match=r"\['embedding'\] has shape \(64, 32\)"):
        mj.Generator(other, params)
    deeper = mj.create_model(testing.tiny_config(vocab_size=64, num_layers=3))
    with pytest.raises(mj.ConfigError, match=r"'layers_2'.* is missing and 5 more"):
        mj.Generator(deeper, params)
    with pytest.raises(mj.ConfigError, match="is not of this model"):
        mj.Generator(model, transformer.param_shapes(deeper))
    with pytest.raises(mj.ConfigError, match="inner tree"):
        mj.Generator(model, {"params": params})
