"""The KV cache: its shapes, and everything that reads or changes its slots.

    cache/lengths                    int32 [B]     tokens each row has seen in all
    cache/layers_3/attention/{k,v}   [B, K, S, H]  [K, S, H] where the batch is 1
                  /{k_scale,v_scale} [B, K, S, 1]  float32, where k and v are int8

A row's next token has position `lengths[b]`. What a slot holds follows from `lengths`
alone; nothing else is stored. A layer's `SlotRule` says where a position lives:

    slot(p) = p                                    without a ring
    slot(p) = p if p < sinks else sinks + (p - sinks) % (S - sinks)        in one

    S = 8, sinks = 2, 12 tokens seen:    slot       0 1 | 2 3 4 5 6  7
                                         position   0 1 | 8 9 10 11 6 7

The order of slots does not matter, because the mask compares positions. The batch axis
of one row is left out: XLA on CPU would drop it by itself, flip the layout of the leaf
and copy the whole cache at every step.

Axes: B batch, K key/value heads, S slots, T new tokens, H head dim.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

from minillm_jax import validation
from minillm_jax.config import MAX_POSITIONS, ConfigError, ModelConfig, check_is_config
from minillm_jax.model import quantized

Cache = Mapping[str, Any]
MAX_ROWS = 2**20


class CacheOverflowError(ValueError):
    """More tokens than a row of the cache can hold."""


def _policy_contradictions(v: dict[str, Any], _: frozenset[str]) -> list[str]:
    if v.get("num_sinks", 0) and v.get("overflow", "ring") != "ring":
        return [f"num_sinks={v['num_sinks']}: needs overflow='ring'; write 0"]
    return []


@validation.checked_fields(contradictions=_policy_contradictions)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """What happens when a row is full. Static: part of what is compiled.

    "error" raises CacheOverflowError before any work, "stop" ends the row, "ring"
    overwrites the oldest tokens but keeps the first `num_sinks` (attention sinks, Xiao
    et al. 2023, arXiv:2309.17453). The first two differ in who generates: `prefill` and
    `decode_step` raise under both, a decode chunk ends the row under both.
    """

    overflow: Annotated[str, validation.OneOf(("error", "stop", "ring"))] = "error"
    num_sinks: Annotated[int, validation.Range(0, MAX_POSITIONS)] = 0


RING = CachePolicy(overflow="ring")


@dataclasses.dataclass(frozen=True)
class SlotRule:
    """Where a layer keeps a position, and how far back its queries see. Static."""

    wraps: bool = False  # a ring; else tokens beyond the last slot are not stored
    window: int | None = None  # positions a query sees, sinks included; None = all
    sinks: int = 0  # first positions that are never overwritten


def slot_rule(
    config: ModelConfig, window: int | None, slots: int, policy: CachePolicy
) -> SlotRule:
    """The rule of a layer with this sliding window whose leaves have `slots` slots."""
    spare = config.prefill_chunk - 1
    ring = policy.overflow == "ring"
    full = window is not None and window + spare <= slots  # a ring from here on
    if window is not None and (full or not ring):
        return SlotRule(wraps=full, window=window)
    if ring:
        return SlotRule(wraps=True, window=slots - spare, sinks=policy.num_sinks)
    return SlotRule()


def num_slots(config: ModelConfig, capacity: int, policy: CachePolicy) -> list[int]:
    """Slots of each layer's leaves when a row is to hold (in a ring: see) `capacity`.

    A ring has `prefill_chunk - 1` more than its window: a chunk is written before it is
    read, and its first query still needs the oldest position of its own window.
    """
    spare = config.prefill_chunk - 1
    slots = capacity + spare if policy.overflow == "ring" else capacity
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return [slots if w is None else min(slots, w + spare) for w in windows]


def check_cache(config: ModelConfig, cache: Cache, policy: CachePolicy) -> None:
    """Raises ValueError where shapes show that `cache` was made for something else."""
    check_types(config, policy)
    names = {f"layers_{layer}" for layer in range(config.num_layers)} | {"lengths"}
    heads = config.num_kv_heads, config.head_dim
    if set(cache) != names or _heads(config, cache) != {heads}:
        raise ValueError("cache: was made for another config; make it with init_cache")
    for slots, rule in _rules(config, cache, policy):
        if rule.window is not None and rule.window <= rule.sinks:
            raise ValueError(
                f"policy: a cache of {slots} slots was not made for {policy}; pass the "
                "policy that init_cache was given"
            )
    slots, longest = max(_slots(config, cache)), config.max_kv_cache_len
    if policy.overflow != "ring" and slots > longest:
        raise ValueError(
            f"cache: has {slots} slots, but max_kv_cache_len={longest}; it is a "
            f"ring's and not for {policy}, or grew too far (grow_cache with config= "
            "refuses that)"
        )


def check_types(config: Any, policy: Any) -> None:
    """Raises ConfigError for arguments that are no ModelConfig and no CachePolicy."""
    check_is_config(config)
    if not isinstance(policy, CachePolicy):
        given = validation.shown(policy)
        raise ConfigError(f"policy={given}: must be a CachePolicy, such as {RING!r}")


def check_alive(cache: Cache) -> None:
    """Raises ValueError for a cache that an earlier call has taken."""
    arrays = [x for x in jax.tree.leaves(dict(cache)) if isinstance(x, jax.Array)]
    if any(not isinstance(x, jax.core.Tracer) and x.is_deleted() for x in arrays):
        raise ValueError(
            "cache: was donated to an earlier call; go on with the one which that "
            "returned, or with a new one from init_cache"
        )


def capacity_bucket(config: ModelConfig, tokens: int) -> int:
    """The smallest power of two that holds `tokens`, at most `max_kv_cache_len`.

    A cache of that capacity costs what its tokens cost, and not what the config allows;
    few sizes mean few executables.
    """
    return min(1 << (tokens - 1).bit_length(), config.max_kv_cache_len)


def token_capacity(config: ModelConfig, cache: Cache, policy: CachePolicy) -> int:
    """Tokens a row of `cache` can hold; MAX_POSITIONS where it never fills up.

    The leaves tell, but for the full rings of sliding windows, which have no end of
    their own: where there is nothing else it is `config.max_kv_cache_len`.
    """
    if policy.overflow == "ring":
        return MAX_POSITIONS
    rules = _rules(config, cache, policy)
    ends = [slots for slots, rule in rules if not rule.wraps]
    return min(ends) if ends else max(config.max_kv_cache_len, *_slots(config, cache))


def cache_shapes(
    config: ModelConfig,
    batch_size: int = 1,
    capacity: int | None = None,
    *,
    policy: CachePolicy = CachePolicy(),
) -> dict[str, Any]:
    """The cache as a tree of `jax.ShapeDtypeStruct`; nothing is allocated."""
    check_types(config, policy)
    config = config.resolve(jax.default_backend())
    capacity = config.max_kv_cache_len if capacity is None else capacity
    slots = num_slots(config, checked_capacity(config, capacity, policy), policy)
    bounds = validation.Range(1, MAX_ROWS)
    batch_size = validation.whole_number("batch_size", batch_size, bounds)
    rows = (batch_size,) if batch_size > 1 else ()
    tree: dict[str, Any] = {"lengths": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    for layer, count in enumerate(slots):
        shape = (*rows, config.num_kv_heads, count)
        dtype = jnp.dtype(config.cache_dtype)
        leaf = jax.ShapeDtypeStruct((*shape, config.head_dim), dtype)
        leaves = {"k": leaf, "v": leaf}
        if dtype == jnp.int8:
            scale = jax.ShapeDtypeStruct((*shape, 1), jnp.float32)
            leaves |= {"k_scale": scale, "v_scale": scale}
        tree[f"layers_{layer}"] = {"attention": leaves}
    return tree


def checked_capacity(config: ModelConfig, capacity: int, policy: CachePolicy) -> int:
    """Tokens of a row as an int; raises ConfigError where no such cache can be."""
    bounds = validation.Range(1, config.max_kv_cache_len)
    capacity = validation.whole_number("capacity", capacity, bounds)
    if policy.num_sinks and config.sliding_window is not None:
        raise ConfigError(
            f"num_sinks={policy.num_sinks}: sliding-window layers "
            f"(sliding_window={config.sliding_window}) keep no sinks; write 0"
        )
    if policy.num_sinks >= capacity:
        raise ConfigError(
            f"num_sinks={policy.num_sinks}: must be below the capacity of {capacity} "
            "tokens, or no token could follow them"
        )
    return capacity


def init_cache(
    config: ModelConfig,
    batch_size: int = 1,
    capacity: int | None = None,
    *,
    policy: CachePolicy = CachePolicy(),
) -> dict[str, Any]:
    """An empty `cache` collection, all zeros, on the default device.

    Args:
      config: dtypes "auto" are resolved for the default backend.
      batch_size: rows.
      capacity: tokens a row can hold, or see in a ring; None = max_kv_cache_len.
      policy: what happens when a row is full.

    Raises:
      ConfigError: for a capacity or batch size that the config does not allow.
    """
    shapes = cache_shapes(config, batch_size, capacity, policy=policy)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def held(leaves: Mapping[str, Any]) -> tuple[Any, Any]:
    """Keys and values of a layer's leaves, as `attend` takes them."""
    if "k_scale" not in leaves:
        return leaves["k"], leaves["v"]
    k, v = (quantized.Rounded(leaves[n], leaves[f"{n}_scale"]) for n in "kv")
    return k, v


