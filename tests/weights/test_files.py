"""Damaged, hostile and incomplete folders: one error that names all that is wrong."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models

import minillm_jax as mj
from minillm_jax.weights import files

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
NORM = "model.norm.weight"  # in the last of them


@pytest.fixture
def single(tmp_path):
    """A folder with one file of weights."""
    return pathlib.Path(shutil.copytree(GOLDENS / "tinyllama", tmp_path / "single"))


@pytest.fixture
def sharded(tmp_path):
    """A folder with three, and their index."""
    return pathlib.Path(shutil.copytree(GOLDENS / "qwen3", tmp_path / "sharded"))


def refusal(folder):
    """What load_pretrained says of a folder that it cannot read."""
    with pytest.raises(mj.CheckpointError) as caught:
        mj.load_pretrained(folder)
    return str(caught.value)


# Truncated files


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_shard_is_named(sharded, name, kept):
    content = (sharded / name).read_bytes()
    (sharded / name).write_bytes(content[: int(kept * len(content))])
    assert refusal(sharded).startswith(f"{sharded / name}: is damaged: ")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", files.INDEX])
def test_truncated_json_is_named(sharded, name):
    content = (sharded / name).read_bytes().rstrip()
    for kept in range(0, len(content), 17):
        (sharded / name).write_bytes(content[:kept])
        assert refusal(sharded).startswith(f"{sharded / name}: ")


def test_a_truncated_tokenizer_is_named(single):
    file = single / "tokenizer.json"
    tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(file))
    content = file.read_bytes().rstrip()
    assert mj.load_pretrained(single)[2].encode("ab") == [0, 1]
    for kept in range(0, len(content), 17):
        file.write_bytes(content[:kept])
        with pytest.raises(mj.TokenizerError, match=r"/tokenizer\.json: "):
            mj.load_pretrained(single)


def test_a_folder_without_config_says_so(single):
    (single / "config.json").unlink()
    assert refusal(single) == f"{single}: has no config.json: not a model's folder"


# What a folder may not do


def edit_index(folder, change):
    values = json.loads((folder / files.INDEX).read_text())
    change(values["weight_map"])
    (folder / files.INDEX).write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.bin"])
def test_pickles_are_refused_and_said_to_be_programs(single, name):
    (single / files.SINGLE).rename(single / name)
    text = refusal(single)
    assert "pickle" in text
    assert "can run any code" in text
    assert "safetensors" in text


def test_a_folder_without_weights_says_what_is_looked_for(single):
    (single / files.SINGLE).unlink()
    assert f"has neither {files.SINGLE} nor {files.INDEX}" in refusal(single)


@pytest.mark.parametrize(
    "entry",
    [
        *("../single/model.safetensors", "/model.safetensors", "..", ".", ""),
        *("shards/model.safetensors", "./model.safetensors", "a\0.safetensors"),
        *("config.json", "pytorch_model.bin", "nosuch.safetensors"),
        *(None, 5, True, 1.5, [SHARDS[0]], {}, []),
        pytest.param("a" * 300 + ".safetensors", id="long"),
        "\ud800.safetensors",
    ],
)
def test_an_index_names_files_of_its_folder_only(sharded, single, entry):
    absolute = f"{single}{entry}" if entry == "/model.safetensors" else entry
    (sharded / "shards").mkdir()
    shutil.copy(single / files.SINGLE, sharded / "shards")
    edit_index(sharded, lambda listed: listed.__setitem__(NORM, absolute))
    text = refusal(sharded)
    assert text.startswith(f"{sharded / files.INDEX}: ")
    assert text.encode()  # it can be printed


@pytest.mark.parametrize("listed", [None, {}, [], "text", 5, [["a", "b"]]])
def test_an_index_has_a_table(sharded, listed):
    (sharded / files.INDEX).write_text(json.dumps({"weight_map": listed}))
    assert refusal(sharded).startswith(f"{sharded / files.INDEX}: has no weight_map")


def test_every_missing_shard_is_named(sharded):
    for name in SHARDS[1:]:
        (sharded / name).unlink()
    text = refusal(sharded)
    assert SHARDS[0] not in text
    assert all(name in text for name in SHARDS[1:])
    assert text.count("is not there") == 2


def test_a_tensor_listed_in_the_wrong_shard_is_named(sharded):
    edit_index(sharded, lambda listed: listed.__setitem__(NORM, SHARDS[0]))
    assert f"{NORM} is not in {SHARDS[0]}" in refusal(sharded)


def test_a_tensor_that_is_listed_and_nowhere_is_named(sharded):
    edit_index(sharded, lambda listed: listed.__setitem__("more", SHARDS[0]))
    assert f"more is not in {SHARDS[0]}" in refusal(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    shutil.copy(sharded / SHARDS[2], sharded / "other.safetensors")
    edit_index(sharded, lambda listed: listed.__setitem__("more", "other.safetensors"))
    text = refusal(sharded)
    assert f"{NORM} is in {SHARDS[2]} and other.safetensors" in text


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_files_and_folders_may_be_links_as_hub_caches_have_them(
    request, tmp_path, name
):
    folder = request.getfixturevalue(name)
    expected = mj.load_pretrained(folder)[1]
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(tmp_path / "blobs" / f"{number}")
        file.symlink_to(pathlib.Path("..", "blobs", blob.name))
    (tmp_path / "link").symlink_to(folder)
    params = mj.load_pretrained(tmp_path / "link")[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_link_to_nowhere_is_no_file(single):
    (single / files.SINGLE).rename(single / "elsewhere")
    (single / files.SINGLE).symlink_to("nosuch")
    assert "has neither" in refusal(single)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["EvilForCausalLM"]])
def test_no_code_of_a_folder_is_run(single, monkeypatch, caplog, architectures):
    marker = single / "was run"
    program = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in ("__init__", "modeling_evil", "configuration_evil", "sitecustomize"):
        (single / f"{name}.py").write_text(program)
    values = json.loads((single / "config.json").read_text())
    classes = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    classes["AutoConfig"] = "configuration_evil.EvilConfig"
    values |= {"auto_map": classes, "architectures": architectures}
    (single / "config.json").write_text(json.dumps(values))
    (single / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    monkeypatch.chdir(single)
    if architectures == ["LlamaForCausalLM"]:
        mj.load_pretrained(single)
        assert "auto_map is ignored: no code from a folder is run" in caplog.text
    else:
        assert "'EvilForCausalLM'" in refusal(single)
    assert not marker.exists()
