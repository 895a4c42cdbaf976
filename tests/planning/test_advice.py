"""Every piece of advice holds what it says."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm_jax as mj
from minillm_jax.planning import advice, devices, workload

CASES = [
    ("xlarge", "t4", 1, False),
    ("xlarge", "rtx4090", 8, False),
    ("large", "h200", 4, False),
    ("large", "cpu", 64, False),
    ("medium", "t4", 8, True),
    ("medium", "h200", 2, True),
]


def planned_again(plan, change):
    """What `plan_memory` says of the same with a change."""
    device = plan.device
    if change.memory_fraction is not None:
        fraction = change.memory_fraction
        device = dataclasses.replace(device, memory_fraction=fraction)
    return mj.plan_memory(
        plan.config.replace(**change.model),
        change.batch_size or plan.batch_size,
        change.context or plan.context,
        device,
        training=plan.workload.training,
    )


@pytest.mark.parametrize(("name", "device", "rows", "training"), CASES)
def test_each_change_saves_what_it_says(name, device, rows, training):
    config = mj.Configs.by_name(name)
    plan = mj.plan_memory(config, rows, device=device, training=training)
    found = advice.singles(plan)
    assert found
    for one in found:
        again = planned_again(plan, one.change)
        assert again.total_bytes == one.plan.total_bytes
        assert again.fits == one.plan.fits
        assert one.saves_bytes == max(0, plan.total_bytes - again.total_bytes)
        assert one.saves_bytes > 0 or again.limit_bytes > plan.limit_bytes


@pytest.mark.parametrize(("name", "device", "rows", "training"), CASES)
def test_what_is_said_to_fit_fits(name, device, rows, training):
    config = mj.Configs.by_name(name)
    plan = mj.plan_memory(config, rows, device=device, training=training)
    fitting = advice.until_it_fits(plan, advice.singles(plan))
    if fitting is not None:
        assert planned_again(plan, fitting.change).fits


def test_an_int8_cache_is_not_advised_for_cudnn_to_read():
    config = mj.Configs.large().replace(dtype="bfloat16", decode_attention="cudnn")
    found = advice.singles(mj.plan_memory(config, 4, device="h200"))
    changes = [one.change.model for one in found]
    assert {"cache_dtype": "int8", "decode_attention": "xla"} in changes
    assert {"cache_dtype": "int8"} not in changes


def test_changes_are_put_together_where_one_is_not_enough():
    plan = mj.plan_memory(mj.Configs.xlarge(), device="t4")
    found = advice.singles(plan)
    assert not any(one.plan.fits for one in found)
    together = advice.until_it_fits(plan, found)
    assert together is not None
    assert len(str(together.change).split()) > 1


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(mj.Configs.names),
    gigabytes=st.floats(0.1, 200),
    rows=st.integers(1, 300),
    context=st.integers(1, 40000),
    platform=st.sampled_from(["gpu", "cpu"]),
    training=st.booleans(),
)
def test_none_is_found_only_where_a_row_of_a_token_is_too_much(
    name, gigabytes, rows, context, platform, training
):
    device = devices.Device("x", platform, int(gigabytes * 1e9), memory_fraction=0.75)
    asked = {"config": mj.Configs.by_name(name), "device": device, "training": training}
    plan = mj.plan_memory(batch_size=rows, context=context, **asked)
    fitting = advice.until_it_fits(plan, found := advice.singles(plan))
    if fitting is not None:
        assert planned_again(plan, fitting.change).fits
        return
    least = advice.Change(batch_size=1, context=1)
    assert not planned_again(plan, least).fits
    for one in found:
        least |= dataclasses.replace(one.change, batch_size=None, context=None)
    assert not planned_again(plan, least).fits


def test_rows_and_context_are_cut_together_before_one_is_cut_to_nothing():
    plan = mj.plan_memory(mj.Configs.xlarge(), 64, device="rtx4090")
    fitting = advice.until_it_fits(plan, advice.singles(plan))
    assert fitting.plan.fits
    assert fitting.change.batch_size > 4
    assert fitting.change.context > 1024


def test_int8_comes_after_narrower_floats_and_before_another_model():
    config = mj.Configs.large().replace(dtype="float32", param_dtype="float32")
    plan = mj.plan_memory(config, 1, device="t4")
    changes = [one.change.model for one in advice.singles(plan)]
    order = [*({"cache_dtype": "int8"}, {"quantization": "int8"}), {"num_kv_heads": 8}]
    assert changes[-len(order) - 1 : -1] == order  # the last is a shorter context
    assert "param_dtype" in {name for change in changes[:-4] for name in change}
    most = mj.plan_memory(mj.Configs.xlarge(), 1, 10000, device="rtx4090")
    fitting = advice.until_it_fits(most, advice.singles(most, trained=True))
    assert fitting.change == advice.Change(memory_fraction=advice.MEMORY_FRACTION)
    device = devices.Device("x", "gpu", 12 * 10**9, memory_fraction=0.95)
    found = mj.plan_memory(mj.Configs.xlarge(), 1, 256, device=device)
    fitting = advice.until_it_fits(found, advice.singles(found))
    assert fitting.change.model == {"quantization": "int8"}
    assert fitting.plan.config.quantization == "w8a16"
    kept = mj.Configs.xlarge().replace(quantization="w8a16", cache_dtype="int8")
    models = [
        one.change.model for one in advice.singles(mj.plan_memory(kept, device="t4"))
    ]
    assert [model for model in models if model] == [{"num_kv_heads": 16}]


def test_a_training_step_is_advised_to_store_less():
    plan = mj.plan_memory(mj.Configs.large(), device="a100-40gb", training=True)
    fitting = advice.until_it_fits(plan, advice.singles(plan))
    assert fitting.change.model == {"remat": True}


def test_more_of_the_memory_is_offered_only_where_it_is_needed():
    for rows, offered in ((1, False), (16, True)):
        plan = mj.plan_memory(mj.Configs.large(), rows, device="rtx4090")
        found = [one.change.memory_fraction for one in advice.singles(plan)]
        assert (advice.MEMORY_FRACTION in found) == offered


def test_no_context_below_the_least_is_offered():
    plan = mj.plan_memory(mj.Configs.xlarge(), device="rtx4090")
    for least in (100, 6000, 7000, 16384):
        found = advice.singles(plan, least_context=least)
        contexts = [a.change.context for a in found if a.change.context is not None]
        assert all(context >= least for context in contexts)
        assert bool(contexts) == (least < 16384)
        fitting = advice.until_it_fits(plan, found, least_context=least)
        assert (fitting.change.context or least) >= least


def test_what_an_exact_plan_saves_is_the_difference_of_estimates(tiny_config):
    config = tiny_config.replace(dtype="float32")
    device = devices.Device("x", "cpu", 10**12)
    estimate, exact = (
        mj.plan_memory(config, 4, exact=exact, device=device) for exact in (False, True)
    )
    assert exact.exact
    assert not estimate.exact
    assert advice.singles(exact) == advice.singles(estimate)


def test_there_is_none_where_nothing_helps():
    plan = mj.plan_memory(mj.Configs.xlarge(), device=devices.Device("x", "gpu", 10**9))
    assert advice.until_it_fits(plan, advice.singles(plan)) is None


def test_all_the_levers_are_there():
    def named(training=False, **options):
        device = devices.Device("x", "gpu", 10**9, memory_fraction=0.75)
        config = mj.Configs.large().replace(dtype="float32", param_dtype="float32")
        plan = mj.plan_memory(config, 4, device=device, training=training)
        found = [one.change for one in advice.singles(plan, **options)]
        names = [name for change in found for name in change.model]
        call = ("batch_size", "context", "memory_fraction")
        return {*names, *(n for n in call for c in found if getattr(c, n) is not None)}

    dtypes = {"dtype", "param_dtype", "cache_dtype"}
    call = {"batch_size", "context", "memory_fraction"}
    assert named() == dtypes | {"quantization", "num_kv_heads"} | call
    assert named(trained=True) == dtypes | {"quantization"} | call
    assert named(training=True) == {"remat", "dtype"} | call


def test_a_change_reads_as_settings_of_a_program_that_only_has_a_config():
    config = mj.Configs.small()
    change = advice.Change({"num_kv_heads": 4}, context=600, memory_fraction=0.95)
    assert change.settings(config, workload.of_length(config, 600)) == (
        "--config.model.num_kv_heads=4 --config.model.max_kv_cache_len=600 "
        "--config.model.max_seq_len=600 with XLA_CLIENT_MEM_FRACTION=0.95 in the "
        "environment"
    )
    planned = workload.of_length(config.replace(prefill_chunk=700), 1500)
    assert advice.Change(context=1500).settings(config, planned) == (
        "--config.model.max_kv_cache_len=1500 --config.model.prefill_chunk=700"
    )


def test_a_change_reads_as_a_command_line():
    change = advice.Change({"num_kv_heads": 4}, batch_size=2)
    assert str(change) == "--config.model.num_kv_heads=4 --batch_size=2"
    both = change | advice.Change({"dtype": "bfloat16"}, batch_size=1, context=512)
    assert both == advice.Change(
        {"num_kv_heads": 4, "dtype": "bfloat16"}, batch_size=1, context=512
    )
