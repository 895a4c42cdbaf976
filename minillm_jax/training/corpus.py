"""Documents as token ids on disk, made once and memory-mapped, in two splits.

FOLDER/tokens.bin       ids of all documents one after another, little-endian
FOLDER/documents.npz    starts [N + 1], num_bytes [N], validation [N]
FOLDER/corpus.json      what it was made from, sizes, a SHA-256; written last

The SHA-256 is that of the SHA-256s of every document's ids.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minillm_jax.json_files import read_object
from minillm_jax.text.tokenizer import Tokenizer
from minillm_jax.training import near_duplicates
from minillm_jax.training.errors import DataError
from minillm_jax.training.sources import Document

VALIDATION_SHARE = 0.05  # of groups of near-duplicates, about


class Corpus(NamedTuple):
    """N documents of token ids."""

    tokens: np.ndarray  # [tokens] uint16 or uint32, memory-mapped
    starts: np.ndarray  # [N + 1] int64, of each document, and the end
    num_bytes: (
        np.ndarray
    )  # [N] int64, of each text in UTF-8; 0 where only ids are known
    validation: np.ndarray  # [N] bool
    facts: Mapping[str, Any]  # of corpus.json

    def split(self, *, validation: bool) -> np.ndarray:
        """The indices of a split's documents."""
        return np.flatnonzero(self.validation == validation)


class _Written(NamedTuple):
    """What is known of each document once its ids are in the file."""

    lengths: list[int]
    num_bytes: list[int]
    keys: list[bytes]  # SHA-256 of the ids
    sketches: list[np.ndarray]


def make(
    folder: str | os.PathLike[str],
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    facts: Mapping[str, Any],
) -> Corpus:
    """Tokenises documents into a folder, which replaces one of that name.

    A document is in the validation split by the hash of its group of near-duplicates,
    whatever the order and the others. Where all are one group, the end of the last
    document is: it is cut in two.

    Args:
      folder: is there only once it is complete.
      documents: at least one token each.
      tokenizer: for those that are texts.
      vocab_size: ids are below it.
      facts: kept in corpus.json.

    Raises:
      DataError: if no document has two tokens, or an id is not below vocab_size.
    """
    folder = pathlib.Path(folder)
    for left in folder.parent.glob(f".making-{folder.name}-*"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    making = folder.with_name(f".making-{folder.name}-{os.getpid()}")
    making.mkdir(parents=True)
    try:
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        with (making / "tokens.bin").open("wb") as file:
            written = _write(file, documents, tokenizer, vocab_size, dtype)
        lengths, num_bytes, validation = _splits(written)
        starts = np.cumsum([0, *lengths], dtype=np.int64)
        np.savez(
            making / "documents.npz",
            starts=starts,
            num_bytes=np.asarray(num_bytes, np.int64),
            validation=np.asarray(validation),
        )
        sha256 = hashlib.sha256(b"".join(written.keys)).hexdigest()
        known = {"dtype": dtype.name, "tokens": int(starts[-1]), "sha256": sha256}
        (making / "corpus.json").write_text(json.dumps({**facts, **known}, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return load(folder)


def load(folder: str | os.PathLike[str]) -> Corpus:
    """The corpus of a folder.

    Raises:
      DataError: if it is not one, or its files are not of the sizes that it says.
    """
    folder = pathlib.Path(folder)
    try:
        facts = read_object(folder / "corpus.json", DataError)
        tokens = np.memmap(folder / "tokens.bin", np.dtype(facts["dtype"]), mode="r")
        with np.load(folder / "documents.npz", allow_pickle=False) as arrays:
            starts, num_bytes = arrays["starts"], arrays["num_bytes"]
            validation = arrays["validation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a corpus: {error}; delete it") from None
    if not len(tokens) == starts[-1] == facts.get("tokens"):
        raise DataError(f"{folder}: tokens.bin is cut off; delete the folder")
    return Corpus(tokens, starts, num_bytes, validation, facts)


def _write(
    file: BinaryIO,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    vocab_size: int,
    dtype: np.dtype,
) -> _Written:
    written = _Written([], [], [], [])
    for document in documents:
        ids = document.tokens(tokenizer)
        if not len(ids):
            continue
        if (largest := int(ids.max())) >= vocab_size:
            raise DataError(
                f"{document.name}: the tokenizer has id {largest}, which is not below "
                f"vocab_size={vocab_size}"
            )
        ids = ids.astype(dtype)
        file.write(ids.tobytes())
        text = document.content
        written.lengths.append(len(ids))
        size = len(text.encode(errors="replace")) if isinstance(text, str) else 0
        written.num_bytes.append(size)
        written.keys.append(hashlib.sha256(ids.tobytes()).digest())
        written.sketches.append(near_duplicates.sketch(ids))
    if max(written.lengths, default=0) < 2:
        raise DataError("there is no document of two tokens to train on")
    return written


def _splits(written: _Written) -> tuple[list[int], list[int], list[bool]]:
    """Lengths, bytes and split of each document.

    Neither split is empty: where chance chooses no group the smallest is validation,
    where it chooses all the largest is not, and of a single group the last document is
    cut in two, whatever is like it in the others.
    """
    lengths, num_bytes = [*written.lengths], [*written.num_bytes]
    groups = near_duplicates.groups(written.sketches)
    keys: dict[int, bytes] = {}
    for group, key in zip(groups, written.keys, strict=True):
        keys[group] = min(key, keys.get(group, key))
    if len(keys) == 1:
        kept = max(1, int((1 - VALIDATION_SHARE) * lengths[-1]))
        kept_bytes = num_bytes[-1] * kept // lengths[-1]
        lengths[-1:] = [kept, lengths[-1] - kept]
        num_bytes[-1:] = [kept_bytes, num_bytes[-1] - kept_bytes]
        return lengths, num_bytes, [False] * (len(lengths) - 1) + [True]
    below = int(VALIDATION_SHARE * 2**64)
    chosen = {g for g, key in keys.items() if int.from_bytes(key[:8]) < below}
    sizes = dict.fromkeys(keys, 0)
    for group, length in zip(groups, lengths, strict=True):
        sizes[group] += length
    smallest, *_, largest = sorted(keys, key=lambda group: (sizes[group], keys[group]))
    if not chosen:
        chosen = {smallest}
    elif len(chosen) == len(keys):
        chosen.remove(largest)
    return lengths, num_bytes, [group in chosen for group in groups]