def named(k: Any, v: Any) -> dict[str, Any]:
    """The way back from `held`: keys and values by the names of a layer's leaves."""
    if not isinstance(k, quantized.Rounded):
        return {"k": k, "v": v}
    values, scales = {"k": k.values, "v": v.values}, (k.scales, v.scales)
    return values | dict(zip(("k_scale", "v_scale"), scales, strict=True))


@functools.partial(jax.jit, static_argnames="rule", inline=True)
def write(
    leaf: Num[Array, "*B K S H"],
    new: Num[Array, "*B K T H"],
    positions: Int[Array, "*B"],
    counts: Int[Array, "*B"],
    rule: SlotRule = SlotRule(),
) -> Num[Array, "*B K S H"]:
    """Stores the first `counts` tokens of each row of `new`, the first at `positions`.

    No other slot changes, whatever the positions: without a ring, tokens beyond the
    last slot are dropped. `T` may not exceed the ring. Done in place where XLA can.
    """
    new = new.astype(leaf.dtype)
    write_row = functools.partial(_write_row, rule=rule)
    several = leaf.ndim == 4

    def in_turn(leaf, new, positions, counts):
        def next_row(row, leaf):
            if not several:
                return write_row(leaf, new, positions, counts)
            return write_row(leaf, new[row], positions[row], counts[row], row=(row,))

        rows = leaf.shape[0] if several else jnp.minimum(counts, 1)
        return jax.lax.fori_loop(0, rows, next_row, leaf)

    # On TPU XLA would hold the leaf in another layout for the sake of a write, and copy
    # it there and back; the carry of a loop keeps its own.
    return jax.lax.platform_dependent(
        *(leaf, new, positions, counts),
        tpu=in_turn,
        default=jax.vmap(write_row) if several else write_row,
    )


