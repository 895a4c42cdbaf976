"""ModelConfig: what is valid, what is said about the rest, and nothing in between."""

import ast
import copy
import dataclasses
import json
import pathlib
import pickle
import re
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax.config import LEGACY_NAMES, MAX_POSITIONS, RopeScaling

BASE = {
    "max_seq_len": 1024,
    "max_kv_cache_len": 2048,
    "dim_model": 512,
    "num_heads": 8,
    "vocab_size": 32000,
}
FIELDS = [field.name for field in dataclasses.fields(mj.ModelConfig)]
INT_FIELDS = (
    *("max_seq_len", "max_kv_cache_len", "dim_model", "num_heads", "vocab_size"),
    *("num_layers", "num_kv_heads", "head_dim", "dim_ff", "sliding_window"),
    *("prefill_chunk", "rotary_dim"),
)
FLOAT_FIELDS = (
    *("rope_theta", "local_rope_theta", "norm_eps", "query_pre_attn_scalar"),
    *("attention_softcap", "embedding_scale", "logits_softcap"),
)
BOOL_FIELDS = (
    "remat",
    *("tie_embeddings", "qkv_bias", "qk_norm", "norm_unit_offset", "post_norms"),
)
DTYPE_FIELDS = ("dtype", "param_dtype", "cache_dtype")
KERNEL_FIELDS = ("attention", "decode_attention")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
PAIRS = 32  # of BASE
TRAINED = {"factor": 4.0, "original_max_position_embeddings": 256}
DYNAMIC = TRAINED | {"rope_type": "dynamic"}
YARN = TRAINED | {"rope_type": "yarn", "attention_factor": 1.2, "truncate": False}
LONGROPE = TRAINED | {
    "rope_type": "longrope",
    "short_factor": [1.0] * PAIRS,
    "long_factor": [1 + i / 8 for i in range(PAIRS)],
}
GEMMA = {
    "activation": "gelu_tanh",
    "sliding_window": 512,
    "global_layers": [2, 5],
    "local_rope_theta": 10000.0,
    "rope_theta": 1e6,
    "qk_norm": True,
    "query_pre_attn_scalar": 128.0,
    "attention_softcap": 50.0,
    "logits_softcap": 30.0,
    "norm_unit_offset": True,
    "post_norms": True,
    "embedding_scale": 512**0.5,
    "tie_embeddings": True,
}
HUGE = 10**5000  # too long for Python to print

# A value other than BASE's for every field that has a legacy name.
OTHER_VALUES = {
    "dim_model": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 3,
    "dim_ff": 640,
    "max_seq_len": 512,
    "max_kv_cache_len": 4096,
    "vocab_size": 300,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "qkv_bias": True,
    "eos_token_ids": (2, 7),
}


def test_every_field_is_of_a_kind_tried_here():
    numbers = {*INT_FIELDS, *FLOAT_FIELDS}
    others = {"rope_scaling", "eos_token_ids", "global_layers", "activation"}
    others |= {"quantization"}
    others |= set(KERNEL_FIELDS)
    assert {*numbers, *BOOL_FIELDS, *DTYPE_FIELDS, *others} == set(FIELDS)


def short(value):
    """A test's id; Python refuses to print HUGE."""
    try:
        return repr(value)[:30]
    except ValueError:
        return "huge"


def problems_of(**given):
    with pytest.raises(mj.ConfigError) as caught:
        mj.ModelConfig(**given)
    return caught.value.problems


