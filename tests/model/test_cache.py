"""The KV cache against a plain model: for each row, slot -> (position, value).

The model knows the documented rule of a slot and nothing of how slots are written. A
token's value is a number of its own, so that any slot tells which token it holds.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import stateful as sf
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax.config import MAX_POSITIONS
from minillm_jax.model import cache as kv

K, H = 2, 2  # key/value heads and head dim of every leaf here
PLAIN = kv.SlotRule()
RING = kv.SlotRule(wraps=True, window=3)
SINKS = kv.SlotRule(wraps=True, window=4, sinks=2)
STOP_POLICY = mj.CachePolicy(overflow="stop")
RING_POLICY = mj.CachePolicy(overflow="ring")
SINKS_POLICY = mj.CachePolicy(overflow="ring", num_sinks=2)


def model_slot(position, slots, rule):
    """The documented rule; None = not stored."""
    if not rule.wraps:
        return position if position < slots else None
    if position < rule.sinks:
        return position
    return rule.sinks + (position - rule.sinks) % (slots - rule.sinks)


def token_values(ids):
    """Numbers of tokens as content [..., K, len(ids), H], exact in float32."""
    ids = np.asarray(ids, np.float32)[..., None, :, None]
    per_head = np.arange(K * H, dtype=np.float32).reshape(K, 1, H)
    return ids * (K * H) + per_head


write = jax.jit(kv.write, static_argnames="rule")
slot_positions = jax.jit(kv.slot_positions, static_argnames=("slots", "rule"))
insert, evict = jax.jit(kv.insert), jax.jit(kv.evict)


# write


LAYOUTS = (
    *((1, PLAIN), (5, PLAIN)),
    *((3, RING), (6, RING)),
    *((3, SINKS), (7, SINKS)),
)


@st.composite
def write_cases(draw):
    """slots, rule, new tokens per row, positions [B], counts [B]; B = 1 to 3."""
    slots, rule = draw(st.sampled_from(LAYOUTS))
    ring = slots - rule.sinks
    longest = ring if rule.wraps else 9
    length = draw(st.sampled_from([n for n in (4, 2, 9, 1) if n <= longest]))
    back, laps = st.integers(0, length), st.integers(0, 2)
    at_the_end = st.builds(lambda b, n: max(0, slots - b + n * ring), back, laps)
    near, far = st.integers(0, 3 * slots), st.integers(0, MAX_POSITIONS - length)
    position = st.one_of(at_the_end, near, at_the_end, far)
    count = st.just(length) | st.integers(0, length)
    rows = draw(
        st.one_of([st.tuples(*[st.tuples(position, count)] * n) for n in (1, 2, 3)])
    )
    positions, counts = zip(*rows, strict=True)
    return slots, rule, length, positions, counts


def check_write(case):
    slots, rule, length, positions, counts = case
    rows = len(positions)
    leaf = -1.0 - np.arange(rows * K * slots * H, dtype=np.float32)
    leaf = leaf.reshape(rows, K, slots, H)
    new = token_values(np.arange(rows * length).reshape(rows, length))
    expected = leaf.copy()
    for row, (position, count) in enumerate(zip(positions, counts, strict=True)):
        for i in range(count):
            slot = model_slot(position + i, slots, rule)
            if slot is not None:
                expected[row, :, slot] = new[row, :, i]
    given = (leaf, new, np.int32(positions), np.int32(counts))
    if rows == 1:  # one row has no batch axis
        given, expected = [x[0] for x in given], expected[0]
    written = write(*map(jnp.asarray, given), rule=rule)
    np.testing.assert_array_equal(written, expected)


@settings(max_examples=150, deadline=None)
@given(write_cases())
def test_write_stores_exactly_counts_tokens_and_touches_no_other_slot(case):
    check_write(case)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(write_cases())
def test_write_stores_exactly_counts_tokens_and_touches_no_other_slot_deep(case):
    check_write(case)


@pytest.mark.parametrize("counts", [0, 1, 4])
@pytest.mark.parametrize("position", range(9))
@pytest.mark.parametrize("layout", [(6, PLAIN), (6, RING), (6, SINKS)], ids=str)
def test_write_is_exact_at_every_position_of_one_row(layout, position, counts):
    check_write((*layout, 4, [position], [counts]))


def test_write_of_a_prompt_longer_than_the_cache_keeps_its_first_tokens():
    leaf = jnp.zeros((K, 5, H))
    written = write(leaf, token_values(range(1, 10)), jnp.int32(0), jnp.int32(9))
    np.testing.assert_array_equal(written, token_values([1, 2, 3, 4, 5]))


@pytest.mark.parametrize("position", [5, 6, 100, MAX_POSITIONS])
def test_full_row_beside_an_active_one_does_not_change(position):
    leaf = jnp.asarray(token_values([range(5), range(10, 15)]))
    positions, counts = jnp.int32([position, 2]), jnp.int32([1, 1])
    written = write(leaf, token_values([[77], [88]]), positions, counts)
    np.testing.assert_array_equal(written[0], leaf[0])
    np.testing.assert_array_equal(written[1], token_values([10, 11, 88, 13, 14]))


def test_dynamic_update_slice_clamps_and_write_does_not():
    """What `write` is for: StableHLO moves a window that passes the end inside."""
    held, new = jnp.asarray(token_values([1, 2, 3, 4, 5])), token_values([8, 9])
    clamped = jax.lax.dynamic_update_slice(held, jnp.asarray(new), (0, 4, 0))
    np.testing.assert_array_equal(clamped, token_values([1, 2, 3, 8, 9]))  # 4 is lost
    written = write(held, new, jnp.int32(4), jnp.int32(2))
    np.testing.assert_array_equal(written, token_values([1, 2, 3, 4, 8]))
    padded = write(held, new, jnp.int32(4), jnp.int32(1))
    np.testing.assert_array_equal(padded, token_values([1, 2, 3, 4, 8]))
    past = write(held, new, jnp.int32(5), jnp.int32(2))
    np.testing.assert_array_equal(past, held)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_write_stores_in_the_dtype_of_the_leaf(dtype):
    leaf = jnp.zeros((K, 5, H), dtype)
    written = write(leaf, token_values([1, 2]) / 3, jnp.int32(1), jnp.int32(2))
    assert written.dtype == dtype
    expected = jnp.asarray(token_values([1, 2]) / 3, dtype)
    np.testing.assert_array_equal(written[:, 1:3], expected)


# slot_positions


def model_positions(length, slots, rule):
    """The position each slot holds after `length` tokens, written one by one."""
    held = np.full(slots, -1)
    recent = range(max(0, length - 2 * slots), length)
    for position in (*range(min(length, slots)), *recent):
        slot = model_slot(position, slots, rule)
        if slot is not None:
            held[slot] = position
    return held


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(0, 30) | st.integers(0, MAX_POSITIONS), min_size=3, max_size=3)
    | st.integers(0, MAX_POSITIONS),
)
def test_slot_positions_are_those_of_tokens_written_one_by_one(layout, lengths):
    slots, rule = layout
    held = slot_positions(jnp.int32(lengths), slots, rule)
    chex.assert_shape(held, (*np.shape(lengths), slots))
    for row, length in zip(np.atleast_2d(held), np.ravel(lengths), strict=True):
        np.testing.assert_array_equal(row, model_positions(length, slots, rule))


def test_slot_positions_of_the_drawing_in_the_module():
    rule = kv.SlotRule(wraps=True, window=8, sinks=2)
    held = slot_positions(jnp.int32([12]), 8, rule)
    np.testing.assert_array_equal(held[0], [0, 1, 8, 9, 10, 11, 6, 7])


# Sequences of operations


def config_of(window=None, **changes):
    config = mj.ModelConfig(
        max_seq_len=8,
        max_kv_cache_len=12,
        dim_model=K * H,
        num_heads=K,
        num_layers=1,
        dim_ff=4,
        vocab_size=5,
        prefill_chunk=3,
        sliding_window=window,
        dtype="float32",
    )
    return config.replace(**changes)


# A window of 5 has a ring of 7 slots: more than the smallest cache, fewer than others.
MIXED = config_of(window=5, num_layers=2, global_layers=(1,))
KINDS = {
    "plain": (config_of(), STOP_POLICY),
    "ring": (config_of(), RING_POLICY),
    "sinks": (config_of(), SINKS_POLICY),
    "window": (config_of(window=4), STOP_POLICY),
    "window_ring": (config_of(window=4), RING_POLICY),
    "mixed": (MIXED, STOP_POLICY),
    "mixed_ring": (MIXED, RING_POLICY),
}
CAPACITIES = (4, 7, 12)


def leaves(cache, layer=0):
    return cache[f"layers_{layer}"]["attention"]


class Row:
    """A row of the model: how many tokens it has seen, and what its slots hold."""

    def __init__(self, layers):
        self.length = 0
        self.held = [
            {} for _ in range(layers)
        ]  # of each layer: slot -> (position, token)

    def append(self, tokens, layers):
        for token in tokens:
            for held, (slots, rule) in zip(self.held, layers, strict=True):
                slot = model_slot(self.length, slots, rule)
                if slot is not None:
                    held[slot] = (self.length, token)
            self.length += 1


class CacheMachine(sf.RuleBasedStateMachine):
    """Random appends, insertions, evictions and growths of a cache and of its model."""

    @sf.initialize(
        kind=st.sampled_from([*sorted(KINDS), "mixed", "mixed_ring"]),
        batch_size=st.sampled_from([1, 2]),
        capacity=st.sampled_from(CAPACITIES),
    )
    def start(self, kind, batch_size, capacity):
        self.config, self.policy = KINDS[kind]
        self.rows = [Row(self.config.num_layers) for _ in range(batch_size)]
        self.tokens = iter(range(1, 10**6))
        self.cache = self.empty(batch_size, capacity)

    def empty(self, batch_size, capacity):
        return mj.init_cache(self.config, batch_size, capacity, policy=self.policy)

    def layers(self, cache):
        """Each layer's slots and rule."""
        found = []
        for layer in range(self.config.num_layers):
            slots, window = (
                leaves(cache, layer)["k"].shape[-2],
                self.config.window(layer),
            )
            rule = kv.slot_rule(self.config, window, slots, self.policy)
            found.append((slots, rule))
        return found

    def slots(self, cache):
        return np.array([slots for slots, _ in self.layers(cache)])

    def appended(self, cache, rows, width, counts):
        """The cache after `counts` new tokens for each row, in a call of `width`."""
        room = kv.token_capacity(self.config, cache, self.policy)
        first = np.asarray(cache["lengths"])
        fits = np.minimum(counts, room - first)
        ids = np.zeros((len(rows), width))
        for row, count, out in zip(rows, fits, ids, strict=True):
            out[:] = [next(self.tokens) for _ in range(width)]
            row.append(out[:count], self.layers(cache))
        new, after = token_values(ids), {"lengths": jnp.int32(first + fits)}
        for layer, (_, rule) in enumerate(self.layers(cache)):
            # As the module does; but without a ring `write` drops what does not fit.
            given = (new, first, np.int32(fits if rule.wraps else counts))
            if len(rows) == 1:
                given = [x[0] for x in given]
            given = [jnp.asarray(x) for x in given]
            held = leaves(cache, layer)
            k = write(held["k"], *given, rule=rule)
            v = write(held["v"], -given[0], *given[1:], rule=rule)
            after[f"layers_{layer}"] = {"attention": {"k": k, "v": v}}
        return after

    @sf.rule(width=st.sampled_from([1, 3]), data=st.data())
    def append(self, width, data):
        counts = [data.draw(st.integers(0, width)) for _ in self.rows]
        self.cache = self.appended(self.cache, self.rows, width, counts)

    @sf.rule()
    def append_full_chunk(self):
        counts = [3] * len(self.rows)
        self.cache = self.appended(self.cache, self.rows, 3, counts)

    @sf.rule(row=st.integers(0, 1), fewer=st.booleans(), tokens=st.integers(0, 15))
    def insert(self, row, fewer, tokens):
        row %= len(self.rows)
        slots = self.slots(self.cache)
        sources = [self.empty(1, capacity) for capacity in CAPACITIES]
        allowed = [source for source in sources if np.all(self.slots(source) <= slots)]
        source = allowed[0] if fewer else allowed[-1]
        # Where a leaf has fewer slots, before its ring has wrapped.
        smaller = [
            n for n, most in zip(self.slots(source), slots, strict=True) if n < most
        ]
        tokens = min([tokens, *smaller])
        single = Row(self.config.num_layers)
        while single.length < tokens:
            before = single.length
            source = self.appended(source, [single], 3, [min(3, tokens - before)])
            if single.length == before:  # a full sliding-window cache
                break
        others = self.other_rows(row)
        self.cache = insert(self.cache, row, source)
        self.rows[row] = single
        chex.assert_trees_all_equal(self.other_rows(row), others)

    @sf.rule(row=st.integers(0, 1))
    def evict(self, row):
        row %= len(self.rows)
        others = self.other_rows(row)
        self.cache = evict(self.cache, row)
        self.rows[row] = Row(self.config.num_layers)
        chex.assert_trees_all_equal(self.other_rows(row), others)
        for leaf in jax.tree.leaves(self.cache):
            assert not np.any(leaf if leaf.ndim == 3 else leaf[row])

    @sf.rule(capacity=st.sampled_from(CAPACITIES), with_config=st.booleans())
    def grow(self, capacity, with_config):
        """Leaf by leaf: one that has wrapped is a sliding window's and stays."""
        ring = self.policy.overflow == "ring"
        config = self.config if with_config or ring else None
        grow = functools.partial(
            mj.grow_cache, self.cache, capacity, config=config, policy=self.policy
        )
        slots = self.slots(self.cache)
        wanted = np.full_like(slots, capacity)
        if config is not None:
            wanted = np.array(kv.num_slots(config, capacity, self.policy))
        longest = max(row.length for row in self.rows)
        old = [leaves(self.cache, layer) for layer in range(len(slots))]
        refused = slots < np.minimum(wanted, longest) if ring else longest > capacity
        if np.any(refused):
            with pytest.raises(mj.CacheOverflowError):
                grow()
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            return
        before = jax.tree.map(np.asarray, old)
        self.cache = grow()
        grown = (slots < wanted) & (longest <= slots)
        assert (
            self.slots(self.cache).tolist() == np.where(grown, wanted, slots).tolist()
        )
        for layer, (was, now) in enumerate(zip(before, grown, strict=True)):
            for name, leaf in leaves(self.cache, layer).items():
                assert old[layer][name].is_deleted() == now
                np.testing.assert_array_equal(leaf[..., : slots[layer], :], was[name])
                assert not np.any(leaf[..., slots[layer] :, :])

    def other_rows(self, row):
        if len(self.rows) == 1:
            return ()
        return jax.tree.map(lambda leaf: np.asarray(leaf)[1 - row], self.cache)

    @sf.invariant()
    def slots_hold_what_the_model_says(self):
        if not hasattr(self, "cache"):
            return
        lengths = [row.length for row in self.rows]
        np.testing.assert_array_equal(self.cache["lengths"], lengths)
        for layer, (slots, rule) in enumerate(self.layers(self.cache)):
            held = np.asarray(slot_positions(self.cache["lengths"], slots, rule))
            contents = jax.tree.map(np.asarray, leaves(self.cache, layer))
            if len(self.rows) == 1:
                contents = jax.tree.map(lambda leaf: leaf[None], contents)
            for number, row in enumerate(self.rows):
                model = row.held[layer]
                positions = {slot: position for slot, (position, _) in model.items()}
                found = {slot: p for slot, p in enumerate(held[number]) if p >= 0}
                assert found == positions
                order = sorted(model)
                expected = token_values([model[slot][1] for slot in order])
                for leaf, sign in ((contents["k"], 1), (contents["v"], -1)):
                    np.testing.assert_array_equal(
                        leaf[number][:, order], sign * expected
                    )


