"""A Hugging Face folder on the command lines: `--model`, model_path, convert."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from tests import commands

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = ROOT / "tests/text/goldens/byte_level"
GREEDY = ("--prompt=Once upon", "--temperature=0", "--max_new_tokens=12", "--json")
BENCHMARK = ("--config.decode.repeats=1", "--config.decode.new_tokens=4")
# Name -> module and arguments of runs that go well; FOLDER is the model's.
RUNS = {
    "generate": ("minillm_jax.cli.generate", "--model=FOLDER", *GREEDY),
    "shorter cache": (
        *("minillm_jax.cli.generate", "--model=FOLDER", *GREEDY),
        *("--config.model.max_seq_len=16", "--config.model.max_kv_cache_len=16"),
    ),
    "model_path": (
        *("minillm_jax.cli.generate", "--config=medium", *GREEDY),
        "--config.model_path=FOLDER",
    ),
    "benchmark": ("benchmarks.decode", "--model=FOLDER", *BENCHMARK),
    "convert": (
        *("minillm_jax.cli.convert", "--model=FOLDER", "--check"),
        *("--out=TMP/bf16", "--dtype=bfloat16"),
    ),
    "export": (
        *("minillm_jax.cli.convert", "--config=small", "--out=TMP/small"),
        *("--config.model.num_layers=1", "--config.model.vocab_size=300"),
    ),
}
# Arguments -> words that the line must hold.
MISTAKES = {
    ("minillm_jax.cli.generate", "--model=/nowhere"): ("/nowhere", "not a folder"),
    ("minillm_jax.cli.generate", "--model=TMP"): ("no config.json",),
    ("minillm_jax.cli.generate", "--model=FOLDER", "--config.model_path=FOLDER"): (
        *("--model=", "config.model_path", "give one"),
    ),
    ("minillm_jax.cli.generate", "--model=FOLDER", "--config.model.num_layers=1"): (
        *("layers.1.input_layernorm.weight is unexpected",),
    ),
    ("minillm_jax.cli.convert", "--config=small"): ("--out=FOLDER",),
    (
        *("minillm_jax.cli.convert", "--config=small", "--out=TMP/x"),
        "--config.model.post_norms=True",
    ): ("post_norms=True", "no architecture of transformers"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = mj.load_tokenizer(TOKENIZER)
    model = mj.create_model(testing.tiny_config(vocab_size=607, eos_token_ids=(3, 4)))
    params = testing.noisy_params(model)
    path = tmp_path_factory.mktemp("folders") / "model"
    mj.save_pretrained(path, model, params, tokenizer)
    return path


@pytest.fixture(scope="module")
def outcome(folder):
    """That of a command; each runs once."""

    @functools.cache
    def one(arguments):
        filled = [
            argument.replace("FOLDER", str(folder)).replace("TMP", str(folder.parent))
            for argument in arguments
        ]
        if "cli.generate" in filled[0] and "--json" not in filled:
            filled.append("--prompt=a")
        return commands.run(*filled)

    return one


@pytest.fixture
def succeeded(outcome):
    """The outcome of a run that goes well, by its name."""

    def one(name):
        done = outcome(RUNS[name])
        assert done.returncode == 0, done.stderr
        return done

    return one


def test_generate_gives_the_text_of_the_folders_model_and_tokenizer(folder, succeeded):
    report = json.loads(succeeded("generate").stdout)
    generator = mj.Generator(*mj.load_pretrained(folder))
    greedy = mj.SamplingParams(temperature=0.0)
    (expected,) = generator.generate(["Once upon"], 12, greedy)
    assert report["tokens"] == expected.tokens
    assert report["text"] == expected.text
    assert report["config"]["eos_token_ids"] == [3, 4]


def test_a_field_on_the_command_line_wins_over_the_folders(succeeded):
    whole = json.loads(succeeded("generate").stdout)
    report = json.loads(succeeded("shorter cache").stdout)
    assert report["config"]["max_kv_cache_len"] == 16
    assert whole["config"]["max_kv_cache_len"] == 96
    assert report["tokens"] == whole["tokens"][: len(report["tokens"])]


def test_model_path_takes_the_place_of_the_configs_model(succeeded):
    whole = json.loads(succeeded("generate").stdout)
    report = json.loads(succeeded("model_path").stdout)
    assert report["tokens"] == whole["tokens"]
    assert report["config"] == whole["config"]


def test_the_benchmark_measures_a_folder_as_far_as_its_context_goes(folder, succeeded):
    result = json.loads(succeeded("benchmark").stdout.splitlines()[-1])
    assert result["config"]["model_path"] == str(folder)
    assert result["config"]["model"]["vocab_size"] == 607
    assert [row["context"] for row in result["results"]] == [96]


def test_convert_writes_another_dtype_and_says_what_it_compared(folder, succeeded):
    done = succeeded("convert")
    assert "ok      read again" in done.stdout
    model, params, tokenizer = mj.load_pretrained(folder.parent / "bf16", "bfloat16")
    _, original, _ = mj.load_pretrained(folder, "bfloat16")
    assert model.config.param_dtype == "bfloat16"
    assert tokenizer is not None
    assert tokenizer.encode("Once upon")
    for one, other in zip(*map(jax.tree.leaves, (params, original)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_config_can_be_exported_with_random_weights(folder, succeeded):
    succeeded("export")
    model, _, tokenizer = mj.load_pretrained(folder.parent / "small")
    expected = mj.Configs.small().replace(num_layers=1, vocab_size=300)
    assert model.config == mj.create_model(expected).config
    assert tokenizer is None


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_ends_in_one_clear_line_and_exit_code_2(outcome, arguments):
    done = outcome(arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in MISTAKES[arguments]), done.stderr
    assert done.stdout == ""
