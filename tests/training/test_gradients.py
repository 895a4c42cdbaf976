"""Gradients against finite differences of the float64 oracle, and causality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.model import blockwise
from minillm_jax.training import loss

VARIATIONS = {
    "plain": {},
    "gemma": {
        "sliding_window": 9,
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "post_norms": True,
        "qk_norm": True,
        "norm_unit_offset": True,
        "tie_embeddings": True,
        "activation": "gelu_tanh",
    },
    "biased": {"qkv_bias": True, "remat": True},
}
EPSILON = 1e-5


@pytest.fixture(params=[8, 128], ids=["in blocks", "whole"])
def block(request, monkeypatch):
    monkeypatch.setattr(blockwise, "TRAINING_BLOCK", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


def reference_loss(config, params, tokens, segment_ids):
    """The mean next-token loss of packed rows, in float64."""
    losses = []
    every = testing.reference_logits(config, params, tokens, segment_ids=segment_ids)
    for row, segments, logits in zip(tokens, segment_ids, every, strict=True):
        highest = logits.max(axis=-1, keepdims=True)
        sums = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
        for place in range(len(row) - 1):
            if segments[place] == segments[place + 1] > 0:
                losses.append(sums[place] - logits[place, row[place + 1]])
    return np.mean(losses)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_gradients_are_the_finite_differences_of_the_oracle(variation, block):
    """Along a random direction of each leaf, and of all of them together."""
    config = testing.tiny_config(**VARIATIONS[variation])
    model = mj.create_model(config)
    params = testing.noisy_params(model)
    draw = np.random.default_rng(2)
    tokens = draw.integers(0, config.vocab_size, (2, 21), np.int32)
    segment_ids = np.array([[1] * 13 + [2] * 8, [1] * 18 + [0] * 3], np.int32)

    def mean(params, tokens, segment_ids):
        total, counted = loss.next_token_loss(model, params, tokens, segment_ids)
        return total / counted

    grads = jax.tree.leaves(jax.jit(jax.grad(mean))(params, tokens, segment_ids))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.float64(x), params))
    directions = [draw.standard_normal(leaf.shape) for leaf in leaves]
    directions = [d / np.linalg.norm(d) for d in directions]

    def difference(chosen):
        ends = []
        for sign in (1, -1):
            moved = [
                leaf + sign * EPSILON * direction * (index in chosen)
                for index, (leaf, direction) in enumerate(
                    zip(leaves, directions, strict=True)
                )
            ]
            moved = jax.tree.unflatten(tree, moved)
            ends.append(reference_loss(config, moved, tokens, segment_ids))
        return (ends[0] - ends[1]) / (2 * EPSILON)

    slopes = [
        float(np.sum(np.float64(g) * d)) for g, d in zip(grads, directions, strict=True)
    ]
    for index, slope in enumerate(slopes):
        assert difference({index}) == pytest.approx(slope, rel=2e-4, abs=2e-6)
    everything = difference(set(range(len(leaves))))
    assert everything == pytest.approx(sum(slopes), rel=2e-4)


def test_no_later_token_has_a_gradient_on_an_earlier_loss(block):
    """Of the embedding's rows, where every token is another one."""
    config = testing.tiny_config()
    model = mj.create_model(config)
    params = mj.init_params(model, seed=1)
    tokens = jnp.arange(20)[None]

    def losses(embedding):
        logits = model.apply({"params": {**params, "embedding": embedding}}, tokens)
        logprobs = jax.nn.log_softmax(logits[0, :-1], axis=-1)
        return -jnp.take_along_axis(logprobs, tokens[0, 1:, None], axis=-1)[:, 0]

    grads = jax.jit(jax.jacrev(losses))(params["embedding"])  # [loss, V, D]
    reached = np.any(np.asarray(grads) != 0.0, axis=-1)[:, :20]
    np.testing.assert_array_equal(reached, np.tri(19, 20, dtype=bool))


def test_no_other_document_has_a_gradient_on_a_loss(block):
    config = testing.tiny_config()
    model = mj.create_model(config)
    params = mj.init_params(model, seed=1)
    tokens = jnp.arange(20)[None]
    segment_ids = jnp.asarray([[1] * 9 + [2] * 7 + [0] * 4])

    def of_second(embedding):
        logits = model.apply(
            {"params": {**params, "embedding": embedding}},
            tokens,
            segment_ids=segment_ids,
        )
        logprobs = jax.nn.log_softmax(logits[0], axis=-1)
        return -jnp.sum(logprobs[jnp.arange(9, 15), jnp.arange(10, 16)])

    grads = np.asarray(jax.jit(jax.grad(of_second))(params["embedding"]))
    reached = np.any(grads != 0.0, axis=-1)[:20]
    np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(9, 15))
