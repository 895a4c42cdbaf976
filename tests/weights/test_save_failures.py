"""Saving that cannot be done, or is interrupted: no folder is a mix of two models."""

import errno
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.model import transformer
from minillm_jax.text.tokenizer import FileTokenizer

EVERY = 10**9  # bytes of a shard: all tensors in one file
FEW = 30_000  # in several


@pytest.fixture(scope="module")
def pair():
    """Two models of the same shapes and other mathematics, and their parameters."""
    found = []
    for seed, theta, eos in ((1, 1e4, (3,)), (2, 1e6, (4, 5))):
        config = testing.tiny_config(rope_theta=theta, eos_token_ids=eos)
        model = mj.create_model(config)
        found.append((model, jax.device_get(testing.noisy_params(model, seed=seed))))
    return found


def loaded(folder):
    model, params, _ = mj.load_pretrained(folder)
    return model.config, params


def is_model(found, model, params):
    config, read = found
    same = jax.tree.map(np.array_equal, read, params)
    return config == model.config and all(jax.tree.leaves(same))


@pytest.fixture
def failing(monkeypatch):
    """Makes the nth call of what saving is made of fail, counted over all of them."""

    def start(nth, error, names=("save_file", "replace", "unlink")):
        calls = []

        def counted(function):
            def call(*args, **kwargs):
                calls.append(function.__name__)
                if len(calls) == nth:
                    raise error
                return function(*args, **kwargs)

            return call

        places = {
            "save_file": (safetensors.numpy, "save_file"),
            "replace": (os, "replace"),
            "unlink": (os, "unlink"),
        }
        for name in names:
            module, attribute = places[name]
            function = counted(getattr(module, attribute))
            monkeypatch.setattr(module, attribute, function)
        return calls

    return start


def check_files_are_whole(folder):
    """Each is JSON or safetensors that can be read; no other name is there."""
    for file in folder.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors", file
            safetensors.numpy.load_file(file)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("shard_bytes", [EVERY, FEW])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_an_interrupted_save_leaves_whole_files_and_no_config(
    tmp_path, pair, failing, monkeypatch, error, shard_bytes, nth
):
    model, params = pair[0]
    calls = failing(nth, error, ("save_file", "replace"))
    with pytest.raises(type(error)):
        mj.save_pretrained(tmp_path, model, params, shard_bytes=shard_bytes)
    assert len(calls) == nth
    monkeypatch.undo()
    check_files_are_whole(tmp_path)
    with pytest.raises(mj.CheckpointError):
        mj.load_pretrained(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(EVERY, FEW), (FEW, EVERY), (FEW, FEW)])
@pytest.mark.parametrize("nth", [1, 2])
def test_weights_that_cannot_be_written_leave_the_earlier_model(
    tmp_path, pair, failing, monkeypatch, before, after, nth
):
    old, new = pair
    mj.save_pretrained(tmp_path, *old, shard_bytes=before)
    calls = failing(nth, OSError(errno.ENOSPC, "full"), ("save_file",))
    try:
        mj.save_pretrained(tmp_path, *new, shard_bytes=after)
    except OSError:
        monkeypatch.undo()
        assert is_model(loaded(tmp_path), *old)
    else:
        assert len(calls) < nth
        assert is_model(loaded(tmp_path), *new)


@pytest.mark.parametrize(
    ("before", "after"), [(EVERY, EVERY), (EVERY, FEW), (FEW, EVERY), (FEW, FEW)]
)
def test_an_interruption_at_any_step_leaves_one_model_or_an_error(
    tmp_path, pair, failing, monkeypatch, before, after
):
    old, new = pair
    mixed = []
    for nth in range(1, 100):
        folder = tmp_path / f"{nth}"
        mj.save_pretrained(folder, *old, shard_bytes=before)
        calls = failing(nth, KeyboardInterrupt())
        try:
            mj.save_pretrained(folder, *new, shard_bytes=after)
        except KeyboardInterrupt:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            break
        try:
            found = loaded(folder)
        except mj.CheckpointError:
            continue
        if not (is_model(found, *old) or is_model(found, *new)):
            mixed.append(f"{nth}: {calls[-1]}")
    assert is_model(loaded(folder), *new)
    assert not mixed


# What is refused before anything is written


def test_params_of_another_model_are_refused_before_anything_is_written(tmp_path, pair):
    (model, params), folder = pair[0], tmp_path / "folder"
    other = mj.create_model(model.config.replace(num_layers=1))
    for mine, theirs in ((other, params), (model, {}), (model, None)):
        with pytest.raises(mj.ConfigError, match="params"):
            mj.save_pretrained(folder, mine, theirs)
    assert not folder.exists()


def test_params_of_whole_numbers_are_refused_before_anything_is_written(tmp_path, pair):
    (model, params), folder = pair[0], tmp_path / "folder"
    params = jax.tree.map(lambda x: x.astype(np.int32), params)
    with pytest.raises(mj.ConfigError, match="int32"):
        mj.save_pretrained(folder, model, params)
    assert not folder.exists()


def test_a_config_of_no_architecture_is_refused_before_anything_is_written(tmp_path):
    config = testing.tiny_config(rotary_dim=4, qk_norm=True, logits_softcap=3.0)
    model = mj.create_model(config)
    params = transformer.param_shapes(model)
    with pytest.raises(mj.ConfigError, match="no architecture"):
        mj.save_pretrained(tmp_path / "folder", model, params)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "make",
    [
        object,
        lambda: FileTokenizer(tokenizers.Tokenizer(models.BPE({"a": 0}, []))),
    ],
    ids=["object", "not read from files"],
)
def test_a_tokenizer_without_files_is_refused_before_anything_is_written(
    tmp_path, pair, make
):
    with pytest.raises(mj.ConfigError, match="tokenizer"):
        mj.save_pretrained(tmp_path / "folder", *pair[0], make())
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_file_in_the_place_of_the_folder_stays(tmp_path, pair, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        mj.save_pretrained(tmp_path / name, *pair[0])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["", "folder"])
def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path, pair, name):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=tmp_path.name):
            mj.save_pretrained(tmp_path / name, *pair[0])
        assert not [*tmp_path.iterdir()]
    finally:
        tmp_path.chmod(0o700)


def test_a_saved_folder_has_nothing_of_the_earlier_model(tmp_path, pair):
    old, new = pair
    mj.save_pretrained(tmp_path, *old, shard_bytes=FEW)
    (tmp_path / "README.md").write_text("mine")
    mj.save_pretrained(tmp_path, *new)
    names = {path.name for path in pathlib.Path(tmp_path).iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == weights | {"README.md"}
