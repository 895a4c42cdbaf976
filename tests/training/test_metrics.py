"""metrics.csv has each step once, whatever happened to the run."""

import csv

import pytest

from minillm_jax.training import metrics
from minillm_jax.training.metrics import MetricsFile, Row

DESIGN = ["step", "loss", "val_loss", "learning_rate", "grad_norm"]
DESIGN += ["tokens_per_second", "mfu"]


def write(folder, steps, last_step=0, loss=1.0, **options):
    file = MetricsFile(folder, last_step, **options)
    for step in steps:
        file.add(Row(step=step, loss=loss / step, learning_rate=0.1, grad_norm=2.0))
    file.close()


def steps_and_losses(folder):
    return [(int(r["step"]), r["loss"]) for r in metrics.read(folder / metrics.CSV)]


def test_the_columns_begin_with_those_of_the_design(tmp_path):
    write(tmp_path, [1])
    with (tmp_path / metrics.CSV).open(newline="") as file:
        header, row = csv.reader(file)
    assert header[: len(DESIGN)] == DESIGN
    assert row[:7] == ["1", "1.0", "", "0.1", "2.0", "", ""]


@pytest.mark.parametrize("tail", ["", "7,0.1", "7,0.1,,0.1,2.0,,,,\n", "junk\n"])
def test_a_resumed_run_has_each_step_once(tmp_path, tail):
    write(tmp_path, range(1, 7))
    with (tmp_path / metrics.CSV).open("a") as file:
        file.write(tail)  # what a kill may leave
    write(tmp_path, range(5, 9), last_step=4, loss=2.0)
    wanted = [(s, str(1 / s)) for s in range(1, 5)]
    wanted += [(s, str(2 / s)) for s in range(5, 9)]
    assert steps_and_losses(tmp_path) == wanted


def test_tensorboard_has_the_rows_too(tmp_path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, range(1, 4), tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in file.read_bytes()


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path, range(1, 4))
    path = metrics.plot(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
