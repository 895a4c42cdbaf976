"""Folders that transformers wrote, in and out: its logits, its tokens, its bytes.

The folders are tests/goldens; make_goldens.py says what is in them.
"""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import minillm_jax as mj
from minillm_jax.weights import load

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = list(json.loads((FOLDER / "versions.json").read_text())["variants"])
GREEDY = mj.SamplingParams(temperature=0.0)
# Families of another architecture with the same mathematics are saved as that one.
SAVED_AS = {
    "mistral_nemo": "llama",
    "phi3": "mistral",
    "phi3_longrope": "llama",
    "seed_oss": "qwen2",
}


@functools.cache
def build(name):
    """A golden model without EOS ids, its parameters and what is expected of it."""
    model, params, tokenizer = mj.load_pretrained(FOLDER / name)
    assert tokenizer is None
    config = model.config.replace(eos_token_ids=())
    if name == "llama_dynamic":  # whose scaling begins where its positions end
        config = config.replace(max_seq_len=128, max_kv_cache_len=128)
    with np.load(FOLDER / name / "expected.npz") as arrays:
        return mj.create_model(config), params, dict(arrays)


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens, lengths):
    return model.apply({"params": params}, tokens, lengths=lengths)


def full_logits(name, rows):
    """The logits of each row, [T, V]; padded, for one compilation per family."""
    model, params, expected = build(name)
    count = len(expected["greedy_0"])
    prompts = (len(x) + count for key, x in expected.items() if "prompt" in key)
    longest = max(*prompts, *(x.shape[1] for x in expected.values() if x.ndim == 2))
    tokens = np.zeros((count, longest), np.int32)
    lengths = np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    logits = np.asarray(forward(model, params, tokens, lengths))
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def arrays_of(name, key):
    expected = build(name)[2]
    count = sum(key == other.rpartition("_")[0] for other in expected)
    return [expected[f"{key}_{i}"] for i in range(count)]


def same_bits(one, other):
    """Whether two trees of arrays are equal in structure, dtypes, shapes and bits."""

    def bits(x):
        return x.dtype.name, x.shape, np.asarray(x).tobytes()

    return jax.tree.map(bits, one) == jax.tree.map(bits, other)


def tensors_in(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def model_type(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.fixture
def copy(tmp_path):
    """A folder to change, with what `files` has of a golden one."""

    def make(name, *files):
        for file in files:
            shutil.copy(FOLDER / name / file, tmp_path)
        return tmp_path

    return make


def test_every_folder_is_tried():
    assert {file.parent.name for file in FOLDER.glob("*/config.json")} == {*NAMES}


# What transformers computes


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    given, wanted = arrays_of(name, "tokens"), arrays_of(name, "logits")
    actual = full_logits(name, [row for tokens in given for row in tokens])
    expected = [row for logits in wanted for row in logits]
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_uncached_greedy_tokens_are_those_of_transformers(name):
    prompts, runs = arrays_of(name, "prompt"), arrays_of(name, "greedy_uncached")
    for prompt, greedy in zip(prompts, runs, strict=True):
        before = [[*prompt, *greedy[:i]] for i in range(len(greedy))]
        logits = full_logits(name, before)
        assert [row[-1].argmax() for row in logits] == greedy.tolist()


QUICK = ("llama_dynamic", "phi3_longrope", "phi4_mini", "gemma3_linear")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_generator_gives_the_greedy_tokens_of_transformers(name):
    model, params, _ = build(name)
    generator = mj.Generator(model, params)
    prompts, wanted = arrays_of(name, "prompt"), arrays_of(name, "greedy")
    completions = generator.generate(prompts, len(wanted[0]), GREEDY)
    assert [c.tokens for c in completions] == [tokens.tolist() for tokens in wanted]


@pytest.mark.parametrize(
    ("name", "prefilled", "total"),
    [("qwen2_window", 20, 40), ("gemma3_linear", 30, 60), ("phi4_mini", 28, 32)],
)
def test_cached_logits_are_those_of_the_full_forward(name, prefilled, total):
    model, params, expected = build(name)
    tokens = np.concatenate([expected["prompt_0"], expected["greedy_0"]])[:total]
    wanted = full_logits(name, [tokens])[0]
    cache = mj.init_cache(model.config, batch_size=1)
    logits, cache = mj.prefill(model, params, cache, tokens[None, :prefilled])
    cached = [logits[0]]
    for token in tokens[prefilled:]:
        logits, cache = mj.decode_step(model, params, cache, token[None])
        cached.append(logits[0])
    np.testing.assert_allclose(cached, wanted[prefilled - 1 :], rtol=0, atol=5e-5)


def test_longrope_must_be_prefilled_again_beyond_its_original_context():
    model, params, expected = build("phi4_mini")
    tokens = np.concatenate([expected["prompt_0"], expected["greedy_0"]])
    original = model.config.rope_scaling.original_max_position_embeddings
    cache = mj.init_cache(model.config, batch_size=1)
    _, cache = mj.prefill(model, params, cache, tokens[None, :original])
    with pytest.raises(mj.ConfigError, match="prefill all its tokens again"):
        mj.decode_step(model, params, cache, tokens[original : original + 1])


# Configs


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_give_the_same_config(name, copy):
    config, family = load.read_config(FOLDER / name)
    folder = copy(name, "generation_config.json")
    shutil.copy(FOLDER / name / "config.legacy.json", folder / "config.json")
    assert load.read_config(folder) == (config, family)


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ([3, 7, 9], 2, (3, 7, 9)),
        (5, [3, 7], (5,)),
        (None, [3, 7], (3, 7)),
        (0, 2, (0,)),
        (None, None, ()),
        ([], 2, ()),
    ],
)
@pytest.mark.parametrize("null", [True, False])
def test_eos_ids_are_those_of_generation_first(copy, generation, own, expected, null):
    folder = copy("llama2", "config.json", "generation_config.json")
    for name, ids in (("generation_config.json", generation), ("config.json", own)):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": ids}
        if ids is None and not null:
            del values["eos_token_id"]
        (folder / name).write_text(json.dumps(values))
    if (generation, own, null) == (None, None, False):
        expected = (2,)  # which transformers takes for a Llama whose files say nothing
    assert load.read_config(folder)[0].eos_token_ids == expected


