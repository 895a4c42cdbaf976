"""Prefill, decode step and decode chunk: tokens in, logits or tokens out.

`prefill` and `decode_step` are the simple entrances: they read `cache["lengths"]` (one
small wait a call), check what the caller gave, and call a jitted function that donates
the cache. `prefill_chunk`, `first_tokens` and `decode_requests` are what a Generator
calls, unchecked: it keeps its own count of tokens and never waits for the device.
`decode_chunk` is the same token loop without requests.

Axes: B batch, T query length, V vocab.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.config import ModelConfig
from minillm_jax.decoding import checks, sampling
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM

Params = Mapping[str, Any]
HostOrDevice = Array | np.ndarray


class DecodeChunk(NamedTuple):
    """What `decode_chunk` returns; feed `tokens`, `active` and `cache` to the next."""

    sampled: jax.Array  # [B, steps] the new tokens; -1 once a row has finished
    tokens: jax.Array  # [B] each row's last token, not yet in the cache
    active: jax.Array  # [B] rows still generating
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
      ValueError: for valid tokens outside the vocabulary, lengths beyond T, shapes that
        do not go with the cache's rows, or a row that must begin again (`longrope`).
    """
    tokens, lengths, longest = checks.checked_prompt(
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
    """Arguments `tokens` and `remaining` of the prefill chunks that a prompt takes.

    Each chunk is the smallest that holds what is left of the `longest` row, or the
    largest there is. There is at least one, so an empty prompt takes the same path.
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
    remaining: Int[HostOrDevice, " B"],
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
      remaining: tokens of each row from this chunk on; 0 and less = none.
      policy: what the cache was made with. Static.

    Returns:
      `logits` after this chunk, and the cache. Nothing is checked.
    """
    counts = jnp.clip(remaining, 0, tokens.shape[1])
    outputs: Any = model.apply(
        {"params": params, "cache": cache},
        tokens,
        lengths=counts,
        reach=cache["lengths"] + jnp.maximum(remaining, 0),
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
      ValueError: for tokens outside the vocabulary, or not one per row, or a row that
        must begin again (`longrope`).
    """
    kv.check_alive(cache)
    checks.check_shape("tokens", tokens, cache["lengths"].shape)
    host = checks.host_copies(tokens, cache["lengths"])
    if host is not None:
        tokens_now, held = host
        checks.check_tokens(model.config, tokens_now)
        checks.check_room(model.config, cache, held, np.ones_like(held), policy)
        checks.check_turns(model.config, held, held + 1)
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

    The loop of `decode_requests`, for benchmarks and tests of the cache. Rows finish,
    and are masked from then on, at an EOS token or when prompt and generated tokens
    fill the cache. Nothing is checked.

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
    requests = sampling.equal_requests(
        sampling.GREEDY, len(tokens), config.vocab_size, config.eos_token_ids
    )
    state = sampling.initial_state(requests)._replace(
        tokens=jnp.asarray(tokens, jnp.int32), active=jnp.asarray(active)
    )
    sampled, state, cache = _decode_scan(
        model, params, cache, state, requests, steps, policy
    )
    going_on = state.active & _has_room(config, cache, policy)
    return DecodeChunk(sampled.tokens, state.tokens, going_on, cache)


@functools.partial(
    jax.jit,
    static_argnames=("model", "steps", "policy"),
    donate_argnames=("cache", "state"),
)
def decode_requests(
    model: MiniLLM,
    params: Params,
    cache: kv.Cache,
    state: sampling.DecodeState,
    requests: sampling.RequestArrays,
    unfinished: Bool[HostOrDevice, " B"],
    *,
    steps: int,
    policy: kv.CachePolicy = kv.CachePolicy(),
) -> tuple[sampling.Sampled, sampling.DecodeState, dict[str, Any]]:
    """`decode_chunk` for requests: greedy or sampling, with budgets and stop ids.

    Args:
      model: from `create_model`.
      params: the inner tree.
      cache: holds everything but `state.tokens`.
      state: how far each row is.
      requests: what each was asked for.
      unfinished: False for rows that the caller has ended.
      steps: tokens to decode. Static.
      policy: what the cache was made with. Static.

    Returns:
      What was sampled, `[B, steps, ...]`, the new state, and the cache.
    """
    active = state.active & unfinished
    state = state._replace(active=active)
    return _decode_scan(model, params, cache, state, requests, steps, policy)


def _decode_scan(model, params, cache, state, requests, steps: int, policy):
    """The token loop; its trip count is static.

    XLA enqueues such a loop on a GPU without asking the host in between.
    """

    def step(carry: tuple[Any, Any], _: None):
        cache, state = carry
        active = state.active & _has_room(model.config, cache, policy)
        counts = active.astype(jnp.int32)
        logits, cache = _step(model, params, cache, state.tokens, counts, policy)
        state = state._replace(active=active)
        sampled, state = sampling.sample_step(logits, state, requests)
        return (cache, state), sampled

    carry: tuple[Any, Any] = (dict(cache), state)
    (cache, state), sampled = jax.lax.scan(step, carry, length=steps)
    sampled = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sampled)
    return sampled, state, cache


def _has_room(config: ModelConfig, cache, policy: kv.CachePolicy):
    """Rows that can take their last token, not in the cache yet, and one more."""
    return cache["lengths"] + 2 <= kv.token_capacity(config, cache, policy)


@functools.partial(jax.jit, donate_argnames=("state",))
def first_tokens(
    logits: Float[Array, "B V"],
    state: sampling.DecodeState,
    requests: sampling.RequestArrays,
) -> tuple[sampling.Sampled, sampling.DecodeState]:
    """The first token after a prefill, shaped like a chunk of one step: `[B, 1]`."""
    sampled, state = sampling.sample_step(logits, state, requests)
    return jax.tree.map(lambda x: x[:, None], sampled), state
