"""Whether a model fits a device, and how much of it would, before anything is made.

plan = plan_memory(Configs.large(), batch_size=8, device="rtx4090")
plan.fits, plan.total_bytes, plan.bytes_by_class, plan.max_context
"""

import dataclasses
import functools

import jax

from minillm_jax import validation
from minillm_jax.config import MAX_POSITIONS, ConfigError, ModelConfig
from minillm_jax.model import cache as kv
from minillm_jax.planning import automatic, compiled, devices, machine
from minillm_jax.planning.automatic import Auto
from minillm_jax.planning.devices import Device
from minillm_jax.planning.workload import Moments, Workload

# Python, JAX and the compiler, resident on the host.
RUNTIME_BYTES = 560 * 2**20
# Share of what is alive that allocators round up, keep for later or cut into pieces.
# The host's does so in every thread: measured in processes of a limited memory.
WORKSPACE, HOST_WORKSPACE = 0.03, 0.12


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes at each moment of a run, and whether the largest keeps the limit."""

    workload: Workload
    device: Device
    moments: Moments  # moment -> class -> bytes alive then

    @property
    def peak(self) -> str:
        """The moment when most is alive."""
        return max(self.moments, key=lambda name: sum(self._taken(name).values()))

    @property
    def bytes_by_class(self) -> dict[str, int]:
        """At the peak, with what is taken beside it: these add up to `total_bytes`."""
        return self._taken(self.peak)

    def _taken(self, moment: str) -> dict[str, int]:
        alive, platform = self.moments[moment], self.device.platform
        share = HOST_WORKSPACE if platform == "cpu" else WORKSPACE
        scratch = self.workload.scratch_bytes(moment, platform)
        taken = {**alive, "workspace": int(share * sum(alive.values())) + scratch}
        if platform == "cpu":
            taken["runtime"] = RUNTIME_BYTES
        return taken

    @property
    def total_bytes(self) -> int:
        """The most that is taken at any moment."""
        return sum(self.bytes_by_class.values())

    @property
    def limit_bytes(self) -> int:
        """What may be taken of the device."""
        return max(0, self.device.limit_bytes)

    @property
    def fits(self) -> bool:
        """Whether the total keeps the limit."""
        return self.total_bytes <= self.limit_bytes

    @property
    def exact(self) -> bool:
        """Whether the bytes are XLA's; `max_batch_size`, `max_context` never are."""
        return any("compiled" in classes for classes in self.moments.values())

    @property
    def config(self) -> ModelConfig:
        """Resolved for the device, and made for the context that is planned."""
        return self.workload.config

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.workload.batch_size

    @property
    def context(self) -> int:
        """Tokens that a row of the cache holds, or of a training sequence."""
        return self.workload.context

    @property
    def weights_bytes(self) -> int:
        """Of the parameters as stored."""
        return self.workload.weights_bytes

    @property
    def cache_bytes(self) -> int:
        """Of the cache as allocated."""
        return self.workload.cache_bytes

    @property
    def cache_used_bytes(self) -> int:
        """Of the cache, what the context fills."""
        return self.workload.cache_used_bytes

    @functools.cached_property
    def max_batch_size(self) -> int:
        """The most rows of this context that fit; 0 = none."""

        def fits(rows: int) -> bool:
            more = dataclasses.replace(self.workload, batch_size=rows)
            return plan(more, self.device).fits

        return automatic.largest(fits, kv.MAX_ROWS)

    @functools.cached_property
    def max_context(self) -> int:
        """The longest context of this many rows that fits; 0 = none.

        It is what the config's `max_kv_cache_len` (of training, `max_seq_len`) could be
        raised to, or must be lowered to, with the lengths that depend on it.
        """
        work = dataclasses.replace(self.workload, capacity=None)

        def fits(context: int) -> bool:
            longer = work.with_context(max(context, work.least_context))
            return plan(longer, self.device).fits

        return automatic.largest(fits, MAX_POSITIONS)

    def refusal(self) -> str:
        """Why it does not fit, for the user of a command line."""
        shown = {n: gigabytes(size) for n, size in self.bytes_by_class.items()}
        parts = [f"{n} {size}" for n, size in shown.items() if size != gigabytes(0)]
        return (
            f"does not fit: {', '.join(parts)}; {gigabytes(self.total_bytes)} in all, "
            f"but {gigabytes(self.limit_bytes)} are available on {self.device.name}"
        )


