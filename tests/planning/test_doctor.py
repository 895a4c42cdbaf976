"""What the doctor says of machines that are well and of those that are not."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from minillm_jax.planning import doctor, probes
from tests import commands

WELL = doctor.Facts(
    versions={
        **{"python": "3.12.1", "jax": "0.12.0.1", "jaxlib": "0.12.0.1"},
        **{"flax": "0.12.12", "minillm_jax": "0.1.0"},
    },
    platform="gpu",
    device="NVIDIA H200",
    devices=1,
    nvidia_driver=True,
    available_bytes=100 * 10**9,
    memory_fraction=".95",
    bandwidth=4.2e12,
    known_bandwidth=4.8e12,
    cache_dtype="bfloat16",
    write_ratio=1.1,
    compilation_cache="/somewhere",
)
CASES = {  # what is otherwise, the line and its level, words of the advice
    "python": ({"python": "3.10.4"}, "python", "BAD", "3.11"),
    "old jax": ({"jax": "0.9.2", "jaxlib": "0.9.2"}, "jax", "BAD", "pip install"),
    "bad jax": ({"jax": "0.11.1", "jaxlib": "0.11.1"}, "jax", "BAD", "excluded"),
    "jaxlib": ({"jaxlib": "0.11.0"}, "jaxlib", "BAD", "not of jax 0.12.0.1"),
    "cpu": ({"platform": "cpu"}, "device", "BAD", "NVIDIA driver"),
    "several": ({"devices": 8}, "device", "note", "one of them"),
    "fraction": ({"memory_fraction": None}, "memory", "note", ".95"),
    "slow": ({"bandwidth": 2e12}, "bandwidth", "BAD", "throttled"),
    "copies": ({"write_ratio": 15.0}, "cache writes (bfloat16)", "BAD", "copied"),
    "no flax": ({"flax": "not installed"}, "flax", "BAD", "pip install"),
    "full": ({"bandwidth": None}, "bandwidth", "note", "another process"),
    "unknown": ({"write_ratio": None}, "cache writes (bfloat16)", "note", "same"),
    "cold": ({"compilation_cache": None}, "compilation cache", "note", "default"),
}


def changed(facts, changes):
    versions = {n: v for n, v in changes.items() if n in facts.versions}
    rest = {n: v for n, v in changes.items() if n not in facts.versions}
    facts = dataclasses.replace(facts, versions={**facts.versions, **versions})
    return dataclasses.replace(facts, **rest)


def test_a_machine_that_is_well_has_nothing_to_change():
    found = list(doctor.findings(WELL))
    assert {finding.level for finding in found} == {"ok"}
    assert all(finding.advice is None for finding in found)


@pytest.mark.parametrize(
    ("changes", "name", "level", "words"), CASES.values(), ids=CASES
)
def test_what_is_not_well_is_named_with_what_to_change(changes, name, level, words):
    found = {f.name: f for f in doctor.findings(changed(WELL, changes))}
    assert found.pop(name).level == level
    assert {finding.level for finding in found.values()} == {"ok"}
    found = {f.name: f for f in doctor.findings(changed(WELL, changes))}
    assert words in found[name].advice


def test_jax_before_0_12_is_told_of_on_a_cpu_alone():
    old = changed(WELL, {"jax": "0.10.2", "jaxlib": "0.10.2"})
    on_cpu = changed(old, {"platform": "cpu", "nvidia_driver": False})
    for facts, level in ((old, "ok"), (on_cpu, "note")):
        assert {f.name: f.level for f in doctor.findings(facts)}["jax"] == level


def test_the_probes_measure_something():
    assert 0 < probes.cache_write_seconds(64, "float32", writes=10) < 1


def test_it_fits_a_screen():
    done = commands.run("minillm_jax.cli.doctor")
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    assert 9 <= len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert "compilation cache" in done.stdout


def test_a_machine_without_the_device_that_was_asked_for_is_told_so():
    done = subprocess.run(
        [sys.executable, "-m", "minillm_jax.cli.doctor", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = {line["name"]: line for line in json.loads(done.stdout)}
    assert found["device"]["level"] == "BAD"
    assert found["device"]["found"].startswith("none: ")
    assert "JAX_PLATFORMS=cpu" in found["device"]["advice"]