def test_an_eos_id_outside_the_vocabulary_is_passed_over(copy, caplog):
    folder = copy("llama2", "config.json")
    values = json.loads((folder / "config.json").read_text())
    values["eos_token_id"] = [3, 32000]
    (folder / "config.json").write_text(json.dumps(values))
    with caplog.at_level("WARNING", "minillm_jax"):
        assert load.read_config(folder)[0].eos_token_ids == (3,)
    assert "eos_token_id=[3, 32000]" in caplog.text


def test_eos_ids_are_those_of_config_json_where_it_is_alone(copy):
    folder = copy("llama3_1", "config.json")
    assert load.read_config(folder)[0].eos_token_ids == (3, 7, 9)


# The way back


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_loaded_bit_for_bit(name, tmp_path):
    dtype = "bfloat16" if name == "llama_bf16" else "float32"
    model, params, _ = mj.load_pretrained(FOLDER / name, dtype)
    mj.save_pretrained(tmp_path, model, params)
    again, loaded, _ = mj.load_pretrained(tmp_path, dtype)
    assert again.config == model.config
    assert same_bits(loaded, params)


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_saved_are_those_of_transformers(name, tmp_path):
    dtype = "bfloat16" if name == "llama_bf16" else "float32"
    mj.save_pretrained(tmp_path, *mj.load_pretrained(FOLDER / name, dtype))
    kept = SAVED_AS.get(name, model_type(FOLDER / name))
    assert model_type(tmp_path) == kept
    if kept == model_type(FOLDER / name):
        assert same_bits(tensors_in(tmp_path), tensors_in(FOLDER / name))


def shards(folder):
    return sorted(file.name for file in folder.glob("model*"))


def test_shards_hold_what_they_may_and_load_bit_for_bit(tmp_path):
    model, params, _ = mj.load_pretrained(FOLDER / "phi4_mini")
    mj.save_pretrained(tmp_path, model, params, shard_bytes=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {
        name: safetensors.numpy.load_file(tmp_path / name)
        for name in shards(tmp_path)
        if name.endswith(".safetensors")
    }
    assert index["weight_map"] == {t: name for name in tensors for t in tensors[name]}
    sizes = [[x.nbytes for x in held.values()] for held in tensors.values()]
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert all(sum(held) <= 10_000 for held in sizes)
    assert len(sizes) > 2
    assert same_bits(mj.load_pretrained(tmp_path)[1], params)


def test_a_tensor_larger_than_a_shard_is_alone_in_its_own(tmp_path):
    model, params, _ = mj.load_pretrained(FOLDER / "llama2")
    mj.save_pretrained(tmp_path, model, params, shard_bytes=1)
    for file in tmp_path.glob("*.safetensors"):
        assert len(safetensors.numpy.load_file(file)) == 1
    assert same_bits(mj.load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize(("before", "after"), [(1, 10**9), (10**9, 1), (1, 20_000)])
def test_files_of_a_model_that_was_there_are_gone(tmp_path, before, after):
    other, model = [mj.load_pretrained(FOLDER / name) for name in ("qwen3", "llama2")]
    fresh, used = tmp_path / "fresh", tmp_path / "used"
    mj.save_pretrained(fresh, *model, shard_bytes=after)
    mj.save_pretrained(used, *other, shard_bytes=before)
    (used / "model_card.safetensors").touch()
    mj.save_pretrained(used, *model, shard_bytes=after)
    assert shards(used) == [*shards(fresh), "model_card.safetensors"]
    assert sorted(p.name for p in fresh.iterdir()) == sorted(
        p.name for p in used.iterdir() if p.name != "model_card.safetensors"
    )
    assert same_bits(mj.load_pretrained(used)[1], model[1])


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(tmp_path):
    folder = shutil.copytree(FOLDER / "qwen3", tmp_path / "model")
    model, params, _ = mj.load_pretrained(folder)
    mj.save_pretrained(folder, model, params)
    assert shards(folder) == ["model.safetensors"]
    again, loaded, _ = mj.load_pretrained(folder)
    assert again.config == model.config
    assert same_bits(loaded, params)
