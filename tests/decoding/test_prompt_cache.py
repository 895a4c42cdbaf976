"""Kept prompts change how long a prompt takes, and nothing of what follows it."""

import functools
import pathlib

import chex
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.config import RopeScaling
from minillm_jax.decoding import executables, generator, prompt_cache
from minillm_jax.model import cache as kv

GREEDY = mj.SamplingParams(temperature=0.0)
VARIATIONS = {
    "stop": {},
    "ring": {"overflow": "ring", "num_sinks": 2},
    "window": {"sliding_window": 6},
    "int8": {"cache_dtype": "int8"},
    "longrope": {
        "rope_scaling": RopeScaling(
            rope_type="longrope",
            factor=2.0,
            original_max_position_embeddings=32,
            short_factor=(1.0,) * 4,
            long_factor=(2.0,) * 4,
        )
    },
    "dynamic": {
        "rope_scaling": RopeScaling(
            rope_type="dynamic", factor=2.0, original_max_position_embeddings=32
        )
    },
}


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch):
    monkeypatch.setattr(generator, "SMALLEST_CAPACITY", 16)


@functools.cache
def parts(**changes):
    fields = {"vocab_size": 64, "max_kv_cache_len": 64, "prefill_chunk": 4}
    model = mj.create_model(testing.tiny_config(num_layers=1, **(fields | changes)))
    return model, testing.noisy_params(model, seed=3)


def generating(overflow="stop", num_sinks=0, tokenizer=None, budget=2**20, **changes):
    return mj.Generator(
        *parts(**changes), tokenizer, overflow, num_sinks, prompt_cache_bytes=budget
    )


def some_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


def stream(run, prompts, count=6):
    """The completions' tokens, and how many tokens were prefilled."""
    with run.stream(prompts, count, GREEDY) as found:
        for _ in found:
            pass
        return [c.tokens for c in found.completions], found.prefilled_tokens


SYSTEM = some_tokens(20, seed=5)


@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
def test_what_follows_a_kept_prompt_is_the_same(changes):
    run, plain = generating(**changes), generating(**changes)
    assert run.remember(SYSTEM) == 20
    prompts = [
        [*SYSTEM, *some_tokens(5)],
        [*SYSTEM[:13], *some_tokens(3, seed=1)],  # a part of it
        some_tokens(9, seed=2),  # nothing of it
        list(SYSTEM),  # but for its last token
        [*SYSTEM, *some_tokens(30, seed=3)],  # beyond what some can be used for
    ]
    expected, _ = stream(plain, prompts)
    found, prefilled = stream(run, prompts)
    assert found == expected
    skipped = dict.fromkeys(("stop", "ring", "int8"), 20 + 13 + 19 + 20)
    skipped |= {"window": 20 + 19 + 20}  # its ring has given up what is before
    skipped |= {"longrope": 20 + 13 + 19, "dynamic": 20 + 13 + 19}
    name = next(name for name, value in VARIATIONS.items() if value is changes)
    assert prefilled == sum(map(len, prompts)) - skipped[name]
    for prompt, completion in zip(prompts, expected, strict=True):
        assert stream(run, prompt)[0] == [completion]  # by itself


def test_the_logits_behind_a_kept_prompt_are_those_without():
    run, plain = generating(), generating()
    run.remember(SYSTEM)
    prompt, sampling = [*SYSTEM, 1, 2], mj.SamplingParams(temperature=0.0, logprobs=5)
    (ours,), (other,) = (g.generate(prompt, 8, sampling) for g in (run, plain))
    chex.assert_trees_all_close(ours.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_file_brings_it_to_another_generator(tmp_path, cache_dtype):
    run, other = (generating(cache_dtype=cache_dtype) for _ in range(2))
    run.remember(SYSTEM)
    run.remember(some_tokens(40, seed=7))
    run.save_cache(tmp_path / "kept.safetensors")
    assert other.load_cache(tmp_path / "kept.safetensors") == 2
    prompts = [[*SYSTEM, 3], [*some_tokens(40, seed=7), 5]]
    assert stream(other, prompts) == stream(run, prompts)
    assert stream(other, prompts)[1] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]
    with safetensors.safe_open(tmp_path / "kept.safetensors", "numpy") as opened:
        leaf = opened.get_slice("0.layers_0.k")
        assert leaf.get_shape() == [2, 20, 8]  # no slot that holds nothing
        assert leaf.get_dtype() == {"float32": "F32", "int8": "I8"}[cache_dtype]


