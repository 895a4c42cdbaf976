"""What XLA makes of the model for accelerators that are not here.

Needs JAX's plugin for them, though no driver: left out where it is not installed.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import targets
from minillm_jax.cli.app import UserError

ROOT = pathlib.Path(__file__).parents[2]


def ahead(*arguments):
    command = [sys.executable, "-m", "benchmarks.ahead", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment
    )


def has(*names):
    """Whether any of these plugins is installed."""
    return any(importlib.util.find_spec(name) for name in names)


CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
needs_cuda = pytest.mark.skipif(not has(*CUDA), reason="no CUDA plugin of JAX")
needs_tpu = pytest.mark.skipif(not has("libtpu"), reason="no TPU plugin of JAX")


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("h200", marks=needs_cuda),
        pytest.param("a100", marks=needs_cuda),
        pytest.param("v5e", marks=needs_tpu),
    ],
)
@pytest.mark.slow
def test_decode_never_copies_the_cache_on_an_accelerator(target):
    done = ahead(
        *(f"--target={target}", "--config=medium", "--config.model.num_layers=8")
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    decodes = [row for row in results if row["call"].startswith("decode")]
    assert {row["batch_size"] for row in decodes} == {1, 8, 32}
    for row in decodes:
        assert row["argument_bytes"] >= row["cache_bytes"]
        if target != "v5e":  # which keeps weights in another layout during a chunk
            assert row["cache_copies"] == 0
            assert row["waits_for_host"] == 0
            most = 20 if row["call"] == "decode, greedy" else 32
            assert row["kernels_per_layer"] <= most  # with those outside of layers
            assert row["temporary_bytes"] <= 0.1 * row["cache_bytes"]
    assert all(row["waits_for_host"] == 0 for row in results if target != "v5e")


def test_an_unknown_target_is_refused():
    with pytest.raises(UserError, match="must be one of a100, h100, h200, v5e, v6e"):
        targets.sharding("h300")


@pytest.mark.skipif(has(*CUDA), reason="the plugin is installed")
def test_without_the_plugin_it_is_named():
    done = ahead("--target=h200", "--config=small")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'minillm_jax[cuda13]'" in line
