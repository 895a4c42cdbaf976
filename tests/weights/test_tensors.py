"""The tensors of a folder beside those of its model: every difference, in one error."""

import json
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.weights import files

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP, DOWN = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down"))


def read(file):
    """Name -> dtype, shape and bytes."""
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            fields["dtype"],
            fields["shape"],
            content[start:][slice(*fields["data_offsets"])],
        )
        for name, fields in header.items()
    }


def write(file, tensors):
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def changed(tmp_path):
    """A golden folder with some tensors changed, those that are None removed."""

    def make(name, changes):
        folder = pathlib.Path(shutil.copytree(GOLDENS / name, tmp_path / name))
        files = list(folder.glob("*.safetensors"))
        for file in files:  # what is new goes into all of them: there is one
            tensors = read(file) | changes
            write(file, {name: t for name, t in tensors.items() if t is not None})
        return folder

    return make


@pytest.fixture
def no_data(monkeypatch):
    """Fails where data are read."""

    def read_rows(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr(files, "read_rows", read_rows)


def problems(folder):
    with pytest.raises(mj.CheckpointError) as caught:
        mj.load_pretrained(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    return sorted(caught.value.problems)


def zeros(*shape, dtype="F32", itemsize=4):
    return dtype, list(shape), bytes(int(np.prod(shape)) * itemsize)


def test_everything_wrong_is_one_error_before_any_data_are_read(changed, no_data):
    changes = {
        EMBEDDING: None,
        UP: None,
        HEAD: zeros(65, 32),
        DOWN: zeros(24, 32),
        "model.norm.weight": zeros(32, 1),
        "model.layers.2.input_layernorm.weight": zeros(32),
        "model.layers.0.self_attn.q_proj.bias": zeros(32),
        "model.layers.0.input_layernorm.weight": zeros(32, dtype="I8", itemsize=1),
        "model.layers.1.input_layernorm.weight": zeros(32, dtype="F8_E4M3", itemsize=1),
    }
    known = "F64, F32, F16, BF16"
    assert problems(changed("tinyllama", changes)) == sorted(
        [
            f"{EMBEDDING} is missing",
            f"{UP} is missing",
            f"{HEAD} has shape (65, 32), not (64, 32)",
            f"{DOWN} has shape (24, 32), not (32, 24)",
            "model.norm.weight has shape (32, 1), not (32,)",
            "model.layers.2.input_layernorm.weight is unexpected",
            "model.layers.0.self_attn.q_proj.bias is unexpected",
            f"model.layers.0.input_layernorm.weight is of dtype I8, not one of {known}",
            "model.layers.1.input_layernorm.weight is of dtype F8_E4M3, "
            f"not one of {known}",
        ]
    )


@pytest.mark.parametrize(
    ("dtype", "itemsize"),
    [
        *(("I8", 1), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1)),
        *(("I16", 2), ("I32", 4), ("I64", 8), ("C64", 8)),
    ],
)
def test_no_dtype_but_floats_is_taken(changed, no_data, dtype, itemsize):
    changes = {UP: zeros(24, 32, dtype=dtype, itemsize=itemsize)}
    (problem,) = problems(changed("tinyllama", changes))
    assert f"{UP} is of dtype {dtype}" in problem


@pytest.mark.parametrize("stored", ["float64", "float16"])
def test_a_tensor_of_another_float_dtype_is_converted(changed, stored):
    value = np.linspace(-2, 2, 24 * 32).reshape(24, 32).astype(stored)
    name = {"float64": "F64", "float16": "F16"}[stored]
    folder = changed("tinyllama", {UP: (name, [24, 32], value.tobytes())})
    _, params, _ = mj.load_pretrained(folder, dtype="float32")
    gate_up = params["layers_1"]["mlp"]["gate_up"]  # [D, 2, F]
    np.testing.assert_array_equal(gate_up[:, 1], value.T.astype(np.float32))


def test_a_head_that_is_not_tied_must_be_there(changed, no_data):
    assert problems(changed("tinyllama", {HEAD: None})) == [f"{HEAD} is missing"]


def test_buffers_of_older_files_change_nothing(changed):
    expected = mj.load_pretrained(GOLDENS / "tinyllama")[1]
    layers = (f"model.layers.{layer}.self_attn" for layer in (0, 1))
    names = [f"{name}.rotary_emb.inv_freq" for name in ("model", *layers)]
    folder = changed("tinyllama", dict.fromkeys(names, zeros(4)))
    params = mj.load_pretrained(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


# Tied heads


def test_a_tied_model_has_no_head_of_its_own():
    assert HEAD not in read(GOLDENS / "smollm2" / files.SINGLE)
    assert "lm_head" not in mj.load_pretrained(GOLDENS / "smollm2")[1]


def test_a_head_that_is_the_embedding_is_passed_over(changed):
    expected = mj.load_pretrained(GOLDENS / "smollm2")[1]
    embedding = read(GOLDENS / "smollm2" / files.SINGLE)[EMBEDDING]
    params = mj.load_pretrained(changed("smollm2", {HEAD: embedding}))[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def one_bit(dtype, shape, content):
    return dtype, shape, content[:-1] + bytes([content[-1] ^ 1])


def transposed(dtype, shape, content):
    return dtype, shape[::-1], content


def half(dtype, shape, content):
    return "F16", shape, content[: len(content) // 2]


def shorter(dtype, shape, content):
    return dtype, [shape[0] - 1, shape[1]], content[: -4 * shape[1]]


@pytest.mark.parametrize("change", [one_bit, transposed, half, shorter])
def test_another_head_beside_tied_embeddings_is_refused(changed, change):
    embedding = read(GOLDENS / "smollm2" / files.SINGLE)[EMBEDDING]
    folder = changed("smollm2", {HEAD: change(*embedding)})
    (problem,) = problems(folder)
    assert problem.startswith(f"{HEAD} is not {EMBEDDING}")
    assert "tie_word_embeddings" in problem
