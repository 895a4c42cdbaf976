"""Documents to train on: a text file, a folder, JSONL, token ids, or Python's own.

The default needs no download: the source of Python's standard library.
"""

import json
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minillm_jax.text.tokenizer import Tokenizer
from minillm_jax.training.errors import DataError

STANDARD_LIBRARY = "python"  # the name that stands for it
_TESTS = {"test", "tests", "idle_test"}
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text, or token ids where the source has those."""

    name: str  # such as a file, or a line of one
    content: str | np.ndarray

    def tokens(self, tokenizer: Tokenizer) -> np.ndarray:
        """Its ids, a trained-on end of document included where there is one."""
        if isinstance(self.content, np.ndarray):
            return self.content
        ends = getattr(tokenizer, "eos_token_ids", ())[:1]
        ids = [*tokenizer.encode(self.content)]
        return np.asarray(ids if tuple(ids[-1:]) == ends else [*ids, *ends], np.int64)


def documents(
    source: str, *, vocab_size: int, eos_token_ids: tuple[int, ...] = ()
) -> Iterator[Document]:
    """The documents of a source, in an order that does not depend on the machine.

    Args:
      source: "python", the standard library of the running Python without its tests; a
        folder, every file below it one document; `.jsonl`, the field "text" of each
        line; `.bin`, token ids as little-endian uint16, or uint32 where the vocabulary
        is larger, documents ending with an EOS id; any other file, one document.
      vocab_size: ids of a `.bin` are below it.
      eos_token_ids: end a document of a `.bin`.

    Raises:
      DataError: for what is not there, not UTF-8, not JSON or not in the vocabulary.
    """
    if source == STANDARD_LIBRARY:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        yield from _files(root, sorted(_source_files(root)))
        return
    path = pathlib.Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        yield from _files(path, [f for f in files if not _is_hidden(path, f)])
    elif not path.is_file():
        raise DataError(
            f"{source}: no such file or folder; {STANDARD_LIBRARY!r} is the source of "
            "Python's standard library"
        )
    elif path.suffix == ".jsonl":
        yield from _lines(path)
    elif path.suffix == ".bin":
        yield from _token_file(path, vocab_size, eos_token_ids)
    else:
        yield from _files(path.parent, [path])


def _source_files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for file in root.rglob("*.py"):
        if not (_TESTS | _NOT_SOURCE) & set(file.relative_to(root).parts[:-1]):
            yield file


def _is_hidden(root: pathlib.Path, file: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _files(root: pathlib.Path, files: list[pathlib.Path]) -> Iterator[Document]:
    for file in files:
        if text := _text(file):
            yield Document(file.relative_to(root).as_posix(), text)


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from None


def _lines(path: pathlib.Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name = f"{path.name}:{number}"
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise DataError(f'{name}: must be a JSON object with a string "text"')
            if text:
                yield Document(name, text)


def _token_file(
    path: pathlib.Path, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> Iterator[Document]:
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    if path.stat().st_size % dtype.itemsize or not path.stat().st_size:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes are not ids of {dtype.itemsize} bytes"
        )
    tokens = np.memmap(path, dtype, mode="r")
    if (largest := int(tokens.max())) >= vocab_size:
        raise DataError(
            f"{path}: id {largest} is not below vocab_size={vocab_size}, for which ids "
            f"have {dtype.itemsize} bytes"
        )
    ends = np.flatnonzero(np.isin(tokens, eos_token_ids)) + 1
    for index, piece in enumerate(np.split(tokens, ends)):
        if len(piece):
            yield Document(f"{path.name}[{index}]", piece)
