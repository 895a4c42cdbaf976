"""The decode benchmark from end to end, and its refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import minillm_jax as mj
from benchmarks import chunks, decode_runs, fit, measure, prompts
from minillm_jax.cli import app, config_files
from minillm_jax.planning import devices
from tests import commands

CONFIG = """
from minillm_jax.cli import config_files

def get_config():
    config = config_files.preset("small")
    config.model.update(dim_model=64, num_heads=2, dim_ff=128, num_layers=2)
    config.model.update(vocab_size=256, max_seq_len=64, max_kv_cache_len=128)
    config.model.eos_token_ids = (0, 1, 2, 3)
    config.decode.update(contexts=(40, 100), new_tokens=8, repeats=2, batch_size=2)
    return config
"""


def test_the_benchmark_prints_a_table_and_one_json_object_last(tmp_path):
    path, copy = tmp_path / "config.py", tmp_path / "result.json"
    path.write_text(CONFIG)
    arguments = [f"--config={path}", f"--config.decode.json_path={copy}"]
    done = commands.run("benchmarks.decode", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *table, last = done.stdout.splitlines()
    assert any("speed-up" in line for line in table)
    assert all(len(line) <= 80 for line in table)
    result = json.loads(last)
    assert json.loads(copy.read_text()) == result
    assert set(result) >= {
        "benchmark", "date", "command", "config", "device", "versions",
        "bandwidth_gb_per_s", "memory", "results",
    }  # fmt: skip
    assert set(result["memory"]) >= {"weights_bytes", "cache_bytes", "peak_bytes"}
    short, long = result["results"]
    assert set(short) >= {
        "batch_size", "context", "prompt_tokens", "new_tokens", "compile_seconds",
        "ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second",
        "ms_per_token", "bytes_per_step", "gb_per_s", "mbu",
        "no_cache_tokens_per_second", "speedup",
    }  # fmt: skip
    assert (short["context"], short["prompt_tokens"], short["new_tokens"]) == (
        40,
        32,
        8,
    )
    assert short["speedup"] > 0
    assert long["speedup"] is None  # longer than max_seq_len
    rate = short["decode_tokens_per_second"]
    assert rate["min"] <= rate["median"] <= rate["max"]
    milliseconds = 1e3 * short["batch_size"] / rate["median"]
    assert short["ms_per_token"] == pytest.approx(milliseconds)
    assert short["cache_bytes_allocated"] == 64 / 40 * short["cache_bytes_used"]


def test_each_repeat_decodes_from_the_same_state(tiny_model, tiny_params):
    """A rewound cache gives the tokens of a fresh one."""
    prompt = np.arange(24, dtype=np.int32).reshape(2, 12)
    step = mj.decode_step
    runs = []
    logits, cache = mj.prefill(
        tiny_model, tiny_params, mj.init_cache(tiny_model.config, 2), prompt
    )
    first = np.argmax(logits, axis=-1)
    for _ in range(2):
        tokens, out = first, []
        cache = chunks.rewound(cache, 12)
        for _ in range(20):
            logits, cache = step(tiny_model, tiny_params, cache, tokens)
            tokens = np.argmax(logits, axis=-1)
            out.append(tokens)
        runs.append(np.stack(out))
    np.testing.assert_array_equal(*runs)


def test_a_chunk_starts_from_the_same_state_each_time(tiny_model, tiny_params):
    cache = mj.init_cache(tiny_model.config, 2)
    prompt = np.arange(24, dtype=np.int32).reshape(2, 12)
    _, cache = mj.prefill(tiny_model, tiny_params, cache, prompt)
    chunk = chunks.DecodeChunk(
        *(tiny_model, tiny_params, cache), context=12, steps=4, tokens=prompt[:, 0]
    )
    run, sampled = chunk.executable, []

    def kept(*given):
        out = run(*given)
        sampled.append([np.array(x) for x in (out.cache["lengths"], out.sampled)])
        return out

    chunk.executable = kept
    assert min(chunk.seconds(), chunk.seconds(), chunk.seconds(2)) > 0
    lengths, tokens = zip(*sampled, strict=True)
    assert [found.tolist() for found in lengths] == [[16, 16]] * 3 + [[20, 20]]
    for again in tokens[1:3]:
        np.testing.assert_array_equal(again, tokens[0])


def test_prompts_are_source_text_and_rows_differ():
    tokens = prompts.source_tokens(2, 4096, 256)
    assert tokens.shape == (2, 4096)
    assert tokens.dtype == np.int32
    assert b"import" in bytes(tokens[0].astype(np.uint8))
    assert not np.array_equal(tokens[0], tokens[1])


def test_capacity_is_the_bucket_of_the_context():
    config = mj.Configs.small()
    settings = config_files.DecodeSettings(contexts=(100, 128, 129, 1500))
    capacities = [s.capacity for s in decode_runs.shapes(config, settings)]
    assert capacities == [128, 128, 256, 2048]


def overridden(name, flags):
    """A preset's frozen configs with `--config.SECTION.FIELD=VALUE` flags applied."""
    config = config_files.preset(name)
    for flag in flags:
        path, value = flag.removeprefix("--config.").split("=")
        section, field = path.split(".")
        kind = type(config[section][field])
        new = (int(value),) if kind is tuple else kind(value)
        config[section][field] = new
    return config_files.model_config(config), config_files.decode_settings(config)


