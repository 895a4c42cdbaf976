"""Where a model's folder comes from: the disk, or huggingface_hub."""

import pathlib
import sys
import types

import jax
import numpy as np
import pytest

import minillm_jax as mj

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "tinyllama"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A huggingface_hub that has GOLDEN as "org/model", and counts what is asked."""
    monkeypatch.chdir(tmp_path)
    found = types.SimpleNamespace(calls=[], error=None)

    def snapshot_download(name, **options):
        found.calls.append((name, options))
        if found.error is not None:
            raise found.error
        return str(GOLDEN)

    found.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", found)
    return found


def refusal(path):
    with pytest.raises(mj.CheckpointError) as caught:
        mj.load_pretrained(path)
    return str(caught.value)


def test_a_name_is_downloaded_without_pickles_and_programs(hub):
    _, params, _ = mj.load_pretrained("org/model")
    expected = mj.load_pretrained(GOLDEN)[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    ((name, options),) = hub.calls
    assert name == "org/model"
    patterns = options["allow_patterns"]
    assert {"config.json", "tokenizer.json"} < {*patterns}
    assert not [p for p in patterns if p.endswith((".bin", ".py", ".pt", "*"))]


def test_a_folder_comes_before_a_name(hub, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert "has no config.json" in refusal("org/model")
    assert not hub.calls


def test_without_huggingface_hub_the_extra_and_a_folder_are_named(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = refusal("org/model")
    assert text.startswith("org/model: is not a folder here")
    assert "install huggingface_hub (the extra `hub`)" in text
    assert "pass its folder" in text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no route\nto host"), "(no route to host)"),
        (ValueError(), "(ValueError)"),
        (RuntimeError("401: a gated model"), "(401: a gated model)"),
    ],
)
def test_a_download_that_fails_is_an_error_with_the_reason(hub, error, reason):
    hub.error = error
    text = refusal("org/model")
    assert reason in text
    assert "pass its folder" in text


def test_an_interrupted_download_stays_an_interruption(hub):
    hub.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        mj.load_pretrained("org/model")


@pytest.mark.parametrize(
    "path",
    [
        *(pathlib.Path("org/model"), "model", "a/b/c", "org/", "/model", "org//model"),
        *("org/mo del", "org/model\n", "org/model@v1", "org:model", "~/model"),
        *("https://huggingface.co/org/model", "/nosuch/model", "org/mod\0el", "\ud800"),
        *("../model", "./model", "org/.."),
        pytest.param("a" * 5000, id="long"),
        pytest.param(pathlib.Path("org", "a" * 300), id="long name"),
    ],
)
def test_what_is_no_name_is_not_asked_for(hub, path):
    assert refusal(path) == f"{path}: is not a folder"
    assert not hub.calls


def test_a_file_is_not_a_folder(hub):
    file = GOLDEN / "model.safetensors"
    assert refusal(str(file)) == f"{file}: is not a folder"
