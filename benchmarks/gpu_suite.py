"""One call that checks and measures this library on the accelerator at hand.

    python -m benchmarks.gpu_suite --out=FOLDER
    python -m benchmarks.gpu_suite --out=FOLDER --parts=correctness,ceilings,small

Correctness on the device first, then its ceilings, decode and prefill of the four
presets, cuDNN's attention beside XLA's, options of XLA, and transformers where it is
installed. Each part is a process of its own: one that fails or takes too long leaves
the others as they are, and what it had found is kept. Writes FOLDER/suite.json after
every part, then suite.txt and, where matplotlib is installed, plots; prints the tables,
then the JSON object as the last line.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from benchmarks import report, suite
from benchmarks.suite import tables
from minillm_jax import progress, validation
from minillm_jax.cli import app
from minillm_jax.cli.app import UserError

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).parents[1]
LEAST_SECONDS = 10  # a part is not begun with less


def define_flags() -> None:
    """Defines all flags."""
    flags.DEFINE_string("out", None, "The folder for results; made where it is not.")
    flags.DEFINE_list("parts", list(suite.PARTS), "What to run, in the suite's order.")
    flags.DEFINE_integer("seconds", 460, "In all; parts beyond it are left out.")
    flags.DEFINE_bool("tiny", False, "Tiny shapes, to try the suite itself on a CPU.")


def run(
    out: pathlib.Path, parts: list[str], *, seconds: float, tiny: bool
) -> dict[str, Any]:
    """Runs the parts; the object that `main` prints, also kept in `out` all along."""
    settings = {"parts": parts, "seconds": seconds, "tiny": tiny}
    result = report.asked("gpu_suite", settings) | {"parts": {}}
    end, size = time.monotonic() + seconds, "tiny" if tiny else "full"
    with (
        progress.bar("", len(parts)) as bar,
        tempfile.TemporaryDirectory(prefix="minillm_jax_suite_") as temporary,
    ):
        process = functools.partial(_run_process, pathlib.Path(temporary), size)
        for name in parts:
            progress.advance(bar, name)
            left = end - time.monotonic()
            part = _run_part(name, result["parts"], left, process)
            machine = part["results"].pop("machine", None)
            if machine is not None:
                result |= machine
            result["parts"][name] = part
            (out / "suite.json").write_text(json.dumps(result) + "\n")
    return result


def _run_part(
    name: str,
    parts: dict[str, Any],
    left: float,
    process: Callable[[str, dict[str, Any], float], dict[str, Any]],
) -> dict[str, Any]:
    """A part's status, the seconds it took, and its results, if only some."""
    needed = ("torch", "transformers") if name == "transformers" else ()
    absent = [package for package in needed if not importlib.util.find_spec(package)]
    if absent:
        status = f"left out: not installed: {', '.join(absent)}"
    elif left < LEAST_SECONDS:
        status = "left out: no time left"
    else:
        found = {other: done["results"] for other, done in parts.items()}
        return process(name, found, min(suite.PARTS[name].seconds, left))
    return {"status": status, "seconds": 0.0, "results": {}}


def _run_process(
    folder: pathlib.Path, size: str, name: str, found: dict[str, Any], limit: float
) -> dict[str, Any]:
    """A part in a process; what parts compile alike is compiled once."""
    known, results = folder / "found.json", folder / f"{name}.json"
    known.write_text(json.dumps(found))
    results.write_text("{}")
    command = [sys.executable, "-m", "benchmarks.suite.worker", name]
    command += [str(known), str(results), size]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")} | os.environ
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
        status = "ok" if done.returncode == 0 else _failure(done)
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    return {
        "status": status,
        "seconds": time.monotonic() - start,
        "results": json.loads(results.read_text()),
    }


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    said = done.stderr.strip().splitlines()
    last = f": {said[-1].strip()[:300]}" if said else ""
    return f"failed with code {done.returncode}{last}"


def _checked_parts(names: list[str]) -> list[str]:
    """The parts asked for, in the suite's order; raises UserError for others."""
    for name in names:
        if name not in suite.PARTS:
            hint = validation.did_you_mean(name, tuple(suite.PARTS))
            raise UserError(
                f"--parts: {name!r} is none of {', '.join(suite.PARTS)}{hint}"
            )
    return [name for name in suite.PARTS if name in names]


def _checked_folder(out: str | None) -> pathlib.Path:
    if not out:
        raise UserError("--out is missing: a folder for the results")
    folder = pathlib.Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={out}: is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    """Runs the parts, prints and draws."""
    parts, out = _checked_parts(FLAGS.parts), _checked_folder(FLAGS.out)
    result = run(out, parts, seconds=FLAGS.seconds, tiny=FLAGS.tiny)
    text = tables.text(result)
    print(text)
    (out / "suite.txt").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.suite import plots  # matplotlib is an extra

        plots.draw(result, out)
    report.write_json(result, str(out / "suite.json"))
    if not any(part["status"] == "ok" for part in result["parts"].values()):
        raise UserError("no part succeeded; see above")


if __name__ == "__main__":
    define_flags()
    app.run_plain(main)
