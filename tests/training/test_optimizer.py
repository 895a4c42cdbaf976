"""The learning rate's course, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.testing import tiny_config
from minillm_jax.training import optimizer


def test_only_matrices_decay():
    """Of a model that has norms, biases and matrices, tensors of any rank."""
    model = mj.create_model(tiny_config(qkv_bias=True, qk_norm=True, post_norms=True))
    found = optimizer.adamw(1.0, weight_decay=0.5)
    params = jax.tree.map(jnp.ones_like, mj.init_params(model))
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = found.update(grads, found.init(params), params)
    decayed = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        np.testing.assert_allclose(update, update.ravel()[0])
        if update.ravel()[0]:
            np.testing.assert_allclose(update, -0.5)
            decayed.add(path[-1].key)
    assert decayed == {"embedding", "lm_head", "qkv", "out", "gate_up", "down"}


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    schedule = optimizer.schedule(2.0, steps=100, warmup=10, final_share=0.1)
    rates = optimizer.rates(schedule, 101)
    np.testing.assert_allclose(rates[:11], np.arange(1, 12) * 2.0 / 11, rtol=1e-5)
    halfway = 2.0 * (0.1 + 0.9 * 0.5)
    np.testing.assert_allclose(rates[[55, 100]], [halfway, 0.2], rtol=1e-5)
    assert np.all(np.diff(rates[10:]) < 0)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 100), (5, 5), (5, 100)])
def test_a_short_run_has_rates_too(steps, warmup):
    rates = optimizer.rates(optimizer.schedule(1.0, steps=steps, warmup=warmup), steps)
    assert rates.shape == (steps,)
    assert np.all((rates > 0) & (rates <= 1.0))