def run_machine(max_examples):
    sf.run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=max_examples, stateful_step_count=15, deadline=None
        ),
    )


def test_append_insert_evict_and_grow_agree_with_a_list_of_positions():
    run_machine(80)


@pytest.mark.slow
def test_append_insert_evict_and_grow_agree_with_a_list_of_positions_deep():
    run_machine(2000)


# init_cache, sizes


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16"])
def test_empty_cache_has_the_documented_names_shapes_and_dtypes(
    tiny_config, batch_size, cache_dtype
):
    config = tiny_config.replace(cache_dtype=cache_dtype, dtype="float32")
    cache = mj.init_cache(config, batch_size)
    assert set(cache) == {"lengths", "layers_0", "layers_1"}
    chex.assert_shape(cache["lengths"], (batch_size,))
    assert cache["lengths"].dtype == jnp.int32
    for layer in ("layers_0", "layers_1"):
        assert set(cache[layer]) == {"attention"}
        assert set(cache[layer]["attention"]) == {"k", "v"}
        for leaf in cache[layer]["attention"].values():
            rows = () if batch_size == 1 else (batch_size,)
            chex.assert_shape(leaf, (*rows, 2, 96, 8))
            assert leaf.dtype == (cache_dtype if cache_dtype != "auto" else "float32")
    for leaf in jax.tree.leaves(cache):
        assert not np.any(leaf)