def _write_row(leaf, new, position, count, rule: SlotRule, row: tuple[Any, ...] = ()):
    """Writes to a leaf of one row or, where `row` is its index, of several."""
    slots, length = leaf.shape[-2], new.shape[-2]
    if not rule.wraps:
        return _put(leaf, new[:, :slots], position, 0, count, row)
    ring = slots - rule.sinks
    assert length <= ring, f"{length} tokens in one write to a ring of {ring} slots"
    slot = _slot(position, slots, rule)
    leaf = _put(leaf, new, slot, 0, count, row)
    if length > 1:  # what passed the last slot goes on behind the sinks
        leaf = _put(leaf, new, slot - ring, rule.sinks, count, row)
    return leaf


def _slot(position, slots: int, rule: SlotRule):
    wrapped = rule.sinks + (position - rule.sinks) % (slots - rule.sinks)
    return jnp.where(position < rule.sinks, position, wrapped)


def _put(leaf, new, slot, lowest: int, count, row: tuple[Any, ...]):
    """Token i of `new` goes to `slot + i`, for i < count and slots from `lowest` on.

    `slot` may lie outside the leaf: the window is moved inside, and the tokens moved
    the other way within it. `dynamic_update_slice` alone would clamp the start and
    overwrite older tokens; here the window's old content is merged in.
    """
    slots, length = leaf.shape[-2], new.shape[-2]
    start = jnp.clip(slot, lowest, slots - length)
    index = jnp.arange(length) + (start - slot)
    keep = (index >= 0) & (index < count)
    if length > 1:
        new = jnp.take(new, index, axis=-2, mode="clip")
    at, sizes = (*row, 0, start, 0), (1,) * len(row) + new.shape
    at = tuple(jnp.asarray(index, start.dtype) for index in at)
    old = jax.lax.dynamic_slice(leaf, at, sizes)
    merged = jnp.where(keep[:, None], new, old)
    return jax.lax.dynamic_update_slice(leaf, merged, at)


