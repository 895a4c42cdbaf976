"""Config files: presets from one home, every field open, frozen once."""

import json
import pathlib

import jax
import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

import minillm_jax as mj
from minillm_jax.cli import config_files
from minillm_jax.planning import devices

ROOT = pathlib.Path(__file__).parents[2]


def parse(*arguments):
    """A config as the command line would give it."""
    values = flags.FlagValues()
    argv = ["program", *arguments]
    holder = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    values(argv)
    return holder.value


@pytest.mark.parametrize("name", mj.Configs.names)
def test_a_config_file_is_its_preset(name):
    config = parse(f"--config={ROOT}/configs/{name}.py")
    assert config_files.model_config(config) == mj.Configs.by_name(name)
    assert config.is_locked


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("num_kv_heads=4", 4),
        ("head_dim=32", 32),
        ("dim_ff=256", 256),
        ("sliding_window=64", 64),
        ("prefill_chunk=128", 128),
        ("rope_theta=500000", 500000.0),
        ("tie_embeddings=true", True),
        ("eos_token_ids=(1,2)", (1, 2)),
        ("eos_token_ids=7", (7,)),
        ("rotary_dim=32", 32),
        ("query_pre_attn_scalar=128", 128.0),
        ("embedding_scale=22", 22.0),
        ("attention_softcap=50", 50.0),
        ("logits_softcap=30.5", 30.5),
        ("local_rope_theta=10000", 10000.0),
        ("activation=gelu_tanh", "gelu_tanh"),
        ("norm_unit_offset=true", True),
        ("post_norms=true", True),
        ("dtype=bfloat16", "bfloat16"),
    ],
)
def test_every_kind_of_field_can_be_set_from_the_command_line(override, value):
    config = parse(f"--config={ROOT}/configs/small.py", f"--config.model.{override}")
    model = config_files.model_config(config)
    assert getattr(model, override.split("=")[0]) == value


@pytest.mark.parametrize(("given", "layers"), [("(1,3)", (1, 3)), ("3", (3,))])
def test_global_layers_can_be_set_from_the_command_line(given, layers):
    config = parse(
        f"--config={ROOT}/configs/small.py",
        "--config.model.sliding_window=64",
        f"--config.model.global_layers={given}",
    )
    assert config_files.model_config(config).global_layers == layers


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 4.0],
        },
    ],
    ids=["linear", "longrope"],
)
def test_rope_scaling_can_be_set_from_the_command_line(fields):
    config = parse(
        f"--config={ROOT}/configs/small.py",
        "--config.model.rotary_dim=4",
        f"--config.model.rope_scaling={json.dumps(fields)}",
    )
    model = config_files.model_config(config)
    assert model.rope_scaling == mj.config.RopeScaling(**fields)


def test_every_model_field_is_in_the_config_file():
    model = mj.Configs.small()
    section = parse(f"--config={ROOT}/configs/small.py").model
    assert set(section.keys()) == set(model.to_dict())


def test_decode_contexts_take_one_number_or_several():
    for text, contexts in (("128", (128,)), ("128,256", (128, 256))):
        config = parse(
            f"--config={ROOT}/configs/small.py", f"--config.decode.contexts={text}"
        )
        assert config_files.decode_settings(config).measured_contexts() == contexts


def test_prompt_tokens_replace_the_contexts():
    config = parse(
        f"--config={ROOT}/configs/small.py",
        "--config.decode.prompt_tokens=100",
        "--config.decode.new_tokens=28",
    )
    assert config_files.decode_settings(config).measured_contexts() == (128,)


@pytest.mark.parametrize(
    ("max_seq_len", "max_kv_cache_len"), [(16384, 32768), (32768, 65536)]
)
def test_long_custom_contexts_trace_without_allocating(max_seq_len, max_kv_cache_len):
    config = parse(
        f"--config={ROOT}/configs/custom.py",
        f"--config.model.max_seq_len={max_seq_len}",
        f"--config.model.max_kv_cache_len={max_kv_cache_len}",
    )
    model = mj.create_model(config_files.model_config(config))
    params = jax.eval_shape(lambda: mj.init_params(model))
    cache = jax.eval_shape(lambda: mj.init_cache(model.config))
    tokens = jax.ShapeDtypeStruct((1, 512), "int32")

    def chunk(params, cache, tokens):
        variables = {"params": params, "cache": cache}
        return model.apply(variables, tokens, mutable=["cache"])

    logits, updated = jax.eval_shape(chunk, params, cache, tokens)
    assert logits.shape == (1, 512, 32000)
    assert updated["cache"]["layers_0"]["attention"]["k"].shape[-2] == max_kv_cache_len


