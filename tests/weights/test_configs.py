"""config.json to ModelConfig and back: what is known, refused, and meant."""

import functools
import json
import logging
import math
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.config import RopeScaling
from minillm_jax.weights import configs, families

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 64,
}
ALONE = [family for family in families.FAMILIES if family.section is None]
PARTS = [family for family in families.FAMILIES if family.section is not None]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PRESETS = [getattr(mj.Configs, name)() for name in mj.Configs.names]


def values_of(model_type="llama", **changes):
    return {"model_type": model_type, **SIZES, **changes}


def read(model_type="llama", generation=(), **changes):
    return configs.read_config(values_of(model_type, **changes), dict(generation))[0]


def problems_of(model_type="llama", **changes):
    with pytest.raises(mj.CheckpointError) as caught:
        read(model_type, **changes)
    return caught.value.problems


def written(config):
    return configs.write_config(config)[0]


def through_json(config):
    """The config that comes back from what is written of one."""
    values = json.loads(json.dumps(written(config)))
    return configs.read_config(values, {})[0]


@functools.cache
def golden_values():
    files = sorted(GOLDENS.glob("*/config*.json"))
    return [json.loads(file.read_text()) for file in files]


# Which architecture


@pytest.mark.parametrize("family", ALONE, ids=lambda f: f.model_type)
def test_an_architecture_is_known_by_either_name(family):
    by_type = configs.read_config(values_of(family.model_type), {})
    named = SIZES | {"architectures": [family.architecture]}
    assert configs.read_config(named, {}) == by_type
    assert by_type[1] == family


@pytest.mark.parametrize(
    "names",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "llama"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"model_type": "mixtral"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {},
    ],
)
def test_an_unknown_architecture_is_named_with_those_that_are_known(names):
    with pytest.raises(mj.CheckpointError, match=r"not known.*Qwen3ForCausalLM"):
        configs.read_config(SIZES | names, {})


def test_two_names_that_contradict_are_refused_or_the_type_counts():
    """As in transformers, which goes by the type alone: another has another window."""
    values = values_of("mistral", architectures=["LlamaForCausalLM"])
    try:
        found = configs.read_config(values, {})
    except mj.CheckpointError:
        return
    assert found == configs.read_config(values_of("mistral"), {})


@pytest.mark.parametrize("family", PARTS, ids=lambda f: f.architecture)
def test_the_config_of_a_part_is_that_of_the_text_alone(family):
    section = values_of(family.model_type, rope_theta=5e5)
    whole = {"architectures": [family.architecture], "vision_config": {"x": 1}}
    inside = whole | {family.section: section, "eos_token_id": [1, 7]}
    assert configs.read_config(inside, {}) == (
        read(family.model_type, rope_theta=5e5, eos_token_id=[1, 7]),
        family,
    )
    for nothing in ({}, {family.section: None}, {family.section: [1]}):
        with pytest.raises(mj.CheckpointError, match=family.section):
            configs.read_config(whole | nothing, {})
    inside[family.section] = section | {"made_up": 1}
    with pytest.raises(mj.CheckpointError, match="made_up"):
        configs.read_config(inside, {})


# Which keys


