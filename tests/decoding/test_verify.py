"""`verify` passes what is right, and names the line of what is wrong."""

import math

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import testing
from minillm_jax.config import RopeScaling
from minillm_jax.decoding import sampler, verify
from minillm_jax.model import attention, rope, scores
from minillm_jax.model import cache as kv

TOKENS = 40


def lines_of(model, params, count=TOKENS):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, count)
    return {line.name: line for line in verify.lines(model, params, tokens.tolist())}


def model_of(**changes):
    model = mj.create_model(testing.tiny_config(num_layers=1, **changes))
    return model, testing.noisy_params(model)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "param_dtype": "bfloat16", "cache_dtype": "bfloat16"},
        {"cache_dtype": "bfloat16"},
        {"cache_dtype": "int8"},
        pytest.param(
            {"sliding_window": 6, "qk_norm": True, "attention_softcap": 20.0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["float32", "bfloat16", "bfloat16 cache", "int8 cache", "window"],
)
def test_a_model_that_is_right_passes(changes):
    model, params = model_of(**changes)
    found = lines_of(model, params)
    assert tuple(found) == verify.names(model.config)
    assert [line.passed for line in found.values()] == [True] * len(found)
    assert all(line.agreement >= 0.9 for line in found.values())
    if not changes:
        assert max(line.relative for line in found.values()) < 1e-5


def off_by_one_in_decode(patch):
    plain = rope.cos_sin

    def turned(config, positions, lengths, **local):
        return plain(config, positions + (positions.shape[1] == 1), lengths, **local)

    patch.setattr(rope, "cos_sin", turned)


def blind_to_itself(patch):
    plain = scores.visible

    def visible(queries, keys, rule):
        earlier = queries._replace(positions=queries.positions - 1)
        return plain(earlier, keys, rule)

    patch.setattr(scores, "visible", visible)


def next_slot_of_a_ring(patch):
    plain = kv._slot
    patch.setattr(
        kv, "_slot", lambda position, slots, rule: plain(position + 1, slots, rule)
    )


def empty_slots_are_seen(patch):
    plain = kv.slot_positions

    def positions(lengths, slots, rule):
        return jax.numpy.maximum(plain(lengths, slots, rule), 0)

    patch.setattr(kv, "slot_positions", positions)


def next_head(patch):
    plain = attention.attend

    def attend(q, k, v, **places):
        axis = k.ndim - 3
        return plain(q, jax.numpy.roll(k, 1, axis), v, **places)

    patch.setattr(attention, "attend", attend)


def off_by_one_in_later_chunks(patch):
    plain = rope.cos_sin

    def turned(config, positions, lengths, **local):
        later = (positions[:, :1] > 0) & (positions.shape[1] > 1)
        return plain(config, positions + later, lengths, **local)

    patch.setattr(rope, "cos_sin", turned)


def writes_are_clamped(patch):
    """As a plain dynamic_update_slice does at the end of an array."""

    def put(leaf, new, slot, lowest, count, row):
        at = [jax.numpy.asarray(index, slot.dtype) for index in (*row, 0, slot, 0)]
        new = new.reshape((1,) * len(row) + new.shape)
        return jax.lax.dynamic_update_slice(leaf, new, at)

    patch.setattr(kv, "_put", put)


def the_first_rows_slot_for_all(patch):
    plain = kv.write

    def write(leaf, new, positions, counts, rule):
        if positions.ndim:
            positions = jax.numpy.broadcast_to(positions[:1], positions.shape)
        return plain(leaf, new, positions, counts, rule)

    patch.setattr(kv, "write", write)


def the_likeliest_but_one(patch):
    plain = sampler.first_largest

    def second(x):
        largest = x == jax.numpy.max(x, axis=-1, keepdims=True)
        return plain(jax.numpy.where(largest, -1e9, x))

    patch.setattr(sampler, "first_largest", second)


FAULTS = {  # the fault, and the line that must name it
    off_by_one_in_decode: "cached / uncached",
    blind_to_itself: "float32 / float64",
    next_slot_of_a_ring: "ring / window",
    empty_slots_are_seen: "cached / uncached",
    next_head: "float32 / float64",
    off_by_one_in_later_chunks: "chunked / one piece",
    writes_are_clamped: "padded / alone",
    the_first_rows_slot_for_all: "batch / solo",
    the_likeliest_but_one: "Generator / uncached",
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(monkeypatch, fault, dtype):
    floats = dict.fromkeys(("dtype", "param_dtype", "cache_dtype"), dtype)
    model, params = model_of(**floats)
    jax.clear_caches()
    fault(monkeypatch)
    try:
        found = lines_of(model, params)
    finally:
        monkeypatch.undo()
        jax.clear_caches()
    assert found[FAULTS[fault]].passed is False, found


@pytest.mark.parametrize(
    ("last", "budget", "passed"),
    [
        (2.0, (1e-3, 1e-6), True),
        (2.0 + 1.9e-3, (1e-3, 1e-3), True),
        (2.0 + 2.1e-3, (1e-3, 1e-3), False),
        (2.1, (1.0, 1e-6), False),  # the divergence alone
        (math.nan, (1e-3, 1e-3), False),
    ],
)
def test_what_is_beyond_the_budget_does_not_pass(last, budget, passed):
    ours, other = np.array([[0.0, 1.0, last]]), np.array([[0.0, 1.0, 2.0]])
    line = verify.compared("", ours, other, verify.Budget(*budget))
    assert line.passed is passed


def test_the_divergence_is_that_of_the_distributions():
    other, ours = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    line = verify.compared("", ours, other, verify.BUDGETS["float32"])
    assert line.divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_the_comparisons_are_of_what_they_say():
    """The pieces of a prompt, the padding and the turns of the ring."""
    model, params = model_of()
    check, calls = verify._Check(model, params, np.arange(TOKENS)), []
    plain = verify.decode.prefill_chunk

    def prefill_chunk(model, params, cache, logits, tokens, remaining, **rest):
        slots = kv.token_capacity(model.config, cache, kv.CachePolicy())
        calls.append((tokens.shape[1], int(remaining[0]), slots))
        return plain(model, params, cache, logits, tokens, remaining, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify.decode, "prefill_chunk", prefill_chunk)
        check.comparisons()["chunked / one piece"]("")
        pieces = [width for width, *_ in calls]
        assert pieces[-1] == 26  # one piece
        assert len(pieces) > 5
        calls.clear()
        check.comparisons()["padded / alone"]("")
        (_, padded, _, alone) = calls  # of 13 tokens each, behind another 13
        assert padded == (40, 13, 40)
        assert alone == (13, 13, 40)
        calls.clear()
        check.comparisons()["ring / window"]("")
        assert 4 * calls[0][2] <= TOKENS  # three wraps


def test_what_turns_keys_by_the_length_is_compared_within_it():
    scaling = RopeScaling(
        rope_type="dynamic", factor=2.0, original_max_position_embeddings=24
    )
    assert verify.longest(testing.tiny_config(rope_scaling=scaling)) == 24
    assert verify.longest(testing.tiny_config()) == 64


def test_a_ring_is_skipped_where_no_forward_has_its_windows():
    model, params = model_of(
        sliding_window=6, local_rope_theta=1e4, global_layers=(), rope_theta=1e5
    )
    check = verify._Check(model, params, np.arange(TOKENS))
    assert "another base" in check.unavailable("ring / window")
    assert check.unavailable("cached / uncached") is None
