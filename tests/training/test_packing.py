"""Packed rows hold every token once an epoch, and follow from seed and step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minillm_jax.training.corpus import Corpus
from minillm_jax.training.packing import Packing


def corpus_of(lengths):
    """Every token is its own place in the file."""
    starts = np.cumsum([0, *lengths])
    split = np.zeros(len(lengths), bool)
    return Corpus(np.arange(starts[-1]), starts, np.asarray(lengths), split, {})


def packing(lengths, length, seed=0):
    corpus = corpus_of(lengths)
    return Packing(corpus, np.arange(len(lengths)), length, seed=seed)


def test_without_a_seed_documents_are_in_order():
    found = packing([5, 3, 8], 6, seed=None).batch(0, 3)
    assert found.tokens.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
        [12, 13, 14, 15, 0, 0],
    ]
    assert found.segment_ids.tolist() == [
        [1, 1, 1, 1, 1, 2],
        [1, 1, 2, 2, 2, 2],
        [1, 1, 1, 1, 0, 0],
    ]


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=12),
    st.integers(1, 16),
    st.integers(0, 5),
)
def test_an_epoch_has_every_token_once_and_no_segment_two_documents(
    lengths, length, epoch
):
    packed = packing(lengths, length, seed=3)
    batch = packed.batch(epoch, packed.num_rows)
    valid = batch.segment_ids > 0
    tokens = np.sort(batch.tokens[valid])
    np.testing.assert_array_equal(tokens, np.arange(sum(lengths)))
    starts = np.cumsum([0, *lengths])
    for row, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            inside = row[segments == segment]
            assert np.all(np.diff(inside) == 1)
            of = np.searchsorted(starts, inside, side="right")
            assert len(set(of.tolist())) == 1


def test_a_batch_follows_from_seed_and_step_alone():
    lengths = list(range(1, 40))
    once = packing(lengths, 16)
    forwards = [once.batch(step, 4) for step in range(30)]
    again = packing(lengths, 16)
    for step in reversed(range(30)):
        for a, b in zip(forwards[step], again.batch(step, 4), strict=True):
            np.testing.assert_array_equal(a, b)
    other = packing(lengths, 16, seed=1).batch(0, 4)
    assert not np.array_equal(forwards[0].tokens, other.tokens)


def test_rows_of_a_batch_are_those_of_smaller_batches():
    packed = packing(range(1, 40), 16)
    large, small = packed.batch(2, 4), [packed.batch(step, 2) for step in (4, 5)]
    np.testing.assert_array_equal(
        large.tokens, np.concatenate([batch.tokens for batch in small])
    )


def test_epochs_differ():
    packed = packing(range(1, 40), 16)
    first, second = (packed.batch(epoch, packed.num_rows) for epoch in range(2))
    assert not np.array_equal(first.tokens, second.tokens)


def test_a_pass_over_all_rows_pads_the_last_batch():
    packed = packing(range(1, 12), 8)  # 66 tokens: 9 rows
    batches = list(packed.epoch(4, 100))
    assert [batch.tokens.shape for batch in batches] == [(4, 8)] * 3
    segments = np.concatenate([batch.segment_ids for batch in batches])
    assert np.all(segments[9:] == 0)
    tokens = np.concatenate([batch.tokens for batch in batches])[segments > 0]
    np.testing.assert_array_equal(np.sort(tokens), np.arange(66))
    assert len(list(packed.epoch(4, 2))) == 2
