"""Which documents are nearly the same: groups of them, found by MinHash sketches.

A document's sketch is the smallest hashes of its runs of tokens, so that two sketches
tell how many runs the documents share (bottom-k sketches: Broder 1997,
doi:10.1109/SEQUEN.1997.666900).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64

RUN = 32  # tokens that are hashed together
SKETCH = 128  # hashes of a document, at most
ALIKE = 0.5  # share of runs that near-duplicates have in common

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def sketch(tokens: Int[np.ndarray, " tokens"]) -> UInt64[np.ndarray, " hashes"]:
    """The smallest distinct hashes of a document's runs, in order.

    A document that is shorter than a run has the hash of all its tokens.
    """
    run = min(RUN, len(tokens))
    hashes = np.zeros(max(1, len(tokens) - run + 1), np.uint64)
    for offset in range(run):
        window = tokens[offset : offset + len(hashes)].astype(np.uint64)
        hashes = hashes * _FACTOR + window + np.uint64(1)
    hashes ^= hashes >> np.uint64(31)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)[:SKETCH]


def similarity(
    a: UInt64[np.ndarray, " hashes"], b: UInt64[np.ndarray, " hashes"]
) -> float:
    """The share of runs in either of two documents that both have, estimated."""
    union = np.union1d(a, b)[: min(SKETCH, max(len(a), len(b)))]
    return float(np.isin(union, a).astype(int) @ np.isin(union, b)) / len(union)


def groups(sketches: Sequence[UInt64[np.ndarray, " hashes"]]) -> list[int]:
    """For each document the first one of its group of near-duplicates.

    A document is compared with the last one before it that has a hash of its sketch:
    linear in the number of documents, and nearly the same ones share many hashes.
    """
    first = list(range(len(sketches)))

    def root(document: int) -> int:
        while first[document] != document:
            first[document] = document = first[first[document]]
        return document

    last: dict[int, int] = {}
    for document, found in enumerate(sketches):
        values = found.tolist()
        for other in {last[value] for value in values if value in last}:
            if similarity(sketches[other], found) >= ALIKE:
                low, high = sorted((root(other), root(document)))
                first[high] = low
        last.update(dict.fromkeys(values, document))
    return [root(document) for document in range(len(sketches))]
