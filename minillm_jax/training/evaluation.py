"""How many bits a model needs for texts: every token counted once, none left out.

A document is read in windows of T tokens, each half over the one before; what is new in
a window counts, so that behind the first window a token has T / 2 others before it, or
more. The first token of a document, which nothing precedes, costs log2(V) bits.

    document   aaaaaaaaaaaaaaaa
    window 0   .AAAAAAA
    window 1       aaaaAAAA              A: counts
    window 2           aaaaAAAA
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from minillm_jax.model.transformer import MiniLLM
from minillm_jax.training import step
from minillm_jax.training.corpus import Corpus


class Score(NamedTuple):
    """What texts take."""

    bits: float
    num_tokens: int
    num_bytes: int  # in UTF-8

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, and with a compressor's."""
        return self.bits / self.num_bytes


class _Window(NamedTuple):
    tokens: np.ndarray  # [T] int32
    segment_ids: np.ndarray  # [T] int32, 1, and 0 = padding
    chosen: np.ndarray  # [T] bool, what counts


def score(
    model: MiniLLM,
    params: Mapping[str, Any],
    corpus: Corpus,
    documents: np.ndarray,
    *,
    rows: int = 16,
    on_window: Callable[[], None] = lambda: None,
) -> Score:
    """The bits of some documents of a corpus.

    Args:
      model: T is its `max_seq_len`.
      params: the inner tree.
      corpus: of the model's tokens, of texts whose bytes are known.
      documents: their indices.
      rows: windows of a batch.
      on_window: called for each that is done.
    """
    length = model.config.max_seq_len
    starts = (corpus.starts[documents], corpus.starts[documents + 1])
    windows = itertools.chain.from_iterable(
        _windows(corpus.tokens[start:end], length)
        for start, end in zip(*starts, strict=True)
    )
    nats, counted = 0.0, 0
    nothing = _Window(*(np.zeros(length, kind) for kind in ("int32", "int32", "bool")))
    while batch := list(itertools.islice(windows, rows)):
        padded = batch + [nothing] * (rows - len(batch))
        stacked = (np.stack(parts) for parts in zip(*padded, strict=True))
        total, count = jax.device_get(step.eval_step(model, params, *stacked))
        nats, counted = nats + float(total), counted + int(count)
        for _ in batch:
            on_window()
    bits = nats / math.log(2) + len(documents) * math.log2(model.config.vocab_size)
    num_tokens = int(np.diff(corpus.starts)[documents].sum())
    assert counted + len(documents) == num_tokens, "a token was left out"
    return Score(bits, num_tokens, int(corpus.num_bytes[documents].sum()))


def num_windows(corpus: Corpus, documents: np.ndarray, length: int) -> int:
    """How many windows `score` takes."""
    lengths = np.diff(corpus.starts)[documents]
    behind = np.maximum(0, lengths - length)
    return int(np.sum(1 + -(-behind // _stride(length))))


def _windows(tokens: np.ndarray, length: int) -> Iterator[_Window]:
    stride = _stride(length)
    for start in range(0, max(1, len(tokens) - length + stride), stride):
        part = tokens[start : start + length]
        known = length - stride if start else 1
        padding = (0, length - len(part))
        places = np.arange(length)
        yield _Window(
            np.pad(part.astype(np.int32), padding),
            (places < len(part)).astype(np.int32),
            (places >= known) & (places < len(part)),
        )


def _stride(length: int) -> int:
    return max(1, length // 2)
