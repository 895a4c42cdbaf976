"""Fixtures; shapes checked at run time, no silent rank promotion, short compilations.

The suite is mostly XLA's time. What is compiled is kept on disk until the session ends,
for all of its processes. Without slow tests, LLVM also optimizes little: the HLO and
its memory, of which tests speak, are the same. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` asks
for what users get.
"""

import os
import tempfile

import jaxtyping
import pytest

_COMPILED = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # which has these from its parent
    _COMPILED = tempfile.TemporaryDirectory(
        prefix="minillm_jax_tests_", ignore_cleanup_errors=True
    )
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# Before anything imports them: the annotated shapes of these packages hold in tests.
_CHECKED = ["minillm_jax.model", "minillm_jax.decoding"]
_HOOK = jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")

import jax  # noqa: E402

import minillm_jax as mj  # noqa: E402
from minillm_jax import testing  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    name = "jax_disable_most_optimizations"
    if config.option.markexpr == "not slow" and name.upper() not in os.environ:
        os.environ[name.upper()] = "1"  # of the commands
        jax.config.update(name, True)


def pytest_unconfigure():
    if _COMPILED is not None:
        _COMPILED.cleanup()


@pytest.fixture(scope="module", autouse=True)
def _without_others_programs():
    """Compiled code is many mappings of memory, of which a process has but so many."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def tiny_config():
    return testing.tiny_config()


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    return mj.create_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    return mj.init_params(tiny_model, seed=1)


@pytest.fixture
def unchecked():
    """Without the annotations' run-time checks, as outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