def test_legacy_names_work_in_a_config_file_section():
    section = {
        "max_len": 64, "max_kv_cache_len": 128, "d_model": 32, "n_heads": 4,
        "n_vocab": 300,
    }  # fmt: skip
    config = ml_collections.ConfigDict({"model": section})
    with pytest.warns(DeprecationWarning, match="d_model -> dim_model"):
        assert config_files.model_config(config).dim_model == 32


def test_a_config_file_may_return_plain_dictionaries():
    sections = {
        "model": mj.Configs.small().to_dict(),
        "decode": {"contexts": [64], "batch_size": 2},
    }
    assert config_files.model_config(sections) == mj.Configs.small()
    assert config_files.decode_settings(sections).measured_contexts() == (64,)


def test_a_section_that_is_no_mapping_is_a_config_error():
    with pytest.raises(mj.ConfigError, match="section 'model'"):
        config_files.model_config({"model": 3})


def sized(gigabytes):
    return devices.Device("some", "gpu", int(gigabytes * 1e9))


@pytest.mark.parametrize("name", ["small", "xlarge"])
def test_an_automatic_cache_is_the_longest_that_fits(name):
    config = parse(
        f"--config={ROOT}/configs/{name}.py", "--config.model.max_kv_cache_len=auto"
    )
    found = config_files.model_config(config, sized(20))
    assert mj.plan_memory(found, device=sized(20)).fits
    longer = found.replace(max_kv_cache_len=found.max_kv_cache_len + 1)
    assert not mj.plan_memory(longer, device=sized(20)).fits
    plan = mj.plan_memory(mj.Configs.by_name(name), device=sized(20))
    assert found.max_kv_cache_len == plan.max_context
    assert found.max_seq_len == min(
        mj.Configs.by_name(name).max_seq_len, found.max_kv_cache_len
    )


def test_an_automatic_cache_keeps_its_cap_and_shortens_what_it_must():
    asked = [f"--config={ROOT}/configs/small.py", "--config.model.prefill_chunk=300"]
    config = parse(*asked, "--config.model.max_kv_cache_len=auto:200")
    found = config_files.model_config(config, sized(20))
    assert (found.max_kv_cache_len, found.max_seq_len) == (200, 200)
    assert found.prefill_chunk == 200


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("auto", "max_kv_cache_len=auto: does not fit: weights"),
        ("most", "max_kv_cache_len='most': must be a whole number, \"auto\""),
        ("auto:0", "max_kv_cache_len=0: must be a number"),
        ("1.5", "max_kv_cache_len=1.5: must be a whole number"),
    ],
)
def test_an_automatic_cache_that_cannot_be_is_a_config_error(value, words):
    config = parse(
        f"--config={ROOT}/configs/xlarge.py", f"--config.model.max_kv_cache_len={value}"
    )
    with pytest.raises(mj.ConfigError) as error:
        config_files.model_config(config, sized(10))
    assert str(error.value).startswith(f"config.model.{words}")


def test_an_automatic_cache_hides_no_other_mistake():
    section = mj.Configs.small().given() | {
        "max_kv_cache_len": "auto:2000",
        "max_seq_len": 10**9,
    }
    with pytest.raises(mj.ConfigError, match=r"model\.max_seq_len=1000000000: "):
        config_files.model_config({"model": section}, sized(20))


def test_what_is_not_automatic_is_told_with_its_rule():
    with pytest.raises(mj.ConfigError) as error:
        config_files.DecodeSettings(batch_size="auto: 5")
    rule = 'must be a whole number, "auto", or "auto:64" for at most 64'
    assert str(error.value) == f"batch_size='auto: 5': {rule}"


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("batch_size=auto", "batch_size", "auto"),
        ("batch_size=auto:16", "batch_size", "auto:16"),
        ("batch_size=3", "batch_size", 3),
        ("contexts=auto", "contexts", ("auto",)),
        ("contexts=(128,'auto:4096')", "contexts", (128, "auto:4096")),
    ],
)
def test_numbers_of_a_benchmark_may_be_automatic(flag, field, value):
    config = parse(f"--config={ROOT}/configs/small.py", f"--config.decode.{flag}")
    assert getattr(config_files.decode_settings(config), field) == value
