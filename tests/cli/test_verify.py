"""`cli.verify` as a person uses it."""

import json
import math

import pytest

import minillm_jax as mj
from minillm_jax import testing
from tests import commands

TINY = {
    "max_seq_len": 32,
    "max_kv_cache_len": 48,
    "dim_model": 32,
    "num_heads": 2,
    "num_layers": 1,
    "dim_ff": 64,
    "vocab_size": 60,
}


def run(*arguments, **changes):
    fields = [f"--config.model.{n}={v}" for n, v in (TINY | changes).items()]
    return run_alone("--config=small", *fields, *arguments)


def run_alone(*arguments):
    return commands.run("minillm_jax.cli.verify", *arguments)


def test_a_table_and_an_object():
    done = run("--dtype=bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["model"]["dtype"] == found["model"]["cache_dtype"] == "bfloat16"
    names = [line["name"] for line in found["verify"]]
    assert names[0] == "cached / uncached"
    assert names[-2:] == ["bfloat16 / float32", "float32 / float64"]
    assert all(line["passed"] for line in found["verify"])


def test_a_table_of_quick_ones_and_the_exit_code(tmp_path):
    model = mj.create_model(testing.tiny_config(num_layers=1))
    params = mj.init_params(model)
    mj.save_pretrained(tmp_path / "right", model, params)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * math.nan
    mj.save_pretrained(tmp_path / "wrong", model, params)
    for name, code in (("right", 0), ("wrong", 1)):
        done = run_alone("--quick", f"--model={tmp_path / name}")
        assert done.returncode == code, done.stderr
        assert "64 tokens" in done.stdout
        assert done.stdout.count(" ok") == (7 if code == 0 else 0)
        assert done.stdout.count("FAILED") == (0 if code == 0 else 7)
    done = run_alone("--quick", "--json", f"--model={tmp_path / 'wrong'}")
    assert done.returncode == 1
    found = json.loads(done.stdout, parse_constant=pytest.fail)  # no NaN
    assert not found["passed"]
    assert found["verify"][0]["difference"] is None


def test_what_is_too_short_is_one_line():
    done = run(max_seq_len=8, max_kv_cache_len=8)
    assert done.returncode == 2
    assert "takes 8 tokens; 16 are needed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_is_too_large_is_refused_before_it_is_made():
    done = run(num_layers=999, dim_ff=2_000_000)
    assert done.returncode == 2
    assert "does not fit" in done.stderr
