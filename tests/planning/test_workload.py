"""The bytes of each moment, against the compiler's own figures, and their monotony."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax.planning import compiled, devices, memory
from minillm_jax.planning.workload import Workload
from minillm_jax.testing import tiny_config

BEFORE_0_12 = jax.__version_info__ < (0, 12)
MIXED = {"sliding_window": 64, "global_layers": (1,)}
RING = mj.CachePolicy(overflow="ring", num_sinks=4)


def workload(config, batch_size=1, context=1024, platform="cpu", **others):
    config = config.resolve(platform)
    if not others.get("training"):
        others["capacity"] = context
    return Workload(config=config, batch_size=batch_size, context=context, **others)


def alive(work, platform="cpu"):
    moments = work.moments(platform)
    return {name: sum(classes.values()) for name, classes in moments.items()}


@pytest.mark.parametrize(
    ("batch_size", "changes", "policy"),
    [
        (1, {}, mj.CachePolicy()),
        (8, {}, mj.CachePolicy()),
        (8, MIXED, mj.CachePolicy()),
        (2, {"num_kv_heads": 2, "tie_embeddings": True}, RING),
        (8, {"num_layers": 6, "prefill_chunk": 256}, mj.CachePolicy()),
    ],
)
def test_generating_takes_what_the_compiler_says(batch_size, changes, policy):
    fields = {"num_layers": 2, "dtype": "float32"} | changes
    config = mj.Configs.small().replace(**fields)
    work = workload(config, batch_size, policy=policy)
    planned, truth = alive(work), compiled.total_bytes(work)
    assert set(truth) == {"prefill", "decode"}
    for name, total in truth.items():
        assert 0.999 <= planned[name] / total <= 1.05, name


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_generating_in_bfloat16_takes_what_the_compiler_says(batch_size):
    """Before JAX 0.12 with float32 copies; from then on without."""
    config = mj.Configs.small().replace(num_layers=2, dtype="bfloat16")
    work = workload(config, batch_size)
    planned, truth = alive(work), compiled.total_bytes(work)
    for name, total in truth.items():
        assert 0.99 * total <= planned[name], name
        assert planned[name] <= max(1.1 * total, total + 64 * 2**20), name
    copies = work.moments("cpu")["decode"]["converted copies"]
    assert (copies > 0) == BEFORE_0_12


@pytest.mark.skipif(BEFORE_0_12, reason="promised from JAX 0.12 on")
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("rows", "length", "changes"),
    [
        (1, 1024, {}),
        (8, 512, {"num_kv_heads": 2, "qk_norm": True}),
        (8, 128, {"activation": "gelu_tanh", "post_norms": True}),
        (4, 512, {"dtype": "bfloat16", "dim_ff": 4096}),
        (400, 64, {}),  # queries in blocks, because there are many rows
    ],
)
def test_a_training_step_takes_no_more_and_not_much_less(rows, length, changes, remat):
    fields = {"num_layers": 3, "dtype": "float32", "remat": remat} | changes
    config = mj.Configs.small().replace(param_dtype="float32", **fields)
    work = workload(config, rows, length, training=True)
    truth = compiled.total_bytes(work)["train"]
    assert truth <= alive(work)["train"] <= 1.3 * truth


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", ["small", "medium"])
def test_a_forward_without_cache_takes_what_the_compiler_says(name, batch_size):
    config = mj.Configs.by_name(name).replace(num_layers=4, dtype="float32")
    model = mj.create_model(config)
    shape = (batch_size, config.max_seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)

    @jax.jit
    def hidden(params, tokens):
        x, _ = model.apply({"params": params}, tokens, method="hidden")
        return x[:, -1]

    params = jax.eval_shape(lambda: mj.init_params(model))
    measured = hidden.lower(params, tokens).compile().memory_analysis()
    work = workload(config, batch_size, forward_tokens=shape[1])
    planned = work.moments("cpu")["forward"]["activations"]
    temp = measured.temp_size_in_bytes
    assert temp <= planned <= 1.25 * temp


# Temporary MB of a prefill chunk with 1024 slots, as XLA compiled it for an H200
# (JAX 0.12.0.1, attention="xla"): `python -m benchmarks.ahead --target=h200`.
ON_A_GPU = {("medium", 1): 27.4, ("medium", 8): 496.1, ("xlarge", 8): 1815}


@pytest.mark.parametrize(("name", "batch_size"), ON_A_GPU)
def test_prefill_on_a_gpu_takes_at_least_what_was_compiled_for_one(name, batch_size):
    temp = ON_A_GPU[name, batch_size] * 1e6
    work = workload(mj.Configs.by_name(name), batch_size, platform="gpu")
    planned = work.moments("gpu")["prefill"]
    assert temp <= planned["activations"]
    total = planned["weights"] + planned["cache"] + temp
    assert planned["activations"] - temp <= 0.1 * total


def test_what_is_converted_to_another_dtype_is_counted():
    config = mj.Configs.small()
    copies = workload(config).moments("cpu")["decode"]["converted copies"]
    assert copies == 0
    stored = workload(config.replace(param_dtype="bfloat16", dtype="float32"))
    copies = stored.moments("cpu")["decode"]["converted copies"]
    assert copies == 2 * stored.weights_bytes


def test_the_cache_of_the_largest_layer_is_what_is_converted_at_once():
    """Of four layers, that one has nearly all the slots."""
    config = mj.Configs.small().replace(
        num_layers=4, prefill_chunk=16, dtype="float32", cache_dtype="bfloat16", **MIXED
    )
    largest = 2 * 4 * 2048 * config.num_kv_heads * config.head_dim
    work = workload(config, context=2048, platform="gpu")
    assert work.moments("gpu")["decode"]["converted copies"] >= largest


def test_the_cache_is_allocated_as_a_generator_does():
    config = mj.Configs.small().resolve("cpu")
    for context, allocated in ((1, 256), (300, 512), (1500, 2048), (2048, 2048)):
        work = Workload(config=config, batch_size=2, context=context)
        assert work.allocated == allocated
        cache = jax.eval_shape(lambda slots=allocated: mj.init_cache(config, 2, slots))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert work.cache_bytes == held - cache["lengths"].size * 4
        assert work.cache_used_bytes == work.cache_bytes * context // allocated


def test_growing_takes_a_leaf_more_than_the_larger_cache():
    config = mj.Configs.small().resolve("cpu")
    work = Workload(config=config, batch_size=1, context=2048)
    leaf = work.cache_bytes // config.num_layers // 2
    assert work.moments("cpu")["growth"]["growth"] == leaf


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_more_never_needs_less(data):
    sizes = {
        "batch_size": data.draw(st.integers(1, 64)),
        "context": data.draw(st.integers(1, 5000)),
        "num_layers": data.draw(st.integers(1, 100)),
    }
    more = data.draw(st.sampled_from(sorted(sizes)))
    fields = {
        "num_kv_heads": data.draw(st.sampled_from([1, 2])),
        "num_heads": 2,
        "vocab_size": data.draw(st.sampled_from([64, 50000])),
        "max_kv_cache_len": 2048,
        "sliding_window": data.draw(st.sampled_from([None, 40])),
        "dtype": data.draw(st.sampled_from(["float32", "bfloat16"])),
        "remat": data.draw(st.booleans()),
    }
    others = {
        "training": data.draw(st.booleans()),
        "policy": data.draw(st.sampled_from([mj.CachePolicy(), RING])),
    }
    platform = data.draw(st.sampled_from(["cpu", "gpu", "tpu"]))

    def needs(batch_size, context, num_layers):
        config = tiny_config(num_layers=num_layers, **fields).resolve(platform)
        if fields["sliding_window"] is not None:
            others["policy"] = mj.CachePolicy()
        work = Workload(config=config, batch_size=batch_size, context=1, **others)
        return alive(work.with_context(context), platform)

    less, grown = needs(**sizes), needs(**(sizes | {more: sizes[more] + 1}))
    assert all(grown[moment] >= less[moment] for moment in less)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(mj.Configs.names),
    rows=st.integers(1, 200),
    context=st.integers(1, 1000),
    remat=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    platform=st.sampled_from(["cpu", "gpu", "tpu"]),
    step=st.sampled_from([(1, 0), (0, 1)]),
)
@example(  # where the length of a block, as a whole number, falls by one
    name="medium",
    rows=95,
    context=100,
    remat=False,
    dtype="float32",
    platform="cpu",
    step=(1, 0),
)
def test_training_on_more_never_needs_less(
    name, rows, context, remat, dtype, platform, step
):
    config = mj.Configs.by_name(name).replace(remat=remat, dtype=dtype)
    device = devices.Device("some", platform, 10**12)

    def needs(rows, context):
        plan = memory.plan_memory(config, rows, context, device, training=True)
        return plan.total_bytes

    assert needs(rows + step[0], context + step[1]) >= needs(rows, context)