def test_leaves_of_an_empty_cache_are_buffers_of_their_own(tiny_config):
    """Donation and growth free them one by one."""
    leaves = jax.tree.leaves(mj.init_cache(tiny_config, 2, 4))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("policy", [STOP_POLICY, RING_POLICY], ids=["stop", "ring"])
def test_cache_shapes_are_those_of_the_cache_and_allocate_nothing(tiny_config, policy):
    shapes = kv.cache_shapes(tiny_config, 3, 20, policy=policy)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        shapes, mj.init_cache(tiny_config, 3, 20, policy=policy)
    )
    huge = mj.Configs.xlarge().replace(max_kv_cache_len=MAX_POSITIONS)
    leaf = kv.cache_shapes(huge, 64)["layers_31"]["attention"]["v"]
    assert leaf.shape == (64, 64, MAX_POSITIONS, 64)


@pytest.mark.parametrize(
    ("overflow", "capacity", "window", "slots"),
    [
        ("error", None, None, 96),
        ("stop", 20, None, 20),
        ("ring", None, None, 96 + 15),  # capacity + prefill_chunk - 1
        ("ring", 20, None, 20 + 15),
        ("ring", 1, None, 16),
        ("error", None, 8, 8 + 15),  # window + prefill_chunk - 1
        ("error", 20, 8, 20),  # never full: no need of a ring
        ("error", 24, 8, 23),
        ("ring", None, 8, 23),
        ("ring", 4, 8, 4 + 15),
        ("error", None, 96, 96),
    ],
)
def test_slots_are_what_the_policy_and_the_window_need(
    tiny_config, overflow, capacity, window, slots
):
    config = tiny_config.replace(sliding_window=window)
    policy = mj.CachePolicy(overflow=overflow)
    cache = mj.init_cache(config, 1, capacity, policy=policy)
    assert cache["layers_1"]["attention"]["k"].shape == (2, slots, 8)


