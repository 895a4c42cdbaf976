"""The learning rate's course, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.training import optimizer


def test_only_matrices_decay():
    found = optimizer.adamw(1.0, weight_decay=0.5)
    params = {"scale": jnp.ones(3), "kernel": jnp.ones((3, 3))}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = found.update(grads, found.init(params), params)
    assert jnp.all(updates["scale"] == 0.0)
    np.testing.assert_allclose(updates["kernel"], -0.5)


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