def slot_positions(
    lengths: Int[Array, "*B"], slots: int, rule: SlotRule
) -> Int[Array, "*B S"]:
    """The position each slot holds after `lengths` tokens; -1 = empty."""
    last = lengths[..., None] - 1
    slot = jnp.broadcast_to(jnp.arange(slots), (*lengths.shape, slots))
    if not rule.wraps:
        return jnp.where(slot <= last, slot, -1)
    latest = last - (last - slot) % (slots - rule.sinks)
    position = jnp.where(slot < rule.sinks, slot, latest)
    first = jnp.minimum(slot, rule.sinks)  # no ring slot holds a sink
    return jnp.where((position >= first) & (position <= last), position, -1)


def can_rewind(
    config: ModelConfig, cache: Cache, policy: CachePolicy, reached: int, to: int
) -> bool:
    """Whether rows can go on from their first `to` tokens, by setting `lengths` alone.

    In a ring newer tokens have overwritten older ones; its spare slots let
    `prefill_chunk` tokens be taken back, and any before the first wrap. `reached` is
    the most tokens that a row has held since it was empty: those of a rewind before
    may still be in its slots.
    """
    if reached - to <= config.prefill_chunk:
        return True
    return not has_wrapped(config, cache, policy, reached)


def has_wrapped(
    config: ModelConfig, cache: Cache, policy: CachePolicy, reached: int
) -> bool:
    """Whether a leaf of rows that have held `reached` tokens gave up some of them."""
    rules = _rules(config, cache, policy)
    return any(rule.wraps and reached > slots for slots, rule in rules)


def insert(cache: Cache, row: int | Int[Array, ""], source: Cache) -> dict[str, Any]:
    """`cache` with row `row` replaced by the only row of `source`.

    `source` may have fewer slots, as long as its ring has not wrapped; the rest of the
    row is zeroed. A row that `cache` does not have changes nothing. Jittable.
    """

    def filled(leaf, new):
        if leaf.ndim == 1:
            return new[0]
        if new.shape[-2] > leaf.shape[-2]:
            raise ValueError(
                f"source: its {new.shape[-2]} slots are more than {leaf.shape[-2]}"
            )
        return jnp.pad(new, ((0, 0), (0, leaf.shape[-2] - new.shape[-2]), (0, 0)))

    return _with_row(cache, row, jax.tree.map(filled, dict(cache), dict(source)))


def copy_rows(
    cache: Cache,
    source: Cache,
    rows: Bool[Array, " B"],
    length: Int[Array, ""],
) -> dict[str, Any]:
    """`cache` with the chosen rows as the first `length` tokens of `source`'s only row.

    `source` holds `length` tokens or more, and could be rewound to them. It may have
    fewer slots, in leaves that have not wrapped, or more than `cache`, which has room
    for `length` tokens. Jittable.
    """

    def copied(leaf, new):
        if leaf.ndim == 1:
            return jnp.where(rows, length, leaf)
        slots = leaf.shape[-2]
        new = padded(new[..., :slots, :], slots)
        if leaf.ndim == 3:  # a single row's, without a batch axis
            return jnp.where(rows[0], new, leaf)
        return jnp.where(rows[:, None, None, None], new[None], leaf)

    return jax.tree.map(copied, dict(cache), dict(source))


def evict(cache: Cache, row: int | Int[Array, ""]) -> dict[str, Any]:
    """`cache` with row `row` empty, its slots zeroed. Jittable.

    Zeroed, not only forgotten: a NaN left in a masked slot would reach the sums of the
    row's next tokens. A row that `cache` does not have changes nothing.
    """
    return _with_row(cache, row, jax.tree.map(lambda leaf: 0, dict(cache)))


