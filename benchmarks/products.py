"""Products of few rows with a preset's kernels, in the forms that XLA could be given.

    python -m benchmarks.products --config=configs/medium.py

All forms in turn, again and again; each passes over at least 256 MB of weights, so that
none stay in a processor's cache. What `minillm_jax.model.products` does follows from
it. Prints a table of 10^9 weights per second, then one JSON object as the last line.
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich import console

from benchmarks import measure, report
from minillm_jax import progress
from minillm_jax.cli import app, config_files
from minillm_jax.config import ModelConfig
from minillm_jax.model import products, transformer

WEIGHTS = 64 * 2**20  # of one pass
ROWS = (1, 2, 4, 8, 16)
REPEATS = 7
# XLA's own products on CPU, without the library that it hands some of them to.
PLAIN_XLA = {"xla_cpu_experimental_ynn_fusion_type": ""}


def _whole(x, kernel):
    return x @ kernel


def _transposed(x, kernel):
    """With a kernel that is stored `[out, in]`."""
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))


def _parts(x, kernel, parts: int):
    rows = x.reshape(x.shape[0], parts, -1)
    kernels = kernel.reshape(parts, -1, kernel.shape[1])
    return jnp.einsum("BNI,NIO->NBO", rows, kernels).sum(0)


def _float32_sums(x, kernel):
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _twice(x, kernel):
    """Each row twice, so that there are two at least."""
    return _float32_sums(jnp.concatenate([x, x]), kernel)[: x.shape[0]]


def _forms() -> dict[str, tuple[Callable[..., Any], dict[str, Any] | None]]:
    """By name: the product, and options of the compiler."""
    forms: dict[str, Any] = {
        "[in, out]": (_whole, None),
        "[out, in]": (_transposed, None),
        "float32 sums": (_float32_sums, None),
        "rows twice": (_twice, None),
    }
    for parts in (2, 4, 8):
        forms[f"{parts} parts"] = (functools.partial(_parts, parts=parts), None)
    if jax.devices()[0].platform == "cpu":
        forms["plain XLA"] = (_whole, PLAIN_XLA)
    return forms


def kernel_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`[in, out]` of the products of a step, by the parameter's name."""
    model = transformer.create_model(config)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        transformer.param_shapes(model)
    ):
        name = path[-1].key
        first = {"qkv": 1, "gate_up": 1, "down": 1, "out": 3, "lm_head": 1}.get(name)
        if first is not None:
            features = math.prod(leaf.shape[:first])
            found[name] = (features, leaf.size // features)
    return found


def measured(shape: tuple[int, int], rows: int, dtype: str) -> dict[str, float]:
    """10^9 weights per second of each form, medians of rounds in turn."""
    count = max(1, WEIGHTS // (shape[0] * shape[1]))
    keys = jax.random.split(jax.random.key(0), count)
    kernels = [jax.random.normal(key, shape, dtype) for key in keys]
    transposed = [jnp.array(kernel.T) for kernel in kernels]
    x, runs = jnp.ones((rows, shape[0]), dtype), {}
    for name, (form, options) in _forms().items():
        given = transposed if form is _transposed else kernels

        def chain(x, kernels, form=form):
            for kernel in kernels:  # each waits for the one before
                x = x + jnp.asarray(1e-9, dtype) * jnp.sum(form(x, kernel))
            return x

        compiled = jax.jit(chain, compiler_options=options).lower(x, given).compile()
        runs[name] = functools.partial(measure.elapsed, compiled, x, given)
    seconds = {name: [] for name in runs}
    for turn in range(REPEATS + 1):
        for name, run in runs.items():
            took = run()
            if turn > 0:  # the first one warms up
                seconds[name].append(took)
    total = count * shape[0] * shape[1]
    return {n: total / statistics.median(s) / 1e9 for n, s in seconds.items()}


def benchmark(config: Any) -> dict[str, Any]:
    """Measures a config file's kernels; returns the object that `main` prints."""
    model_config = config_files.model_config(config)
    report.check_writable(config_files.decode_settings(config).json_path)
    dtype = model_config.resolve(jax.devices()[0].platform).dtype
    shapes, results = kernel_shapes(model_config), []
    with progress.bar("", len(shapes) * len(ROWS)) as bar:
        for name, shape in shapes.items():
            for rows in ROWS:
                progress.advance(bar, f"{name}, {rows} rows")
                rates = measured(shape, rows, dtype)
                row = {"kernel": name, "shape": list(shape), "rows": rows}
                results.append(row | {"giga_weights_per_second": rates})
    sections = {
        "model": model_config.to_dict(),
        "dtype": dtype,
        "cpu_parts": products.CPU_PARTS,
    }
    return report.header("products", sections) | {"results": results}


def show(result: dict[str, Any]) -> None:
    """The table."""
    out = console.Console(highlight=False)
    out.print(
        f"{result['device']['name']}, jax {result['versions']['jax']}, "
        f"{result['config']['dtype']}\n"
    )
    names = list(result["results"][0]["giga_weights_per_second"])
    headings = [name.replace(" ", "\n") for name in names]
    grid = report.grid("kernel", "in x out", "rows", *headings)
    for row in result["results"]:
        rates = row["giga_weights_per_second"].values()
        shape = " x ".join(map(str, row["shape"]))
        shown = [f"{rate:.1f}" for rate in rates]
        grid.add_row(row["kernel"], shape, str(row["rows"]), *shown)
    out.print(grid)
    out.print("\n10^9 weights per second, medians\n")


def main(config: Any) -> None:
    """Measures, then prints."""
    result = benchmark(config)
    show(result)
    report.write_json(result, config_files.decode_settings(config).json_path)


if __name__ == "__main__":
    app.run(main)