def config_or_error(build, given):
    """The config, or None for a ConfigError; anything else goes through."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "legacy config names", DeprecationWarning)
        try:
            return build(given)
        except mj.ConfigError as error:
            said = error.problems
    assert said
    assert all(said)
    return None


# Presets, derived fields


@pytest.mark.parametrize(
    ("name", "seq", "cache", "dim", "heads", "num_layers", "ff", "vocab"),
    [
        ("small", 1024, 2048, 512, 8, 8, 1408, 32000),
        ("medium", 2048, 4096, 1024, 16, 24, 2816, 32000),
        ("large", 4096, 8192, 2048, 32, 24, 5632, 32000),
        ("xlarge", 8192, 16384, 4096, 64, 32, 11008, 32000),
    ],
)
def test_preset_has_the_numbers_of_the_design(
    name, seq, cache, dim, heads, num_layers, ff, vocab
):
    config = getattr(mj.Configs, name)()
    assert config == mj.Configs.by_name(name)
    assert (config.max_seq_len, config.max_kv_cache_len) == (seq, cache)
    assert (config.dim_model, config.num_heads) == (dim, heads)
    assert (config.num_layers, config.dim_ff) == (num_layers, ff)
    assert config.vocab_size == vocab
    assert config.num_kv_heads == heads
    assert config.queries_per_kv_head == 1
    assert config.head_dim == dim // heads
    assert config.prefill_chunk == 512


def test_preset_names_are_the_four():
    assert mj.Configs.names == ("small", "medium", "large", "xlarge")


def test_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(mj.ConfigError, match="did you mean large"):
        mj.Configs.by_name("larg")


@pytest.mark.parametrize(
    ("dim_model", "dim_ff"), [(512, 1408), (1024, 2816), (48, 128), (384, 1024)]
)
def test_dim_ff_is_eight_thirds_rounded_up_to_128(dim_model, dim_ff):
    assert mj.ModelConfig(**BASE | {"dim_model": dim_model}).dim_ff == dim_ff


@pytest.mark.parametrize(("seq", "chunk"), [(1024, 512), (512, 512), (100, 100)])
def test_prefill_chunk_is_the_sequence_up_to_512(seq, chunk):
    assert mj.ModelConfig(**BASE | {"max_seq_len": seq}).prefill_chunk == chunk


def test_replace_derives_again_what_was_derived():
    config = mj.Configs.small().replace(num_heads=16)
    assert (config.head_dim, config.num_kv_heads) == (32, 16)
    assert config == mj.Configs.small().replace(num_heads=16, head_dim=32)
    wide = mj.ModelConfig(**BASE).replace(dim_model=1024, max_seq_len=64)
    assert (wide.dim_ff, wide.head_dim, wide.prefill_chunk) == (2816, 128, 64)


def test_replace_keeps_what_was_given():
    config = mj.Configs.small().replace(head_dim=64, num_kv_heads=4, prefill_chunk=32)
    changed = config.replace(num_heads=16, max_seq_len=64)
    assert (changed.head_dim, changed.num_kv_heads) == (64, 4)
    assert changed.prefill_chunk == 32
    assert changed.dim_ff == 1408
    assert changed.replace(head_dim=None).head_dim == 32


def test_what_rotates_and_what_scales_scores_follow_head_dim():
    config = mj.ModelConfig(**BASE, head_dim=32)
    assert (config.rotary_dim, config.query_pre_attn_scalar) == (32, 32.0)
    wider = config.replace(head_dim=64)
    assert (wider.rotary_dim, wider.query_pre_attn_scalar) == (64, 64.0)
    fewer = config.replace(head_dim=None, num_heads=4)
    assert (fewer.rotary_dim, fewer.query_pre_attn_scalar) == (128, 128.0)
    given = config.replace(rotary_dim=8, query_pre_attn_scalar=3).replace(head_dim=64)
    assert (given.rotary_dim, given.query_pre_attn_scalar) == (8, 3.0)
    assert given.replace(rotary_dim=None).rotary_dim == 64


def test_a_head_of_odd_width_may_turn_a_part():
    config = mj.ModelConfig(**BASE, head_dim=33, rotary_dim=32)
    assert (config.head_dim, config.rotary_dim) == (33, 32)


def test_layers_without_the_window_see_everything():
    config = mj.ModelConfig(**BASE, num_layers=4, **GEMMA | {"global_layers": [0, 2]})
    assert [config.window(layer) for layer in range(4)] == [None, 512, None, 512]
    every = config.replace(global_layers=[0, 1, 2, 3])
    assert [every.window(layer) for layer in range(4)] == [None] * 4
    none = config.replace(sliding_window=None, global_layers=())
    assert [none.window(layer) for layer in range(4)] == [None] * 4


def test_replace_validates_again():
    with pytest.raises(mj.ConfigError, match="num_kv_heads=3"):
        mj.Configs.small().replace(num_kv_heads=3)
    with pytest.raises(mj.ConfigError, match="did you mean num_layers"):
        mj.Configs.small().replace(num_layer=3)


def test_resolve_keeps_the_derived_fields_derived():
    config = mj.Configs.small().resolve("cpu").replace(num_heads=16)
    assert config.head_dim == 32


# Value semantics


def test_config_is_frozen_hashable_and_equal_by_value():
    config, same = mj.Configs.small(), mj.Configs.small()
    assert config is not same
    assert config == same
    assert hash(config) == hash(same)
    assert config != config.replace(vocab_size=31999)
    assert {config: 1}[same] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim_model = 7
    nested = config.replace(rope_scaling=LLAMA3, eos_token_ids=[1, 2])
    assert hash(nested) == hash(
        config.replace(rope_scaling=RopeScaling(**LLAMA3), eos_token_ids=(1, 2))
    )


def test_config_takes_keywords_only():
    with pytest.raises(TypeError):
        mj.ModelConfig(1024, 2048, 512, 8, 32000)


@pytest.mark.parametrize(
    "config",
    [
        mj.Configs.small(),
        mj.Configs.xlarge().replace(num_kv_heads=8, sliding_window=4096, qk_norm=True),
        mj.Configs.medium().replace(rope_scaling=LLAMA3, eos_token_ids=(1, 2)),
        mj.Configs.small().replace(**GEMMA, rope_scaling=YARN, rotary_dim=32),
        mj.Configs.small().replace(rope_scaling=LONGROPE),
    ],
    ids=["small", "xlarge_gqa_window", "medium_llama3", "gemma_yarn", "longrope"],
)
def test_dict_and_json_round_trip(config):
    values = config.to_dict()
    assert list(values) == FIELDS
    assert json.loads(json.dumps(values)) == values  # plain JSON values
    assert mj.ModelConfig.from_dict(values) == config
    assert mj.ModelConfig.from_dict(json.loads(json.dumps(values))) == config
    assert mj.ModelConfig(**values) == config
    assert hash(mj.ModelConfig(**values)) == hash(config)


def test_copies_are_equal_and_still_derive():
    config = mj.Configs.small()
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.replace(num_heads=16).head_dim == 32


@pytest.mark.parametrize("platform", ["gpu", "cuda", "rocm", "tpu", "cpu"])
def test_auto_is_bfloat16_on_accelerators_and_float32_on_cpu(platform):
    concrete = mj.Configs.small().resolve(platform)
    dtype = "float32" if platform == "cpu" else "bfloat16"
    assert [getattr(concrete, name) for name in DTYPE_FIELDS] == [dtype] * 3
    assert concrete.resolve("cpu") == concrete
    assert concrete.resolve("tpu") == concrete


def test_stored_dtypes_follow_dtype_unless_given():
    config = mj.Configs.small().replace(dtype="float16", param_dtype="float32")
    concrete = config.resolve("tpu")
    assert [getattr(concrete, n) for n in DTYPE_FIELDS] == [
        "float16",
        "float32",
        "float16",
    ]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (jnp.bfloat16, "bfloat16"),
        (jnp.float32, "float32"),
        (np.float32, "float32"),
        (np.dtype("float16"), "float16"),
        (jnp.dtype(jnp.bfloat16), "bfloat16"),
        ("auto", "auto"),
        (None, "auto"),
    ],
    ids=short,
)
@pytest.mark.parametrize("field", DTYPE_FIELDS)
def test_dtype_may_be_given_as_numpy_or_jax_has_it(field, given, name):
    assert getattr(mj.Configs.small().replace(**{field: given}), field) == name


def test_an_unknown_quantization_is_a_config_error():
    (problem,) = problems_of(**BASE, quantization="int4")
    assert problem.startswith("quantization='int4'")
    assert "w8a16" in problem


@pytest.mark.parametrize("field", KERNEL_FIELDS)
def test_an_unknown_kernel_is_a_config_error(field):
    (problem,) = problems_of(**BASE, **{field: "cuddn"})
    assert problem.startswith(f"{field}='cuddn'")
    assert problem.endswith("did you mean cudnn?")


@pytest.mark.parametrize(
    "given", [jnp.int32, np.dtype("float64"), float, dict, "fp8", 32, np.ones(2)]
)
def test_other_dtypes_are_config_errors(given):
    (problem,) = problems_of(**BASE, dtype=given)
    assert problem.startswith("dtype=")


def test_numpy_numbers_become_plain_ones():
    config = mj.ModelConfig(
        **BASE | {"dim_model": np.int64(256), "num_heads": np.array(4)},
        norm_eps=np.float32(1e-3),
        rope_theta=500000,
        qkv_bias=np.bool_(True),
        eos_token_ids=np.array([1, 2]),
        sliding_window=8,
        global_layers=np.array([1, 2]),
        rope_scaling=LONGROPE | {"long_factor": np.full(PAIRS, 2, np.float32)},
    )
    assert type(config.dim_model) is int
    assert type(config.num_heads) is int
    assert type(config.norm_eps) is float
    assert type(config.rope_theta) is float
    assert config.qkv_bias is True
    assert config.eos_token_ids == config.global_layers == (1, 2)
    assert config.rope_scaling.long_factor == (2.0,) * PAIRS
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "value", [2, (2,), [2], np.array([2]), np.array(2), np.int32(2)], ids=short
)
def test_eos_token_ids_may_be_one_id_or_several(value):
    assert mj.ModelConfig(**BASE, eos_token_ids=value).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("seq", "cache"), [(16384, 32768), (32768, 65536), (MAX_POSITIONS, MAX_POSITIONS)]
)
def test_long_custom_contexts_are_valid(seq, cache):
    config = mj.ModelConfig(
        max_seq_len=seq,
        max_kv_cache_len=cache,
        dim_model=4096,
        num_heads=64,
        vocab_size=100000,
    )
    assert (config.max_seq_len, config.max_kv_cache_len) == (seq, cache)
    assert (config.num_layers, config.dim_ff, config.head_dim) == (8, 11008, 64)


# Legacy names


def test_legacy_table_holds_the_common_names_and_maps_to_fields():
    common = "d_model n_heads max_len hidden_size num_attention_heads n_embd"
    assert set(common.split()) | {"num_hidden_layers"} <= set(LEGACY_NAMES)
    assert set(LEGACY_NAMES.values()) <= set(FIELDS)
    assert not set(LEGACY_NAMES) & set(FIELDS)
    assert set(LEGACY_NAMES.values()) == set(OTHER_VALUES)


@pytest.mark.parametrize(("legacy", "name"), LEGACY_NAMES.items())
def test_legacy_name_works_and_warns_once(legacy, name):
    value = OTHER_VALUES[name]
    rest = {key: BASE[key] for key in BASE if key != name}
    with pytest.warns(DeprecationWarning, match="legacy config names") as caught:
        config = mj.ModelConfig(**rest, **{legacy: value})
    (warning,) = caught
    assert f"{legacy} -> {name}" in str(warning.message)
    assert warning.filename == __file__  # it points at the caller
    assert config == mj.ModelConfig(**rest, **{name: value})


@pytest.mark.parametrize(("legacy", "name"), LEGACY_NAMES.items())
def test_legacy_name_that_contradicts_is_an_error(legacy, name):
    given = BASE | {name: getattr(mj.ModelConfig(**BASE), name)}
    with pytest.warns(DeprecationWarning, match="legacy config names"):
        (problem,) = problems_of(**given, **{legacy: OTHER_VALUES[name]})
    assert problem.startswith(f"{name}: given under two names")
    assert str(given[name]) in problem
    assert str(OTHER_VALUES[name]) in problem


@pytest.mark.parametrize(("legacy", "name"), LEGACY_NAMES.items())
def test_legacy_name_that_agrees_is_not(legacy, name):
    given = BASE | {name: OTHER_VALUES[name]}
    with pytest.warns(DeprecationWarning, match="legacy config names"):
        config = mj.ModelConfig(**given, **{legacy: given[name]})
    assert config == mj.ModelConfig(**given)


def test_several_legacy_names_make_one_warning():
    with pytest.warns(DeprecationWarning, match="legacy config names") as caught:
        config = mj.ModelConfig(
            n_positions=1024, max_cache_len=2048, n_embd=512, n_head=8, n_vocab=32000
        )
    assert len(caught) == 1
    assert config == mj.ModelConfig(**BASE)
    with pytest.warns(DeprecationWarning, match="legacy config names") as caught:
        assert config.replace(n_layers=2, d_ff=128).num_layers == 2
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_two_legacy_names_of_one_field_may_contradict_too():
    rest = {key: BASE[key] for key in BASE if key != "dim_model"}
    with pytest.warns(DeprecationWarning, match="legacy config names"):
        (problem,) = problems_of(**rest, d_model=256, hidden_size=512)
    assert "256 and 512" in problem


def test_contradiction_beyond_what_a_message_shows_is_an_error():
    with pytest.warns(DeprecationWarning, match="legacy config names"):
        (problem,) = problems_of(
            **BASE, eos_token_ids=[*range(100), 7], eos_token_id=[*range(100), 8]
        )
    assert problem.startswith("eos_token_ids: given under two names")


def test_new_names_do_not_warn():
    mj.ModelConfig(**BASE)  # warnings are errors here


# What a ConfigError says


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dim_modle", "dim_model"),
        ("num_head", "num_heads"),
        ("max_kv_cache_length", "max_kv_cache_len"),
        ("hiden_size", "hidden_size"),
    ],
)
def test_unknown_field_is_answered_with_the_nearest(name, meant):
    (problem,) = problems_of(**BASE, **{name: 1})
    assert problem == f"{name}: unknown field; did you mean {meant}?"


def test_field_like_no_other_gets_no_guess():
    (problem,) = problems_of(**BASE, zzzzzz=1)
    assert problem == "zzzzzz: unknown field"


def test_all_problems_are_in_one_error():
    problems = problems_of(
        max_seq_len=4096,
        max_kv_cache_len=2048,
        num_heads=7,
        dim_modle=512,
        vocab_size=-1,
        num_layers=2.5,
        num_kv_heads=3,
        norm_eps=float("nan"),
        tie_embeddings="yes",
        rope_scaling={"rope_type": "yarn", "factor": 0.5, "beta_fast": 0.5},
        dtype="float8",
        prefill_chunk=4096,
        rotary_dim=33,
        global_layers=(2**24,),
        activation="relu",
        logits_softcap=0,
    )
    fields = [re.split("[:=]", problem)[0] for problem in problems]
    assert sorted(fields) == sorted(
        [
            *("dim_modle", "dim_model", "vocab_size", "num_layers", "norm_eps"),
            *("tie_embeddings", "rope_scaling", "dtype", "max_kv_cache_len"),
            *("num_kv_heads", "prefill_chunk", "rotary_dim", "global_layers"),
            *("activation", "logits_softcap"),
        ]
    )
    (scaling,) = [p for p in problems if p.startswith("rope_scaling")]
    for said in ("rope_type='yarn' needs it", "factor=0.5", "below beta_fast=0.5"):
        assert said in scaling


def test_the_message_is_all_problems():
    with pytest.raises(mj.ConfigError) as caught:
        mj.ModelConfig(**BASE | {"num_heads": 0, "vocab_size": 0})
    assert len(caught.value.problems) == 2
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", BASE)
def test_required_field_is_missed_by_name(name):
    (problem,) = problems_of(**{key: BASE[key] for key in BASE if key != name})
    assert problem == f"{name}: missing, and it has no default"
    assert problems_of(**BASE | {name: None}) == (problem,)


@pytest.mark.parametrize("name", INT_FIELDS)
@pytest.mark.parametrize("value", [-1, 0, -(10**30), 10**30])
def test_number_out_of_range_is_named_with_value_bounds_and_advice(name, value):
    (problem,) = problems_of(**BASE | {name: value})
    assert problem.startswith(f"{name}={value}: must be a number in [")
    assert re.search(r"; write \d+$", problem)


@pytest.mark.parametrize("value", [HUGE, -HUGE], ids=["huge", "-huge"])
@pytest.mark.parametrize("name", [*INT_FIELDS, *FLOAT_FIELDS, "dtype", "activation"])
def test_number_too_long_to_print_is_a_config_error(name, value):
    (problem,) = problems_of(**BASE | {name: value})
    assert problem.startswith(f"{name}=")
    assert len(problem) < 200


@pytest.mark.parametrize(
    "given",
    [
        {"eos_token_ids": HUGE},
        {"eos_token_ids": [1, HUGE]},
        {"global_layers": [1, HUGE], "sliding_window": 4},
        {"rope_scaling": LONGROPE | {"long_factor": [HUGE]}},
        {"max_seq_len": [HUGE]},
        {"rope_scaling": {"rope_type": "linear", "factor": HUGE}},
        {"rope_scaling": {"rope_type": {"deep": [HUGE]}, "factor": 2.0}},
        {"dtype": {HUGE: HUGE}},
        {"nonsense": HUGE},
        {"dim_model": HUGE, "d_model": -HUGE},
    ],
    ids=lambda given: "-".join(map(str, given)),
)
def test_number_too_long_to_print_is_a_config_error_anywhere(given):
    assert config_or_error(mj.ModelConfig.from_dict, BASE | given) is None


@pytest.mark.parametrize("name", INT_FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        *(True, False, np.True_, "512", b"512", 512.5, float("nan"), float("inf")),
        *([512], {}, 1j, np.array([512]), object),
    ],
    ids=short,
)
def test_what_is_no_whole_number_is_a_config_error(name, value):
    (problem,) = problems_of(**BASE | {name: value})
    assert problem.startswith(f"{name}=")
    assert "must be a whole number" in problem


def test_whole_float_is_refused_with_the_number_to_write():
    (problem,) = problems_of(**BASE | {"dim_model": 512.0})
    assert problem == "dim_model=512.0: must be a whole number; write 512"


@pytest.mark.parametrize("name", FLOAT_FIELDS)
@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0, True, "1e-5"),
        *([1.0], 1j, np.complex64(0.5 + 0.5j)),
    ],
    ids=short,
)
def test_what_is_no_number_in_range_is_a_config_error(name, value):
    (problem,) = problems_of(**BASE, **{name: value})
    assert problem.startswith(f"{name}={value!r}: must be a number")


@pytest.mark.parametrize("name", FLOAT_FIELDS)
def test_nan_is_answered_with_the_bounds_and_no_guess(name):
    (problem,) = problems_of(**BASE, **{name: float("nan")})
    assert "must be a number in [" in problem
    assert "write" not in problem


@pytest.mark.parametrize("name", BOOL_FIELDS)
@pytest.mark.parametrize("value", [0, 1, "True", 1.0, []], ids=short)
def test_what_is_no_truth_value_is_a_config_error(name, value):
    (problem,) = problems_of(**BASE, **{name: value})
    assert problem == f"{name}={value!r}: must be True or False"


LOCAL = {"sliding_window": 4}


@pytest.mark.parametrize(
    ("changes", "start", "says"),
    [
        ({"num_heads": 7}, "num_heads=7:", "must divide dim_model=512; write 8"),
        ({"num_heads": 1024}, "num_heads=1024:", "must divide dim_model=512"),
        ({"num_kv_heads": 3}, "num_kv_heads=3:", "must divide num_heads=8; write"),
        ({"num_kv_heads": 16}, "num_kv_heads=16:", "must divide num_heads=8; write 8"),
        ({"max_kv_cache_len": 1023}, "max_kv_cache_len=1023:", "write 2048"),
        ({"head_dim": 33}, "head_dim=33:", "must be even"),
        ({"dim_model": 24}, "head_dim=3:", "must be even"),
        ({"prefill_chunk": 2049}, "prefill_chunk=2049:", "at most max_kv_cache_len"),
        ({"eos_token_ids": 32000}, "eos_token_ids=(32000,):", "0 to 31999"),
        ({"eos_token_ids": (1, -1)}, "eos_token_ids=(1, -1):", "0 to 31999"),
        ({"eos_token_ids": ("</s>",)}, "eos_token_ids=", "must be a whole number"),
        ({"dtype": "bfloat"}, "dtype='bfloat':", "did you mean bfloat16"),
        ({"sliding_window": 0}, "sliding_window=0:", "write 1"),
        ({"rotary_dim": 33}, "rotary_dim=33:", "must be even"),
        ({"rotary_dim": 66}, "rotary_dim=66:", "must be at most head_dim=64"),
        ({"head_dim": 8, "rotary_dim": 10}, "rotary_dim=10:", "most head_dim=8"),
        ({"global_layers": (0,)}, "global_layers=(0,):", "needs a sliding_window"),
        (LOCAL | {"global_layers": 8}, "global_layers=(8,):", "layers from 0 to 7"),
        (LOCAL | {"global_layers": (-1,)}, "global_layers=(-1,):", "from 0 to 7"),
        (LOCAL | {"global_layers": (2, 1)}, "global_layers=(2, 1):", "ascending"),
        (LOCAL | {"global_layers": (1, 1)}, "global_layers=(1, 1):", "ascending"),
        (LOCAL | {"global_layers": "1"}, "global_layers='1':", "a whole number"),
        ({"activation": "gelu"}, "activation='gelu':", "did you mean gelu_tanh"),
    ],
)
def test_contradiction_is_named_with_value_rule_and_advice(changes, start, says):
    (problem,) = problems_of(**BASE | changes)
    assert problem.startswith(start)
    assert says in problem


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "su", "factor": 4.0}, "one of linear, dynamic, llama3, yarn, "),
        (
            {"rope_type": "yarn", "factor": 4.0},
            "original_max_position_embeddings: miss",
        ),
        ({"rope_type": "dynamic", "factor": 4.0}, "original_max_position_embeddings"),
        (YARN | {"beta_slow": 32}, "beta_slow=32.0: must be below beta_fast=32.0"),
        (YARN | {"attention_factor": 0.0}, "attention_factor=0.0: must be a number"),
        (YARN | {"truncate": 1}, "truncate=1: must be True or False"),
        (LONGROPE | {"short_factor": []}, "short_factor: missing, and rope_type='long"),
        (LONGROPE | {"long_factor": None}, "long_factor: missing"),
        (LONGROPE | {"long_factor": [0.0] * PAIRS}, "long_factor: "),
        (LONGROPE | {"long_factor": ["1"] * PAIRS}, "must be a number"),
        (LONGROPE | {"long_factor": [float("nan")] * PAIRS}, "long_factor: "),
        (LONGROPE | {"long_factor": [float("inf")] * PAIRS}, "long_factor: "),
        (LONGROPE | {"long_factor": [1e-300] * PAIRS}, "long_factor: "),  # cos(inf)
        ({"rope_type": "llama", "factor": 4.0}, "did you mean llama3?"),
        ({"type": "linear", "factor": 4.0}, "type: unknown field; did you mean rope_"),
        ({"rope_type": "linear", "facter": 4.0}, "did you mean factor?"),
        ({"rope_type": "linear"}, "factor: missing"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5: must be a number in"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "must be below high_freq_factor=4"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "write 1"),
        ({1: 2}, "must be a RopeScaling or a mapping"),
        ("linear", "must be a RopeScaling or a mapping"),
        ([], "must be a RopeScaling or a mapping"),
        ({"self": 1, "rope_type": "linear", "factor": 2.0}, "self: unknown field"),
    ],
)
def test_rope_scaling_problems_are_the_configs(scaling, says):
    (problem,) = problems_of(**BASE, rope_scaling=scaling)
    assert problem.startswith("rope_scaling=")
    assert says in problem


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling": DYNAMIC, "rotary_dim": 2}, ["more than 2"]),
        ({"rope_scaling": DYNAMIC, "head_dim": 2}, ["more than 2"]),
        ({"rope_scaling": YARN, "rotary_dim": 2}, ["more than 2"]),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            ["long_factor must be 32"],
        ),
        (
            {"rope_scaling": LONGROPE, "rotary_dim": 16},
            ["short_factor must be 8 numbers", "long_factor must be 8 numbers"],
        ),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, ["yarn"]),  # no pair is slower
    ],
)
def test_a_scaling_that_does_not_go_with_the_pairs_is_a_config_error(changes, says):
    problems = problems_of(**BASE | changes)
    assert len(problems) == len(says)
    for problem, part in zip(problems, says, strict=True):
        assert problem.startswith("rope_scaling")
        assert part in problem


def test_rope_scaling_may_be_a_mapping_or_the_class():
    config = mj.ModelConfig(**BASE, rope_scaling=LLAMA3)
    assert config.rope_scaling == RopeScaling(rope_type="llama3", factor=8.0)
    assert mj.ModelConfig(**BASE, rope_scaling=config.rope_scaling) == config


def test_derived_field_keeps_the_range_of_a_given_one():
    given = BASE | {"dim_model": 2**20, "num_heads": 1}
    config = config_or_error(mj.ModelConfig.from_dict, given)
    assert config is None or mj.ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "values", [None, 5, "max_seq_len", [], [1], [("max_seq_len", 1)], set()], ids=str
)
def test_from_dict_of_no_mapping_is_a_config_error(values):
    with pytest.raises(mj.ConfigError):
        mj.ModelConfig.from_dict(values)


@pytest.mark.parametrize("key", [1, None, b"a", ("a",), 2.5, HUGE], ids=short)
def test_from_dict_of_other_keys_than_strings_is_a_config_error(key):
    with pytest.raises(mj.ConfigError, match="field names must be strings"):
        mj.ModelConfig.from_dict(BASE | {key: 1})


@pytest.mark.parametrize("name", ["self", "cls", "given", "derived", "", "a b", "\0"])
def test_any_string_is_at_most_an_unknown_field(name):
    with pytest.raises(mj.ConfigError, match="unknown field"):
        mj.ModelConfig.from_dict(BASE | {name: 1})


def test_other_frozen_configs_are_checked_the_same_way():
    with pytest.raises(mj.ConfigError) as caught:
        RopeScaling(rope_typ="linear", factor=0.0)
    assert len(caught.value.problems) == 3  # unknown, missing, out of range
    with pytest.raises(mj.ConfigError) as caught:
        mj.CachePolicy(overflow="rings", num_sinks=-1)
    assert len(caught.value.problems) == 2


# Advice


ADVICE = re.compile(r"^(?P<field>\w+)=.*; write (?P<value>\S+?)(?:, or .*)?$", re.S)


def advised(problem):
    """The field and the value that a problem says to write, or None."""
    found = ADVICE.match(problem)
    return found and {found["field"]: ast.literal_eval(found["value"])}


@pytest.mark.parametrize(
    "changes",
    [
        {name: value}
        for name in ("vocab_size", "num_layers", "dim_ff", "head_dim", "sliding_window")
        for value in (0, -5, 10**30)
    ]
    + [
        {"max_seq_len": 0},
        {"num_heads": -1},
        {"num_kv_heads": 0},
        {"prefill_chunk": -2},
        {"dim_model": 512.0},
        {"num_heads": 7},
        {"num_heads": 100},
        {"num_kv_heads": 3},
        {"num_kv_heads": 100},
        {"max_kv_cache_len": 1023},
        {"head_dim": 63},
        {"rotary_dim": 0},
        {"rotary_dim": 33},
        {"rotary_dim": 65},
        {"rotary_dim": 66},
        {"rotary_dim": 34, "head_dim": 33},
        {"global_layers": (1, 2)},
        {"attention_softcap": 0.0},
        {"embedding_scale": -1.0},
        {"dim_model": 24},
        {"prefill_chunk": 3000},
        {"rope_theta": float("inf")},
        {"rope_theta": -1.0},
        {"norm_eps": 0.0},
        {"norm_eps": 2.0},
    ],
    ids=str,
)
def test_what_a_problem_advises_is_valid(changes):
    given = BASE | changes
    (problem,) = problems_of(**given)
    advice = advised(problem)
    assert advice, problem
    config = mj.ModelConfig(**given | advice)
    for name, value in advice.items():
        assert getattr(config, name) == value


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "max_seq_len": st.integers(-3, 40) | st.just(10**30),
            "max_kv_cache_len": st.integers(-3, 40) | st.just(10**30),
            "dim_model": st.integers(-3, 200) | st.sampled_from([64, 2**30]),
            "num_heads": st.integers(-3, 40) | st.just(2**40),
            "vocab_size": st.integers(-3, 40),
        },
        optional={
            "num_kv_heads": st.integers(-3, 40),
            "head_dim": st.integers(-3, 40),
            "rotary_dim": st.integers(-3, 40),
            "num_layers": st.integers(-3, 5000),
            "prefill_chunk": st.integers(-3, 60),
            "rope_theta": st.floats(allow_nan=False),
        },
    )
)
def test_following_the_advice_ends_in_a_valid_config(given):
    for _ in range(6):
        try:
            mj.ModelConfig(**given)
            return
        except mj.ConfigError as error:
            for problem in error.problems:
                advice = advised(problem)
                assert advice, problem
                given = given | advice
    mj.ModelConfig(**given)


# Any dictionary: valid or a ConfigError


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 64)
    | st.integers()
    | st.sampled_from(["<huge>", "<-huge>", 2**24, 2**24 + 1, 2**63, 512, 1024])
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.sampled_from(["auto", "float32", "bfloat16", "gelu_tanh"])
    | st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope"])
    | st.sampled_from([np.float32(2), np.int8(-1), np.array(3), np.array([[1], [2]])])
    | st.sampled_from([jnp.bfloat16, np.dtype("int8"), int, object(), 1j])
)
NAMES = st.sampled_from(FIELDS) | st.sampled_from(sorted(LEGACY_NAMES))
MISSPELT = st.builds(
    lambda name, at: name[: at % len(name)] + name[at % len(name) + 1 :],
    NAMES,
    st.integers(0, 30),
)
KEYS = NAMES | NAMES | MISSPELT | st.text(max_size=8) | st.sampled_from(["self", "cls"])
SCALING_KEYS = st.sampled_from([f.name for f in dataclasses.fields(RopeScaling)])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(SCALING_KEYS | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)
OTHER_KEYS = st.one_of(
    st.none(),
    st.integers(),
    st.just("<huge>"),
    st.binary(max_size=3),
    st.tuples(st.text(max_size=2), st.integers()),
)
SCALINGS = st.sampled_from([LLAMA3, DYNAMIC, YARN, LONGROPE])
STARTS = st.sampled_from(
    [{}, BASE, mj.Configs.medium().to_dict(), BASE | GEMMA]
) | st.builds(lambda scaling: BASE | {"rope_scaling": scaling}, SCALINGS)
PLAUSIBLE = st.fixed_dictionaries(
    {
        "max_seq_len": st.integers(1, 5000) | st.just(2**24),
        "max_kv_cache_len": st.integers(1, 10000) | st.just(2**24),
        "dim_model": st.sampled_from([1, 2, 24, 64, 96, 512, 4096, 2**20]),
        "num_heads": st.sampled_from([1, 2, 3, 4, 8, 16, 64, 2**16]),
        "vocab_size": st.integers(1, 100000),
    },
    optional={
        "num_kv_heads": st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([None, 2, 33, 64, 128]),
        "rotary_dim": st.sampled_from([None, 2, 32, 64]),
        "query_pre_attn_scalar": st.floats(1e-3, 1e3),
        "dim_ff": st.integers(1, 9000),
        "num_layers": st.integers(1, 100),
        "prefill_chunk": st.integers(1, 1000),
        "sliding_window": st.integers(1, 5000),
        "global_layers": st.sets(st.integers(0, 9), max_size=3).map(sorted),
        "local_rope_theta": st.floats(1.0, 1e7),
        "activation": st.sampled_from(["silu", "gelu_tanh"]),
        "attention_softcap": st.none() | st.floats(0.1, 100.0),
        "logits_softcap": st.none() | st.floats(0.1, 100.0),
        "norm_unit_offset": st.booleans(),
        "post_norms": st.booleans(),
        "embedding_scale": st.floats(0.1, 100.0),
        "eos_token_ids": st.lists(st.integers(0, 300), max_size=3),
        "rope_theta": st.floats(1.0, 1e7),
        "tie_embeddings": st.booleans(),
        "rope_scaling": st.none() | SCALINGS,
        "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        "attention": st.sampled_from(["auto", "xla", "cudnn"]),
        "d_model": st.sampled_from([64, 512]),
    },
)


def with_huge_numbers(value):
    """Hypothesis must print its examples: huge numbers get in here."""
    if isinstance(value, dict):
        return {with_huge_numbers(k): with_huge_numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_huge_numbers, value))
    if isinstance(value, str):
        return {"<huge>": HUGE, "<-huge>": -HUGE}.get(value, value)
    return value


def assert_invariants(config):
    hash(config)
    assert json_round_trip(config) == config
    assert config.replace() == config
    assert config.num_heads % config.num_kv_heads == 0
    assert config.queries_per_kv_head * config.num_kv_heads == config.num_heads
    assert config.rotary_dim % 2 == 0
    assert 2 <= config.rotary_dim <= config.head_dim
    assert list(config.global_layers) == sorted(set(config.global_layers))
    assert all(0 <= i < config.num_layers for i in config.global_layers)
    assert config.sliding_window is not None or not config.global_layers
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "longrope":
        assert len(scaling.short_factor) == config.rotary_dim // 2
        assert len(scaling.long_factor) == config.rotary_dim // 2
    assert 1 <= config.max_seq_len <= config.max_kv_cache_len <= MAX_POSITIONS
    assert 1 <= config.prefill_chunk <= config.max_kv_cache_len
    assert all(0 <= i < config.vocab_size for i in config.eos_token_ids)
    for platform in ("cpu", "tpu"):
        concrete = config.resolve(platform)
        assert "auto" not in [getattr(concrete, name) for name in DTYPE_FIELDS]
        assert concrete.resolve(platform) == concrete


def json_round_trip(config):
    return mj.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def check_any_dictionary(given):
    config = config_or_error(mj.ModelConfig.from_dict, with_huge_numbers(given))
    if config is not None:
        assert isinstance(config, mj.ModelConfig)
        assert_invariants(config)


def random_dictionaries():
    changes = st.dictionaries(KEYS, VALUES, max_size=5)
    return st.builds(lambda start, change: start | change, STARTS, changes)


@settings(max_examples=100, deadline=None)
@given(random_dictionaries())
def test_any_dictionary_is_a_valid_config_or_a_config_error(given):
    check_any_dictionary(given)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(random_dictionaries())
def test_any_dictionary_is_a_valid_config_or_a_config_error_deep(given):
    check_any_dictionary(given)


@settings(max_examples=60, deadline=None)
@given(STARTS, st.dictionaries(KEYS | OTHER_KEYS, VALUES, max_size=4))
def test_any_key_is_at_most_a_config_error(start, changes):
    check_any_dictionary(start | changes)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_replacement_is_valid_or_a_config_error(changes):
    config = mj.Configs.small()
    changes = with_huge_numbers(changes)
    changed = config_or_error(lambda given: config.replace(**given), changes)
    if changed is not None:
        assert_invariants(changed)
    assert config == mj.Configs.small()


@settings(max_examples=100, deadline=None)
@given(PLAUSIBLE)
def test_a_valid_config_round_trips_and_keeps_its_invariants(given):
    config = config_or_error(mj.ModelConfig.from_dict, given)
    if config is None:
        return
    assert_invariants(config)
    for name, value in given.items():
        if name in FIELDS and value is not None and name != "rope_scaling":
            kept = getattr(config, name)
            assert (list(kept) if isinstance(kept, tuple) else kept) == value


@settings(max_examples=60, deadline=None)
@given(
    SCALINGS, st.dictionaries(SCALING_KEYS | st.text(max_size=4), VALUES, max_size=5)
)
def test_any_rope_scaling_is_valid_or_a_config_error(start, changes):
    config = config_or_error(
        mj.ModelConfig.from_dict,
        BASE | {"rope_scaling": start | with_huge_numbers(changes)},
    )
    if config is not None:
        assert_invariants(config)
        scaling = config.rope_scaling
        assert scaling.factor >= 1.0
        assert scaling.low_freq_factor < scaling.high_freq_factor
        assert scaling.beta_slow < scaling.beta_fast
        needs = scaling.rope_type in ("dynamic", "llama3", "yarn", "longrope")
        assert scaling.original_max_position_embeddings is not None or not needs


# Importing


IMPORT_IS_QUIET = """
import jax, flax.linen, chex
from absl import flags
before = dict(jax.config.values)
known = set(flags.FLAGS)
import minillm_jax
import jax._src.xla_bridge as bridge
assert not bridge.backends_are_initialized(), bridge._backends
assert bridge._backends == {}, bridge._backends
after = dict(jax.config.values)
assert after == before, {k: v for k, v in after.items() if before.get(k) != v}
assert set(flags.FLAGS) == known, set(flags.FLAGS) - known
print("quiet")
"""


def test_importing_touches_no_device_sets_no_config_and_defines_no_flag():
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_IS_QUIET],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(mj.__file__).parents[1],
        check=False,
    )
    assert ran.stdout.strip() == "quiet", ran.stderr
