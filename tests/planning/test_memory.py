"""plan_memory: what fits, how much of it would, and what may be asked."""

import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax.planning import devices, machine, memory
from minillm_jax.planning.devices import Device

NAMES = ("t4", "rtx4090", "h200", "v5e")


WINDOW = mj.Configs.small().replace(sliding_window=64)


def sinks(count):
    return mj.CachePolicy(overflow="ring", num_sinks=count)


def sized(gigabytes, platform="gpu"):
    return Device("some", platform, int(gigabytes * 1e9))


def test_the_classes_add_up_to_the_total():
    plan = mj.plan_memory(mj.Configs.large(), 2, device="h200")
    assert sum(plan.bytes_by_class.values()) == plan.total_bytes
    assert plan.bytes_by_class["weights"] == plan.weights_bytes
    assert plan.bytes_by_class["cache"] == plan.cache_bytes
    assert plan.total_bytes > sum(plan.moments[plan.peak].values())
    assert plan.limit_bytes == 0.75 * 141e9
    assert plan.fits


def test_dtypes_are_those_of_the_device():
    config = mj.Configs.large()
    here, there = (mj.plan_memory(config, device=name) for name in ("cpu", "h200"))
    assert there.config.dtype == there.config.cache_dtype == "bfloat16"
    assert here.weights_bytes == 2 * there.weights_bytes
    assert here.cache_bytes == 2 * there.cache_bytes
    assert "runtime" in here.bytes_by_class
    assert "runtime" not in there.bytes_by_class


