"""Prefill, decode step and decode chunk: tokens in, logits or tokens out.

`prefill` and `decode_step` are the simple entrances: they read `cache["lengths"]` (one
small wait a call), check what the caller gave, and call a jitted function that donates
the cache. `prefill_chunk`, `first_tokens` and `decode_rows` are what a Generator calls,
unchecked: it keeps its own count of tokens and never waits for the device.
`decode_chunk` is the same token loop without requests.

Axes: B batch, T query length, V vocab.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.config import ModelConfig
from minillm_jax.decoding import sampling
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM

Params = Mapping[str, Any]
HostOrDevice = Array | np.ndarray


class DecodeChunk(NamedTuple):
    """What `decode_chunk` returns; feed `tokens`, `active` and `cache` to the next."""

    sampled: jax.Array  # [B, steps] the new tokens; -1 once a row has finished
    tokens: jax.Array  # [B] each row's last token, not yet in the cache
    active: jax.Array  # [B] rows that go on
    cache: dict[str, Any]


def chunk_sizes(config: ModelConfig) -> tuple[int, ...]:
    """The prefill chunk's sizes, largest first: what bounds its executables to four."""
    sizes = {max(1, config.prefill_chunk >> shift) for shift in (0, 2, 4, 6)}
    return tuple(sorted(sizes, reverse=True))


