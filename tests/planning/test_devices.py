"""The table of devices: complete, with a source each, and found by any spelling."""

import math

import pytest

import minillm_jax as mj
from minillm_jax.planning import devices

ASKED = ("h200", "h100", "a100-40gb", "a100-80gb", "l4", "t4", "rtx3090", "rtx4090")
ASKED += ("rtx5090", "v4", "v5e", "v5p", "v6e")


def test_the_table_has_the_devices_people_ask_for():
    assert set(devices.DEVICES) == set(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_every_device_has_all_figures_and_their_source(name):
    device = devices.DEVICES[name]
    assert device.platform == ("tpu" if name.startswith("v") else "gpu")
    assert 16e9 <= device.memory_bytes <= 200e9
    assert 0.2e12 <= device.bytes_per_second <= 10e12
    # What a byte read could be multiplied by meanwhile: no unit is mistaken.
    assert 50 <= device.flops_per_second / device.bytes_per_second <= 600
    assert device.source.startswith("https://") or "white paper" in device.source


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx-3090", "rtx3090"),
        ("A100 80GB", "a100-80gb"),
        ("a100_40gb", "a100-40gb"),
        ("TPU v5e", "v5e"),
        ("tpu-v6e", "v6e"),
        ("Tesla T4", "t4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        *((device.name, name) for name, device in devices.DEVICES.items()),
    ],
)
def test_a_device_is_found_by_any_spelling(spelled, name):
    assert devices.find(spelled) is devices.DEVICES[name]


@pytest.mark.parametrize("name", ["h300", "", "a100", "rtx4900", "NVIDIA H100 PCIe"])
def test_an_unknown_device_names_those_there_are(name):
    with pytest.raises(mj.ConfigError, match=r"must be one of h200, .*, v4, cpu, this"):
        devices.find(name)


@pytest.mark.parametrize(
    ("name", "offered"), [("A100", "a100-80gb or a100-40gb"), ("v5", "v5p or v5e")]
)
def test_a_name_that_several_begin_with_offers_them(name, offered):
    with pytest.raises(mj.ConfigError, match=f"; write {offered}$"):
        devices.find(name)


def test_a_misspelled_device_is_guessed():
    with pytest.raises(mj.ConfigError, match="did you mean rtx4090"):
        devices.find("rtx4900")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
    ],
)
def test_a_device_is_recognised_by_what_jax_calls_it(kind, name):
    assert devices.of_kind(kind) is devices.DEVICES[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "NVIDIA H100 PCIe"])
def test_another_kind_is_not_taken_for_one_of_them(kind):
    assert devices.of_kind(kind) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"platform": "npu"}, "device.platform='npu': must be one of gpu, tpu, cpu"),
        ({"platform": None}, "device.platform=None: must be a string"),
        ({"memory_bytes": -1}, "device.memory_bytes=-1: must be a number in [0,"),
        ({"memory_bytes": math.nan}, "device.memory_bytes=nan: must be a number"),
        ({"memory_bytes": None}, "device.memory_bytes=None: must be a number"),
        ({"bytes_per_second": 0}, "device.bytes_per_second=0: must be a number"),
        ({"flops_per_second": math.inf}, "device.flops_per_second=inf: must be"),
        ({"memory_fraction": 1.5}, "device.memory_fraction=1.5: must be a number"),
        ({"memory_fraction": math.nan}, "device.memory_fraction=nan: must be a"),
    ],
)
def test_a_device_that_cannot_be_is_a_config_error(fields, words):
    given = {"name": "some", "platform": "gpu", "memory_bytes": 10**9} | fields
    with pytest.raises(mj.ConfigError) as error:
        devices.Device(**given)
    assert words in str(error.value)