@pytest.mark.parametrize(
    "keys",
    [
        {"mlp_bias": True},
        {"attention_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"num_local_experts": 8},
        {"rope_interleaved": True},
        {"use_bidirectional_attention": True},
        {"attn_logit_softcapping": 30.0},
        {"query_pre_attn_scalar": 16},
        {"is_causal": False},
        {"sliding_window": 8},  # of a Llama
        {"made_up": 0},
        {"made_up": ""},
    ],
)
def test_a_key_that_may_change_what_is_computed_is_refused(keys):
    [problem] = problems_of(**keys)
    assert next(iter(keys)) in problem
    assert "LlamaForCausalLM" in problem
    config = configs.read_config(values_of(**keys), {}, ignore_keys=[*keys])[0]
    assert config == read()


@pytest.mark.parametrize(
    "keys",
    [
        {"mlp_bias": False, "attention_bias": None, "pruned_heads": {}, "made_up": []},
        {"torch_dtype": "float16", "dtype": "bfloat16", "transformers_version": "5.0"},
        {"bos_token_id": 1, "pad_token_id": 9999, "attention_dropout": 0.5},
        {"use_cache": True, "pretraining_tp": 4, "initializer_range": 0.02},
        {"temperature": 0.6, "do_sample": True, "max_length": 20, "top_k": 50},
        {"_name_or_path": "x/y", "_attn_implementation": "flash_attention_2"},
        {"id2label": {"0": "LABEL_0"}, "torchscript": True, "prefix": "x"},
        {"is_llama_config": True, "rope_interleaved": False, "lm_head_bias": False},
        {"full_attn_mod": 1, "interpolate_factor": 1},
    ],
)
def test_a_key_that_changes_nothing_is_passed_over(keys):
    assert read(**keys) == read()


def test_all_that_is_wrong_is_told_at_once_with_the_file():
    values = values_of(
        made_up=1, num_local_experts=8, rope_scaling={"rope_type": "magic"}
    )
    values |= {"rms_norm_eps": -1.0, "hidden_act": "relu"}
    del values["vocab_size"]
    with pytest.raises(mj.CheckpointError) as caught:
        configs.read_config(values, {}, where="here/config.json")
    text = str(caught.value)
    assert text.startswith("here/config.json: ")
    for name in ("made_up", "num_local_experts", "magic", "norm_eps", "relu", "vocab"):
        assert name in text


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("null", [True, False])
def test_a_size_that_is_missing_is_named(key, null):
    values = values_of(**{key: None})
    if not null:
        del values[key]
    with pytest.raises(mj.CheckpointError, match=f"{key} is missing"):
        configs.read_config(values, {})


def test_code_of_a_folder_is_not_run_and_a_warning_says_so(caplog):
    with caplog.at_level(logging.WARNING, "minillm_jax"):
        config = read(auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    assert config == read()
    [record] = caplog.records
    assert "auto_map is ignored" in record.getMessage()


def test_a_key_that_is_ignored_must_be_named_exactly():
    with pytest.raises(mj.CheckpointError, match="made_up"):
        configs.read_config(values_of(made_up=1), {}, ignore_keys=["made"])


# What an architecture takes for keys that are not there, as transformers 5.23 does

USUAL = {
    "max_seq_len": 32768,
    "num_kv_heads": 32,
    "head_dim": 4,
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_embeddings": False,
    "activation": "silu",
    "sliding_window": None,
    "eos_token_ids": (2,),
}
GEMMA = {
    "eos_token_ids": (1,),
    "max_seq_len": 8192,
    "head_dim": 256,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
    "embedding_scale": math.sqrt(128),
    "norm_unit_offset": True,
}
GEMMA_2 = {
    **GEMMA,
    "num_kv_heads": 4,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "global_layers": (1,),
    "post_norms": True,
    "attention_softcap": 50.0,
    "logits_softcap": 30.0,
}
DEFAULTS = {
    "llama": {"max_seq_len": 2048},
    "mistral": {"num_kv_heads": 8, "max_seq_len": 131072, "sliding_window": 4096},
    "qwen2": {"qkv_bias": True, "eos_token_ids": ()},
    "qwen3": {"head_dim": 128, "qk_norm": True, "eos_token_ids": ()},
    # Its 32000 is outside of the vocabulary here.
    "phi3": {"max_seq_len": 4096, "norm_eps": 1e-5, "eos_token_ids": ()},
    "ministral": {"num_kv_heads": 8, "max_seq_len": 131072, "sliding_window": 4096},
    "seed_oss": {
        "num_kv_heads": 8,
        "head_dim": 128,
        "qkv_bias": True,
        "max_seq_len": 524288,
    },
    "gemma": {**GEMMA, "num_kv_heads": 16},
    "gemma2": GEMMA_2,
    "gemma3_text": {
        **GEMMA_2,
        "max_seq_len": 131072,
        "attention_softcap": None,
        "logits_softcap": None,
        "global_layers": (),  # the sixth would be the first
        "qk_norm": True,
        "rope_theta": 1e6,
        "local_rope_theta": 1e4,
    },
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_keys_that_are_not_there_have_the_values_of_transformers(model_type):
    config, expected = read(model_type), USUAL | DEFAULTS[model_type]
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.max_kv_cache_len == config.max_seq_len


def test_every_architecture_has_its_defaults_written_down():
    assert list(DEFAULTS) == [family.model_type for family in ALONE]


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_null_is_never_read_as_another_value_than_the_default(model_type):
    """Keys that transformers does not let be null: the default, or an error."""
    keys = ("hidden_act", "hidden_activation", "tie_word_embeddings", "rms_norm_eps")
    keys += ("query_pre_attn_scalar", "max_position_embeddings", "rope_theta")
    [known] = [family.keys for family in ALONE if family.model_type == model_type]
    for key in known.keys() & keys:
        try:
            config = read(model_type, **{key: None})
        except mj.CheckpointError:
            continue
        assert config == read(model_type), key


@pytest.mark.parametrize(
    ("model_type", "key", "name", "expected"),
    [
        ("llama", "hidden_act", "swish", "silu"),
        ("llama", "hidden_act", "gelu_pytorch_tanh", "gelu_tanh"),
        ("gemma", "hidden_act", "gelu", "gelu_tanh"),
        ("gemma2", "hidden_activation", "gelu_pytorch_tanh", "gelu_tanh"),
        ("gemma2", "hidden_act", "gelu", "gelu_tanh"),  # which is not read
        ("gemma", "hidden_activation", "silu", "gelu_tanh"),  # nor is this
    ],
)
def test_activations_are_those_that_transformers_means(model_type, key, name, expected):
    config = read(model_type, **{key: name})
    assert config.activation == expected


@pytest.mark.parametrize(
    ("model_type", "key", "name"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "hidden_act", "relu"),
        ("llama", "hidden_act", ["silu"]),
        ("gemma2", "hidden_activation", "gelu"),
    ],
)
def test_an_activation_that_is_not_known_is_refused(model_type, key, name):
    assert any(
        "must be one of" in problem
        for problem in problems_of(model_type, **{key: name})
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_heads_must_divide_the_model_where_transformers_says_so(model_type):
    sizes = {"hidden_size": 40, "head_dim": 8}
    problems = problems_of(model_type, **sizes)
    assert any("num_attention_heads: must divide" in problem for problem in problems)
    assert read("mistral", **sizes).head_dim == 8


# RoPE


def test_rope_is_read_from_either_spelling():
    old = read(rope_theta=5e5, rope_scaling=YARN, max_position_embeddings=128)
    new = read(rope_parameters={"rope_theta": 5e5, **YARN}, max_position_embeddings=128)
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(**YARN)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_no_scaling_has_many_spellings(name, scaling):
    assert read(**{name: scaling}) == read()


def test_the_oldest_files_call_the_type_type():
    linear = {"type": "linear", "factor": 2.0}
    config = read(rope_scaling=linear)
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    both = read(rope_scaling={**linear, "rope_type": "linear"})
    assert both == config


def test_rope_by_type_of_layer_is_that_of_one_base_each():
    nested = {
        "full_attention": {"rope_theta": 2e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 3e4, "rope_type": "default"},
    }
    old = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = read("gemma3_text", rope_parameters=nested)
    assert config == read("gemma3_text", **old)
    assert (config.rope_theta, config.local_rope_theta) == (2e6, 3e4)
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=8.0)


@pytest.mark.parametrize("missing", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("null", [True, False])
def test_a_type_of_layer_that_is_not_there_has_the_defaults(missing, null):
    nested = {
        "full_attention": {"rope_theta": 2e6},
        "sliding_attention": {"rope_theta": 3e4},
    }
    nested |= {missing: None}
    if not null:
        del nested[missing]
    config = read("gemma3_text", rope_parameters=nested)
    full, local = config.rope_theta, config.local_rope_theta
    assert (full, local) == ((1e6, 3e4) if missing == "full_attention" else (2e6, 1e4))


@pytest.mark.parametrize(
    "nested",
    [
        {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        {"full_attention": {}, "chunked_attention": {}},
        {"full_attention": {"rope_type": "magic"}},
        {"full_attention": 3},
        {"full_attention": {}, "sliding_attention": [1]},
    ],
)
def test_rope_by_type_of_layer_that_is_not_known_is_refused(nested):
    assert problems_of("gemma3_text", rope_parameters=nested)


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "magic", "factor": 2.0}, "magic"),
        ({"rope_type": "proportional", "factor": 2.0}, "proportional"),
        ({"rope_type": ["linear"], "factor": 2.0}, "linear"),
        ({"rope_type": "mrope", "mrope_section": [1, 1, 1]}, "mrope"),
        ({"rope_type": "linear", "factor": 2.0, "made_up": 1}, "made_up"),
        ({"rope_type": "default", "mrope_section": [1, 1, 1]}, "mrope_section"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "yarn", "factor": "x"}, "rope_scaling"),
        ({**YARN, "factor": 0, "mscale": 1, "mscale_all_dim": 1}, "rope_scaling"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "long_factor"),
        ("linear", "must be an object"),
        ([1], "must be an object"),
        (2.0, "must be an object"),
    ],
)
def test_rope_scaling_that_is_not_known_is_refused(scaling, named):
    problems = problems_of(rope_scaling=scaling)
    assert any("rope_scaling" in problem for problem in problems)
    assert any(named in problem for problem in problems)


