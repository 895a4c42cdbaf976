"""The chunked loss against the plain one, packed rows against separate documents."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.model import blockwise
from minillm_jax.testing import tiny_config
from minillm_jax.training import loss


@pytest.fixture(scope="module")
def model():
    return mj.create_model(tiny_config())


@pytest.fixture(scope="module")
def params(model):
    return mj.init_params(model, seed=1)


def tokens_of(model, *shape):
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.integers(0, model.config.vocab_size, shape, np.int32))


def plain_losses(model, params, tokens):
    """-log p of each next token, from the logits of the whole sequence."""
    logits = model.apply({"params": params}, tokens)
    logprobs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_the_loss_in_chunks_is_the_loss(model, params, monkeypatch, chunk, length):
    rows = 2
    size = 4 * rows * model.config.vocab_size * chunk
    monkeypatch.setattr(loss, "LOGITS_BYTES", size)
    assert loss.chunk_size(rows, length, model.config.vocab_size) == min(chunk, length)
    tokens = tokens_of(model, rows, length)
    total, counted = loss.next_token_loss(model, params, tokens)
    assert counted == rows * (length - 1)
    wanted = jnp.sum(plain_losses(model, params, tokens))
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_its_gradient_is_that_of_the_plain_loss(monkeypatch, tied):
    model = mj.create_model(tiny_config(tie_embeddings=tied, logits_softcap=5.0))
    params = mj.init_params(model, seed=1)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 2 * model.config.vocab_size * 4)
    tokens = tokens_of(model, 2, 10)

    def gradient(total):
        return jax.jit(jax.grad(lambda p: 3.0 * total(p)))(params)

    grads = gradient(lambda p: loss.next_token_loss(model, p, tokens)[0])
    wanted = gradient(lambda p: jnp.sum(plain_losses(model, p, tokens)))
    chex.assert_trees_all_close(grads, wanted, atol=6e-5)


def test_its_gradient_computes_logits_once(model, params):
    """The products with the vocabulary: logits, and the gradients of both factors."""
    tokens = tokens_of(model, 2, 10)

    def total(params):
        return loss.next_token_loss(model, params, tokens)[0]

    text = jax.jit(jax.grad(total)).lower(params).as_text()
    vocab = re.compile(rf"\b{model.config.vocab_size}\b|x{model.config.vocab_size}x")
    products = [
        line
        for line in text.splitlines()
        if "dot_general" in line and vocab.search(line.split(" : ")[-1])
    ]
    assert len(products) == 3


@pytest.mark.parametrize("block", [128, 4], ids=["whole", "blocks"])
def test_packed_documents_have_the_losses_of_separate_ones(
    model, params, monkeypatch, block
):
    """And the gradients, where attention is computed at once and block by block."""
    monkeypatch.setattr(blockwise, "TRAINING_BLOCK", block)
    jax.clear_caches()
    first, second = tokens_of(model, 1, 9), tokens_of(model, 1, 5)
    packed = jnp.pad(jnp.concatenate([first, second], axis=1), ((0, 0), (0, 2)))
    segment_ids = jnp.asarray([[1] * 9 + [2] * 5 + [0] * 2])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def together(params):
        return loss.next_token_loss(model, params, packed, segment_ids)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def alone(params):
        found = [loss.next_token_loss(model, params, x) for x in (first, second)]
        return jax.tree.map(lambda *parts: sum(parts), *found)

    results = [jax.jit(function)(params) for function in (together, alone)]
    jax.clear_caches()
    assert results[0][0][1] == 8 + 4
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)


def test_padding_has_no_loss(model, params):
    segment_ids = jnp.zeros((1, 6), jnp.int32)
    tokens = tokens_of(model, 1, 6)
    assert loss.next_token_loss(model, params, tokens, segment_ids) == (0.0, 0)
