"""What of this installation would make the library slow, wrong or fail.

    python -m minillm_jax.cli.doctor

Looks at versions, the device, its memory and how fast it reads, whether a write to the
cache costs what a token costs, and the compilation cache; says what to change. The exit
code is 1 if something is bad. Takes some seconds.
"""

import dataclasses
import json
import os
import pathlib
import sys

import jax
from absl import flags
from rich import console, table, text

from minillm_jax import config
from minillm_jax.cli import app
from minillm_jax.planning import devices, doctor, machine, probes
from minillm_jax.planning.doctor import Facts

FLAGS = flags.FLAGS
_STYLES = {doctor.GOOD: "green", doctor.NOTE: "yellow", doctor.BAD: "bold red"}


def define_flags() -> None:
    """Defines all of them."""
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the lines.")


def facts() -> Facts:
    """Gathers and measures."""
    device = jax.devices()[0]
    known = devices.of_kind(device.device_kind)
    cache_dtype = config.Configs.small().resolve(device.platform).cache_dtype
    available, bandwidth, ratio = machine.available_bytes(device), None, None
    if available > 2 * probes.probe_bytes(device.platform):
        short, long = (
            probes.cache_write_seconds(slots, cache_dtype) for slots in (2048, 32768)
        )
        bandwidth, ratio = probes.Bandwidth().probe(), long / short
    return Facts(
        versions=machine.versions(),
        platform=device.platform,
        device=machine.device_name(device),
        devices=jax.device_count(),
        nvidia_driver=pathlib.Path("/proc/driver/nvidia/version").exists(),
        available_bytes=available,
        memory_fraction=machine.told_fraction(),
        bandwidth=bandwidth,
        known_bandwidth=None if known is None else known.bytes_per_second,
        cache_dtype=cache_dtype,
        write_ratio=ratio,
        compilation_cache=os.environ.get("JAX_COMPILATION_CACHE_DIR"),
    )


def main() -> None:
    """Prints the lines, and exits with 1 if one is bad."""
    try:
        jax.devices()
    except Exception as error:  # JAX has several, AssertionError among them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        found = list(doctor.without_device(machine.versions(), reason))
    else:
        found = list(doctor.findings(facts()))
    if FLAGS.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found]))
    else:
        shown = table.Table(box=None, show_header=False, pad_edge=False)
        for finding in found:
            level = text.Text(finding.level, _STYLES[finding.level])
            said = text.Text(finding.found)
            if finding.advice is not None:
                said.append(f"\n{finding.advice}", "italic")
            shown.add_row(level, finding.name, said)
        console.Console(highlight=False).print(shown)
    if any(finding.level == doctor.BAD for finding in found):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run_plain(main)