def longrope(kind="longrope", **fields):
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    return {"rope_type": kind, **factors, **fields}


PHI = {"max_position_embeddings": 256}


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_phi_3_called_longrope_by_other_names(kind):
    original = {"original_max_position_embeddings": 64}
    scaling = longrope(kind)
    del scaling["rope_type"]
    older = read("phi3", **PHI, **original, rope_scaling={"type": kind, **scaling})
    assert older == read("phi3", **PHI, **original, rope_scaling=longrope())
    assert older.rope_scaling.rope_type == "longrope"
    assert older.rope_scaling.factor == 4.0
    assert problems_of("llama", **PHI, rope_scaling={"type": "su", **scaling})


def test_phi_3_has_its_original_context_outside_of_the_scaling():
    inside = longrope(original_max_position_embeddings=32)
    config = read("phi3", **PHI, rope_scaling=inside)
    assert config.rope_scaling.original_max_position_embeddings == 4096
    assert config.rope_scaling.factor == 1.0
    config = read(
        "phi3", **PHI, rope_scaling=inside, original_max_position_embeddings=64
    )
    assert config.rope_scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_phi_3_has_no_other_scaling(kind):
    problems = problems_of("phi3", rope_scaling={"rope_type": kind, "factor": 2.0})
    assert any(f"no {kind}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
        ),
        ({"mscale": 0.707}, None),
        ({"mscale_all_dim": 0.707}, None),
        ({"mscale": 0, "mscale_all_dim": 1.0}, None),
        ({"mscale": 2.0, "mscale_all_dim": 1.0, "attention_factor": 1.25}, 1.25),
    ],
)
def test_a_pair_of_mscales_makes_yarns_attention_factor(scales, expected):
    scaling = read(rope_scaling=YARN | scales).rope_scaling
    factor = scaling.attention_factor
    assert factor == (None if expected is None else pytest.approx(expected))