@pytest.mark.parametrize(
    ("overflow", "capacity", "window", "tokens"),
    [
        ("error", None, None, 96),
        ("stop", 20, None, 20),
        ("ring", 20, None, MAX_POSITIONS),
        ("error", 20, 8, 20),
        ("error", 24, 8, 96),  # a full ring has no end but the config's
        ("stop", None, 8, 96),
        ("ring", None, 8, MAX_POSITIONS),
    ],
)
def test_token_capacity_is_where_a_row_is_full(
    tiny_config, overflow, capacity, window, tokens
):
    config = tiny_config.replace(sliding_window=window)
    policy = mj.CachePolicy(overflow=overflow)
    cache = kv.cache_shapes(config, 2, capacity, policy=policy)
    assert kv.token_capacity(config, cache, policy) == tokens


@pytest.mark.parametrize(
    ("policy", "capacity", "window", "rule"),
    [
        (STOP_POLICY, 20, None, kv.SlotRule()),
        (RING_POLICY, 20, None, kv.SlotRule(wraps=True, window=20)),
        (SINKS_POLICY, 20, None, kv.SlotRule(wraps=True, window=20, sinks=2)),
        (STOP_POLICY, None, 8, kv.SlotRule(wraps=True, window=8)),
        (STOP_POLICY, 24, 8, kv.SlotRule(wraps=True, window=8)),
        (STOP_POLICY, 20, 8, kv.SlotRule(wraps=False, window=8)),  # too few for a ring
        (RING_POLICY, None, 8, kv.SlotRule(wraps=True, window=8)),
        (RING_POLICY, 4, 8, kv.SlotRule(wraps=True, window=4)),
    ],
)
def test_slot_rule_follows_from_config_leaf_and_policy(
    tiny_config, policy, capacity, window, rule
):
    config = tiny_config.replace(sliding_window=window)
    cache = kv.cache_shapes(config, 1, capacity, policy=policy)
    slots = cache["layers_0"]["attention"]["k"].shape[-2]
    assert kv.slot_rule(config, window, slots, policy) == rule


