"""The comparison with other programs: each peer alone, then from end to end."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from benchmarks import compare_report, compare_runs, measure, peers, workers
from benchmarks.peers import ours
from minillm_jax import testing
from minillm_jax.cli import config_files
from minillm_jax.config import ConfigError
from tests import commands

CONFIG = """
from minillm_jax.cli import config_files

def get_config():
    config = config_files.preset("small")
    config.model.update(dim_model=64, num_heads=2, dim_ff=128, num_layers=2)
    config.model.update(vocab_size=256, max_seq_len=64, max_kv_cache_len=128)
    config.compare.update(contexts=(40,), batch_sizes=(1, 2), new_tokens=8, repeats=2)
    config.compare.peers = ("ours", "tutorial_jax")
    return config
"""
INT8 = ["ours_w8a8", "ours_int8"]
ALWAYS = [n for n, kind in peers.PEERS.items() if not kind.packages and n not in INT8]
FLOAT32 = [n for n in peers.PEERS if n.endswith(("eager", "f32"))]
ROWS, PROMPT, STEPS = 2, 21, 12


@pytest.fixture(scope="module")
def model():
    return mj.create_model(testing.tiny_config(vocab_size=256))


@pytest.fixture(scope="module")
def params(model):
    return testing.noisy_params(model)


@pytest.fixture(scope="module")
def folder(model, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "model"
    mj.save_pretrained(path, model, params)
    (path.parent / "config.json").write_text(json.dumps(model.config.to_dict()))
    return path


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).integers(0, 256, (ROWS, PROMPT)).astype(np.int32)


@pytest.fixture(scope="module")
def greedy(model, params, prompt):
    """The tokens of full forwards, without a cache: `[B, 1 + STEPS]`."""

    @jax.jit
    def best(tokens):
        return jnp.argmax(model.apply({"params": params}, tokens), axis=-1)

    tokens = np.pad(prompt, ((0, 0), (0, STEPS + 1)))  # which no token before it sees
    for place in range(PROMPT, tokens.shape[1]):
        tokens[:, place] = best(tokens)[:, place - 1]
    return tokens[:, PROMPT:]


@pytest.mark.parametrize("name", ALWAYS)
def test_a_peer_gives_the_tokens_of_full_forwards_from_the_same_state_each_time(
    name, model, folder, prompt, greedy
):
    module = importlib.import_module(f"benchmarks.peers.{peers.PEERS[name].module}")
    peer = module.load(name, folder, model.config, 1)
    peer.begin(ROWS, PROMPT + STEPS + 1)
    for _ in range(2):
        np.testing.assert_array_equal(peer.prefill(prompt), greedy[:, 0])
        for _ in range(2):
            np.testing.assert_array_equal(peer.decode(STEPS), greedy[:, 1:])
    assert peer.step_bytes(2, 30) > peer.step_bytes(1, 30) > 0


@pytest.mark.parametrize("name", INT8)
def test_ours_in_int8_is_the_same_each_time(name, model, folder, prompt, greedy):
    peer = ours.load(name, folder, model.config, 1)
    peer.begin(ROWS, PROMPT + STEPS + 1)
    np.testing.assert_array_equal(peer.prefill(prompt), greedy[:, 0])
    found = [peer.decode(STEPS) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    plain = ours.load("ours", folder, model.config, 1)
    assert peer.step_bytes(1, 30) < plain.step_bytes(1, 30)


@pytest.mark.parametrize("name", FLOAT32)
def test_another_program_gives_the_same_tokens(name, folder, prompt, greedy):
    absent = peers.missing(name)
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    worker = workers.start(name, folder, folder.parent / "config.json")
    try:
        shape = {"batch_size": ROWS, "context": PROMPT + STEPS + 1, "held": PROMPT}
        assert worker.call(call="begin", **shape)["step_bytes"] > 0
        for _ in range(2):
            first = worker.call(call="prefill", tokens=prompt.tolist())
            assert first["tokens"] == greedy[:, 0].tolist()
            for _ in range(2):
                rest = worker.call(call="decode", steps=STEPS)
                assert rest["tokens"] == greedy[:, 1:].tolist()
                assert rest["seconds"] > 0
    finally:
        worker.stop()


def compare(tmp_path, *arguments, config=CONFIG):
    path = tmp_path / "config.py"
    path.write_text(config)
    changes = [f"--config.{argument}" for argument in arguments]
    return commands.run("benchmarks.compare", f"--config={path}", *changes)


def test_the_comparison_prints_tables_and_one_json_object_last(tmp_path):
    copy = tmp_path / "result.json"
    done = compare(tmp_path, f"compare.json_path={copy}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *tables, last = done.stdout.splitlines()
    assert all(len(line) <= 88 for line in tables)
    result = json.loads(last)
    assert json.loads(copy.read_text()) == result
    assert {name: peer["status"] for name, peer in result["peers"].items()} == {
        "ours": "ok",
        "tutorial_jax": "ok",
    }
    assert result["threads"] >= 1
    assert [case["batch_size"] for case in result["results"]] == [1, 2]
    for case in result["results"]:
        assert (case["prompt_tokens"], case["new_tokens"]) == (32, 8)
        assert case["product_gflop_per_s"] > 0
        assert case["bandwidth_gb_per_s"] > 0
        for row in case["peers"].values():
            rate = row["decode_tokens_per_second"]
            assert 0 < rate["min"] <= rate["median"] <= rate["max"]
            assert row["same_tokens"] == 1.0
            assert row["mbu"] > 0
        assert case["peers"]["ours"]["decode_ours_to_peer"]["median"] == 1.0


def test_a_peer_that_fails_is_reported_and_the_others_go_on(tmp_path):
    config = CONFIG.replace("return", "config.model.qkv_bias = True\n    return")
    done = compare(tmp_path, "compare.batch_sizes=1", config=config)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert "qkv_bias" in result["peers"]["tutorial_jax"]["status"]
    assert any("tutorial_jax: failed" in line for line in done.stdout.splitlines())
    assert list(result["results"][0]["peers"]) == ["ours"]


def test_a_peer_that_ends_in_the_middle_is_reported(tmp_path):
    code = "import sys; print('{}', flush=True); input(); sys.exit('no more memory')"
    worker = workers.Worker([sys.executable, "-c", code], tmp_path / "log")
    field = compare_runs.Field({"it": "ok"}, {"it": worker})
    assert field.call("it", call="decode", steps=1) is None
    assert field.status["it"] == "failed: ended with code 1: no more memory"
    assert field.call("it", call="decode", steps=1) is None
    assert not field.workers


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("compare.peers=ours,lama_cpp_f32", ("lama_cpp_f32", "mean llama_cpp_f32")),
        ("compare.contexts=40,4096", ("4096 tokens", "max_kv_cache_len=128")),
        ("compare.contexts=8", ("contexts=(8,)", "new_tokens=8")),
        ("compare.batch_sizes=0", ("batch_sizes=(0,)", "from 1")),
        ("compare.json_path=/nowhere/x.json", ("compare.json_path=/nowhere/x.json",)),
        ("compare.repeat=3", ("--config.compare.repeat", "did you mean repeats")),
    ],
)
def test_a_wrong_setting_gives_one_line(tmp_path, argument, words):
    done = compare(tmp_path, argument)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.missing("llama_cpp_q8_0") == ["llama-cpp-python", "gguf"]
    assert peers.missing("ours") == []


def test_tokens_are_the_same_up_to_a_rows_first_difference():
    ours = [[1, 2, 3, 4], [1, 2, 3, 4]]
    others = [[1, 2, 0, 4], [1, 2, 3, 4]]
    assert compare_runs.same_tokens(ours, others) == (2 + 4) / 8
    assert compare_runs.same_tokens(ours, ours) == 1.0


def test_every_preset_compares_contexts_that_fit():
    for name in mj.Configs.names:
        config = config_files.preset(name)
        settings = config_files.compare_settings(config)
        found = compare_runs.cases(config_files.model_config(config), settings)
        assert {case.batch_size for case in found} == {1, 8}
    assert compare_runs.checked_peers(settings) == tuple(peers.PEERS)
    with pytest.raises(ConfigError, match="none of ours"):
        compare_runs.checked_peers(config_files.CompareSettings(peers=("theirs",)))


@pytest.mark.parametrize(("busy", "told"), [(0.5, True), (0.0, False), (None, False)])
def test_a_busy_machine_is_told(capsys, busy, told):
    spread = measure.spread([1.0])
    row = dict.fromkeys(
        ("prefill_tokens_per_second", "decode_tokens_per_second"), spread
    )
    ratios = ("prefill_ours_to_peer", "decode_ours_to_peer", "decode_int8_to_peer")
    row |= dict.fromkeys(ratios)
    row |= {"prefill_product_share": 0.5, "mbu": 0.5, "same_tokens": None}
    case = {"batch_size": 1, "context": 40, "prompt_tokens": 32, "busy_before": busy}
    case |= {"product_gflop_per_s": 1.0, "bandwidth_gb_per_s": 1.0}
    result = {
        "device": {"name": "a machine"},
        "threads": 1,
        "versions": {"jax": "0"},
        "config": {"model": {"dtype": "float32"}},
        "peers": {"ours": {"status": "ok"}},
        "results": [case | {"peers": {"ours": row}}],
    }
    compare_report.show(result)
    assert ("measure again" in capsys.readouterr().out) == told


def test_the_busy_share_is_a_share():
    share = measure.busy_share(0.05)
    assert share is None or 0.0 <= share <= 1.0
