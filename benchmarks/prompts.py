"""Prompts of real text that need no download: Python's own standard library source.

A token is a byte, so any vocabulary of at least 256 will do.
"""

import pathlib
import sysconfig

import numpy as np

from minillm_jax.config import ConfigError

BYTES = 256


def check(vocab_size: int) -> None:
    """Raises ConfigError if the vocabulary cannot hold a byte."""
    if vocab_size < BYTES:
        raise ConfigError(
            f"vocab_size={vocab_size}: prompts are bytes here; write {BYTES} or more"
        )


def source_tokens(batch_size: int, length: int, vocab_size: int) -> np.ndarray:
    """`[batch_size, length]` int32, each row from another place in the source.

    Raises:
      ConfigError: if the vocabulary cannot hold a byte.
    """
    check(vocab_size)
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text, wanted = bytearray(), batch_size * length
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= wanted:
            break
    tokens = np.frombuffer(bytes(text), np.uint8).astype(np.int32)
    return np.resize(tokens, (batch_size, length))
