"""What XLA makes of a model for an accelerator that is not here.

    python -m benchmarks.ahead --config=medium --target=h200
    python -m benchmarks.ahead --config=large --target=v5e --config.model.head_dim=128

Compiles prefill and decode for a described device (`pip install minillm_jax[cuda13]` or
`[tpu]`; no driver is needed), and tells what can be read off the result: the kernels of
a step, the memory it takes beside weights and cache, whether the cache is ever copied,
and whether the host is asked in between. Nothing is run, and no time is measured.

Prints a table, then one JSON object as the last line.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from rich import console

from benchmarks import hlo, report, targets
from minillm_jax import progress
from minillm_jax.cli import app, config_files
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode, sampling
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM

FLAGS = flags.FLAGS
BATCH_SIZES, STEPS, CAPACITY = (1, 8, 32), 16, 1024
DECODES = {"greedy": sampling.GREEDY, "sampling": sampling.SamplingParams()}


def define_flags() -> None:
    """Defines everything but --config."""
    known = ", ".join(targets.TARGETS)
    flags.DEFINE_string("target", "h200", f"The accelerator: {known}.")


def calls(config: ModelConfig) -> list[dict[str, Any]]:
    """What is compiled: each a row of the results, without its figures."""
    capacity = min(CAPACITY, config.max_kv_cache_len)
    shapes = [{"batch_size": rows, "capacity": capacity} for rows in BATCH_SIZES]
    found = [shape | {"call": "decode, greedy"} for shape in shapes]
    found += [shapes[1] | {"call": "decode, sampling"}]
    found += [shape | {"call": "prefill"} for shape in shapes[:2]]
    return found


def compiled(model: MiniLLM, call: dict[str, Any], where: Any) -> Any:
    """The executable of a call."""
    config, rows = model.config, call["batch_size"]
    params = transformer.param_shapes(model)
    cache = kv.cache_shapes(config, rows, call["capacity"])
    if call["call"] == "prefill":
        chunk = min(config.prefill_chunk, call["capacity"])
        logits = jax.ShapeDtypeStruct((rows, config.vocab_size), np.float32)
        tokens = jax.ShapeDtypeStruct((rows, chunk), np.int32)
        remaining = jax.ShapeDtypeStruct((rows,), np.int32)
        shapes = targets.placed((params, cache, logits, tokens, remaining), where)
        return decode.prefill_chunk.lower(model, *shapes).compile()
    asked = DECODES[call["call"].removeprefix("decode, ")]
    requests = sampling.equal_requests(asked, rows, config.vocab_size)
    state, unfinished = sampling.initial_state(requests), np.ones(rows, bool)
    shapes = targets.placed((params, cache, state, requests, unfinished), where)
    return decode.decode_requests.lower(model, *shapes, steps=STEPS).compile()


def figures(model: MiniLLM, call: dict[str, Any], where: Any) -> dict[str, Any]:
    """A call with what its executable tells."""
    start = time.perf_counter()
    executable = compiled(model, call, where)
    seconds = time.perf_counter() - start
    module, memory = hlo.Module(executable.as_text()), executable.memory_analysis()
    cache = kv.cache_shapes(model.config, call["batch_size"], call["capacity"])
    leaves = [leaf for leaf in jax.tree.leaves(cache) if len(leaf.shape) > 1]
    whole = call["call"] == "prefill"
    kernels = module.kernels() if whole else module.loop_kernels()
    cycles = module.cycles() if whole else module.loop_cycles()
    return call | {
        "kernels": kernels,
        "kernels_per_layer": kernels / model.config.num_layers,
        "estimated_cycles": cycles or None,
        "waits_for_host": module.waits(),
        "cache_copies": sum(
            len(module.copies(shape)) for shape in {leaf.shape for leaf in leaves}
        ),
        "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def benchmark(config: Any, target: str) -> dict[str, Any]:
    """Compiles a config file's model; returns the object that `main` prints."""
    settings = config_files.decode_settings(config)
    report.check_writable(settings.json_path)
    where = targets.sharding(target)
    model_config = config_files.model_config(config).resolve(targets.platform(target))
    model = MiniLLM(model_config)
    return report.header("ahead", {"model": model_config.to_dict()}) | {
        "target": {"name": targets.TARGETS[target].device.name, "flag": target},
        "results": list(_results(model, where)),
    }


def _results(model: MiniLLM, where: Any) -> Iterator[dict[str, Any]]:
    todo = calls(model.config)
    with progress.bar("", len(todo)) as bar:
        for call in todo:
            progress.advance(bar, f"{call['call']}, batch size {call['batch_size']}")
            yield figures(model, call, where)


def show(result: dict[str, Any]) -> None:
    """The table."""
    out = console.Console(highlight=False)
    model = result["config"]["model"]
    out.print(
        f"compiled for {result['target']['name']}, not run; jax "
        f"{result['versions']['jax']}, {model['dtype']}, {model['num_layers']} layers\n"
    )
    grid = report.grid(
        *("call", "batch", "slots", "kernels", "(layer)", "temp.\nMB", "of the\ncache"),
        *("cache\ncopies", "waits", "10^6\ncycles"),
    )
    for row in result["results"]:
        temporary = row["temporary_bytes"]
        grid.add_row(
            *(row["call"], str(row["batch_size"]), str(row["capacity"])),
            *(str(row["kernels"]), f"({row['kernels_per_layer']:.1f})"),
            *(f"{temporary / 1e6:.1f}", f"{temporary / row['cache_bytes']:.2f}"),
            *(str(row["cache_copies"]), str(row["waits_for_host"])),
            report.or_dash(row["estimated_cycles"], lambda x: f"{x / 1e6:.2f}"),
        )
    out.print(grid)
    out.print(
        "\nkernels: of a decode step, or a prefill chunk, and divided by the layers.\n"
        "temp.: memory beside the arguments, in MB and as a share of the cache.\n"
        "waits: conditionals, for which a GPU may ask the host.\n"
        "cycles: XLA's own estimate, where it leaves one in what it compiles (TPU).\n"
    )


def main(config: Any) -> None:
    """Compiles, then prints."""
    result = benchmark(config, FLAGS.target)
    show(result)
    report.write_json(result, config_files.decode_settings(config).json_path)


if __name__ == "__main__":
    define_flags()
    app.run(main)
