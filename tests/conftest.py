"""Fixtures; shapes checked at run time, and no silent rank promotion."""

import jaxtyping
import pytest

# Before anything imports them: the annotated shapes of these packages hold in tests.
_CHECKED = ["minillm_jax.model", "minillm_jax.decoding"]
_HOOK = jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")

import jax  # noqa: E402

import minillm_jax as mj  # noqa: E402
from minillm_jax import testing  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


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