@pytest.mark.parametrize(
    ("overflow", "capacity", "slots", "rules", "tokens"),
    [
        ("stop", None, (23, 96), ((True, 8), (False, None)), 96),
        ("stop", 24, (23, 24), ((True, 8), (False, None)), 24),
        ("stop", 23, (23, 23), ((True, 8), (False, None)), 23),
        ("stop", 20, (20, 20), ((False, 8), (False, None)), 20),  # too few for a ring
        ("ring", None, (23, 111), ((True, 8), (True, 96)), MAX_POSITIONS),
        ("ring", 20, (23, 35), ((True, 8), (True, 20)), MAX_POSITIONS),
        ("ring", 8, (23, 23), ((True, 8), (True, 8)), MAX_POSITIONS),
        (
            "ring",
            4,
            (19, 19),
            ((True, 4), (True, 4)),
            MAX_POSITIONS,
        ),  # below the window
    ],
)
def test_each_layer_of_a_mixed_model_has_its_own_slots_and_rule(
    tiny_config, overflow, capacity, slots, rules, tokens
):
    """Layers 0 and 2 see 8 tokens and have chunks of 16, layer 1 sees all."""
    config = tiny_config.replace(num_layers=3, sliding_window=8, global_layers=(1,))
    policy = mj.CachePolicy(overflow=overflow)
    assert kv.num_slots(config, capacity or 96, policy) == [*slots, slots[0]]
    cache = kv.cache_shapes(config, 2, capacity, policy=policy)
    found = [leaves(cache, layer)["v"].shape[-2] for layer in range(3)]
    assert found == [*slots, slots[0]]
    for layer, slots_here in enumerate(found):
        wraps, window = rules[layer % 2]
        rule = kv.slot_rule(config, config.window(layer), slots_here, policy)
        assert rule == kv.SlotRule(wraps=wraps, window=window)
    assert kv.token_capacity(config, cache, policy) == tokens
    kv.check_cache(config, cache, policy)


