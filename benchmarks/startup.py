"""Seconds from a command to its first token, and of compiling: cold, and from disk.

    python -m benchmarks.startup --config=configs/small.py
    python -m benchmarks.startup --config=xlarge

`cold` begins with an empty compilation cache, `warm` with what `cold` has left there.
Compiling is measured from shapes, so that any preset can be; the first token, in
processes of their own, where the model fits this machine. Prints a table, then one JSON
object as the last line.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from rich import console

from benchmarks import report
from minillm_jax import compilation_cache
from minillm_jax.cli import app, config_files
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode
from minillm_jax.decoding.generator import GENERATE_STEPS
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import memory

CAPACITY = 256
TIMES = ("cold", "warm")


def compile_seconds(model: MiniLLM) -> dict[str, float]:
    """Seconds to trace and compile a prefill chunk and a decode chunk, from shapes."""
    config = model.config
    params = transformer.param_shapes(model)
    cache = kv.cache_shapes(config, 1, CAPACITY)
    row, active = np.zeros(1, np.int32), np.ones(1, bool)
    chunk = min(config.prefill_chunk, CAPACITY)
    tokens = np.zeros((1, chunk), np.int32)
    logits = jax.ShapeDtypeStruct((1, config.vocab_size), np.float32)
    steps = max(GENERATE_STEPS)
    lowered = {
        "prefill": lambda: decode.prefill_chunk.lower(
            model, params, cache, logits, tokens, row
        ),
        "decode": lambda: decode.decode_chunk.lower(
            model, params, cache, row, active, steps=steps
        ),
    }
    seconds = {}
    for name, lower in lowered.items():
        start = time.perf_counter()
        lower().compile()
        seconds[f"{name}_compile_seconds"] = time.perf_counter() - start
    return seconds


def first_token_seconds(arguments: list[str], folder: pathlib.Path) -> float:
    """Seconds from the start of a process that generates to its first character."""
    command = [sys.executable, "-m", "minillm_jax.cli.generate", *arguments]
    command += ["--prompt=def main():", "--max_new_tokens=2", "--temperature=0"]
    command += [f"--compilation_cache={folder}"]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, said = process.communicate()
    if process.returncode != 0 or not first:
        raise UserError(f"generate failed: {said.decode(errors='replace').strip()}")
    return seconds


def benchmark(config: Any, arguments: list[str]) -> dict[str, Any]:
    """Measures a config file's model; returns the object that `main` prints."""
    model = transformer.create_model(config_files.model_config(config))
    report.check_writable(config_files.decode_settings(config).json_path)
    rows: dict[str, dict[str, float | None]] = {}
    with tempfile.TemporaryDirectory(prefix="minillm_jax_startup_") as temporary:
        folder = pathlib.Path(temporary)
        compilation_cache.use_compilation_cache(folder / "compile")
        for name in TIMES:
            jax.clear_caches()
            rows[name] = {**compile_seconds(model), "first_token_seconds": None}
        if _fits(model.config):
            for name in TIMES:
                seconds = first_token_seconds(arguments, folder / "first_token")
                rows[name]["first_token_seconds"] = seconds
    sections = {"model_path": config.get("model_path"), "model": model.config.to_dict()}
    return report.header("startup", sections) | rows


def _fits(config: ModelConfig) -> bool:
    return memory.plan_memory(config, context=CAPACITY).fits


def show(result: dict[str, Any]) -> None:
    """The table."""
    out = console.Console(highlight=False)
    device, versions = result["device"]["name"], result["versions"]
    out.print(f"{device}, jax {versions['jax']}, {result['config']['model']['dtype']}")
    for name in TIMES:
        seconds = ", ".join(
            f"{key.removesuffix('_seconds').replace('_', ' ')} "
            + report.or_dash(value, lambda x: f"{x:.2f} s")
            for key, value in result[name].items()
        )
        out.print(f"{name}: {seconds}")


def main(config: Any) -> None:
    """Measures, then prints."""
    if any("compilation_cache" in arg for arg in sys.argv[1:]):
        raise UserError("--compilation_cache: this measures with folders of its own")
    result = benchmark(config, sys.argv[1:])
    show(result)
    report.write_json(result, config_files.decode_settings(config).json_path)


if __name__ == "__main__":
    app.run(main)