def _with_row(cache: Cache, row, values: Any) -> dict[str, Any]:
    """`cache` with each leaf's row `row` set to a value, if there is such a row."""
    rows = cache["lengths"].shape[0]
    there = (jnp.asarray(row) >= 0) & (jnp.asarray(row) < rows)
    target = jnp.where(there, row, rows)  # out of bounds, and dropped

    def put(leaf, value):
        if leaf.ndim == 3:  # a single row's, without a batch axis
            return jnp.where(there, value, leaf)
        return leaf.at[target].set(value, mode="drop")

    return jax.tree.map(put, dict(cache), values)


def grow_cache(
    cache: Cache,
    capacity: int,
    *,
    config: ModelConfig | None = None,
    policy: CachePolicy = CachePolicy(),
) -> dict[str, Any]:
    """The same rows with room for `capacity` tokens each; `cache` is dead afterwards.

    Leaves are grown and freed one by one: the peak is the new cache and one old leaf.
    Leaves that have wrapped are a sliding window's, and stay as they are.

    Args:
      cache: outside a trace, before the first wrap of a ring.
      capacity: tokens a row can hold, or see in a ring.
      config: tells the slots of a ring, where it is required, and of a sliding window.
        Without it `max_kv_cache_len` is not checked here, and sliding-window leaves
        may grow beyond what their window needs.
      policy: the one that the cache was made with; a ring grown as another policy has
        a smaller window than asked for.

    Raises:
      CacheOverflowError: if `capacity` is less than a row holds, or a ring wrapped.
      ConfigError: if a ring is grown without its config.
    """
    check_alive(cache)
    bounds = validation.Range(1, MAX_POSITIONS)
    capacity = validation.whole_number("capacity", capacity, bounds)
    longest = int(np.max(np.asarray(cache["lengths"])))
    ring = policy.overflow == "ring"
    if ring and config is None:
        raise ConfigError("config=None: growing a ring needs the config; pass config=")
    layers = len(cache) - 1
    wanted = [capacity] * layers
    if config is not None:
        wanted = num_slots(config, checked_capacity(config, capacity, policy), policy)
    if longest > capacity and not ring:
        raise CacheOverflowError(
            f"capacity={capacity}: a row holds {longest} tokens already"
        )

    def grow(leaf, wanted: int):
        slots = leaf.shape[-2]
        if slots >= wanted:
            return leaf
        if longest > slots and ring:
            raise CacheOverflowError(
                f"a ring of {slots} slots has wrapped after {longest} tokens: "
                "it can only grow before that"
            )
        if longest > slots:
            return leaf
        grown = jax.block_until_ready(padded(leaf, wanted))
        leaf.delete()
        return grown

    grown = dict(cache)
    for layer in range(layers):
        name = f"layers_{layer}"
        added = functools.partial(grow, wanted=wanted[layer])
        grown[name] = jax.tree.map(added, cache[name])
    return grown


def padded(half: Any, slots: int) -> Any:
    """Keys or values with empty slots behind their own, `slots` in all.

    As a leaf `[*B, K, S, H]`, or with its scales, as in `held`.
    """

    def pad(leaf: Num[Array, "*B K S H"]) -> Num[Array, "*B K slots H"]:
        added = [(0, 0)] * (leaf.ndim - 2) + [(0, slots - leaf.shape[-2]), (0, 0)]
        return jnp.pad(leaf, added)

    return jax.tree.map(pad, half)


def _layers(config: ModelConfig, cache: Cache) -> list[Mapping[str, Any]]:
    """Each layer's leaves by name."""
    return [cache[f"layers_{n}"]["attention"] for n in range(config.num_layers)]


def _heads(config: ModelConfig, cache: Cache) -> set[tuple[int, int]]:
    """All pairs of key/value heads and head dim that there are."""
    found = [layer[name] for layer in _layers(config, cache) for name in "kv"]
    return {(leaf.shape[-3], leaf.shape[-1]) for leaf in found}


def _slots(config: ModelConfig, cache: Cache) -> list[int]:
    """Slots of each layer's leaves."""
    return [layer["k"].shape[-2] for layer in _layers(config, cache)]


def _rules(
    config: ModelConfig, cache: Cache, policy: CachePolicy
) -> list[tuple[int, SlotRule]]:
    """Each layer's slots and rule."""
    return [
        (slots, slot_rule(config, config.window(layer), slots, policy))
        for layer, slots in enumerate(_slots(config, cache))
    ]