@pytest.mark.parametrize(
    ("overflow", "capacity", "held", "back", "rewinds"),
    [
        ("stop", 96, 23, 23, True),  # the local ring has not wrapped
        ("stop", 96, 24, 17, False),
        ("stop", 96, 24, 16, True),  # a chunk, anywhere
        ("stop", 20, 20, 20, True),
        ("ring", 96, 24, 17, False),
        ("ring", 96, 500, 16, True),
        ("ring", 4, 19, 19, True),
        ("ring", 4, 20, 17, False),
    ],
)
def test_a_mixed_cache_goes_back_as_far_as_its_shortest_ring(
    tiny_config, overflow, capacity, held, back, rewinds
):
    config = tiny_config.replace(sliding_window=8, global_layers=(0,))
    policy = mj.CachePolicy(overflow=overflow)
    cache = kv.cache_shapes(config, 1, capacity, policy=policy)
    assert kv.can_rewind(config, cache, policy, held, held - back) == rewinds


def test_chunk_longer_than_a_small_cache_with_a_window_is_written(tiny_config):
    """It has fewer slots than its ring would: it cannot wrap, and takes any chunk."""
    rule = kv.slot_rule(tiny_config.replace(sliding_window=8), 8, 4, STOP_POLICY)
    check_write((4, rule, tiny_config.prefill_chunk, [0], [3]))
    check_write((4, rule, tiny_config.prefill_chunk, [2, 0], [2, 4]))


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [(1, 1), (2, 2), (3, 4), (32, 32), (33, 64), (64, 64), (65, 96), (96, 96)],
)
def test_capacity_bucket_is_a_power_of_two_or_all_there_is(
    tiny_config, tokens, capacity
):
    assert kv.capacity_bucket(tiny_config, tokens) == capacity


# insert, evict: what the machine does not try


def filled(cache, first=1):
    """Every slot full, of distinct numbers."""
    numbers = iter(range(first, 100))
    return jax.tree.map(
        lambda leaf: (
            jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
            + next(numbers) * 1000
        ),
        cache,
    )


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("slots", [8, 5])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_insert_replaces_one_row_and_leaves_the_others(row, slots, traced):
    config = config_of()
    cache = filled(mj.init_cache(config, 3, 8))
    source = filled(mj.init_cache(config, 1, slots), first=50)
    after = (insert if traced else kv.insert)(cache, row, source)
    for name, leaf in leaves(after).items():
        expected = np.array(leaves(cache)[name])
        expected[row] = 0
        expected[row, :, :slots] = leaves(source)[name]
        np.testing.assert_array_equal(leaf, expected)
    lengths = np.array(cache["lengths"])
    lengths[row] = source["lengths"][0]
    np.testing.assert_array_equal(after["lengths"], lengths)


def test_insert_into_a_batch_of_one_replaces_it():
    config = config_of()
    source = filled(mj.init_cache(config, 1, 8), first=50)
    after = insert(filled(mj.init_cache(config, 1, 8)), 0, source)
    chex.assert_trees_all_equal(after, source)


def test_insert_does_not_take_more_slots_than_there_are():
    config = config_of()
    with pytest.raises((TypeError, ValueError)):
        kv.insert(mj.init_cache(config, 2, 5), 0, mj.init_cache(config, 1, 8))


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(("batch_size", "row"), [(1, 0), (3, 0), (3, 2)])
def test_evict_zeroes_one_row_even_of_nan_and_leaves_the_others(
    batch_size, row, traced
):
    cache = filled(mj.init_cache(config_of(), batch_size, 5))
    held = leaves(cache)
    index = np.s_[0, 0, 0] if batch_size == 1 else np.s_[row, 0, 0, 0]
    cache["layers_0"] = {"attention": held | {"v": held["v"].at[index].set(jnp.nan)}}
    after = (evict if traced else kv.evict)(cache, row)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        expected = np.array(old)
        expected[() if new.ndim == 3 else row] = 0
        np.testing.assert_array_equal(new, expected)


# grow_cache: what the machine does not try


def held_cache(config, tokens, *, capacity=None, policy=STOP_POLICY, rows=2):
    """A cache with room for `capacity` whose rows have seen `tokens`."""
    cache = filled(mj.init_cache(config, rows, capacity, policy=policy))
    return cache | {"lengths": jnp.full((rows,), tokens, jnp.int32)}


def test_growing_needs_no_config_without_a_ring():
    cache = held_cache(config_of(), 4, capacity=4)
    before = jax.tree.map(np.array, cache)
    grown = mj.grow_cache(cache, 12)
    np.testing.assert_array_equal(grown["lengths"], before["lengths"])
    for name, leaf in leaves(grown).items():
        chex.assert_shape(leaf, (2, K, 12, H))
        np.testing.assert_array_equal(leaf[:, :, :4], leaves(before)[name])
        assert not np.any(leaf[:, :, 4:])


