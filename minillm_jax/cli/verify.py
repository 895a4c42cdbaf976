"""Whether a model computes the same on this machine in all the ways that it can.

    python -m minillm_jax.cli.verify --config=small
    python -m minillm_jax.cli.verify --model=FOLDER --dtype=bfloat16

Prints a line for each comparison (decoding/verify.py says of what): the largest
difference of two logits, the mean KL divergence, how often the likeliest token is the
same, and what is normal for the dtype. The exit code is 1 if one is beyond that. Where
nothing names a model it is the small one that comes with the package.
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from absl import flags
from rich import console, table, text

from minillm_jax import progress
from minillm_jax.cli import app, config_files, model_folder
from minillm_jax.cli.app import UserError
from minillm_jax.config import FLOAT_DTYPES, ModelConfig
from minillm_jax.decoding import verify
from minillm_jax.decoding.verify import Line
from minillm_jax.model import transformer
from minillm_jax.planning import machine, memory
from minillm_jax.weights import hub, load

FLAGS = flags.FLAGS
TOKENS, QUICK_TOKENS = 256, 64


def define_flags() -> None:
    """Defines everything but --config and --model."""
    flags.DEFINE_enum(
        *("dtype", None, FLOAT_DTYPES),
        "To compute in, with a cache of it; else the config's.",
    )
    flags.DEFINE_bool("quick", False, f"{QUICK_TOKENS} tokens instead of {TOKENS}.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")


def main(config: Any) -> None:
    """Compares, and exits with 1 where something is not normal."""
    model_config = config_files.model_config(config)
    if FLAGS.dtype is not None:
        floats = dict.fromkeys(("dtype", "param_dtype", "cache_dtype"), FLAGS.dtype)
        model_config = model_config.replace(**floats)
    model = transformer.create_model(model_config)
    _check_fits(model.config)
    count = min(QUICK_TOKENS if FLAGS.quick else TOKENS, verify.longest(model.config))
    if count < verify.SHORTEST:
        raise UserError(
            f"the model takes {count} tokens; {verify.SHORTEST} are needed to compare"
        )
    params = model_folder.params(config, model)
    tokens = _tokens(model_folder.folder(config), model.config, count)
    start, found = time.perf_counter(), []
    names = verify.names(model.config)
    with progress.bar("comparing", len(names)) as bar:
        for line in verify.lines(model, params, tokens.tolist()):
            found.append(line)
            progress.advance(bar, line.name)
    result = _result(model.config, found, count, time.perf_counter() - start)
    if FLAGS.json:
        print(json.dumps(result), flush=True)
    else:
        _show(result, found)
    if not result["passed"]:
        sys.exit(1)


def _check_fits(config: ModelConfig) -> None:
    """The largest that is alive: the parameters in float32 beside their own."""
    plan = memory.plan_memory(config.replace(param_dtype="float32"), 3, TOKENS)
    if not plan.fits:
        raise UserError(plan.refusal())


def _tokens(folder: pathlib.Path | None, config: ModelConfig, count: int) -> np.ndarray:
    """A text's where there is a tokenizer, for a model knows its own kind; or any."""
    tokenizer = None if folder is None else load.read_tokenizer(folder)
    if tokenizer is not None:
        ids = tokenizer.encode(pathlib.Path(verify.__file__).read_text())
        return np.asarray(ids[:count], np.int32)
    draw = np.random.default_rng(0)
    return draw.integers(0, config.vocab_size, count, np.int32)


def _result(
    config: ModelConfig, found: list[Line], count: int, seconds: float
) -> dict[str, Any]:
    device = machine.this_device()
    return {
        "verify": [_finite(line) for line in found],
        "passed": all(line.passed is not False for line in found),
        "tokens": count,
        "seconds": seconds,
        "model": config.to_dict(),
        "device": device.name,
        "versions": machine.versions(),
    }


def _finite(line: Line) -> dict[str, Any]:
    """A line as JSON, which knows neither NaN nor infinity: they are null."""
    values = dataclasses.asdict(line) | {"passed": line.passed}
    unknown = {n for n, v in values.items() if isinstance(v, float) and v - v != 0}
    return values | dict.fromkeys(unknown)


def _show(result: dict[str, Any], found: list[Line]) -> None:
    out = console.Console(highlight=False)
    shown = table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "max |d|", "budget", "mean KL", "budget", "greedy", ""):
        side = "left" if not heading else "right"
        shown.add_column(text.Text(heading), justify=side, no_wrap=True)
    for line in found:
        shown.add_row(line.name, *_cells(line))
    config, versions = result["model"], result["versions"]
    out.print(
        f"{result['device']}, jax {versions['jax']}, {config['dtype']}, "
        f"{result['tokens']} tokens, {result['seconds']:.0f} s\n"
    )
    out.print(shown)
    verdict = "all within" if result["passed"] else "NOT all within"
    out.print(
        "\nmax |d|: of two logits, over the largest logit. KL: nats per token.\n"
        f"greedy: how often the likeliest token is the same.\n{verdict} what is normal."
    )


def _cells(line: Line) -> tuple[str, ...]:
    if line.budget is None or line.difference is None:
        return ("-", "-", "-", "-", "-", f"skipped: {line.skipped}")
    diverged = "-" if line.divergence is None else f"{line.divergence:.1e}"
    return (
        *(f"{line.relative:.1e}", f"{line.budget.difference:.0e}"),
        *(diverged, f"{line.budget.divergence:.0e}"),
        *(f"{line.agreement:.3f}", "ok" if line.passed else "FAILED"),
    )


if __name__ == "__main__":
    define_flags()
    app.run(main, unnamed=str(hub.SHIPPED))