def prefill(
    model: MiniLLM,
    params: Params,
    cache: kv.Cache,
    tokens: Int[HostOrDevice, "B T"],
    lengths: Int[HostOrDevice, " B"] | None = None,
    *,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> tuple[Float[Array, "B V"], dict[str, Any]]:
    """Appends a prompt to every row, in chunks; `cache` is dead afterwards.

    Args:
      model: from `create_model`.
      params: the inner tree.
      cache: from `init_cache`, or one that holds earlier tokens.
      tokens: prompts, padded on the right.
      lengths: each row's valid tokens, 0 = the row is not touched; None = T.
      policy: what the cache was made with.

    Returns:
      The logits of each row's last valid token (0 for untouched rows), and the cache.

    Raises:
      CacheOverflowError: before any work, if a row would not fit.
      ValueError: for valid tokens outside the vocabulary, lengths beyond T, or shapes
        that do not go with the cache's rows.
    """
    tokens, lengths, longest = _checked_prompt(
        model.config, cache, tokens, lengths, policy
    )
    shape = (tokens.shape[0], model.config.vocab_size)
    logits: Any = np.zeros(shape, np.float32)
    for chunk, left in prompt_chunks(model.config, tokens, lengths, longest):
        logits, cache = prefill_chunk(
            model, params, cache, logits, chunk, left, policy=policy
        )
    return logits, dict(cache)


def prompt_chunks(
    config: ModelConfig, tokens: Any, lengths: Any, longest: int
) -> Iterator[tuple[Any, Any]]:
    """Arguments `tokens` and `lengths` of the prefill chunks that a prompt takes.

    Each chunk is the smallest that holds what is left of the `longest` row, or the
    largest there is; one at least, so that the result is always alike.
    """
    sizes, start = chunk_sizes(config), 0
    # On the host, outside a trace: JAX would compile a slice for every new length.
    xp = np if isinstance(tokens, np.ndarray) else jnp
    while start < max(longest, 1):
        size = min((s for s in sizes if s >= longest - start), default=sizes[0])
        chunk = tokens[:, start : start + size]
        yield xp.pad(chunk, ((0, 0), (0, size - chunk.shape[1]))), lengths - start
        start += size


@functools.partial(
    jax.jit, static_argnames=("model", "policy"), donate_argnames=("cache", "logits")
)
def prefill_chunk(
    model: MiniLLM,
    params: Params,
    cache: kv.Cache,
    logits: Float[HostOrDevice, "B V"],
    tokens: Int[HostOrDevice, "B T"],
    lengths: Int[HostOrDevice, " B"],
    *,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> tuple[Float[Array, "B V"], dict[str, Any]]:
    """Appends one chunk of each row's prompt; `cache` and `logits` are donated.

    Args:
      model: from `create_model`.
      params: the inner tree.
      cache: what is before the chunk.
      logits: of each row's last valid token so far.
      tokens: the chunk.
      lengths: tokens of each row from this chunk on; 0 and less = none.
      policy: what the cache was made with. Static.

    Returns:
      `logits` after this chunk, and the cache. Nothing is checked.
    """
    counts = jnp.clip(lengths, 0, tokens.shape[1])
    outputs: Any = model.apply(
        {"params": params, "cache": cache},
        tokens,
        lengths=counts,
        policy=policy,
        mutable=["cache"],
        method="hidden",
    )
    (x, counts), updated = outputs
    last = jnp.maximum(counts - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    new: Any = model.apply({"params": params}, x, method="unembed")
    return jnp.where(counts[:, None] > 0, new, logits), updated["cache"]


def decode_step(
    model: MiniLLM,
    params: Params,
    cache: kv.Cache,
    tokens: Int[HostOrDevice, " B"],
    *,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> tuple[Float[Array, "B V"], dict[str, Any]]:
    """Appends one token to every row; `cache` is donated, and dead afterwards.

    `decode_step.lower(...)` is `jax.jit`'s, of the step without its checks.

    Args:
      model: from `create_model`.
      params: the inner tree.
      cache: from `init_cache` or `prefill`.
      tokens: one id per row.
      policy: what the cache was made with.

    Returns:
      The logits of the next token, float32, and the cache.

    Raises:
      CacheOverflowError: if a row is full.
      ValueError: for tokens outside the vocabulary, or not one per row.
    """
    kv.check_alive(cache)
    _check_shape("tokens", tokens, cache["lengths"].shape)
    host = _host(tokens, cache["lengths"])
    if host is not None:
        tokens_now, held = host
        check_tokens(model.config, tokens_now)
        _check_room(model.config, cache, held, np.ones_like(held), policy)
        if not isinstance(tokens, jax.Array):  # one executable for every integer type
            tokens = tokens_now.astype(np.int32)
    return _decode_step(model, params, cache, tokens, policy=policy)


@functools.partial(
    jax.jit, static_argnames=("model", "policy"), donate_argnames=("cache",)
)
def _decode_step(model, params, cache, tokens, *, policy=kv.CachePolicy()):
    return _step(model, params, cache, tokens, None, policy)


decode_step.lower = _decode_step.lower  # pyright: ignore[reportFunctionMemberAccess]


def _step(model, params, cache, tokens, counts, policy) -> tuple[Any, dict[str, Any]]:
    logits, updated = model.apply(
        {"params": params, "cache": cache},
        tokens[:, None],
        lengths=counts,
        policy=policy,
        mutable=["cache"],
    )
    return logits[:, 0], updated["cache"]


@functools.partial(
    jax.jit, static_argnames=("model", "steps", "policy"), donate_argnames=("cache",)
)
def decode_chunk(
    model: MiniLLM,
    params: Params,
    cache: kv.Cache,
    tokens: Int[HostOrDevice, " B"],
    active: Bool[HostOrDevice, " B"],
    *,
    steps: int,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> DecodeChunk:
    """Greedy decode, `steps` tokens in one executable; the cache is donated.

    Rows finish, and are masked from then on, at an EOS token or when prompt and
    generated tokens fill the cache. Nothing is checked.

    Args:
      model: from `create_model`.
      params: the inner tree.
      cache: holds everything but `tokens`.
      tokens: each row's last token, its logits not yet computed.
      active: rows to decode; the others are not touched.
      steps: tokens to decode. Static.
      policy: what the cache was made with. Static.
    """
    config = model.config
    rows = sampling.greedy_rows(config.eos_token_ids, len(tokens), config.vocab_size)
    progress = sampling.start(rows)._replace(
        tokens=jnp.asarray(tokens, jnp.int32), active=jnp.asarray(active)
    )
    sampled, progress, cache = _decode_scan(
        model, params, cache, progress, rows, steps, policy
    )
    going_on = progress.active & _has_room(config, cache, policy)
    return DecodeChunk(sampled.tokens, progress.tokens, going_on, cache)


@functools.partial(
    jax.jit,
    static_argnames=("model", "steps", "policy"),
    donate_argnames=("cache", "progress"),
)
def decode_rows(
    model: MiniLLM,
    params: Params,
    cache: kv.Cache,
    progress: sampling.Progress,
    rows: sampling.Rows,
    going_on: Bool[HostOrDevice, " B"],
    *,
    steps: int,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> tuple[sampling.Sampled, sampling.Progress, dict[str, Any]]:
    """`decode_chunk` for requests: greedy or sampling, with budgets and stop ids.

    Args:
      model: from `create_model`.
      params: the inner tree.
      cache: holds everything but `progress.tokens`.
      progress: how far each row is.
      rows: what each was asked for.
      going_on: False for rows that the caller has ended.
      steps: tokens to decode. Static.
      policy: what the cache was made with. Static.

    Returns:
      What was sampled, `[B, steps, ...]`, the new progress, and the cache.
    """
    active = progress.active & going_on
    progress = progress._replace(active=active)
    return _decode_scan(model, params, cache, progress, rows, steps, policy)


def _decode_scan(model, params, cache, progress, rows, steps: int, policy):
    """The token loop; its trip count is static.

    XLA enqueues such a loop on a GPU without asking the host in between.
    """

    def step(carry: tuple[Any, Any], _: None):
        cache, progress = carry
        active = progress.active & _has_room(model.config, cache, policy)
        counts = active.astype(jnp.int32)
        logits, cache = _step(model, params, cache, progress.tokens, counts, policy)
        progress = progress._replace(active=active)
        sampled, progress = sampling.choose(logits, progress, rows)
        return (cache, progress), sampled

    carry: tuple[Any, Any] = (dict(cache), progress)
    (cache, progress), sampled = jax.lax.scan(step, carry, length=steps)
    sampled = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sampled)
    return sampled, progress, cache


def _has_room(config: ModelConfig, cache, policy: kv.CachePolicy):
    """Rows that can take their last token, not in the cache yet, and one more."""
    return cache["lengths"] + 2 <= kv.token_capacity(config, cache, policy)


@functools.partial(jax.jit, donate_argnames=("progress",))
def first_tokens(
    logits: Float[Array, "B V"], progress: sampling.Progress, rows: sampling.Rows
) -> tuple[sampling.Sampled, sampling.Progress]:
    """The tokens behind a prefill, as a chunk of one step gives them."""
    sampled, progress = sampling.choose(logits, progress, rows)
    return jax.tree.map(lambda x: x[:, None], sampled), progress


def check_tokens(config: ModelConfig, tokens: np.ndarray) -> None:
    """Raises ValueError for ids outside the vocabulary."""
    if tokens.size == 0:
        return
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens: must be whole numbers, not {tokens.dtype}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"tokens: {wrong} is outside the vocabulary, 0 to {config.vocab_size - 1}"
        )


def _check_shape(name: str, array: Any, expected: tuple[int, ...]) -> None:
    if (shape := tuple(np.shape(array))) != expected:
        raise ValueError(f"{name}: must have shape {expected} here, not {shape}")


def _host(*arrays: Any) -> list[np.ndarray] | None:
    """Copies on the host, fetched together, or None under a trace.

    Copies: a view would keep the buffer from being donated.
    """
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return None
    for x in arrays:
        if isinstance(x, jax.Array):
            x.copy_to_host_async()
    return [np.array(x) for x in arrays]


def _checked_prompt(config: ModelConfig, cache, tokens, lengths, policy):
    """Tokens and lengths on the host, and the longest length; in a trace as given."""
    kv.check_alive(cache)
    if np.ndim(tokens) != 2:
        raise ValueError(f"tokens: must be [B, T], not of shape {np.shape(tokens)}")
    rows, width = cache["lengths"].shape, np.shape(tokens)[1]
    _check_shape("tokens", tokens, (*rows, width))
    lengths = np.full(rows, width, np.int32) if lengths is None else lengths
    _check_shape("lengths", lengths, rows)
    on_host = _host(tokens, lengths, cache["lengths"])
    if on_host is None:
        return tokens, lengths, width
    host, wanted, held = on_host
    if not np.issubdtype(wanted.dtype, np.integer):
        raise ValueError(f"lengths: must be whole numbers, not {wanted.dtype}")
    if np.any((wanted < 0) | (wanted > width)):
        raise ValueError(f"lengths: {wanted.tolist()} must lie in 0 to {width}")
    check_tokens(config, host[np.arange(width)[None] < wanted[:, None]])
    _check_room(config, cache, held, wanted, policy)
    return host.astype(np.int32), wanted.astype(np.int32), int(wanted.max())


def _check_room(config: ModelConfig, cache, held, wanted, policy) -> None:
    """Raises CacheOverflowError, naming the first row that has no room."""
    capacity = kv.token_capacity(config, cache, policy)
    for row in np.flatnonzero(held + wanted > capacity):
        raise kv.CacheOverflowError(
            f"row {row} holds {held[row]} tokens and {wanted[row]} more were asked, "
            f"but its capacity is {capacity}: {max(capacity - held[row], 0)} would fit"
        )
