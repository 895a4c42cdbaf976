"""The text part of a checkpoint that reads images too."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import minillm_jax as mj

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "gemma3_linear"
OTHERS = (
    "vision_tower.encoder.weight",
    "multi_modal_projector.mm_soft_emb_norm.weight",
)


@pytest.fixture(params=["", "model."], ids=["as transformers 4", "as transformers 5"])
def folder(request, tmp_path):
    """The golden folder as the text part of a Gemma 3 with eyes."""
    alone = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    before, after = ("model.", "language_model.model.")
    if request.param:
        before, after = ("model.", "model.language_model.")
    tensors = {after + name.removeprefix(before): x for name, x in alone.items()}
    tensors |= {request.param + name: np.zeros((2, 3), np.float32) for name in OTHERS}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((GOLDEN / "config.json").read_text())
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 5],
        "text_config": text,
        "vision_config": {"hidden_size": 16},
        "mm_tokens_per_image": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_text_part_is_the_model_alone(folder):
    model, params, _ = mj.load_pretrained(folder)
    alone, expected, _ = mj.load_pretrained(GOLDEN)
    assert model.config == alone.config.replace(eos_token_ids=(1, 5))
    for one, other in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_text_part_is_saved_as_a_model_alone(folder, tmp_path):
    model, params, _ = mj.load_pretrained(folder)
    mj.save_pretrained(tmp_path / "alone", model, params)
    saved = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert saved["architectures"] == ["Gemma3ForCausalLM"]
    assert mj.load_pretrained(tmp_path / "alone")[0].config == model.config


def test_a_tensor_of_no_known_part_is_unexpected(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(
        tensors | {"audio.weight": np.zeros(2, np.float32)}, file
    )
    with pytest.raises(mj.CheckpointError, match=r"audio.weight is unexpected"):
        mj.load_pretrained(folder)


def test_without_its_section_it_is_refused(folder):
    shutil.copy(GOLDEN / "model.safetensors", folder)
    config = {"architectures": ["Gemma3ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(mj.CheckpointError, match="text_config is missing"):
        mj.load_pretrained(folder)
