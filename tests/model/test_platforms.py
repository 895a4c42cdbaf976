"""What is chosen by platform computes the same everywhere.

The branches for GPUs and TPUs are taken here, on CPU, in place of its own.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax.decoding import sampler, sampling
from minillm_jax.model import attention, products, quantized, scores
from minillm_jax.model import cache as kv


@pytest.fixture
def on(monkeypatch):
    """`on(platform, function, *args)` with that platform's branches."""

    def run(platform, function, *args):
        taken = []

        def choose(*operands, default, **forms):
            taken.append(forms)
            return forms.get(platform, default)(*operands)

        with monkeypatch.context() as patched:
            patched.setattr(jax.lax, "platform_dependent", choose)
            jax.clear_caches()  # of what was traced with other branches
            result = jax.jit(lambda *args: function(*args))(*args)
        jax.clear_caches()
        assert any(forms for forms in taken), "it has one form for all"
        return result

    return run


@pytest.mark.parametrize("axis", [0, 1])
def test_a_product_of_one_row(key, on, axis):
    x_key, kernel_key = jax.random.split(key)
    x, kernel = (  # whole numbers: exact, in whatever order they are summed
        jax.random.randint(of, shape, -99, 100).astype(jnp.float32)
        for of, shape in ((x_key, (1, 1, 64)), (kernel_key, (64, 64)))
    )

    def product(x, kernel):
        return products.product(x, kernel, axis=axis)

    expected = x @ (kernel if axis == 0 else kernel.T)
    chex.assert_trees_all_equal(on("cuda", product, x, kernel), expected)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("shape", "inputs"), [((8, 2, 3), 1), ((2, 2, 2, 6), 3)])
@pytest.mark.parametrize("mode", quantized.MODES)
def test_a_product_in_int8(key, on, mode, shape, inputs, flat):
    x_key, kernel_key = jax.random.split(key)
    x = jax.random.normal(x_key, (2, 5, 8))
    leaf = quantized.quantized(jax.random.normal(kernel_key, shape), inputs, mode)

    def product(x, leaf):
        return products.product(x, leaf, flat=flat)

    expected = products.product(x, leaf, flat=flat)
    chex.assert_shape(expected, (2, 5, *((6,) if flat else shape[inputs:])))
    for platform in ("tpu", "cuda"):
        found = on(platform, product, x, leaf)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("mode", quantized.MODES)
def test_rows_meet_a_kernel_in_int8_with_the_axes_they_have(platform, mode):
    """A matrix of them could be a copy on a TPU."""
    leaf = quantized.quantized(jnp.ones((64, 2, 16)), 1, mode)
    x = jnp.ones((2, 3, 64), jnp.bfloat16)
    lowered = (
        jax.jit(products.product).trace(x, leaf).lower(lowering_platforms=(platform,))
    )
    products_of = [
        line for line in lowered.as_text().splitlines() if "dot_general" in line
    ]
    assert len(products_of) == 1
    left, right = {"w8a16": ("bf16", "bf16"), "w8a8": ("i8", "i8")}[mode]
    assert f"(tensor<2x3x64x{left}>, tensor<2x16x64x{right}>)" in products_of[0]


RULES = {
    "plain": kv.SlotRule(),
    "ring": kv.SlotRule(wraps=True, window=12, sinks=0),
    "sinks": kv.SlotRule(wraps=True, window=12, sinks=3),
}


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", RULES)
def test_a_write_of_several_rows(key, on, name, length):
    """At the start, at the end and past it, with rows that take nothing."""
    rule, rows = RULES[name], 6
    leaf_key, new_key = jax.random.split(key)
    leaf = jax.random.normal(leaf_key, (rows, 2, 16, 4))
    new = jax.random.normal(new_key, (rows, 2, length, 4))
    positions = jnp.array([0, 3, 15, 16, 14, 40], jnp.int32)
    counts = jnp.minimum(jnp.array([length, 0, 1, length, length, 2]), length)

    def write(leaf, new, positions, counts):
        return kv.write(leaf, new, positions, counts, rule)

    expected = jax.jit(write)(leaf, new, positions, counts)
    actual = on("tpu", write, leaf, new, positions, counts)
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_trees_all_equal(actual[1], leaf[1])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rule", [kv.SlotRule(), kv.SlotRule(window=70)])
@pytest.mark.parametrize("queries", [20, 300])  # one block of them, and two
def test_attention_of_several_tokens(key, on, queries, rule, softcap):
    batch, slots = 2, 600
    q_key, k_key, v_key = jax.random.split(key, 3)
    q = jax.random.normal(q_key, (batch, 2, 2, queries, 8))
    k = jax.random.normal(k_key, (batch, 2, slots, 8))
    v = jax.random.normal(v_key, (batch, 2, slots, 8))
    first = jnp.array([250, 0])[:, None]
    places = scores.Places(first + jnp.arange(queries)[None])
    held = scores.Places(kv.slot_positions(first[:, 0] + queries, slots, rule))

    def attend(q, k, v):
        return attention.attend(
            q, k, v, queries=places, keys=held, rule=rule, softcap=softcap
        )

    def total(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)))

    expected = jax.jit(attend)(q, k, v)
    chex.assert_trees_all_close(on("cuda", attend, q, k, v), expected, atol=2e-6)
    expected = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    actual = on("cuda", jax.grad(total, argnums=(0, 1, 2)), q, k, v)
    chex.assert_trees_all_close(actual, expected, atol=5e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 3},
        {"top_k": 200},
        {"top_p": 0.5},
        {"top_p": 0.999, "temperature": 5.0},
        {"top_k": 100, "top_p": 0.9, "min_p": 0.01, "temperature": 3.0},
    ],
)
def test_what_a_sampler_keeps(key, on, fields):
    logits = 3 * jax.random.normal(key, (4, 301))
    logits = logits.at[0, ::3].set(-jnp.inf).at[1, ::2].set(0.5)
    params = sampling.SamplingParams(**fields)
    arrays = jax.device_put(sampling.equal_requests(params, 4, 301).sampler)
    expected = jax.jit(sampler.kept_weights)(logits, arrays)
    actual = on("cuda", sampler.kept_weights, logits, arrays)
    np.testing.assert_array_equal(np.asarray(actual) > 0, np.asarray(expected) > 0)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
