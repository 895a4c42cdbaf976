"""The model that comes with the package: small, whole, and it knows Python."""

import gzip
import importlib.util
import json
import pathlib

import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.cli import config_files
from minillm_jax.training import evaluation
from minillm_jax.training.corpus import Corpus
from minillm_jax.weights import hub

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "python_model"


@pytest.fixture(scope="module")
def loaded():
    return mj.load_pretrained(dtype="float32")


def test_it_is_small_and_has_all_its_files():
    sizes = {path.name: path.stat().st_size for path in hub.SHIPPED.iterdir()}
    assert sizes.keys() == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "training.json"),
    }
    assert sum(sizes.values()) <= 8 * 10**6


def config_file():
    path = ROOT / "configs" / "python.py"
    spec = importlib.util.spec_from_file_location("python_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_it_was_trained_by_the_config_file(loaded):
    """As it stands: the run recorded what it was begun with."""
    run = json.loads((RESULTS / "config.json").read_text())
    settings = config_files.train_settings(config_file())
    assert type(settings)(**run["train"]) == settings
    wanted = config_files.model_config(config_file())
    model, params, tokenizer = loaded
    floats = dict.fromkeys(("dtype", "param_dtype", "cache_dtype"), "float32")
    assert model.config == mj.create_model(wanted.replace(**floats)).config
    assert isinstance(params, dict)
    assert tokenizer.encode("é") == [195, 169]


def test_its_log_goes_to_the_last_step():
    lines = (RESULTS / "metrics.csv").read_text().splitlines()
    steps = [int(line.split(",")[0]) for line in lines[1:]]
    settings = config_files.train_settings(config_file())
    assert steps == list(range(1, settings.steps + 1))
    measured = json.loads((RESULTS / "bits_per_byte.json").read_text())
    assert measured["held_out"]
    ours, others = measured["bits_per_byte"], measured["compressors"]
    assert ours < others["gzip -9"]


def bits_of(model, params, text):
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    size = np.asarray([len(tokens)])
    corpus = Corpus(tokens, np.asarray([0, len(tokens)]), size, np.asarray([False]), {})
    return evaluation.score(model, params, corpus, np.asarray([0])).bits_per_byte


def test_it_knows_python_that_it_has_not_seen(loaded):
    """This package's own source, beside gzip, which sees all of the file."""
    model, params, _ = loaded
    source = (ROOT / "minillm_jax" / "decoding" / "requests.py").read_bytes()
    found = bits_of(model, params, source)
    assert found < 8 * len(gzip.compress(source, 9)) / len(source)
    backwards = bits_of(model, params, source[::-1])
    assert backwards > 1.5 * found
    noise = np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes()
    assert bits_of(model, params, noise) > 8


def test_what_it_writes_looks_like_python(loaded):
    generator = mj.Generator(*loaded)
    greedy = mj.SamplingParams(temperature=0.0)
    (found,) = generator.generate("import os\nimport ", 80, greedy)
    assert found.text.isascii()
    words = found.text.replace("\n", " ").split()
    assert {"import", "def", "class", "from"} & {*words}