def test_the_original_context_is_the_longest_where_it_is_not_told():
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for kind, more in (("llama3", bounds), ("yarn", {}), ("dynamic", {})):
        scaling = {"rope_type": kind, "factor": 2.0, **more}
        config = read(**PHI, rope_scaling=scaling)
        assert config.rope_scaling.original_max_position_embeddings == 256


@pytest.mark.parametrize("nested", [True, False])
def test_a_part_of_each_head_turns_in_phi_3(nested):
    part = {"partial_rotary_factor": 0.75}
    keys = {"rope_parameters": {"rope_type": "default", **part}} if nested else part
    config = read("phi3", hidden_size=512, **keys)
    assert (config.head_dim, config.rotary_dim) == (16, 12)
    assert read("phi3", hidden_size=512, partial_rotary_factor=1.0).rotary_dim == 16


@pytest.mark.parametrize("part", [0.0, 1.5, -0.5, "half", [0.5], math.nan, math.inf])
def test_a_part_of_each_head_that_cannot_turn_is_refused(part):
    assert problems_of("phi3", hidden_size=512, partial_rotary_factor=part)


def test_a_part_of_each_head_turns_in_no_other_architecture():
    problems = problems_of(hidden_size=512, partial_rotary_factor=0.5)
    assert any("partial_rotary_factor" in problem for problem in problems)


