"""Accelerators to compile for without having one, described to XLA.

XLA compiles for a GPU that is described by numbers, or for a TPU by its name, where
JAX's plugin for it is installed: no device and no driver are needed. What it would try
out on the device, tile sizes above all, it then leaves at its defaults.
"""

import os
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minillm_jax.cli.app import UserError
from minillm_jax.planning.devices import DEVICES, Device


class Gpu(NamedTuple):
    """Of NVIDIA; figures of the maker's data sheets and architecture papers."""

    device: Device
    capability: tuple[int, int]
    multiprocessors: int
    cache_bytes: int  # the second level
    shared_bytes: int  # of a multiprocessor


class Tpu(NamedTuple):
    """Of Google, one chip of the smallest slice that is described."""

    device: Device
    topology: str


TARGETS: dict[str, Gpu | Tpu] = {
    "a100": Gpu(DEVICES["a100-80gb"], (8, 0), 108, 40 << 20, 164 << 10),
    "h100": Gpu(DEVICES["h100"], (9, 0), 132, 50 << 20, 228 << 10),
    "h200": Gpu(DEVICES["h200"], (9, 0), 132, 50 << 20, 228 << 10),
    "v5e": Tpu(DEVICES["v5e"], "v5e:2x2"),
    "v6e": Tpu(DEVICES["v6e"], "v6e:2x2"),
}
_PLUGINS = {Gpu: "minillm_jax[cuda13]", Tpu: "minillm_jax[tpu]"}


def sharding(name: str) -> NamedSharding:
    """Where arrays are that one described device holds; for `jax.ShapeDtypeStruct`.

    Raises:
      UserError: for an unknown target, or if its plugin is not installed.
    """
    if name not in TARGETS:
        raise UserError(f"--target={name}: must be one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    # The plugins look for their driver and their machine first, and would fail.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        if isinstance(target, Tpu):
            described = topologies.get_topology_desc(target.topology, platform="tpu")
        else:
            described = topologies.get_topology_desc(
                target.device.name,
                platform="cuda",
                topology="1x1x1",
                target_config=_described(target),
            )
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--target={name}: needs pip install '{_PLUGINS[type(target)]}' "
            f"({' '.join(str(error).split())[:100]})"
        ) from None
    mesh = Mesh(np.array(described.devices[:1]), ("one",))
    return NamedSharding(mesh, PartitionSpec())


def platform(name: str) -> str:
    """JAX's name of a target's platform."""
    return TARGETS[name].device.platform


def _described(gpu: Gpu) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    major, minor = gpu.capability
    return f"""
    platform_name: "CUDA"
    device_description_str: "{gpu.device.name}"
    dnn_version_info {{ major: 9 minor: 10 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {gpu.multiprocessors}
      fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
      clock_rate_ghz: 1.7
      device_memory_size: {gpu.device.memory_bytes}
      memory_bandwidth: {int(gpu.device.bytes_per_second or 0)}
      l2_cache_size: {gpu.cache_bytes}
      shared_memory_per_core: {gpu.shared_bytes}
      shared_memory_per_block: {48 << 10}
      shared_memory_per_block_optin: {gpu.shared_bytes - (1 << 10)}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
    """


def placed(tree, where: NamedSharding):
    """Shapes of a tree as arrays that are there."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )
