"""Every piece of advice holds what it says."""

import dataclasses

import pytest

import minillm_jax as mj
from minillm_jax.planning import advice, devices

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


def test_changes_are_put_together_where_one_is_not_enough():
    plan = mj.plan_memory(mj.Configs.xlarge(), device="t4")
    found = advice.singles(plan)
    assert not any(one.plan.fits for one in found)
    together = advice.until_it_fits(plan, found)
    assert together is not None
    assert len(str(together.change).split()) > 1


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
    assert named() == dtypes | {"num_kv_heads"} | call
    assert named(trained=True) == dtypes | call
    assert named(model_only=True) == dtypes | {"num_kv_heads"}
    assert named(training=True) == {"remat", "dtype"} | call


def test_a_change_reads_as_a_command_line():
    change = advice.Change({"num_kv_heads": 4}, batch_size=2)
    assert str(change) == "--config.model.num_kv_heads=4 --batch_size=2"
    both = change | advice.Change({"dtype": "bfloat16"}, batch_size=1, context=512)
    assert both == advice.Change(
        {"num_kv_heads": 4, "dtype": "bfloat16"}, batch_size=1, context=512
    )
