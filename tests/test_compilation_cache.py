"""Compiled functions on disk: found again, by this machine alone; safe to damage."""

import importlib.metadata
import os
import warnings

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import compilation_cache, testing

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def folder(tmp_path):
    """A place for a cache; JAX's settings are as before afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def steps(model, params):
    """Logits of two decode steps, from functions that are not compiled in memory."""
    jax.clear_caches()
    cache, logits = mj.init_cache(model.config), []
    for token in (3, 5):
        out, cache = mj.decode_step(model, params, cache, np.array([token], np.int32))
        logits.append(np.asarray(out))
    return np.stack(logits)


@pytest.fixture(scope="module")
def tiny():
    model = mj.create_model(testing.tiny_config(max_kv_cache_len=64))
    return model, mj.init_params(model)


def test_what_was_compiled_is_found_again(folder, tiny, cache_events):
    expected = steps(*tiny)
    path = mj.use_compilation_cache(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    steps(*tiny)
    assert path.parent == folder
    assert list(path.iterdir())
    cache_events.clear()
    np.testing.assert_array_equal(steps(*tiny), expected)
    assert "/jax/compilation_cache/cache_hits" in cache_events
    assert "/jax/compilation_cache/cache_misses" not in cache_events


def test_a_damaged_entry_is_compiled_again(folder, tiny):
    expected = steps(*tiny)
    path = mj.use_compilation_cache(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    steps(*tiny)
    for entry in path.iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of each
        np.testing.assert_array_equal(steps(*tiny), expected)


def test_the_folder_is_the_owners_alone_and_this_machines(folder, monkeypatch):
    path = mj.use_compilation_cache(folder)
    assert path.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "another processor")
    assert mj.use_compilation_cache(folder) != path
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert "jaxlib-0.0.1-" in str(mj.use_compilation_cache(folder))


def test_the_default_is_in_the_users_cache_folder(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert mj.use_compilation_cache().parent == folder / "minillm_jax"


@pytest.mark.parametrize("which", ["the folder", "this machine's"])
def test_a_folder_that_others_can_write_to_is_refused(folder, which):
    path = mj.use_compilation_cache(folder)
    (path if which == "this machine's" else folder).chmod(0o777)
    with pytest.raises(mj.ConfigError, match="others may write there"):
        mj.use_compilation_cache(folder)


def test_another_users_folder_is_refused(folder, monkeypatch):
    mj.use_compilation_cache(folder)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(mj.ConfigError, match="another user's"):
        mj.use_compilation_cache(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [("~nobody_of_this_name/x", "home directory"), ("", "give a folder")],
)
def test_a_folder_that_is_none_is_refused(given, message):
    with pytest.raises(mj.ConfigError, match=message):
        mj.use_compilation_cache(given)


def test_a_folder_that_cannot_be_made_is_refused(folder):
    folder.write_text("a file")
    with pytest.raises(mj.ConfigError, match="cannot be made: File exists"):
        mj.use_compilation_cache(folder)


@pytest.fixture(scope="module")
def all_events():
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    return events


@pytest.fixture
def cache_events(all_events):
    """Events of JAX since the test cleared them."""
    all_events.clear()
    return all_events
