"""Accelerators by name: what each holds, how fast it reads, how fast it multiplies.

Figures are the makers', of one chip: the best that anything could do. Memory is counted
as they count it, in 10^9 bytes; drivers mostly report some percent more. No device is
touched here.
"""

import dataclasses
import numbers
import re

from minillm_jax import validation
from minillm_jax.config import ConfigError

_PLATFORMS = validation.OneOf(("gpu", "tpu", "cpu"))
_RATE = validation.Range(1, 1e24)
_NUMBERS = {
    "memory_bytes": validation.Range(0, 1e18),
    "bytes_per_second": _RATE,
    "flops_per_second": _RATE,
    "memory_fraction": validation.Range(0, 1),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or a machine as somebody describes it.

    Raises:
      ConfigError: for a field that cannot be, with its value and the rule.
    """

    name: str  # what JAX calls a GPU of this kind, so that one can be recognised
    platform: str  # JAX's: "gpu", "tpu" or "cpu"
    memory_bytes: int
    bytes_per_second: float | None = None  # read from its memory; None = not known
    # Products of bfloat16 (T4: float16) with sums in float32, without sparsity.
    flops_per_second: float | None = None
    source: str = "given"  # where the figures are from
    # What JAX takes of the memory: three quarters of a GPU's unless
    # XLA_CLIENT_MEM_FRACTION says otherwise (docs.jax.dev, "GPU memory allocation").
    memory_fraction: float = 1.0

    def __post_init__(self) -> None:
        problems = {name: self._number_problem(name) for name in _NUMBERS}
        text = isinstance(self.platform, str)
        rule = _PLATFORMS.problem(self.platform) if text else "must be a string"
        problems["platform"] = rule
        told = [
            f"device.{name}={validation.shown(getattr(self, name))}: {problem}"
            for name, problem in problems.items()
            if problem is not None
        ]
        if told:
            raise ConfigError(told)

    def _number_problem(self, name: str) -> str | None:
        value = getattr(self, name)
        if value is None and _NUMBERS[name] is _RATE:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return "must be a number"
        return _NUMBERS[name].problem(float(value))

    @property
    def limit_bytes(self) -> int:
        """What a program may use."""
        return int(self.memory_bytes * self.memory_fraction)


AT_HAND = ("cpu", "this")  # names of what machine.py finds
FRACTIONS = {"gpu": 0.75}  # by platform, where it is not all of the memory
_GB = 10**9
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_CLOUD = "https://docs.cloud.google.com/tpu/docs"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture, white paper, 2025"
_ADA = "NVIDIA Ada GPU architecture, white paper, 2022"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture, white paper, 2020"

# FLOPs are half of the makers' where those count sparsity: H200, H100, L4.
_NVIDIA_GPUS = {
    "h200": ("NVIDIA H200", 141, 4.8e12, 989.5e12, f"{_NVIDIA}/h200"),
    "h100": ("NVIDIA H100 80GB HBM3", 80, 3.35e12, 989.5e12, f"{_NVIDIA}/h100"),
    "a100-80gb": ("NVIDIA A100-SXM4-80GB", 80, 2.039e12, 312e12, f"{_NVIDIA}/a100"),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 40, 1.555e12, 312e12, f"{_NVIDIA}/a100"),
    "l4": ("NVIDIA L4", 24, 300e9, 121e12, f"{_NVIDIA}/l4"),
    "t4": ("Tesla T4", 16, 320e9, 65e12, f"{_NVIDIA}/tesla-t4"),
    "rtx5090": ("NVIDIA GeForce RTX 5090", 32, 1.792e12, 209.5e12, _BLACKWELL),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 24, 1.008e12, 165.2e12, _ADA),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 24, 936e9, 71e12, _AMPERE),
}
_TPUS = {
    "v6e": ("TPU v6e", 32, 1.638e12, 918e12, f"{_CLOUD}/v6e"),
    "v5p": ("TPU v5p", 95, 2.765e12, 459e12, f"{_CLOUD}/v5p"),
    "v5e": ("TPU v5e", 16, 819e9, 197e12, f"{_CLOUD}/v5e"),
    "v4": ("TPU v4", 32, 1.2e12, 275e12, f"{_CLOUD}/v4"),
}
DEVICES = {
    short: Device(
        *(name, platform, gigabytes * _GB, read, flops, source),
        memory_fraction=FRACTIONS.get(platform, 1.0),
    )
    for platform, table in (("gpu", _NVIDIA_GPUS), ("tpu", _TPUS))
    for short, (name, gigabytes, read, flops, source) in table.items()
}
# Where JAX says something else than everybody.
_KINDS = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e"}


def find(name: str) -> Device:
    """The device called so, however it is spelled: "RTX 4090", "tpu-v5e", "H200".

    What JAX calls it will do too.

    Raises:
      ConfigError: if there is none, with the names there are.
    """
    spelled = {_plain(device.name): device for device in DEVICES.values()}
    spelled |= {_plain(known): device for known, device in DEVICES.items()}
    device = of_kind(name) or spelled.get(_plain(name))
    if device is None:
        known = ", ".join((*DEVICES, *AT_HAND))
        given = validation.shown(name)
        raise ConfigError(f"device={given}: must be one of {known}{_hint(name)}")
    return device


def _hint(name: str) -> str:
    """What may have been meant: several where they begin so."""
    plain = _plain(name)
    longer = [known for known in DEVICES if plain and _plain(known).startswith(plain)]
    if longer:
        return f"; write {' or '.join(longer)}"
    return validation.did_you_mean(name.lower(), (*DEVICES, *AT_HAND))


def of_kind(kind: str) -> Device | None:
    """The device that JAX calls `kind`, its `device_kind`; None for any other."""
    name = _KINDS.get(kind, kind)
    return next((device for device in DEVICES.values() if device.name == name), None)


def _plain(name: str) -> str:
    words = re.sub(r"nvidia|geforce|tesla|google|cloud|tpu", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)
