"""One step: what it updates, and that remat changes only what is stored."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import minillm_jax as mj
from minillm_jax.model import transformer
from minillm_jax.testing import tiny_config
from minillm_jax.training import loss, step
from minillm_jax.training import optimizer as optimizers


def batch(config, rows=2, length=12):
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.integers(0, config.vocab_size, (rows, length), np.int32))


def test_a_step_is_adamw_on_the_mean_loss():
    model = mj.create_model(tiny_config())
    params, tokens = mj.init_params(model, seed=1), batch(model.config)
    optimizer = optimizers.adamw(1e-2)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        total, counted = loss.next_token_loss(model, params, tokens)
        return total / counted

    value, grads = mean(params)
    updates, after_update = optimizer.update(grads, optimizer.init(params), params)
    wanted = optax.apply_updates(params, updates)

    state = step.initial_state(jax.tree.map(jnp.copy, params), optimizer)
    state, metrics = step.train_step(model, optimizer, state, tokens)
    assert state.step == 1
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-4)
    chex.assert_trees_all_close(state.params, wanted, atol=1e-4)
    moments, expected = (
        state_of[1][0].mu for state_of in (state.optimizer, after_update)
    )
    chex.assert_trees_all_close(moments, expected, atol=1e-6)


def test_the_state_is_donated():
    model = mj.create_model(tiny_config())
    optimizer = optimizers.adamw(1e-2)
    state = step.initial_state(mj.init_params(model), optimizer)
    step.train_step(model, optimizer, state, batch(model.config))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_steps_learn_a_batch_by_heart():
    model = mj.create_model(tiny_config())
    optimizer, tokens = optimizers.adamw(1e-2), batch(model.config)
    state = step.initial_state(mj.init_params(model), optimizer)
    losses = []
    for _ in range(60):
        state, metrics = step.train_step(model, optimizer, state, tokens)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(model.config.vocab_size), rel=0.1)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"qk_norm": True}])
def test_remat_has_the_same_params_and_gradients(changes):
    plain, remat = (
        mj.create_model(tiny_config(remat=flag, **changes)) for flag in (False, True)
    )
    params, tokens = mj.init_params(plain, seed=1), batch(plain.config)
    chex.assert_trees_all_equal(params, mj.init_params(remat, seed=1))

    def grads(model):
        def total(params):
            return loss.next_token_loss(model, params, tokens)[0]

        return jax.jit(jax.grad(total))(params)

    chex.assert_trees_all_close(grads(plain), grads(remat), atol=1e-5)


def test_remat_decodes_as_without():
    plain, remat = (mj.create_model(tiny_config(remat=flag)) for flag in (False, True))
    params, tokens = mj.init_params(plain, seed=1), batch(plain.config)
    both = []
    for model in (plain, remat):
        logits, cache = mj.prefill(
            model, params, mj.init_cache(model.config, 2), tokens
        )
        logits, _ = mj.decode_step(model, params, cache, np.argmax(logits, axis=-1))
        both.append(logits)
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("segmented", [False, True])
def test_a_batch_in_parts_is_the_batch(segmented):
    """Weighted by tokens: the parts have from 6 to 22 of them that count."""
    model = mj.create_model(tiny_config())
    optimizer, tokens = optimizers.adamw(1e-2), batch(model.config, rows=8)
    segment_ids = None
    if segmented:
        lengths = np.array([12, 3, 4, 4, 12, 12, 2, 9])
        segment_ids = jnp.asarray(np.arange(12) < lengths[:, None], jnp.int32)
    results = []
    for parts in (1, 4):
        state = step.initial_state(mj.init_params(model, seed=1), optimizer)
        state, metrics = step.train_step(
            model, optimizer, state, tokens, segment_ids, accumulation=parts
        )
        # A moment is a tenth of the clipped gradients.
        grads = jax.tree.map(lambda mu: 10 * mu, state.optimizer[1][0].mu)
        results.append((metrics, grads))
    chex.assert_trees_all_close(*results, atol=1e-6, rtol=1e-6)


def test_narrow_parameters_and_parts_that_do_not_fit_are_refused():
    optimizer, config = optimizers.adamw(1e-2), tiny_config(param_dtype="bfloat16")
    model = mj.create_model(config)
    state = step.initial_state(mj.init_params(model), optimizer)
    with pytest.raises(mj.ConfigError, match="bfloat16; a step takes float32"):
        step.train_step(model, optimizer, state, batch(config))
    model = mj.create_model(tiny_config())
    state = step.initial_state(mj.init_params(model), optimizer)
    with pytest.raises(mj.ConfigError, match="accumulation=3: must divide"):
        step.train_step(model, optimizer, state, batch(config), accumulation=3)


def test_evaluation_is_the_loss_before_the_update():
    model = mj.create_model(tiny_config())
    optimizer, tokens = optimizers.adamw(1e-2), batch(model.config)
    state = step.initial_state(mj.init_params(model), optimizer)
    total, counted = step.eval_step(model, state.params, tokens)
    _, metrics = step.train_step(model, optimizer, state, tokens)
    np.testing.assert_allclose(metrics.loss, total / counted, rtol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_memory_grows_in_proportion_to_the_length(remat):
    """Temporary bytes of a token are the same at 1K, 2K and 4K, but for a step of 1.2.

    The scores of a whole sequence would be 6 times all the rest at 4K.
    """
    fields = {"max_seq_len": 4096, "max_kv_cache_len": 4096, "prefill_chunk": 64}
    model = mj.create_model(tiny_config(remat=remat, **fields))
    optimizer = optimizers.adamw(1e-3)
    state = jax.eval_shape(
        lambda params: step.initial_state(params, optimizer),
        transformer.param_shapes(model),
    )
    temporary = []
    for length in (1024, 2048, 4096):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lowered = step.train_step.lower(model, optimizer, state, tokens, tokens)
        found = lowered.compile().memory_analysis()
        temporary.append(found.temp_size_in_bytes / length)
    assert max(temporary) < 1.3 * min(temporary), temporary