def test_a_base_of_the_local_layers_is_none_of_an_architecture_without_them():
    try:
        config = read("mistral", rope_local_base_freq=50.0)
    except mj.CheckpointError:
        return
    assert config == read("mistral")


# Windows

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"sliding_window": 8}


@pytest.mark.parametrize(
    ("model_type", "keys", "windows"),
    [
        ("mistral", {}, [8, 8, 8]),
        ("mistral", {"sliding_window": None}, [None] * 3),
        ("phi3", {}, [8, 8, 8]),
        ("qwen2", {}, [None] * 3),
        ("qwen2", {"use_sliding_window": True}, [None] * 3),  # from the 28th on
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [None, 8, 8]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, [8, 8, 8]),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]},
            [8, None, 8],
        ),
        ("ministral", {}, [8, 8, 8]),
        ("ministral", {"layer_types": [FULL, SLIDING, FULL]}, [None, 8, None]),
        ("ministral", {"layer_types": [FULL] * 3}, [None] * 3),
        ("gemma2", {}, [8, None, 8]),
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING]}, [None, 8, 8]),
        ("gemma3_text", {}, [8, 8, 8]),
        ("gemma3_text", {"sliding_window_pattern": 2}, [8, None, 8]),
        (
            "gemma3_text",
            {"sliding_window_pattern": 2, "layer_types": [FULL, SLIDING, SLIDING]},
            [None, 8, 8],
        ),
    ],
)
def test_each_layer_has_its_window(model_type, keys, windows):
    config = read(model_type, **WINDOW | keys)
    assert [config.window(layer) for layer in range(3)] == windows


def test_a_layer_cannot_slide_where_the_window_is_switched_off():
    problems = problems_of("qwen3", **WINDOW, layer_types=[SLIDING, FULL, SLIDING])
    assert problems == ("layer_types: sliding_attention needs a sliding_window",)


def test_a_model_type_of_another_architecture_is_refused():
    """transformers goes by the type, and would make another model."""
    values = json.loads((GOLDENS / "llama2" / "config.json").read_text())
    with pytest.raises(mj.CheckpointError, match="granite contradict"):
        configs.read_config(values | {"model_type": "granite"}, {})


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 3e2}}}, "all layers"),
        ("qwen2", {"rope_scaling": {FULL: {"rope_theta": 3e2}}}, "all layers"),
        ("gemma3_text", {"attn_logit_softcapping": 0.5}, "attn_logit_softcapping"),
        (
            "gemma3_text",
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {FULL: {"rope_theta": 1e6}},
            },
            "give one",
        ),
        ("gemma3_text", {"rope_scaling": {FULL: {"rope_theta": 3e2}}}, "all layers"),
        (
            "gemma3_text",
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0}},
            },
            "original_max_position_embeddings",
        ),
    ],
)
def test_what_transformers_would_take_for_another_model_is_refused(
    model_type, changes, says
):
    problems = problems_of(model_type, **changes)
    assert any(says in problem for problem in problems), problems


def test_gemma_2_has_no_pattern_but_its_own():
    """transformers reads none for it: every other layer has the window."""
    try:
        config = read("gemma2", **WINDOW, sliding_window_pattern=3)
    except mj.CheckpointError:
        return
    assert config == read("gemma2", **WINDOW)


def test_gemma_2_may_say_its_window_twice():
    """As the files of its 9 billion parameters do; transformers reads one of them."""
    config = read("gemma2", **WINDOW, sliding_window_size=8)
    assert config == read("gemma2", **WINDOW)


@pytest.mark.parametrize(
    "types",
    [
        [FULL] * 2,
        [FULL] * 4,
        [FULL, SLIDING, "chunked_attention"],
        [FULL, SLIDING, [FULL]],
        [FULL, SLIDING, None],
        "full_attention",
        {FULL: 3},
        3,
    ],
)
def test_layer_types_that_are_not_one_for_each_layer_are_refused(types):
    problems = problems_of("gemma3_text", **WINDOW, layer_types=types)
    assert any("layer_types" in problem for problem in problems)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("gemma3_text", "sliding_window_pattern"), ("qwen2", "max_window_layers")],
)
@pytest.mark.parametrize("value", ["2", -1.5, [2]])
def test_a_number_of_layers_must_be_one(model_type, key, value):
    keys = {"use_sliding_window": True} if model_type == "qwen2" else {}
    problems = problems_of(model_type, **WINDOW, **keys, **{key: value})
    assert any(key in problem for problem in problems)


