"""What of an installation would make the library slow, wrong or fail: the rules.

Each finding is a line: what is, whether that is good, and what to change. The facts are
gathered by `cli.doctor`; here nothing is touched.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

GOOD, NOTE, BAD = "ok", "note", "BAD"
SLOW_WRITE = 4.0  # of a long cache, over a short one; in place it is about 1
SLOW_READ = 0.5  # of what the device's maker says


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    found: str
    level: str = GOOD
    advice: str | None = None  # where the level is not GOOD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What there is."""

    versions: Mapping[str, str]  # of python, jax, jaxlib, flax, minillm_jax
    platform: str  # JAX's: "cpu", "gpu", "tpu"
    device: str
    devices: int  # how many
    nvidia_driver: bool  # whether there is one
    available_bytes: int
    memory_fraction: str | None  # that JAX may take, where it was told
    bandwidth: float | None  # bytes per second; None where there was no room to measure
    known_bandwidth: float | None  # what the maker says
    cache_dtype: str  # of this platform
    write_ratio: float | None  # seconds of a write to 32768 slots over one to 2048
    compilation_cache: str | None  # its folder


def findings(facts: Facts) -> Iterator[Finding]:
    """All of them, the good ones too."""
    yield from _versions(facts.versions, facts.platform)
    yield _device(facts)
    yield _memory(facts)
    yield _bandwidth(facts)
    yield _writes(facts)
    yield _compilations(facts)


def without_device(versions: Mapping[str, str], error: str) -> Iterator[Finding]:
    """Those of an installation in which JAX finds no device, for the reason given."""
    yield from _versions(versions, "")
    advice = (
        "JAX_PLATFORMS=cpu goes without; for a GPU see JAX's page on installation: "
        "its driver, and the extra cuda13 or cuda12"
    )
    yield Finding("device", f"none: {error}", BAD, advice)


def _versions(shown: Mapping[str, str], platform: str) -> Iterator[Finding]:
    python, jax, jaxlib, flax = (
        _numbers(shown.get(name, "")) for name in ("python", "jax", "jaxlib", "flax")
    )
    yield (
        Finding("python", shown["python"])
        if python >= (3, 11)
        else Finding("python", shown["python"], BAD, "Python 3.11 or newer is needed")
    )
    if jax[:2] < (0, 10):
        advice = "JAX 0.10 or newer is needed: pip install -U jax"
        yield Finding("jax", shown["jax"], BAD, advice)
    elif jax[:3] == (0, 11, 1):
        advice = "not supported, and excluded by our requirements: pip install -U jax"
        yield Finding("jax", shown["jax"], BAD, advice)
    elif jax[:2] < (0, 12) and platform == "cpu":
        advice = (
            "on CPU a bfloat16 cache costs its length at each token, and remat saves "
            "nothing, before 0.12; that needs Python 3.12"
        )
        yield Finding("jax", shown["jax"], NOTE, advice)
    else:
        yield Finding("jax", shown["jax"])
    if jax[:3] == jaxlib[:3]:
        yield Finding("jaxlib", shown["jaxlib"])
    else:
        advice = f"is not of jax {shown['jax']}: pip install -U jax jaxlib"
        yield Finding("jaxlib", shown["jaxlib"], BAD, advice)
    if flax:
        yield Finding("flax", shown["flax"])
    else:
        yield Finding("flax", "not installed", BAD, "pip install -U flax")


def _device(facts: Facts) -> Finding:
    number = "" if facts.devices == 1 else f", one of {facts.devices}"
    found = f"{facts.device} ({facts.platform}{number})"
    if facts.platform == "cpu" and facts.nvidia_driver:
        advice = (
            "there is an NVIDIA driver that JAX does not use: pip install "
            "'minillm_jax[cuda13]'; JAX_PLATFORMS=cuda shows what fails"
        )
        return Finding("device", found, BAD, advice)
    if facts.devices > 1:
        return Finding("device", found, NOTE, "one of them is used")
    return Finding("device", found)


def _memory(facts: Facts) -> Finding:
    found = f"{facts.available_bytes / 1e9:.3g} GB left"
    if facts.platform == "gpu" and facts.memory_fraction is None:
        advice = "of 75 % of it; XLA_CLIENT_MEM_FRACTION=.95 gives JAX more"
        return Finding("memory", found, NOTE, advice)
    return Finding("memory", found)


def _bandwidth(facts: Facts) -> Finding:
    if facts.bandwidth is None:
        advice = "too little memory is left to measure: is another process using it?"
        return Finding("bandwidth", "unknown", NOTE, advice)
    found, known = f"{facts.bandwidth / 1e9:.3g} GB/s read", facts.known_bandwidth
    if known is None:
        return Finding("bandwidth", found)
    found += f", {facts.bandwidth / known:.2f} of the maker's {known / 1e9:.4g}"
    if facts.bandwidth < SLOW_READ * known:
        advice = "is it shared, throttled or busy? decode is as slow as this"
        return Finding("bandwidth", found, BAD, advice)
    return Finding("bandwidth", found)


def _writes(facts: Facts) -> Finding:
    name = f"cache writes ({facts.cache_dtype})"
    if facts.write_ratio is None:
        return Finding(name, "unknown", NOTE, "the same")
    found = f"{facts.write_ratio:.1f} times as long at 32768 slots as at 2048"
    if facts.write_ratio <= SLOW_WRITE:
        return Finding(name, found)
    advice = "the cache is copied at each token: try another jax, or report it"
    return Finding(name, found, BAD, advice)


def _compilations(facts: Facts) -> Finding:
    name = "compilation cache"
    if facts.compilation_cache is not None:
        return Finding(name, facts.compilation_cache)
    advice = (
        "each process compiles anew; --compilation_cache=default, or "
        "use_compilation_cache(), keeps what is compiled"
    )
    return Finding(name, "none", NOTE, advice)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
