"""Memory of loading: the model, and what one parameter needs beside it."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.model import transformer
from minillm_jax.weights import load

ROOT = pathlib.Path(mj.__file__).parents[1]
STATUS = pathlib.Path("/proc/self/status")
# The host's allocator keeps some of what it got back, more with many small parameters.
SLACK = 0.12  # of the model

LOADS = """
import json, pathlib, sys
import jax
import minillm_jax as mj

def memory(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder, tiny, dtype = sys.argv[1:]
mj.load_pretrained(tiny, dtype)  # what the first arrays of a process take
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
_, params, _ = mj.load_pretrained(folder, dtype)
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps([memory("VmHWM") - before, sum(sizes), max(sizes)]))
"""


@pytest.fixture(scope="module")
def model_of():
    """A model of 71 M parameters in a dtype; embedding and head are half of it."""

    @functools.cache
    def make(dtype):
        config = testing.tiny_config(
            vocab_size=32000,
            dim_model=512,
            num_heads=8,
            num_kv_heads=8,
            num_layers=12,
            dim_ff=1408,
            dtype=dtype,
        )
        model = mj.create_model(config)
        shapes = transformer.param_shapes(model)
        return model, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)

    return make


CASES = [
    ("bfloat16", 50 * 10**6, "float32"),
    *[
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("float32", 10**9, "float32"),
            ("float32", 50 * 10**6, "float32"),
            ("float32", 10**9, "bfloat16"),
            ("bfloat16", 10**9, "float32"),
            ("bfloat16", 10**9, "bfloat16"),
        )
    ],
]


@pytest.mark.skipif(not STATUS.exists(), reason="no VmHWM on this system")
@pytest.mark.parametrize(("stored", "shard_bytes", "dtype"), CASES)
def test_loading_takes_the_model_and_one_parameter(
    tmp_path, model_of, stored, shard_bytes, dtype
):
    folder = tmp_path / "model"
    model, params = model_of(stored)
    mj.save_pretrained(folder, model, params, shard_bytes=shard_bytes)
    block = load.BLOCK * params["embedding"].itemsize
    try:
        tiny = pathlib.Path(__file__).parents[1] / "goldens" / "tinyllama"
        done = subprocess.run(
            [sys.executable, "-c", LOADS, str(folder), str(tiny), dtype],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        shutil.rmtree(folder)
    peak, size, largest = json.loads(done.stdout)
    print(f"{stored} -> {dtype}: peak {peak / size:.2f} of {size / 1e6:.0f} MB")
    # On the device, a parameter on the host, a block of it mapped and as read.
    assert size < peak < (1 + SLACK) * size + largest + 2 * block
