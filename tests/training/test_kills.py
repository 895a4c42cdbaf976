"""kill -9 at any moment of a run, over and over: the losses are those of a whole one.

python -m pytest -m slow tests/training/test_kills.py -s
"""

import itertools
import pathlib
import subprocess
import sys
import time

import pytest

from minillm_jax.training import checkpoint, metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
KILLS, STEPS, EVERY = 24, 240, 5
EXACT = ("step", "loss", "val_loss", "learning_rate", "grad_norm")


def start(folder, text, cache):
    arguments = (
        *("--config=small", "--config.model.vocab_size=256"),
        *("--config.model.num_layers=2", "--config.model.dim_model=128"),
        *("--config.model.num_heads=2", "--config.model.dim_ff=256"),
        *("--config.model.max_seq_len=160", f"--config.train.data={text}"),
        *(f"--config.train.steps={STEPS}", "--config.train.batch_size=2"),
        *(f"--config.train.checkpoint_every={EVERY}", "--config.train.eval_every=15"),
        *(f"--workdir={folder}", f"--compilation_cache={cache}"),
    )
    command = [sys.executable, "-m", "minillm_jax.cli.train", *arguments]
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log)


def rows(folder):
    return metrics.read(folder / metrics.CSV)


def last_step(folder):
    found = rows(folder)
    return int(found[-1]["step"]) if found else 0


def saving(folder):
    """Whether a checkpoint is being written: orbax's part of it, or the manifest."""
    for path in (folder / "checkpoints").glob("*"):
        try:
            if path.is_dir() and not (path / checkpoint.MANIFEST).is_file():
                return True
        except OSError:  # it was renamed meanwhile
            return True
    return False


def wait(process, reached):
    while not reached():
        if process.poll() is not None:
            return
        time.sleep(0.0005)


def kill_somewhere(process, folder, number):
    """Ends the process in a save, or some steps after one; tells where it was."""
    begun = last_step(folder)
    wait(process, lambda: last_step(folder) > begun + EVERY)
    if number % 2 == 0:
        wait(process, lambda: saving(folder))
        time.sleep(0.004 * (number % 6))
    else:
        beyond = last_step(folder) + number % EVERY
        wait(process, lambda: last_step(folder) > beyond)
    process.kill()
    process.wait()
    return "in a save" if saving(folder) else "between saves"


def test_a_run_killed_again_and_again_has_the_losses_of_a_whole_one(tmp_path):
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    words = ("alpha", "beta", "gamma", "delta", "epsilon")
    text.write_text(" ".join(words[i * i % 5] + str(i) for i in range(20_000)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, text, cache).wait() == 0, whole.with_suffix(".log").read_text()

    places = []
    for number in itertools.count():
        process = start(killed, text, cache)
        if number >= KILLS:
            break
        place = kill_somewhere(process, killed, number)
        if process.returncode == 0:  # it was done before
            break
        places.append(place)
        print(f"kill {number + 1}: after step {last_step(killed)}, {place}")
    assert process.wait() == 0, killed.with_suffix(".log").read_text()
    assert len(places) >= 20
    assert places.count("in a save") >= 5
    assert places.count("between saves") >= 5

    found, wanted = ([[r[n] for n in EXACT] for r in rows(f)] for f in (killed, whole))
    assert [row[0] for row in found] == [str(step) for step in range(1, STEPS + 1)]
    assert found == wanted
    best = [(f / "model/model.safetensors").read_bytes() for f in (killed, whole)]
    assert best[0] == best[1]