def test_growing_takes_one_leaf_more_than_the_new_cache(tiny_config, monkeypatch):
    cache = mj.init_cache(tiny_config, 2, 4)
    old = [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim > 1]
    alive, pad = [], jnp.pad

    def counting_pad(*args, **kwargs):
        alive.append(sum(not leaf.is_deleted() for leaf in old))
        return pad(*args, **kwargs)

    monkeypatch.setattr(jnp, "pad", counting_pad)
    mj.grow_cache(cache, 8)
    assert alive == [4, 3, 2, 1]  # each old leaf is gone before the next one grows
    assert all(leaf.is_deleted() for leaf in old)


def test_growing_to_what_it_has_changes_nothing():
    cache = held_cache(config_of(), 4, capacity=7)
    for capacity in (4, 6, 7):
        same = mj.grow_cache(cache, capacity)
        chex.assert_trees_all_equal(same, cache)
        assert leaves(same)["k"].shape[-2] == 7


@pytest.mark.parametrize("config", [None, config_of()], ids=["no_config", "config"])
def test_growing_below_what_is_held_is_an_overflow(config):
    cache = held_cache(config_of(), 6, capacity=7)
    with pytest.raises(mj.CacheOverflowError, match=r"capacity=5.*holds 6 tokens"):
        mj.grow_cache(cache, 5, config=config)
    assert not leaves(cache)["k"].is_deleted()


def test_growing_beyond_the_config_is_a_config_error():
    with pytest.raises(mj.ConfigError, match=r"in \[1, 12\]"):
        mj.grow_cache(held_cache(config_of(), 1, capacity=4), 13, config=config_of())


def test_a_ring_grows_by_its_config_before_it_wraps():
    config = config_of()
    fresh = held_cache(config, 6, capacity=4, policy=SINKS_POLICY)  # 6 slots
    with pytest.raises(mj.ConfigError, match="pass config="):
        mj.grow_cache(fresh, 7, policy=SINKS_POLICY)
    content = np.array(leaves(fresh)["k"])
    grown = mj.grow_cache(fresh, 7, config=config, policy=SINKS_POLICY)
    chex.assert_shape(leaves(grown)["k"], (2, K, 7 + 2, H))
    np.testing.assert_array_equal(leaves(grown)["k"][:, :, :6], content)


def test_a_ring_that_wrapped_does_not_grow():
    config = config_of()
    cache = held_cache(config, 7, capacity=4, policy=SINKS_POLICY)
    with pytest.raises(mj.CacheOverflowError, match="wrapped after 7 tokens"):
        mj.grow_cache(cache, 7, config=config, policy=SINKS_POLICY)
    assert not leaves(cache)["k"].is_deleted()
    same = mj.grow_cache(cache, 4, config=config, policy=SINKS_POLICY)
    chex.assert_trees_all_equal(same, cache)


@pytest.mark.parametrize("with_config", [True, False])
def test_leaves_of_a_sliding_window_that_wrapped_stay_as_they_are(with_config):
    config = config_of(window=4)
    cache = held_cache(config, 10)  # 6 slots, wrapped
    grown = mj.grow_cache(cache, 12, config=config if with_config else None)
    chex.assert_trees_all_equal(grown, cache)
    assert leaves(grown)["k"].shape[-2] == 6


def test_a_sliding_window_grows_to_its_ring_and_no_further():
    config = config_of(window=4)
    grown = mj.grow_cache(held_cache(config, 4, capacity=4), 12, config=config)
    chex.assert_shape(leaves(grown)["k"], (2, K, 6, H))
    assert kv.token_capacity(config, grown, STOP_POLICY) == 12


def test_a_mixed_cache_grows_where_a_layer_has_not_wrapped():
    """The local ring, of 7 slots, has; the layer that sees everything has not."""
    cache = held_cache(MIXED, 9, capacity=10)
    contents = jax.tree.map(np.array, cache)
    grown = mj.grow_cache(cache, 12, config=MIXED)
    for layer, (old, new) in enumerate([(7, 7), (10, 12)]):
        for name, leaf in leaves(grown, layer).items():
            chex.assert_shape(leaf, (2, K, new, H))
            np.testing.assert_array_equal(
                leaf[:, :, :old], leaves(contents, layer)[name]
            )
    assert kv.token_capacity(MIXED, grown, STOP_POLICY) == 12


# What is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"overflow": "rings"}, "must be one of error, stop, ring; did you mean ring?"),
        ({"overflow": ""}, "must be one of error, stop, ring"),
        ({"num_sinks": 2}, "num_sinks=2: needs overflow='ring'; write 0"),
        ({"num_sinks": 2, "overflow": "stop"}, "needs overflow='ring'"),
        ({"num_sinks": -1, "overflow": "ring"}, "num_sinks=-1: must be a number in"),
        ({"num_sinks": True, "overflow": "ring"}, "must be a whole number"),
    ],
)
def test_wrong_policy_is_a_config_error(fields, says):
    with pytest.raises(mj.ConfigError) as caught:
        mj.CachePolicy(**fields)
    (problem,) = caught.value.problems
    assert says in problem


