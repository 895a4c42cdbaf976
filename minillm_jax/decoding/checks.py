"""What the checked entrances ask of their arguments, on the host and before any work.

Axes: B batch, T query length.
"""

from typing import Any

import jax
import jax.core
import numpy as np

from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.model import cache as kv
from minillm_jax.model import rope


def check_tokens(config: ModelConfig, tokens: np.ndarray, name: str = "tokens") -> None:
    """Raises ConfigError, a ValueError, for ids outside the vocabulary."""
    if tokens.size == 0:
        return
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(f"{name}: must be whole numbers, not {tokens.dtype}")
    check_range(config, int(tokens.min()), int(tokens.max()), name)


def check_range(config: ModelConfig, low: int, high: int, name: str) -> None:
    """Raises ConfigError if ids from `low` to `high` are not all in the vocabulary."""
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ConfigError(
            f"{name}: {wrong} is outside the vocabulary, 0 to {config.vocab_size - 1}"
        )


def check_shape(name: str, array: Any, expected: tuple[int, ...]) -> None:
    """Raises ValueError for another shape."""
    if (shape := tuple(np.shape(array))) != expected:
        raise ValueError(f"{name}: must have shape {expected} here, not {shape}")


def host_copies(*arrays: Any) -> list[np.ndarray] | None:
    """Copies on the host, fetched together, or None under a trace.

    Copies: a view would keep the buffer from being donated.
    """
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return None
    for x in arrays:
        if isinstance(x, jax.Array):
            x.copy_to_host_async()
    return [np.array(x) for x in arrays]


def checked_prompt(config: ModelConfig, cache, tokens, lengths, policy):
    """Tokens and lengths on the host, and the longest length; in a trace as given."""
    kv.check_alive(cache)
    if np.ndim(tokens) != 2:
        raise ValueError(f"tokens: must be [B, T], not of shape {np.shape(tokens)}")
    rows, width = cache["lengths"].shape, np.shape(tokens)[1]
    check_shape("tokens", tokens, (*rows, width))
    lengths = np.full(rows, width, np.int32) if lengths is None else lengths
    check_shape("lengths", lengths, rows)
    on_host = host_copies(tokens, lengths, cache["lengths"])
    if on_host is None:
        return tokens, lengths, width
    host, wanted, held = on_host
    if not np.issubdtype(wanted.dtype, np.integer):
        raise ValueError(f"lengths: must be whole numbers, not {wanted.dtype}")
    if np.any((wanted < 0) | (wanted > width)):
        raise ValueError(f"lengths: {wanted.tolist()} must lie in 0 to {width}")
    check_tokens(config, host[np.arange(width)[None] < wanted[:, None]])
    check_room(config, cache, held, wanted, policy)
    check_turns(config, held, held + wanted)
    return host.astype(np.int32), wanted.astype(np.int32), int(wanted.max())


def check_room(config: ModelConfig, cache, held, wanted, policy) -> None:
    """Raises CacheOverflowError, naming the first row that has no room."""
    capacity = kv.token_capacity(config, cache, policy)
    for row in np.flatnonzero(held + wanted > capacity):
        raise kv.CacheOverflowError(
            f"row {row} holds {held[row]} tokens and {wanted[row]} more were asked, "
            f"but its capacity is {capacity}: {max(capacity - held[row], 0)} would fit"
        )


def check_turns(config: ModelConfig, held, after) -> None:
    """Raises ConfigError for a row whose keys are no good for what it grows to."""
    for row in np.flatnonzero((held > 0) & (after > held)):
        if not rope.same_turns(config, int(held[row]), int(after[row])):
            raise ConfigError(
                f"rope_scaling: row {row} grows from {held[row]} to {after[row]} "
                "tokens, beyond the original context of its longrope, where all its "
                "keys turn by other frequencies: prefill all its tokens again, into an "
                "empty cache"
            )
