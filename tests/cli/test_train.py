"""The training command: one line in, a model out, and what may go wrong."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from minillm_jax.training import metrics
from tests import commands

ROOT = pathlib.Path(__file__).parents[2]
TINY = (
    *("--config=small", "--config.model.vocab_size=256", "--config.model.num_layers=1"),
    *("--config.model.dim_model=32", "--config.model.num_heads=2"),
    *("--config.model.dim_ff=64", "--config.model.max_seq_len=64"),
    *("--config.train.batch_size=2", "--config.train.eval_every=10"),
    "--config.train.checkpoint_every=10",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def command(*arguments):
    return [sys.executable, "-m", "minillm_jax.cli.train", *arguments]


def run(*arguments, name="train"):
    return commands.run(f"minillm_jax.cli.{name}", *arguments)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(text, tmp_path, sign):
    folder = tmp_path / "run"
    arguments = [*TINY, f"--workdir={folder}", f"--config.train.data={text}"]
    arguments += ["--config.train.steps=10000"]
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while len(metrics.read(folder / metrics.CSV)) < 15:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(sign)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert f"{sign.name}: ends after this step, and saves" in said
    assert "step 10: loss" in said
    rows = metrics.read(folder / metrics.CSV)
    last = int(rows[-1]["step"])
    assert [int(row["step"]) for row in rows] == list(range(1, last + 1))
    assert f"stopped after step {last}; the best model is in {folder / 'model'}" in said
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["param_dtype"] == "float32"
    if sign == signal.SIGINT:  # the rest is the same
        return

    refused = run(*arguments[:-1], "--config.train.steps=9000")
    assert refused.returncode == 2
    assert "config.train.steps=9000: the run has 10000" in refused.stderr
    again = subprocess.Popen(
        command(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert f"resumes after step {last}, of 10000 steps" in again.stderr.readline()
    again.kill()
    again.communicate()

    done = run(
        *(f"--workdir={folder}", "--prompt=the ", "--max_new_tokens=8", "--json"),
        *("--temperature=0",),
        name="generate",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"]


def test_bad_input_is_one_line_and_leaves_nothing(text, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    cases = {
        (): "--workdir is missing",
        (workdir, "--config.train.data=/nowhere"): "/nowhere: no such file",
        (workdir, "--config.train.step=3"): "there is no step; did you mean steps?",
        (workdir, "--config.train.learning_rate=-1"): "learning_rate=-1",
        (workdir, "--config.model.vocab_size=100"): "ids up to 255",
        (workdir, "--config.train.seq_len=4096"): "seq_len=4096",
        (workdir, "--config.train.batch_size=100000"): "does not fit",
        (workdir, "--config.model.logits_softcap=30.0"): "logits_softcap",
        (workdir, "--config.model.param_dtype=bfloat16"): "float32",
    }
    for given, words in cases.items():
        found = run(*TINY, *given)
        assert found.returncode == 2, (given, found.stderr)
        assert words in found.stderr
        assert found.stderr.count("\n") == 1, found.stderr
        assert "Traceback" not in found.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_without_a_config_is_no_small_one(tmp_path):
    done = run(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "--config is missing" in done.stderr


def test_a_run_and_a_model_are_one_too_many(tmp_path):
    (tmp_path / "model").mkdir()
    done = run(f"--workdir={tmp_path}", f"--model={tmp_path}", name="generate")
    assert done.returncode == 2
    assert "give one" in done.stderr


def test_a_run_goes_on_where_nobody_reads_what_it_says(text, tmp_path):
    """As under `| tee` that Ctrl-C has ended."""
    folder = tmp_path / "run"
    arguments = [*TINY, f"--workdir={folder}", f"--config.train.data={text}"]
    process = subprocess.Popen(
        command(*arguments, "--config.train.steps=100000"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr.readline()
    process.stderr.close()
    while len(metrics.read(folder / metrics.CSV)) < 15:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    last = metrics.read(folder / metrics.CSV)[-1]["step"]
    assert (folder / "checkpoints" / last / "manifest.json").is_file()
    assert (folder / "model" / "config.json").is_file()


def test_a_workdir_without_a_model_is_told(tmp_path):
    done = run(f"--workdir={tmp_path}", "--prompt=a", name="generate")
    assert done.returncode == 2
    assert "has no model yet" in done.stderr