def test_policy_is_frozen_hashable_and_has_the_documented_defaults():
    policy = mj.CachePolicy()
    assert (policy.overflow, policy.num_sinks) == ("error", 0)
    assert hash(policy) == hash(mj.CachePolicy(overflow="error"))
    assert policy != RING_POLICY
    with pytest.raises(AttributeError):
        policy.num_sinks = 1


@pytest.mark.parametrize(
    ("given", "policy", "says"),
    [
        ({"batch_size": 0}, STOP_POLICY, "batch_size=0: must be a number"),
        ({"batch_size": -3}, STOP_POLICY, "batch_size=-3"),
        ({"capacity": 0}, STOP_POLICY, "capacity=0: must be a number in"),
        ({"capacity": -1}, STOP_POLICY, "capacity=-1: must be a number in"),
        ({"capacity": 13}, STOP_POLICY, "capacity=13: must be a number in"),
        ({"capacity": 10**30}, RING_POLICY, "in .1, 12"),
        ({"capacity": 2}, SINKS_POLICY, "num_sinks=2: must be below the capacity of 2"),
        ({"capacity": 1}, SINKS_POLICY, "num_sinks=2: must be below the capacity of 1"),
    ],
)
def test_cache_that_the_config_does_not_allow_is_a_config_error(given, policy, says):
    with pytest.raises(mj.ConfigError, match=says):
        mj.init_cache(config_of(), **given, policy=policy)


@pytest.mark.parametrize("capacity", [3, 12])
def test_smallest_and_largest_cache_with_sinks_are_allowed(capacity):
    cache = mj.init_cache(config_of(), 1, capacity, policy=SINKS_POLICY)
    chex.assert_shape(leaves(cache)["k"], (K, capacity + 2, H))


def test_sinks_with_a_sliding_window_are_refused(tiny_config):
    config = tiny_config.replace(sliding_window=8)
    with pytest.raises(mj.ConfigError, match=r"num_sinks=2: sliding-window layers"):
        mj.init_cache(config, policy=SINKS_POLICY)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("row", [-1, 2, 5])
def test_a_row_that_is_not_there_changes_nothing(batch_size, row):
    config = config_of()
    cache = held_cache(config, 5, capacity=8, rows=batch_size)
    source = held_cache(config, 3, capacity=8, rows=1)
    chex.assert_trees_all_equal(kv.insert(cache, row, source), cache)
    chex.assert_trees_all_equal(kv.evict(cache, row), cache)


def test_a_shorter_source_leaves_nothing_of_the_row_before():
    config = config_of()
    cache = held_cache(config, 5, capacity=12)
    poisoned = jax.tree.map(
        lambda x: x if x.ndim == 1 else jnp.full_like(x, jnp.nan), cache
    )
    replaced = kv.insert(poisoned, 0, held_cache(config, 3, capacity=8, rows=1))
    for leaf in jax.tree.leaves(replaced):
        assert np.all(np.isfinite(np.asarray(leaf)[0]))


@pytest.mark.parametrize(
    ("slots", "policy"), [(3, kv.RING), (15, kv.CachePolicy()), (3, SINKS_POLICY)]
)
def test_a_cache_of_another_policy_is_refused(tiny_config, slots, policy):
    config = tiny_config.replace(
        max_seq_len=12, max_kv_cache_len=12, prefill_chunk=4, num_kv_heads=2
    )
    leaf = jax.ShapeDtypeStruct((2, slots, 8), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    layer = {"attention": {"k": leaf, "v": leaf}}
    cache = {"lengths": lengths, "layers_0": layer, "layers_1": layer}
    message = "pass the policy that init_cache was given|it is a ring's and not for"
    with pytest.raises(ValueError, match=message):
        kv.check_cache(config, cache, policy)


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"head_dim": 4}])
def test_a_cache_of_another_config_is_refused(tiny_config, change):
    cache = kv.cache_shapes(tiny_config.replace(**change))
    with pytest.raises(ValueError, match="cache: was made for another config"):
        kv.check_cache(tiny_config, cache, mj.CachePolicy())


def test_a_window_cache_too_small_for_a_ring_is_refused(tiny_config):
    config = tiny_config.replace(sliding_window=12)
    cache = kv.cache_shapes(config, 2, 8)
    with pytest.raises(ValueError, match="pass the policy that init_cache was given"):
        kv.check_cache(config, cache, kv.RING)


def test_a_dead_cache_is_named(tiny_config):
    cache = mj.init_cache(tiny_config, 1, 8)
    mj.grow_cache(cache, 16)
    with pytest.raises(ValueError, match="donated to an earlier call"):
        mj.grow_cache(cache, 16)
