"""The machine at hand: its name, its versions and the memory it has left.

A `device` is one of `jax.devices()`, where it is not the planner's `Device`.
"""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterator
from typing import Any

import jax

from minillm_jax.planning import devices

_HERE = "what this machine has left"  # the source of a device that is found
_ROOT = pathlib.Path("/")
# Of cgroups by controller, "" = version 2: the folder, the files of the limit and of
# what is used, and what `memory.stat` calls the cached files that are not in use.
_CGROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
}


def host() -> devices.Device:
    """The processors and the memory they have left, to plan for; JAX is not asked."""
    return devices.Device(_processor(), "cpu", _host_available(), source=_HERE)


def this_device() -> devices.Device:
    """The first of `jax.devices()`, with what it has left, to plan for."""
    device = jax.devices()[0]
    fraction = _fraction(device.platform)
    found = {
        "memory_bytes": math.ceil(available_bytes(device) / fraction),
        "memory_fraction": fraction,
        "source": _HERE,
    }
    known = devices.of_kind(device.device_kind)
    if known is not None:
        return dataclasses.replace(known, **found)
    return devices.Device(device_name(device), device.platform, **found)


def _fraction(platform: str) -> float:
    """What JAX takes of the memory, as far as it can be told."""
    usual, told = devices.FRACTIONS.get(platform, 1.0), told_fraction() or ""
    if platform != "gpu" or not re.fullmatch(r"\d*\.?\d+", told):
        return usual
    return min(float(told), 1.0) or usual


def told_fraction() -> str | None:
    """What the environment says that JAX may take of a GPU's memory, if it does."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    return next((os.environ[name] for name in names if name in os.environ), None)


def device_name(device: Any) -> str:
    """What a person calls it: the GPU's or TPU's kind, or the processor's model."""
    return _processor() if device.platform == "cpu" else device.device_kind


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in _lines("proc/cpuinfo")
        if line.startswith("model name")
    ]
    model = names[0] if names else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions that a measurement depends on."""
    packages = ("minillm_jax", "jax", "jaxlib", "flax")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def available_bytes(device: Any) -> int:
    """Bytes that can still be allocated: of the device, or of the host on CPU.

    On a GPU what JAX may take (its 75 % default, XLA_CLIENT_MEM_FRACTION) less
    what it uses; on CPU the host's available memory, within the cgroup's limit.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _host_available()


def peak_bytes(device: Any) -> int | None:
    """The most that was in use so far: of the device, or of this process on CPU."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _host_available() -> int:
    limits = [_available(), *_cgroups_available()]
    return max(0, min(limits))


def _available() -> int:
    for line in _lines("proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups_available() -> Iterator[int]:
    """What the limit of each group that this process is in leaves, where it has one.

    A container may not see the folder of its own group, but has its limits at the root.
    """
    for line in _lines("proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _CGROUP_FILES:
            continue
        root, *names = _CGROUP_FILES[kind]
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            left = _left_in(f"{root}/{folder}", *names)
            if left is not None:
                yield left


def _left_in(folder: str, limit: str, used: str, inactive: str) -> int | None:
    """Bytes below a group's limit; what the kernel would give up counts as left."""
    most, taken = _lines(f"{folder}/{limit}"), _lines(f"{folder}/{used}")
    if not most or not taken or not most[0].strip().isdecimal():  # "max" = none
        return None
    stat = [line.split() for line in _lines(f"{folder}/memory.stat")]
    files = sum(int(line[1]) for line in stat if line[:1] == [inactive])
    return int(most[0]) - int(taken[0]) + files


def _lines(path: str) -> list[str]:
    try:
        return (_ROOT / path).read_text().splitlines()
    except OSError:
        return []
