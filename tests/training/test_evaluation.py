"""Bits of texts: each token once, with the context that it should have."""

import functools

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax.testing import tiny_config
from minillm_jax.training import evaluation
from minillm_jax.training.corpus import Corpus

LENGTH = 8


def corpus_of(lengths, vocab_size=32):
    draw = np.random.default_rng(0)
    starts = np.cumsum([0, *lengths])
    tokens = draw.integers(0, vocab_size, starts[-1], np.uint16)
    sizes = np.asarray(lengths)
    return Corpus(tokens, starts, sizes, np.zeros(len(sizes), bool), {})


@pytest.fixture(scope="module")
def model():
    return mj.create_model(tiny_config(vocab_size=32, max_seq_len=LENGTH))


@pytest.fixture(scope="module")
def params(model):
    return mj.init_params(model, seed=1)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def bits_of(model, params, tokens, length):
    """One token at a time, from the whole model, with the context it is to have."""
    total, stride = np.log2(32), length // 2
    for place in range(1, len(tokens)):
        start = max(0, -(-(place + 1 - length) // stride) * stride)
        row = np.zeros((1, length), np.int32)
        row[0, : place - start] = tokens[start:place]
        logits = forward(model, params, row)[0, place - start - 1]
        total -= jax.nn.log_softmax(logits)[tokens[place]] / np.log(2)
    return float(total)


@pytest.mark.parametrize("lengths", [[1], [2], [7], [8], [9], [12], [13], [30, 1, 5]])
def test_bits_are_those_of_each_token_by_itself(model, params, lengths):
    corpus = corpus_of(lengths)
    documents = np.arange(len(lengths))
    found = evaluation.score(model, params, corpus, documents, rows=3)
    wanted = sum(
        bits_of(model, params, corpus.tokens[start : start + length], LENGTH)
        for start, length in zip(corpus.starts[:-1], lengths, strict=True)
    )
    chex.assert_trees_all_close(found.bits, wanted, rtol=1e-5)
    assert found.num_tokens == found.num_bytes == sum(lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(2, 17))
@settings(deadline=None)
def test_every_token_but_the_first_counts_once(lengths, length):
    corpus = corpus_of(lengths)
    windows = [
        window
        for start, end in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
        for window in evaluation._windows(np.arange(start, end), length)
    ]
    counted = np.concatenate([w.tokens[w.chosen] for w in windows])
    firsts = corpus.starts[:-1]
    np.testing.assert_array_equal(counted, np.setdiff1d(range(sum(lengths)), firsts))
    assert len(windows) == evaluation.num_windows(
        corpus, np.arange(len(lengths)), length
    )
    for window in windows:
        context = np.flatnonzero(window.chosen)
        assert not len(context) or context[0] in (1, length - length // 2)


def test_windows_are_told_of_and_a_part_of_the_documents_is_taken(model, params):
    corpus, told = corpus_of([20, 3, 9]), []
    some = np.asarray([0, 2])
    found = evaluation.score(
        model, params, corpus, some, on_window=lambda: told.append(1)
    )
    assert found.num_bytes == 29
    assert len(told) == evaluation.num_windows(corpus, some, LENGTH)