def test_training_keeps_float32_weights_and_adds_the_optimiser():
    plan = mj.plan_memory(mj.Configs.medium(), 2, device="h200", training=True)
    assert plan.config.dtype == "bfloat16"
    assert plan.config.param_dtype == "float32"
    assert plan.context == plan.config.max_seq_len
    assert plan.cache_bytes == 0
    assert plan.bytes_by_class["optimizer"] == 2 * plan.weights_bytes
    assert plan.bytes_by_class["gradients"] == plan.weights_bytes
    narrow = mj.Configs.medium().replace(param_dtype="bfloat16")
    with pytest.raises(mj.ConfigError, match="param_dtype=bfloat16: training keeps"):
        mj.plan_memory(narrow, device="h200", training=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("device", NAMES)
@pytest.mark.parametrize("name", mj.Configs.names)
def test_the_largest_that_fits_fits_and_one_more_does_not(name, device, training):
    config = mj.Configs.by_name(name)

    def fits(batch_size=1, context=None):
        plan = mj.plan_memory(config, batch_size, context, device, training=training)
        return plan.fits

    plan = mj.plan_memory(config, device=device, training=training)
    assert plan.fits == (plan.max_batch_size >= 1) == (plan.max_context >= plan.context)
    rows, tokens = plan.max_batch_size, plan.max_context
    assert not rows or fits(batch_size=rows)
    assert not fits(batch_size=rows + 1)
    assert not tokens or fits(context=tokens)
    assert not fits(context=tokens + 1)


def test_a_context_beyond_the_config_is_planned_as_if_that_were_raised():
    config = mj.Configs.small()
    plan = mj.plan_memory(config, context=65536, device="h200")
    assert plan.config.max_kv_cache_len == 65536
    assert plan.config.max_seq_len == config.max_seq_len
    raised = config.replace(max_kv_cache_len=65536)
    assert plan == mj.plan_memory(raised, device="h200")
    longer = mj.plan_memory(config, context=8192, device="h200", training=True)
    assert longer.config.max_seq_len == 8192


@pytest.mark.parametrize("chunk", [None, 300])
@pytest.mark.parametrize("gigabytes", [15, 17, 20])
def test_a_context_below_the_config_is_planned_as_if_that_were_lowered(
    gigabytes, chunk
):
    config = mj.Configs.xlarge().replace(prefill_chunk=chunk)
    found = mj.plan_memory(config, device=sized(gigabytes)).max_context
    assert 0 < found < config.max_kv_cache_len

    def lowered(longest):
        fields = {"max_kv_cache_len": longest}
        fields["max_seq_len"] = min(config.max_seq_len, longest)
        if chunk is not None:
            fields["prefill_chunk"] = min(chunk, longest)
        return mj.plan_memory(config.replace(**fields), device=sized(gigabytes))

    assert lowered(found).fits
    assert not lowered(found + 1).fits
    assert lowered(found) == mj.plan_memory(config, 1, found, sized(gigabytes))
    assert lowered(found) == mj.plan_memory(config, 1, "auto", sized(gigabytes))


@pytest.mark.parametrize(("gigabytes", "training"), [(0.95, False), (20, True)])
def test_the_longest_context_is_that_whatever_context_is_planned(gigabytes, training):
    config = mj.Configs.medium().replace(num_kv_heads=4)
    device, found = sized(gigabytes), set()
    for context in (1, 67, None, 5000):
        plan = mj.plan_memory(config, 21, context, device, training=training)
        found.add(plan.max_context)
    assert len(found) == 1


def test_the_shortest_context_of_a_ring_holds_its_sinks_and_a_token():
    config, policy = mj.Configs.xlarge(), sinks(40)
    plan = mj.plan_memory(config, 1, "auto", sized(2), policy=policy)
    assert (plan.context, plan.fits, plan.max_context) == (41, False, 0)


@pytest.mark.parametrize("device", NAMES)
def test_automatic_numbers_are_the_largest_that_fit(device):
    config = mj.Configs.large()
    plan = mj.plan_memory(config, device=device)
    many = mj.plan_memory(config, "auto", device=device)
    assert many.batch_size == plan.max_batch_size
    some = mj.plan_memory(config, "auto:3", device=device)
    assert some.batch_size == min(3, plan.max_batch_size)
    long = mj.plan_memory(config, 1, "auto", device)
    assert long.context == plan.max_context
    short = mj.plan_memory(config, 1, "auto:5000", device)
    assert short.context == min(5000, plan.max_context)
    both = mj.plan_memory(config, "auto", "auto:5000", device)
    assert both.context == short.context
    assert both.batch_size == both.max_batch_size
    assert all(plan.fits for plan in (many, some, long, short, both))


def test_where_nothing_fits_automatic_numbers_are_one():
    plan = mj.plan_memory(mj.Configs.xlarge(), "auto", "auto", sized(2))
    assert (plan.batch_size, plan.context, plan.fits) == (1, 1, False)
    assert (plan.max_batch_size, plan.max_context) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(gigabytes=st.floats(0.5, 200), batch_size=st.integers(1, 64))
def test_more_memory_never_fits_less(gigabytes, batch_size):
    config = mj.Configs.medium()
    less = mj.plan_memory(config, batch_size, device=sized(gigabytes))
    more = mj.plan_memory(config, batch_size, device=sized(1.1 * gigabytes))
    assert more.fits >= less.fits
    assert more.max_batch_size >= less.max_batch_size
    assert more.max_context >= less.max_context


@pytest.mark.parametrize("training", [False, True])
def test_exact_takes_the_compilers_figures(tiny_config, training):
    config = tiny_config.replace(dtype="float32")
    plan = mj.plan_memory(config, 2, training=training)
    exact = mj.plan_memory(config, 2, training=training, exact=True)
    calls = {"train"} if training else {"prefill", "decode"}
    assert {
        name for name in exact.moments if "compiled" in exact.moments[name]
    } == calls
    for name in calls:
        classes = exact.moments[name]
        assert classes["weights"] == plan.weights_bytes
        assert classes["compiled"] > 0
        assert sum(classes.values()) == pytest.approx(
            sum(plan.moments[name].values()), abs=64 * 2**20
        )


def test_exact_is_for_the_platform_at_hand():
    with pytest.raises(mj.ConfigError, match="exact=True: compiles for this machine's"):
        mj.plan_memory(mj.Configs.small(), device="h200", exact=True)


@pytest.mark.parametrize("name", ["cpu", "CPU", "this", "This"])
def test_the_machine_at_hand_is_found_by_any_case(name):
    assert memory.find_device(name).source == "what this machine has left"


def test_this_machine_has_what_it_has_left(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 3 * 10**9)
    plan = mj.plan_memory(mj.Configs.small())
    assert plan.limit_bytes == 3 * 10**9
    assert plan.device.platform == jax.default_backend()


@pytest.fixture
def a_gpu(monkeypatch):
    """An L4 at hand, with 16 GB of what JAX takes of it left."""

    class Here:
        platform, device_kind = "gpu", "NVIDIA L4"

        def memory_stats(self):
            return {"bytes_limit": 17 * 10**9, "bytes_in_use": 10**9}

    monkeypatch.setattr(jax, "devices", lambda: [Here()])
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)


