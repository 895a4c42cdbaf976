"""Random configs, run in processes whose memory is limited to what their plan says."""

import concurrent.futures
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.planning import devices, memory
from minillm_jax.planning.workload import Workload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a data limit is Linux's"),
]

RUN = pathlib.Path(__file__).parent / "limited_run.py"
CONFIGS, WORKERS = 50, 2
# Of an estimate. What is less is mostly Python, JAX and the compiler.
SMALLEST, LARGEST = 10**9, 8 * 10**9
TOO_SMALL = 1.3  # a limit that the estimate exceeds by so much is truly too small


def limited(code, limit_bytes, *arguments):
    """A Python process with a data limit."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_DATA, ({0}, {0}));"
    return subprocess.run(
        [sys.executable, "-c", limit.format(limit_bytes) + code, *arguments],
        capture_output=True,
        text=True,
    )


def test_the_limit_limits_what_is_written_and_not_what_is_reserved():
    asked = "import numpy as np; np.{}(int(600e6), np.uint8); print('there')"
    assert "there" in limited(asked.format("ones"), 10**9).stdout
    assert "MemoryError" in limited(asked.format("ones"), 5 * 10**8).stderr
    reserve = "import mmap; mmap.mmap(-1, 2 * 10**9, prot=mmap.PROT_READ); print('ok')"
    assert "ok" in limited(reserve, 5 * 10**8).stdout


def random_workload(seed):
    """A model of any size, with a cache or in training.

    Training and bfloat16 are promised from JAX 0.12 on.
    """
    draw = np.random.default_rng(seed)
    heads = int(draw.choice([4, 8, 16]))
    head_dim = int(draw.choice([32, 64, 128]))
    context = int(draw.choice([256, 512, 1024, 2048, 4096, 8192]))
    promised = jax.__version_info__ >= (0, 12)
    training = promised and seed % 5 == 0
    if training:
        context = min(context, 512)
    fields = {
        "max_seq_len": context,
        "max_kv_cache_len": context,
        "dim_model": int(draw.choice([256, 512, 1024, 1536])),
        "num_heads": heads,
        "num_kv_heads": heads // int(draw.choice([1, 2, 4])),
        "head_dim": head_dim,
        "num_layers": int(draw.integers(2, 17)),
        "vocab_size": int(draw.choice([1000, 8000, 32000, 64000])),
        "dtype": str(draw.choice(["float32", "bfloat16"])) if promised else "float32",
        "tie_embeddings": bool(draw.integers(2)),
    }
    if draw.integers(3) == 0:
        fields["sliding_window"] = int(draw.integers(64, 1024))
    overflow = "ring" if draw.integers(4) == 0 else "error"
    config = mj.ModelConfig(**fields).resolve("cpu")
    if training:
        config = config.replace(param_dtype="float32", remat=bool(draw.integers(2)))
    return Workload(
        config=config,
        batch_size=int(draw.choice([1, 2, 4] if training else [1, 2, 4, 8, 16])),
        context=context,
        capacity=context,
        policy=mj.CachePolicy(overflow=overflow),
        training=training,
    )


def run(work, limit_bytes):
    """Whether it ran, and the last line of what it said."""
    asked = {
        "config": work.config.to_dict(),
        "batch_size": work.batch_size,
        "context": work.context,
        "capacity": work.capacity,
        "overflow": work.policy.overflow,
        "training": work.training,
        "limit_bytes": limit_bytes,
    }
    done = subprocess.run(
        [sys.executable, str(RUN), json.dumps(asked)], capture_output=True, text=True
    )
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.returncode == 0 and "ran" in done.stdout, said[-1] if said else ""


def estimate(work):
    return memory.plan(work, devices.Device("host", "cpu", 0)).total_bytes


def test_what_fits_runs_and_what_is_refused_does_not():
    """At a limit of the estimate, and at one that the estimate exceeds by 1.3."""
    drawn = (random_workload(seed) for seed in itertools.count())
    sized = (work for work in drawn if SMALLEST <= estimate(work) <= LARGEST)
    works = list(itertools.islice(sized, CONFIGS))
    totals = [estimate(work) for work in works]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        fitting = list(pool.map(run, works, totals))
        smaller = [int(total / TOO_SMALL) for total in totals]
        refused = list(pool.map(run, works, smaller))
    for seed, (total, above, below) in enumerate(
        zip(totals, fitting, refused, strict=True)
    ):
        kind = "train" if works[seed].training else "decode"
        print(f"{seed:3} {kind:6} {total / 1e9:6.2f} GB: ", end="")
        print("ran" if above[0] else f"DIED ({above[1][:60]})", end=", ")
        print("ran" if below[0] else "died", "at 1/1.3")
    died = [seed for seed, (ran, _) in enumerate(fitting) if not ran]
    assert not died
    truly = sum(not ran for ran, _ in refused)
    print(f"{truly} of {CONFIGS} refused ones truly do not fit")
    assert truly >= 0.9 * CONFIGS