# A section of our own


@pytest.mark.parametrize("config", PRESETS, ids=mj.Configs.names)
def test_a_preset_is_written_and_read_as_it_is(config):
    assert through_json(config) == config
    values = written(config)
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["max_position_embeddings"] == config.max_seq_len


@pytest.mark.parametrize(
    "changes",
    [
        {"max_seq_len": 64, "max_kv_cache_len": 64, "prefill_chunk": None},
        {"max_seq_len": 64, "max_kv_cache_len": 64, "prefill_chunk": 16},
        {"max_seq_len": 2048, "max_kv_cache_len": 2048, "prefill_chunk": 1024},
        {"max_seq_len": 64, "max_kv_cache_len": 96},
    ],
)
def test_lengths_are_written_and_read_as_they_are(changes):
    config = testing.tiny_config(**changes)
    again = through_json(config)
    for name in ("max_seq_len", "max_kv_cache_len", "prefill_chunk"):
        assert getattr(again, name) == getattr(config, name)


@pytest.mark.parametrize(
    "section",
    [{"vocab_size": 7}, {"max_seq_len": 0}, {"max_seq_len": "x"}, [1], 3, "x"],
)
def test_our_section_holds_lengths_and_nothing_else(section):
    assert problems_of(minillm_jax=section)


# The way back

VARIATIONS = {
    "mha": {"num_kv_heads": None},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 12},
    "window": {"sliding_window": 5},
    "some_windows": {"sliding_window": 5, "global_layers": (1,)},
    "tied": {"tie_embeddings": True},
    "gelu": {"activation": "gelu_tanh"},
    "eos": {"eos_token_ids": (3, 7)},
    "one_eos": {"eos_token_ids": (3,)},
    "partial": {"head_dim": 16, "rotary_dim": 12},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {
        "rope_scaling": {
            "rope_type": "dynamic",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "yarn": {"rope_scaling": {**YARN, "truncate": False, "beta_slow": 0.5}},
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": 3.0,
            "attention_factor": 1.1,
            "original_max_position_embeddings": 48,
            "short_factor": (1.0, 1.1, 1.2, 1.3),
            "long_factor": (1.0, 2.0, 3.0, 4.0),
        }
    },
    "gemma": {
        "norm_unit_offset": True,
        "embedding_scale": math.sqrt(32),
        "activation": "gelu_tanh",
        "tie_embeddings": True,
    },
}
VARIATIONS["gemma2"] = VARIATIONS["gemma"] | {
    "post_norms": True,
    "sliding_window": 5,
    "global_layers": (1,),
    "attention_softcap": 5.0,
    "logits_softcap": 3.0,
    "query_pre_attn_scalar": 16.0,
}
VARIATIONS["gemma3"] = VARIATIONS["gemma2"] | {
    "attention_softcap": None,
    "qk_norm": True,
    "local_rope_theta": 500.0,
    "global_layers": (0,),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_config_comes_back_from_what_is_written_of_it(name):
    config = testing.tiny_config(**VARIATIONS[name])
    assert through_json(config) == config


@pytest.mark.parametrize("changes", [{}, *VARIATIONS.values()])
def test_what_is_written_says_nothing_that_transformers_would_take_otherwise(changes):
    """Whole numbers where its classes have them, and no id outside the vocabulary."""
    values = written(testing.tiny_config(**changes))
    integers = {"query_pre_attn_scalar", "sliding_window", "head_dim", *SIZES}
    integers |= {"num_key_value_heads", "max_position_embeddings"}
    for key in values.keys() & integers:
        assert values[key] is None or type(values[key]) is int, key
    if values["model_type"] == "phi3":  # whose class has a padding id of 32000
        assert values.get("pad_token_id", 32000) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"post_norms": True}, "post_norms"),
        ({"norm_unit_offset": True}, "norm_unit_offset"),
        ({"embedding_scale": 2.0}, "embedding_scale"),
        ({"attention_softcap": 5.0}, "attention_softcap"),
        ({"logits_softcap": 5.0}, "logits_softcap"),
        ({"query_pre_attn_scalar": 3.0}, "query_pre_attn_scalar"),
        ({"qkv_bias": True, "qk_norm": True}, "q"),
        ({"rotary_dim": 4, "sliding_window": 5, "global_layers": (0,)}, "rotary"),
        ({"local_rope_theta": 50.0, "sliding_window": 5}, "local"),
        (VARIATIONS["gemma2"] | {"post_norms": False}, "post_norms"),
        (
            VARIATIONS["gemma2"] | {"query_pre_attn_scalar": 2.5},
            "query_pre_attn_scalar",
        ),
        (VARIATIONS["gemma"] | {"embedding_scale": 1.0}, "norm_unit_offset"),
    ],
)
def test_fields_that_no_architecture_has_together_are_named(changes, named):
    with pytest.raises(mj.ConfigError, match="no architecture of transformers") as e:
        configs.write_config(testing.tiny_config(**changes))
    assert named in " ".join(e.value.problems[1:])