def test_a_known_device_at_hand_has_its_own_rates(a_gpu):
    found = memory.find_device("this")
    assert found.limit_bytes == 16 * 10**9
    assert found.bytes_per_second == devices.DEVICES["l4"].bytes_per_second


@pytest.mark.parametrize(
    ("told", "fraction"), [(None, 0.75), (".9", 0.9), ("much", 0.75), ("0", 0.75)]
)
def test_a_gpu_at_hand_has_the_fraction_that_jax_is_told(
    monkeypatch, a_gpu, told, fraction
):
    if told is not None:
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", told)
    found = memory.find_device("this")
    assert found.memory_fraction == fraction
    assert found.limit_bytes == pytest.approx(16 * 10**9, abs=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": "small"}, "config: must be a ModelConfig"),
        ({"batch_size": 0}, "batch_size=0: must be a number"),
        ({"batch_size": 1.5}, "batch_size=1.5: must be a whole number"),
        ({"batch_size": "all"}, "batch_size='all': must be a whole number, \"auto\""),
        ({"batch_size": "auto:"}, "batch_size='auto:': must be"),
        ({"batch_size": "auto:0"}, "batch_size=0: must be a number"),
        ({"context": "auto:x"}, "context='auto:x': must be"),
        ({"context": 2**30}, "context=1073741824: must be a number"),
        ({"device": "h300"}, "did you mean h200"),
        ({"device": 80e9}, "device=80000000000.0: must be a name or Device"),
        ({"batch_size": "auto:" + "9" * 5000}, "must be a number in [1, 1048576]"),
        ({"batch_size": "auto: 5"}, "batch_size='auto: 5': must be a whole number"),
        ({"policy": "ring"}, "policy='ring': must be a CachePolicy"),
        ({"policy": None}, "policy=None: must be a CachePolicy"),
        ({"policy": sinks(4000)}, "num_sinks=4000: must be below the capacity"),
        ({"policy": sinks(4), "context": 4}, "num_sinks=4: must be below the capacity"),
        ({"policy": sinks(4), "config": WINDOW}, "num_sinks=4: sliding-window layers"),
    ],
)
def test_what_cannot_be_planned_is_a_config_error(arguments, words):
    given = {"config": mj.Configs.small(), "device": "h200"} | arguments
    with pytest.raises(mj.ConfigError) as error:
        mj.plan_memory(**given)
    assert words in str(error.value)


def test_a_refusal_names_the_classes_and_the_limit():
    plan = mj.plan_memory(mj.Configs.xlarge(), device="t4")
    assert not plan.fits
    text = plan.refusal()
    for words in ("weights 13.5 GB", "cache 8.6 GB", "12.0 GB are available", "Tesla"):
        assert words in text


def test_a_refusal_leaves_out_what_rounds_to_nothing():
    text = mj.plan_memory(mj.Configs.xlarge(), device="t4").refusal()
    assert "converted copies" not in text
    assert " 0.0 GB" not in text


def test_a_plan_is_a_value():
    plan = mj.plan_memory(mj.Configs.small(), device="t4")
    assert plan == mj.plan_memory(mj.Configs.small(), device="t4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.device = devices.DEVICES["h200"]
