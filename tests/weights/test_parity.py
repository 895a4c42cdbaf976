"""transformers loads what is saved here, and the other way round; needs both.

    pip install -e .[dev,parity]
    python -m pytest tests/weights/test_parity.py

Skipped where torch or transformers is not installed.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.weights import configs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = list(json.loads((FOLDER / "versions.json").read_text())["variants"])
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40), np.int32)
SCALING = {"factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": (1.0, 1.1, 1.2, 1.3), "long_factor": (1.1, 2.0, 3.0, 4.0)}
GEMMA = {
    "norm_unit_offset": True,
    "embedding_scale": 32**0.5,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
}
GEMMA_2 = GEMMA | {
    "post_norms": True,
    "sliding_window": 5,
    "global_layers": (1,),
    "attention_softcap": 5.0,
    "logits_softcap": 3.0,
    "query_pre_attn_scalar": 16.0,
}
VARIATIONS = {
    "preset": {"num_kv_heads": None, "dim_ff": None},
    "grouped": {},
    "tied": {"tie_embeddings": True, "eos_token_ids": (3, 7)},
    "theta_and_eps": {"rope_theta": 100.0, "norm_eps": 0.1},
    "gelu": {"activation": "gelu_tanh"},
    "qkv_bias": {"qkv_bias": True},
    "qkv_bias_and_head_dim": {"qkv_bias": True, "head_dim": 12},
    "qk_norm_and_head_dim": {"qk_norm": True, "head_dim": 12, "tie_embeddings": True},
    "window": {"sliding_window": 5},
    "window_and_head_dim": {"sliding_window": 5, "head_dim": 12},
    "some_windows": {"sliding_window": 5, "global_layers": (1,)},
    "some_windows_and_bias": {
        "sliding_window": 5,
        "global_layers": (0,),
        "qkv_bias": True,
    },
    "partial": {"head_dim": 8, "rotary_dim": 6},
    "partial_longrope": {
        "head_dim": 8,
        "rotary_dim": 6,
        "rope_scaling": {
            "rope_type": "longrope",
            **SCALING,
            **{name: factors[:3] for name, factors in LONG.items()},
        },
    },
    "longrope": {"rope_scaling": {"rope_type": "longrope", **SCALING, **LONG}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", **SCALING}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", **SCALING, "truncate": False}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **SCALING}},
    "gemma": GEMMA,
    "gemma2": GEMMA_2,
    "gemma3": GEMMA_2
    | {
        "global_layers": (0,),
        "qk_norm": True,
        "local_rope_theta": 50.0,
        "attention_softcap": None,
        "logits_softcap": None,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
FRESH = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen3": {"head_dim": 12},
    "phi3": {"sliding_window": 5},
    "gemma2": {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 7},
    "gemma3_text": {"head_dim": 12, "sliding_window": 5},
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(config):
    """A model with nothing in its parameters at 0 or 1."""
    model = mj.create_model(config)
    return model, testing.noisy_params(model)


@functools.partial(jax.jit, static_argnames="model")
def our_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def load_theirs(folder):
    """transformers' model in float32; it has every tensor and no other."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    return model.eval()


def their_logits(model, tokens):
    with torch.inference_mode():
        given = torch.tensor(np.asarray(tokens, np.int64))
        return model(given, use_cache=False).logits.numpy()


def close(actual, expected):
    assert 0.1 < np.std(expected) < 10  # or the tolerance means nothing
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_folder_that_is_saved_is_the_original(name, tmp_path):
    mj.save_pretrained(tmp_path, *mj.load_pretrained(FOLDER / name, "float32"))
    with np.load(FOLDER / name / "expected.npz") as expected:
        for key in [key for key in expected if key.startswith("tokens")]:
            theirs = their_logits(load_theirs(tmp_path), expected[key])
            close(theirs, expected[key.replace("tokens", "logits")])


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_model_of_our_own_is_the_same_in_transformers(name, tmp_path):
    model, params = build(testing.tiny_config(**VARIATIONS[name]))
    mj.save_pretrained(tmp_path, model, params)
    theirs = load_theirs(tmp_path)
    close(our_logits(model, params, TOKENS), their_logits(theirs, TOKENS))
    ids = theirs.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    assert tuple(ids) == model.config.eos_token_ids


@pytest.mark.parametrize("name", ["preset", "linear", "yarn", "llama3", "longrope"])
def test_logits_at_position_2000_are_the_same_in_transformers(name, tmp_path):
    """A last place of a RoPE frequency is multiplied by the position."""
    long = {"max_seq_len": 2048, "max_kv_cache_len": 2048}
    model, params = build(testing.tiny_config(**VARIATIONS[name], **long))
    mj.save_pretrained(tmp_path, model, params)
    tokens = np.random.default_rng(0).integers(0, 61, (1, 2000), np.int32)
    expected = their_logits(load_theirs(tmp_path), tokens)
    close(our_logits(model, params, tokens), expected)


@pytest.mark.parametrize("model_type", FRESH)
def test_a_model_of_transformers_is_the_same_here(model_type, tmp_path):
    values = SIZES | FRESH[model_type]
    config = transformers.AutoConfig.for_model(model_type, **values)
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )
    same_here(theirs, tmp_path)


def test_the_text_part_of_a_gemma_3_that_sees_is_the_same_here(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=SIZES | FRESH["gemma3_text"], vision_config=vision
    )
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    same_here(theirs, tmp_path)


def same_here(theirs, folder):
    """A model of transformers, drawn anew, saved there and loaded here."""
    torch.manual_seed(0)
    for weight in theirs.parameters():
        noise = torch.randn(weight.shape)
        weight.data += 0.3 * noise if weight.ndim == 1 else 0.2 * noise
    theirs.eval().save_pretrained(folder)
    model, params, _ = mj.load_pretrained(folder, "float32")
    close(our_logits(model, params, TOKENS), their_logits(theirs, TOKENS))


def test_shards_are_loaded(tmp_path):
    model, params = build(testing.tiny_config())
    mj.save_pretrained(tmp_path, model, params, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    close(
        our_logits(model, params, TOKENS), their_logits(load_theirs(tmp_path), TOKENS)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_told(dtype, tmp_path):
    model, params = build(testing.tiny_config(dtype=dtype))
    mj.save_pretrained(tmp_path, model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype is getattr(torch, dtype)
    ours = np.asarray(params["embedding"].astype(jnp.float32))
    kept = theirs.get_input_embeddings().weight.detach().to(torch.float32).numpy()
    np.testing.assert_array_equal(kept, ours)


@pytest.mark.parametrize("name", mj.Configs.names)
def test_a_preset_survives_the_config_class_of_transformers(name, tmp_path):
    config = mj.Configs.by_name(name)
    values, _ = configs.write_config(config)
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert configs.read_config(theirs.to_dict(), {})[0] == config


@pytest.mark.parametrize(
    "model_type",
    [*FRESH, "mistral", "ministral", "seed_oss", "gemma"],
)
def test_keys_that_are_not_there_are_taken_as_transformers_does(model_type):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {key: SIZES[key] for key in keys}
    sizes |= {"vocab_size": 32064, "num_attention_heads": 32, "hidden_size": 128}
    if model_type == "phi3":
        sizes["num_attention_heads"] = 16
    theirs = transformers.AutoConfig.for_model(model_type, **sizes).to_dict()
    theirs = {key: value for key, value in theirs.items() if "eos" not in key}
    ours, family = configs.read_config({"model_type": model_type, **sizes}, {})
    told = {"architectures": [family.architecture]}
    assert configs.read_config(theirs | told, {})[0] == ours