def test_one_file_serves_other_lengths_and_policies(tmp_path):
    run = generating()
    run.remember(SYSTEM)
    run.save_cache(tmp_path / "kept")
    longer = generating(max_kv_cache_len=96, **VARIATIONS["ring"])
    assert longer.load_cache(tmp_path / "kept") == 1
    plain = generating(max_kv_cache_len=96, **VARIATIONS["ring"])
    prompt = [*SYSTEM, *some_tokens(8)]
    (found, prefilled), (expected, _) = (
        stream(longer, prompt, 80),
        stream(plain, prompt, 80),
    )
    assert found == expected
    assert prefilled == 8


def test_what_does_not_match_is_refused(tmp_path):
    path = tmp_path / "kept"
    run = generating(tokenizer=mj.ByteTokenizer())
    run.remember(SYSTEM)
    run.save_cache(path)
    with pytest.raises(mj.PromptCacheError, match=r"another config \(rope_theta=1"):
        generating(tokenizer=mj.ByteTokenizer(), rope_theta=500.0).load_cache(path)
    with pytest.raises(mj.PromptCacheError, match="another tokenizer"):
        generating().load_cache(path)
    model, params = parts()
    params = jax.tree.map(lambda x: x, params)
    changed = np.array(params["final_norm"]["scale"])
    changed[3] = np.nextafter(changed[3], 2)
    params = params | {"final_norm": {"scale": changed}}
    other = mj.Generator(model, params, mj.ByteTokenizer())
    with pytest.raises(mj.PromptCacheError, match="made with other weights"):
        other.load_cache(path)
    with pytest.raises(mj.PromptCacheError, match="20 tokens, but max_kv_cache_len=16"):
        generating(
            tokenizer=mj.ByteTokenizer(), max_seq_len=16, max_kv_cache_len=16
        ).load_cache(path)