@pytest.mark.parametrize("gigabytes", [0.5, 1.5, 3, 8, 12, 24])
@pytest.mark.parametrize("name", mj.Configs.names)
def test_what_a_refusal_advises_fits(monkeypatch, name, gigabytes):
    limit = int(gigabytes * 1e9) + measure.PROBE_BYTES
    monkeypatch.setattr(fit.machine, "available_bytes", lambda device: limit)
    model, settings = overridden(name, [])
    try:
        fit.check(model, settings)
        return
    except app.UserError as refusal:
        message = str(refusal)
    assert f"but {gigabytes:.1f} GB are available" in message
    if gigabytes < 1:
        assert "nothing smaller fits" in message
        return
    flags = [word for word in message.split("fits, with")[1].split() if "--" in word]
    named = [flag.split("=")[1] for flag in flags if flag.startswith("--config=")]
    rest = [flag for flag in flags if not flag.startswith("--config=")]
    model, settings = overridden(*named or [name], rest)
    plan = fit.check(model, settings)
    assert plan.total_bytes <= limit - measure.PROBE_BYTES


def test_the_bandwidth_probe_reads_more_than_a_cache_holds():
    bandwidth = measure.Bandwidth()
    assert bandwidth._matrix.nbytes == measure.PROBE_BYTES
    assert bandwidth.probe() > 1e8


def test_compile_seconds_counts_compilations_only():
    double = jax.jit(lambda x: x * 2 + 1)
    with measure.compile_seconds() as first:
        double(np.ones(3))
        compiled = first()
    with measure.compile_seconds() as second:
        double(np.ones(3))
        again = second()
    assert compiled > 0
    assert again == 0


def test_advice_can_be_pasted_whatever_the_settings_were(monkeypatch):
    limit = 3 * 10**9 + measure.PROBE_BYTES
    monkeypatch.setattr(fit.machine, "available_bytes", lambda device: limit)
    given = [
        "--config.decode.contexts=4096",
        "--config.decode.new_tokens=64",
        "--config.decode.batch_size=4",
    ]
    model, settings = overridden("large", given)
    settings = dataclasses.replace(settings, capacity=8192)
    with pytest.raises(app.UserError) as refusal:
        fit.check(model, settings)
    advice = str(refusal.value).split("GB: ")[1].split()
    assert all(word.startswith("--config") for word in advice)
    fields = {w.split("=")[0].split(".")[-1]: w.split("=")[1] for w in advice}
    assert (
        fields.items()
        >= {
            "contexts": "128",
            "new_tokens": "32",
            "batch_size": "1",
            "capacity": "128",
        }.items()
    )


@pytest.mark.parametrize("gigabytes", [2, 6, 20])
def test_automatic_numbers_are_the_largest_that_fit(monkeypatch, gigabytes):
    limit = int(gigabytes * 1e9) + measure.PROBE_BYTES
    monkeypatch.setattr(fit.machine, "available_bytes", lambda device: limit)
    model = mj.create_model(mj.Configs.small()).config

    def fits(**changes):
        asked = {"contexts": (128,), "batch_size": 1} | changes
        settings = config_files.DecodeSettings(**asked)
        return fit.plan_for(model, settings, fit.device_left()).fits

    settings = config_files.DecodeSettings(contexts=("auto",), batch_size=8)
    (longest,) = fit.numbers(model, settings).contexts
    assert fits(contexts=(longest,), batch_size=8)
    full = longest == model.max_kv_cache_len
    assert full or not fits(contexts=(longest + 1,), batch_size=8)
    settings = config_files.DecodeSettings(contexts=(1024,), batch_size="auto")
    most = fit.numbers(model, settings).batch_size
    assert fits(contexts=(1024,), batch_size=most)
    assert not fits(contexts=(1024,), batch_size=most + 1)
    settings = config_files.DecodeSettings(
        contexts=(64, "auto:500"), batch_size="auto:3"
    )
    both = fit.numbers(model, settings)
    assert both.contexts == (64, 500)
    assert both.batch_size == 3


def test_numbers_that_are_given_stay(tiny_config):
    settings = config_files.DecodeSettings(contexts=(40, 64), batch_size=2)
    assert fit.numbers(tiny_config, settings) == settings


def test_where_nothing_fits_the_least_is_refused(monkeypatch):
    monkeypatch.setattr(fit.machine, "available_bytes", lambda device: 10**9)
    model = mj.create_model(mj.Configs.large()).config
    settings = config_files.DecodeSettings(contexts=("auto",), batch_size="auto")
    settings = fit.numbers(model, settings)
    assert (settings.contexts, settings.batch_size) == ((33,), 1)
    with pytest.raises(app.UserError, match="does not fit"):
        fit.check(model, settings)


@pytest.mark.parametrize("trained", [False, True])
def test_weights_that_are_given_keep_their_shapes(monkeypatch, trained):
    limit = 2 * 10**9 + measure.PROBE_BYTES
    monkeypatch.setattr(fit.machine, "available_bytes", lambda device: limit)
    model, settings = overridden("xlarge", [])
    with pytest.raises(app.UserError) as refusal:
        fit.check(model, settings, trained=trained)
    message = str(refusal.value)
    assert ("num_layers" in message or "--config=" in message) != trained
    assert ("nothing smaller fits" in message) == trained


@pytest.mark.parametrize(("gigabytes", "enough"), [(1.4, True), (0.9, False)])
def test_more_of_a_gpu_is_advised_where_that_is_enough(monkeypatch, gigabytes, enough):
    size = int(gigabytes * 1e9)
    device = devices.Device("some", "gpu", size, memory_fraction=0.75)
    monkeypatch.setattr(fit.machine, "this_device", lambda: device)
    monkeypatch.setattr(fit.measure, "probe_bytes", lambda platform: 0)
    model, settings = overridden("medium", [])
    settings = dataclasses.replace(settings, compare_no_cache=False)
    with pytest.raises(app.UserError) as refusal:
        fit.check(model, settings)
    words = "GB: XLA_CLIENT_MEM_FRACTION=0.95 in the environment"
    assert (words in str(refusal.value)) == enough
