"""Rows of T tokens packed from documents: a batch follows from (seed, step) alone.

Every epoch shuffles the documents, lines their tokens up, cuts the line into rows and
shuffles those. A document that a cut divides goes on as another one in its next row.

    documents   aaaaa bbb cccccccc
    rows, T=6   aaaaab  bbcccc  cccc..      segment_ids  111112  112222  111100
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minillm_jax.training.corpus import Corpus


class Batch(NamedTuple):
    """Packed rows."""

    tokens: np.ndarray  # [B, T] int32
    segment_ids: np.ndarray  # [B, T] int32, documents from 1 on; 0 = padding


class Packing:
    """Some documents of a corpus as rows of `length` tokens."""

    def __init__(
        self, corpus: Corpus, documents: np.ndarray, length: int, *, seed: int | None
    ):
        """Takes the documents' indices; without a seed they keep their order."""
        self._corpus, self._documents, self._length = corpus, documents, length
        self._seed = seed
        self._lengths = np.diff(corpus.starts)[documents]
        self.num_tokens = int(self._lengths.sum())  # of an epoch
        self.num_rows = -(-self.num_tokens // length)  # of an epoch
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, rows: int) -> Batch:
        """The rows of a step, counted from 0."""
        first = step * rows
        packed = [self._row(index) for index in range(first, first + rows)]
        return _stacked(packed)

    def epoch(self, rows: int, most: int) -> Iterator[Batch]:
        """The batches of the first epoch, `most` of them at most.

        Every row is in one of them; rows of padding fill the last.
        """
        count = -(-self.num_rows // rows)
        padding = np.zeros(self._length, np.int32), np.zeros(self._length, np.int32)
        for first in range(min(count, most)):
            indices = range(first * rows, (first + 1) * rows)
            yield _stacked(
                [self._row(i) if i < self.num_rows else padding for i in indices]
            )

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the documents, their ends in line, and the order of the rows."""
        count, rows = len(self._documents), self.num_rows
        if self._seed is None:
            order, lines = np.arange(count), np.arange(rows)
        else:
            draw = np.random.Generator(np.random.Philox([self._seed, epoch]))
            order, lines = draw.permutation(count), draw.permutation(rows)
        return order, np.cumsum(self._lengths[order]), lines

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, row = divmod(index, self.num_rows)
        order, ends, lines = self._order(epoch)
        place = int(lines[row]) * self._length
        tokens = np.zeros(self._length, np.int32)
        segment_ids = np.zeros(self._length, np.int32)
        filled, document = 0, int(np.searchsorted(ends, place, side="right"))
        segment = 1
        while filled < self._length and document < len(ends):
            end = int(ends[document])
            count = min(end - place, self._length - filled)
            stop = int(self._corpus.starts[self._documents[order[document]] + 1])
            start = stop - (end - place)
            tokens[filled : filled + count] = self._corpus.tokens[start : start + count]
            segment_ids[filled : filled + count] = segment
            filled, place = filled + count, place + count
            document, segment = document + 1, segment + 1
        return tokens, segment_ids


def _stacked(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    tokens, segment_ids = zip(*rows, strict=True)
    return Batch(np.stack(tokens), np.stack(segment_ids))