def test_a_changed_byte_is_refused(tmp_path):
    """Of all that say what the file holds, and some of what it holds."""
    path = tmp_path / "kept"
    run, other = generating(), generating()
    run.remember(SYSTEM)
    run.save_cache(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (*range(header), *range(header, len(whole), 97), len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(mj.PromptCacheError, match="kept"):
            other.load_cache(path)
    assert len(other._prompts) == 0
    assert stream(other, [*SYSTEM, 1])[1] == 21


def with_arrays(run, path, **changes):
    """A file with arrays of other shapes or names, and the right SHA-256."""
    with safetensors.safe_open(path, "numpy") as opened:
        metadata, names = opened.metadata(), opened.keys()
        arrays = {name: opened.get_tensor(name) for name in names} | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    metadata["sha256"] = prompt_cache._file_sha256(arrays, metadata)
    safetensors.numpy.save_file(arrays, path, metadata)


K = np.ones((2, 20, 8), np.float32)
STRANGE = {
    "no tokens": {"0.tokens": None},
    "tokens of floats": {"0.tokens": np.ones(20, np.float32)},
    "a scalar": {"0.tokens": np.asarray(3, np.int32)},
    "nothing": {"0.tokens": np.ones(0, np.int32)},
    "fewer tokens": {"0.tokens": np.ones(19, np.int32)},
    "no k": {"0.layers_0.k": None},
    "a short k": {"0.layers_0.k": K[:, :5].copy()},
    "one head": {"0.layers_0.k": K[:1].copy()},
    "one token": {"0.layers_0.k": K[:, :1].copy()},
    "float64": {"0.layers_0.k": K.astype(np.float64)},
    "one axis": {"0.layers_0.k": np.ones(3, np.float32)},
    "one layer more": {"0.layers_1.k": K},
    "another name": {"x": K},
}


@pytest.mark.parametrize("changes", STRANGE.values(), ids=STRANGE)
def test_a_file_of_another_shape_is_refused(tmp_path, changes):
    run, path = generating(), tmp_path / "kept"
    run.remember(SYSTEM)
    run.save_cache(path)
    with_arrays(run, path, **changes)
    other = generating()
    with pytest.raises(mj.PromptCacheError, match="kept: "):
        other.load_cache(path)
    assert len(other._prompts) == 0


def test_a_file_beyond_the_budget_is_refused_before_it_reaches_the_device(
    tmp_path, monkeypatch
):
    run, path = generating(), tmp_path / "kept"
    for seed in range(3):
        run.remember(some_tokens(20, seed=seed))
    run.save_cache(path)
    small = generating(budget=2 * run._kept_bytes(32))
    small.remember(SYSTEM)
    monkeypatch.setattr(small._executables, "put", None)
    with pytest.raises(mj.PromptCacheError, match=r"kept: what it holds takes \d+ byt"):
        small.load_cache(path)
    assert len(small._prompts) == 1


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    run = generating()
    run.remember(SYSTEM)
    for path in (tmp_path / "nowhere" / "kept", tmp_path):
        with pytest.raises(mj.PromptCacheError, match=f"^{path}: cannot be written"):
            run.save_cache(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(mj.PromptCacheError, match=f"^{tmp_path}: cannot be read"):
        run.load_cache(tmp_path)


def test_others_may_read_the_file_as_they_may_any(tmp_path):
    run = generating()
    run.remember(SYSTEM)
    run.save_cache(tmp_path / "kept")
    (tmp_path / "any").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("kept", "any")}
    assert len(modes) == 1


def test_other_files_are_refused(tmp_path):
    run = generating()
    with pytest.raises(mj.PromptCacheError, match="cannot be read"):
        run.load_cache(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(mj.PromptCacheError, match="cannot be read"):
        run.load_cache(tmp_path / "text")
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "model")
    with pytest.raises(mj.PromptCacheError, match="is not a minillm_jax prompt cache"):
        run.load_cache(tmp_path / "model")
    with pytest.raises(mj.PromptCacheError, match="nothing is kept yet"):
        run.save_cache(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_was_there_survives_a_save_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    run = generating()
    run.remember(SYSTEM)
    run.save_cache(path)
    before = path.read_bytes()

    def full(arrays, file, metadata):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(prompt_cache.safetensors.numpy, "save_file", full)
    with pytest.raises(mj.PromptCacheError, match="kept: cannot be written: No space"):
        run.save_cache(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_budget_bounds_what_is_kept():
    model, _ = parts()
    one = sum(x.nbytes for x in jax.tree.leaves(mj.init_cache(model.config, 1, 32)))
    run = generating(budget=2 * one)
    first, second, third = (some_tokens(20, seed=seed) for seed in (1, 2, 3))
    run.remember(first)
    run.remember(second)
    assert stream(run, [*first, 1])[1] == 1  # used now, so the second one goes
    run.remember(third)
    assert run._prompts.nbytes <= 2 * one
    assert [stream(run, [*p, 1])[1] for p in (first, second, third)] == [1, 21, 1]
    with pytest.raises(mj.PromptCacheError, match="prompt_cache_bytes="):
        generating(budget=one - 5).remember(first)
    assert generating(budget=one - 4).remember(first) == 20  # `lengths` do not count
    assert len(run._prompts) == 2
    run.forget()
    assert stream(run, [*first, 1])[1] == 21


def test_what_is_kept_already_is_not_prefilled_again():
    run, longer = generating(), [*SYSTEM, *some_tokens(13, seed=8)]
    assert [run.remember(p) for p in (SYSTEM, SYSTEM, longer)] == [20, 0, 13]
    assert run.remember(longer[:25]) == 0
    assert len(run._prompts) == 1  # the longer one serves for both
    expected, _ = stream(generating(), [*longer, 1])
    assert stream(run, [*longer, 1]) == (expected, 1)


def test_a_text_is_a_prompt_too():
    run = generating(tokenizer=mj.ByteTokenizer(), vocab_size=256)
    assert run.remember("You are kind. ") == 14
    assert stream(run, "You are kind. Hello")[1] == 5


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([[1], [2]], mj.ConfigError),
        ([], mj.ConfigError),
        ([64], mj.ConfigError),
        ([1] * 65, mj.CacheOverflowError),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_not_a_prompt_is_refused(prompt, error):
    with pytest.raises(error, match="prompt"):
        generating().remember(prompt)


def test_nothing_compiles_after_a_warmup_that_knows_the_prompts():
    run = generating()
    run.remember(SYSTEM)
    run.warmup((1, 2))
    assert run.compilations["copy_rows"] == 2 * 3  # capacities 16, 32 and 64
    with run.forbid_compile():
        stream(run, [[*SYSTEM, 1, 2], some_tokens(3)], 40)
        stream(run, [*SYSTEM, 5])
        run.remember(some_tokens(12))
    with run.forbid_compile(), pytest.raises(executables.CompileForbiddenError):
        stream(run, [*some_tokens(12), 1])  # its cache is of another capacity


def test_a_shorter_prompt_needs_less_room_than_what_is_kept():
    """A kept cache of 64 slots for a request of 16, and for one to be kept."""
    run, longer = generating(), some_tokens(40, seed=4)
    run.remember(longer)
    run.warmup((1,))
    with run.forbid_compile():
        prompt = [*longer[:3], 1]
        assert stream(run, prompt, 2) == (stream(generating(), prompt, 2)[0], 1)
        assert run.remember([*longer[:5], 2, 3]) == 2


@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_is_kept_before_the_tokens_are_the_same(changes, seed):
    """Prompts cut from one text, some changed at the end; kept, forgotten, used."""
    draw, text = np.random.default_rng(seed), some_tokens(64, seed=9)
    run, plain, session = generating(**changes), generating(**changes), mj.Session()
    for _ in range(40):
        prompt = text[: draw.integers(1, 44)]
        if draw.random() < 0.6:
            prompt = [*prompt, *draw.integers(0, 64, draw.integers(1, 4)).tolist()]
        kind = draw.choice(["remember", "stream", "session", "session", "forget"])
        if kind == "remember":
            run.remember(prompt)
        elif kind == "forget":
            if draw.random() < 0.3:
                run.forget()
        elif kind == "stream" or changes is VARIATIONS["dynamic"]:
            # (A session keeps keys that have since been turned a little further.)
            assert stream(run, prompt, 2)[0] == stream(plain, prompt, 2)[0]
        else:
            with run.stream(prompt, 2, GREEDY, session=session) as found:
                tokens = [piece.token for piece in found]
            assert [tokens] == stream(plain, prompt, 2)[0]


def test_a_session_whose_cache_is_of_no_use_begins_with_a_kept_prompt():
    run, session = generating(), mj.Session()
    run.remember(SYSTEM)
    for prompt, prefilled in ((some_tokens(9), 9), ([*SYSTEM, 3], 1)):
        found = run.stream(prompt, 4, GREEDY, session=session)
        tokens = [piece.token for piece in found]
        assert [tokens] == stream(generating(), prompt, 4)[0]
        assert found.prefilled_tokens == prefilled


def test_a_session_begins_with_a_kept_prompt():
    run, session = generating(), mj.Session()
    run.remember(SYSTEM)
    prompt = [*SYSTEM, 4, 5]
    first = run.stream(prompt, 4, GREEDY, session=session)
    tokens = [piece.token for piece in first]
    assert first.prefilled_tokens == 2
    second = run.stream([*prompt, *tokens, 9], 4, GREEDY, session=session)
    assert [*second]
    assert second.prefilled_tokens == 2  # the last token sampled, and the new one


@pytest.mark.parametrize("rows", [1, 3])
def test_only_the_chosen_rows_are_copied(rows):
    model, params = parts()
    _, source = mj.prefill(
        model, params, mj.init_cache(model.config, 1, 16), np.asarray([SYSTEM[:9]])
    )
    cache = mj.init_cache(model.config, rows, 32)
    tokens = np.asarray([some_tokens(5, seed=s) for s in range(rows)])
    _, cache = mj.prefill(model, params, cache, tokens)
    chosen = np.arange(rows) == rows - 1
    copied = jax.jit(kv.copy_rows)(cache, source, chosen, np.int32(7))
    assert copied["lengths"].tolist() == [5] * (rows - 1) + [7]
    leaf, before, row = (
        tree["layers_0"]["attention"]["k"] for tree in (copied, cache, source)
    )
    leaf, before = leaf.reshape(rows, 2, 32, 8), before.reshape(rows, 2, 32, 8)
    chex.assert_trees_all_equal(leaf[:-1], before[:-1])
    chex.assert_trees_all_equal(leaf[-1, :, :16], row)
    assert not leaf[-1, :, 16:].any()
