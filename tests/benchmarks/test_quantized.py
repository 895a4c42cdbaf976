"""`benchmarks.quantized` as a person runs it."""

import json

import pytest

import minillm_jax as mj
from benchmarks import int8_forms
from minillm_jax import testing
from tests import commands

TINY = {
    "max_seq_len": 64,
    "max_kv_cache_len": 64,
    "dim_model": 32,
    "num_heads": 2,
    "num_layers": 1,
    "dim_ff": 64,
    "vocab_size": 60,
}


def test_rates_and_accuracy_are_told(tmp_path):
    fields = [f"--config.model.{n}={v}" for n, v in TINY.items()]
    done = commands.run(
        *("benchmarks.quantized", "--config=small", *fields),
        *("--batch_sizes=2", "--context=32", "--rounds=2"),
        *("--models=tests/goldens/llama2", f"--json_path={tmp_path / 'x.json'}"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    floats, kernels, cache, both = found["results"]
    assert floats["quantization"] == "none"
    assert kernels["quantization"] in ("w8a8", "w8a16")
    assert both["quantization"] == kernels["quantization"]
    assert both["cache_dtype"] == cache["cache_dtype"] == "int8"
    assert floats["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert kernels["weights_bytes"] < floats["weights_bytes"] / 2
    assert cache["cache_bytes"] < floats["cache_bytes"] / 2
    forms = [row["form"] for row in found["accuracy"]]
    assert forms == ["w8a16", "w8a8", "kv8", "w8a8+kv8"]
    for row in found["accuracy"]:
        assert 0 < row["kl_nats"] < (0.005 if row["form"] == "kv8" else 0.05)
        assert abs(row["bits_per_token_ratio"] - 1) < 0.01
    assert json.loads((tmp_path / "x.json").read_text()) == found


def test_a_form_that_is_none_is_refused():
    done = commands.run("benchmarks.quantized", "--config=small", "--forms=kv8,int4")
    assert done.returncode != 0
    assert "--forms: 'int4': 'int4' is none of none, int8" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_form_is_of_kernels_or_cache_or_both():
    config = testing.tiny_config()
    assert int8_forms.with_form(config, int8_forms.FLOATS) == config
    both = int8_forms.with_form(config, "w8a16+kv8")
    assert (both.quantization, both.cache_dtype) == ("w8a16", "int8")
    with pytest.raises(mj.ConfigError, match=r"'w8a16\+kv4': 'kv4' is none of"):
        int8_forms.with_form(config, "w8a16+kv4")