def plan_memory(
    config: ModelConfig,
    batch_size: int | str = 1,
    context: int | str | None = None,
    device: str | Device = "this",
    *,
    policy: kv.CachePolicy = kv.CachePolicy(),
    training: bool = False,
    accumulated: bool = False,
    exact: bool = False,
) -> MemoryPlan:
    """The plan of generating, or training, with a config on a device; nothing is made.

    Args:
      config: dtypes "auto" become those of the device.
      batch_size: rows; "auto" = the most that fit, "auto:64" = at most 64.
      context: tokens that a row of the cache holds, or of a training sequence. None =
        `max_kv_cache_len`, or `max_seq_len`; with another the config is planned as if
        they were that (a Generator whose config allows more allocates the next power of
        two). "auto" and "auto:65536" = the longest that fits, chosen before an
        automatic batch size.
      device: a name of `devices.DEVICES`, "cpu" (the host), "this" (the first of
        `jax.devices()`, with the memory it has left), or a Device.
      policy: of the cache.
      training: a step of AdamW instead of prefill and decode; parameters are float32
        then.
      accumulated: a step sums the gradients of several batches of so many rows.
      exact: also compiles what is planned, from shapes, and takes XLA's figures; only
        for the platform at hand.

    Raises:
      ConfigError: for anything that is not as above.
    """
    kv.check_types(config, policy)
    device = find_device(device)
    if training:
        config = as_trained(config)
    config = config.resolve(device.platform)
    longest = config.max_seq_len if training else config.max_kv_cache_len
    rows = automatic.parse("batch_size", batch_size, kv.MAX_ROWS)
    asked = longest if context is None else context
    tokens = automatic.parse("context", asked, MAX_POSITIONS)
    work = Workload(
        config=config,
        batch_size=1 if isinstance(rows, Auto) else rows,
        context=longest,
        policy=policy,
        training=training,
        accumulated=training and accumulated,
    )
    if isinstance(tokens, Auto):
        longest = plan(work, device).max_context
        tokens = tokens.choose(longest, least=work.least_context)
    work = work.with_context(tokens)
    if isinstance(rows, Auto):
        chosen = rows.choose(plan(work, device).max_batch_size)
        work = dataclasses.replace(work, batch_size=chosen)
    if not training:
        kv.checked_capacity(work.config, work.allocated, policy)
    found = plan(work, device)
    return _compiled(found) if exact else found


def as_trained(config: ModelConfig) -> ModelConfig:
    """As training has it: parameters in float32, whatever it computes in.

    Raises:
      ConfigError: for parameters in something else.
    """
    if config.param_dtype not in ("auto", "float32"):
        raise ConfigError(
            f"param_dtype={config.param_dtype}: training keeps parameters in float32; "
            "write float32, or auto (dtype may be bfloat16)"
        )
    if config.quantization != "none":
        raise ConfigError(
            f"quantization={config.quantization}: kernels in int8 cannot be trained; "
            'write "none"'
        )
    return config.replace(param_dtype="float32")


def plan(work: Workload, device: Device) -> MemoryPlan:
    """The plan of a workload whose config is resolved for the device."""
    return MemoryPlan(work, device, work.moments(device.platform))


def _compiled(found: MemoryPlan) -> MemoryPlan:
    """With XLA's figures in the place of ours, of the moments that are one call."""
    platform, here = found.device.platform, jax.default_backend()
    if platform != here:
        raise ConfigError(
            f"exact=True: compiles for this machine's {here!r}, but "
            f"{found.device.name} is a {platform!r}; leave it out"
        )
    moments = dict(found.moments)
    for name, total in compiled.total_bytes(found.workload).items():
        stored = ("weights", "cache", "optimizer")
        parts = {k: v for k, v in moments[name].items() if k in stored}
        moments[name] = parts | {"compiled": total - sum(parts.values())}
    return dataclasses.replace(found, moments=moments)


def find_device(device: str | Device) -> Device:
    """The device of that name, "cpu" or "this"; a Device is itself.

    Raises:
      ConfigError: for anything else.
    """
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise ConfigError(
            f"device={validation.shown(device)}: must be a name or Device"
        )
    found = {"this": machine.this_device, "cpu": machine.host}.get(
        device.strip().lower()
    )
    return devices.find(device) if found is None else found()


def gigabytes(size: int) -> str:
    """As messages and tables show bytes."""
    return f"{size / 1e9:.1f} GB"