# Anything


def same_or_refused(values, generation):
    """A valid config, which is written and read as it is, or CheckpointError."""
    try:
        config, _ = configs.read_config(values, generation)
    except mj.CheckpointError as error:
        problems = error.problems
    else:
        assert through_json(config) == config
        return
    assert problems
    assert all(problems)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.sampled_from([2**24, 2**63, 10**400, -(10**400), 10**4000])
    | st.floats()
    | st.sampled_from([0.5, 0.75, 1.0, 2.0, 1e-5, 1e4])
    | st.text(max_size=5)
    | st.sampled_from(["silu", "default", "linear", "dynamic", "llama3", "yarn"])
    | st.sampled_from(["longrope", "su", FULL, SLIDING])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
SCALING_KEYS = ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor")
SCALING_KEYS += ("original_max_position_embeddings", "attention_factor", "mscale")
SCALING_KEYS += ("mscale_all_dim", "beta_fast", "truncate", "short_factor")
SCALING_KEYS += ("long_factor", "low_freq_factor", "high_freq_factor")
SCALING = st.dictionaries(st.sampled_from(SCALING_KEYS), JUNK, max_size=6)
BY_LAYER = st.dictionaries(st.sampled_from([FULL, SLIDING]), SCALING | JUNK)
KEYS = sorted({*SIZES}.union(*golden_values(), *(f.keys for f in families.FAMILIES)))
OWN = st.sampled_from(["max_seq_len", "max_kv_cache_len", "prefill_chunk", "other"])


@st.composite
def mutations(draw):
    """A golden config.json with some keys changed, added or taken away."""
    values = dict(draw(st.sampled_from(golden_values())))
    for key in draw(st.lists(st.sampled_from([*values]), max_size=2)):
        values.pop(key, None)
    names = st.sampled_from(KEYS) | st.text(max_size=5)
    values |= draw(st.dictionaries(names, JUNK, max_size=3))
    name = draw(st.sampled_from(["rope_scaling", "rope_parameters", "minillm_jax", ""]))
    if name.startswith("rope"):
        kept = values.get(name) if draw(st.booleans()) else None
        changed = draw(SCALING | BY_LAYER)
        values[name] = {**kept, **changed} if isinstance(kept, dict) else changed
    elif name:
        values[name] = draw(st.dictionaries(OWN, JUNK))
    return values


def with_examples(count):
    return settings(max_examples=count, deadline=None)


GENERATION = st.just({}) | st.fixed_dictionaries({"eos_token_id": JUNK})


@given(mutations(), GENERATION)
@with_examples(100)
def test_any_config_json_is_a_config_or_a_checkpoint_error(values, generation):
    same_or_refused(values, generation)


@pytest.mark.slow
@given(mutations(), GENERATION)
@with_examples(3000)
def test_any_of_many_is_a_config_or_a_checkpoint_error(values, generation):
    same_or_refused(values, generation)


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_known_key_is_a_config_or_a_checkpoint_error(key):
    for value in ([], {}, "x", 3, -3, True, None, math.inf, [[]], [{}], 10**400):
        for values in golden_values()[::2]:
            same_or_refused(values | {key: value}, {})
