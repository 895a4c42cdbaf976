"""What is saved is what is restored, or it is named and passed over."""

import json
import logging
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.training import checkpoint
from minillm_jax.training.checkpoint import MANIFEST, Checkpoints, Saved
from minillm_jax.weights.errors import CheckpointError


def state_of(seed):
    draw = np.random.default_rng(seed)
    return {
        "params": {"kernel": jnp.asarray(draw.standard_normal((500, 400), np.float32))},
        "narrow": jnp.asarray(draw.standard_normal(30), jnp.bfloat16),
        "step": jnp.asarray(seed, jnp.int32),
    }


@pytest.fixture
def opened(tmp_path):
    """Opens the same folder, as often as it is called."""
    there = []

    def open_again(keep=2):
        there.append(Checkpoints(tmp_path / "c", keep))
        return there[-1]

    yield open_again
    for checkpoints in there:
        checkpoints.close()


def fill(checkpoints, steps=(10, 20, 30)):
    for step in steps:
        checkpoints.save(step, state_of(step))
    checkpoints.wait()


def restored(checkpoints, step):
    like = checkpoint.shapes(lambda: state_of(0))
    return checkpoints.restore(step, like)


def data_file(checkpoints, step):
    """The largest file of a checkpoint."""
    files = [f for f in (checkpoints.folder / str(step)).rglob("*") if f.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def test_what_is_saved_is_restored_bit_for_bit(opened):
    first = opened()
    first.save(10, state_of(10), val_loss=1.5, about={"seed": 3})
    first.wait()
    again = opened()
    assert again.newest() == Saved(10, 1.5, {"seed": 3})
    found = restored(again, 10)
    chex.assert_trees_all_equal(found, state_of(10))
    chex.assert_trees_all_equal_dtypes(found, state_of(10))


def test_what_is_being_saved_may_be_donated(opened):
    """The files hold the state as it was, whatever becomes of its buffers."""
    checkpoints, state = opened(), state_of(1)
    advance = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0
    )
    for step in range(1, 6):
        kept = jax.tree.map(np.array, state)
        checkpoints.save(step, state)
        for _ in range(20):
            state = advance(state)
        checkpoints.wait()
        chex.assert_trees_all_equal(restored(checkpoints, step), kept)


def test_the_newest_ones_and_the_best_are_kept(opened):
    checkpoints = opened(keep=2)
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5)):
        checkpoints.save(step, state_of(step), val_loss=val_loss)
    checkpoints.wait()
    saved = checkpoints.saved()
    assert [found.step for found in saved] == [2, 4, 5]
    assert checkpoint.best_of(saved).step == 2
    chex.assert_trees_all_equal(restored(checkpoints, 2), state_of(2))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(opened, caplog, damage):
    first = opened()
    fill(first)
    file = data_file(first, 30)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        file = first.folder / "30" / MANIFEST
        file.write_text(file.read_text()[:40])
    again = opened()
    with caplog.at_level(logging.WARNING, "minillm_jax"):
        assert again.newest().step == 20
    assert str(file) in caplog.text
    assert "step 20 is taken" in caplog.text
    chex.assert_trees_all_equal(restored(again, 20), state_of(20))
    again.save(30, state_of(31))  # the step can be taken again
    again.wait()
    chex.assert_trees_all_equal(restored(again, 30), state_of(31))


def test_one_that_was_never_finished_is_passed_over(opened):
    first = opened()
    fill(first)
    (first.folder / "30" / MANIFEST).unlink()
    (first.folder / "40.orbax-checkpoint-tmp").mkdir()
    again = opened()
    assert again.newest().step == 20
    again.save(30, state_of(30))
    again.wait()
    assert [found.step for found in again.saved()] == [20, 30]


def test_the_first_one_that_was_never_finished_is_begun_anew(opened):
    """As after a kill between orbax's last file and the manifest."""
    first = opened()
    fill(first, steps=(10,))
    (first.folder / "10" / MANIFEST).unlink()
    again = opened()
    assert again.newest() is None
    again.save(10, state_of(11))
    again.wait()
    chex.assert_trees_all_equal(restored(again, 10), state_of(11))


def test_a_damaged_best_one_stops_nothing(opened):
    checkpoints = opened(keep=1)
    for step, val_loss in ((1, 1.0), (2, 3.0), (3, float("nan"))):
        checkpoints.save(step, state_of(step), val_loss=val_loss)
    checkpoints.wait()
    assert checkpoints.best().step == 1
    (checkpoints.folder / "1" / MANIFEST).write_text("{")
    checkpoints.save(4, state_of(4), val_loss=2.0)
    checkpoints.wait()
    assert checkpoints.best().step == 4
    file = data_file(checkpoints, 4)
    checkpoints.save(5, state_of(5), val_loss=2.5)
    checkpoints.wait()
    file.write_bytes(b"")
    assert checkpoints.best().step == 5


@pytest.mark.parametrize("files", [[], {"x": 3}, None, {"x": [1, "2"]}])
def test_a_strange_manifest_is_named(opened, files):
    first = opened()
    fill(first, steps=(10, 20))
    file = first.folder / "20" / MANIFEST
    file.write_text(json.dumps({"files": files}))
    assert opened().newest().step == 10


def test_where_none_is_whole_nothing_is_begun_anew(opened):
    first = opened()
    fill(first, steps=(10,))
    file = data_file(first, 10)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is whole: ") as error:
        opened().newest()
    assert str(file) in str(error.value)
    assert file.exists()


def test_another_models_is_told(opened):
    checkpoints = opened()
    fill(checkpoints, steps=(10,))
    like = checkpoint.shapes(lambda: {**state_of(0), "more": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match="10: cannot be read: "):
        checkpoints.restore(10, like)


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from minillm_jax.training.checkpoint import Checkpoints
from minillm_jax.weights.errors import CheckpointError

checkpoints = Checkpoints(sys.argv[1], 2)
checkpoints.save(10, {"x": jnp.arange(1000.0)})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(20, {"x": jnp.arange(1e6).at[::3].mul(0.7)})
    checkpoints.wait()
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of files is POSIX's")
def test_a_disk_that_is_full_is_told_and_the_one_before_is_taken(opened, tmp_path):
    """No file may grow above some bytes: writing fails as on a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")],
        capture_output=True,
        text=True,
    )
    assert "could not be written" in done.stdout, done.stderr
    assert str(tmp_path / "c/20") in done.stdout
    assert "step 10 is the newest" in done.stdout
    assert opened().newest().step == 10


def test_the_manifest_lists_every_file(opened):
    checkpoints = opened()
    fill(checkpoints, steps=(10,))
    folder = checkpoints.folder / "10"
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == files - {MANIFEST}
