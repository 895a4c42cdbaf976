"""The suite with tiny shapes on this CPU: every part, and what goes wrong in one."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import gpu_suite, suite
from benchmarks.suite import presets, scale, tables
from minillm_jax.config import Configs
from tests import commands


def run_suite(*arguments):
    return commands.run("benchmarks.gpu_suite", *arguments, timeout=600)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All parts but the presets that only repeat `small`, in one run."""
    out = tmp_path_factory.mktemp("suite") / "new" / "folder"
    parts = [name for name in suite.PARTS if name not in Configs.names[1:]]
    done = run_suite(f"--out={out}", "--tiny", f"--parts={','.join(parts)}")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_part_succeeds_and_the_json_is_last(done):
    out, stdout = done
    result = json.loads(stdout.splitlines()[-1])
    assert json.loads((out / "suite.json").read_text()) == result
    assert (out / "suite.txt").read_text() in stdout
    assert result["device"]["platform"] == "cpu"
    assert set(result["versions"]) >= {"jax", "python"}
    installed = importlib.util.find_spec("torch") is not None
    for name, part in result["parts"].items():
        if name == "transformers" and not installed:
            assert part["status"].startswith("left out: not installed: torch")
        else:
            assert part["status"] == "ok"
            assert part["results"]
    if importlib.util.find_spec("matplotlib") is not None:
        assert (out / "decode.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "prefill.png").exists()


def test_the_device_agrees_with_the_reference(done):
    found = json.loads((done[0] / "suite.json").read_text())["parts"]["correctness"]
    checks = found["results"]["checks"]
    assert found["results"]["passed"]
    assert {(row["dtype"], row["attention"]) for row in checks} == {
        ("float32", "xla"),
        ("bfloat16", "xla"),
    }
    names = {row["check"].split(" = ")[0] for row in checks}
    int8 = {"w8a16", "w8a8", "kv8", "w8a16+kv8"}
    assert names == {"forward", "cached", "ring", "chunked", "padded"} | int8
    assert all(0 <= row["difference"] < 1 for row in checks)


def test_shares_follow_from_the_ceilings(done):
    parts = json.loads((done[0] / "suite.json").read_text())["parts"]
    ceilings = parts["ceilings"]["results"]
    rows = parts["small"]["results"]
    for row in rows["decode"]:
        read = row["bytes_per_step"] / ceilings["read_bytes_per_second"]
        assert row["mbu"] == pytest.approx(read / row["step_seconds"]["median"])
        kernels = row["kernels"] * ceilings["seconds_per_kernel"]
        assert row["bound_seconds"] == pytest.approx(read + kernels)
    shapes = [(row["batch_size"], row["context"]) for row in rows["decode"]]
    assert shapes == [(1, 32), (2, 32), (1, 64)]
    prompts = [(row["prompt_tokens"], row["chunk"]) for row in rows["prefill"]]
    assert prompts == [(16, 8), (32, 8), (16, 16), (32, 16)]
    for row in rows["prefill"]:
        rate = row["flops"] / row["prefill_seconds"]["median"]
        share = rate / ceilings["bfloat16_flops_per_second"]
        assert row["mfu"] == pytest.approx(share)


def test_int8_is_measured_beside_the_floats(done):
    parts = json.loads((done[0] / "suite.json").read_text())["parts"]
    for rows in parts["int8"]["results"]["presets"].values():
        floats, *others = [rows[i : i + 3] for i in range(0, len(rows), 3)]
        assert len(others) == 4
        assert [row["ratio"] for row in floats] == [1.0] * 3
        for row, float_row in zip(others[0], floats, strict=True):
            seconds = [r["step_seconds"]["median"] for r in (float_row, row)]
            assert row["ratio"] == pytest.approx(seconds[0] / seconds[1])
            assert row["weights_bytes"] < float_row["weights_bytes"]
            assert row["bytes_per_step"] < float_row["bytes_per_step"]


def test_a_profile_without_a_gpu_says_so(done):
    parts = json.loads((done[0] / "suite.json").read_text())["parts"]
    for row in parts["profiles"]["results"]["presets"].values():
        assert row["kernels_per_step"] is None
        assert row["layers"] == 2


def test_without_ceilings_there_are_no_shares():
    small = scale.tiny()
    small = small._replace(batch_sizes=(1,), repeats=1, prompts=(16,))
    *_, last = presets.run(small, {}, preset="small")
    assert all("mbu" not in row for row in last["decode"])
    shown = {"small": {"status": "ok", "seconds": 1.0, "results": last}}
    text = tables.text({"date": "2026", "parts": shown})
    assert "no device answered" in text
    assert "small: ok, 1 s" in text


# Failures


FAILING = """
import json, os, sys, time
out = sys.argv[3]
json.dump({"some": 1}, open(out, "w"))
if sys.argv[1] == "small":
    sys.exit("out of memory")
if sys.argv[1] == "medium":
    time.sleep(60)
if sys.argv[1] == "large":
    os.abort()
"""


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Parts whose processes fail in one way each."""
    script = tmp_path / "worker.py"
    script.write_text(FAILING)
    real = subprocess.run

    def run(command, **options):
        return real([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(
        suite.PARTS, "medium", suite.PARTS["medium"]._replace(seconds=2)
    )
    return tmp_path


def test_a_part_that_fails_leaves_the_others_and_what_it_found(failing):
    names = ["small", "medium", "large", "xlarge"]
    result = gpu_suite.run(failing, names, seconds=100, tiny=True)
    statuses = {name: part["status"] for name, part in result["parts"].items()}
    assert statuses["small"] == "failed with code 1: out of memory"
    assert statuses["medium"] == "stopped after 2 s"
    assert statuses["large"].startswith("failed with code -6")
    assert statuses["xlarge"] == "ok"
    assert all(part["results"] == {"some": 1} for part in result["parts"].values())
    assert json.loads((failing / "suite.json").read_text()) == result


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    result = gpu_suite.run(tmp_path, ["ceilings", "small"], seconds=5, tiny=True)
    statuses = {part["status"] for part in result["parts"].values()}
    assert statuses == {"left out: no time left"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--out is missing: a folder for the results"),
        (("--out=README.md",), "--out=README.md: is not a folder"),
        (("--out=TMP", "--parts=smal"), "--parts: 'smal' is none of"),
        (("--out=TMP", "--parts=smal"), "did you mean small?"),
        (("--out=TMP", "--seconds=many"), "flag --seconds=many"),
        (("--out=TMP", "--seconds=1", "--tiny"), "no part succeeded"),
        (("--out=TMP", "stray"), "stray arguments: stray"),
    ],
)
def test_a_mistake_ends_in_one_clear_line(tmp_path, arguments, words):
    done = run_suite(*(a.replace("TMP", str(tmp_path)) for a in arguments))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line


def test_the_full_scale_measures_what_the_presets_can_hold():
    full = scale.full()
    assert set(full.configs) == set(Configs.names)
    for name, config in full.configs.items():
        preset = Configs.by_name(name)
        assert (config.dim_model, config.num_layers) == (
            preset.dim_model,
            preset.num_layers,
        )
        assert config.dtype == "bfloat16"
        assert config.max_kv_cache_len >= 16 * full.context
        assert config.max_kv_cache_len >= max(full.prompts)
        assert config.prefill_chunk == max(full.prefill_chunks)
    assert full.context > full.steps * full.chunks + 1
    assert sum(part.seconds > 0 for part in suite.PARTS.values()) == 11
