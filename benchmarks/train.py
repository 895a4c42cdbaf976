"""Training steps per second, beside the peak of products and beside PyTorch.

    python -m benchmarks.train --config=configs/small.py --config.train.batch_size=4

The step is that of `cli.train`, on rows of one document each. Where torch and
transformers are installed, their compiled Llama takes the same steps in turn, from the
same weights, and must come to the same losses. Prints a table, then one JSON object as
the last line.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from rich import console

from benchmarks import measure, report, workers
from minillm_jax.cli import app, config_files
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.model import transformer
from minillm_jax.planning import compiled, costs, machine, memory
from minillm_jax.training import optimizer as optimizers
from minillm_jax.training import step
from minillm_jax.training.settings import TrainSettings
from minillm_jax.weights import save

FLAGS = flags.FLAGS
WARM_UPS = 3
APART = 1e-3  # of two losses after as many steps, at most


def define_flags() -> None:
    """Defines everything but --config."""
    flags.DEFINE_integer("rounds", 5, "Steps that are measured.", lower_bound=1)
    flags.DEFINE_bool("torch", None, "Measure PyTorch too; else if it is installed.")
    flags.DEFINE_string("json_path", None, "Also write the JSON object to this file.")


class Ours:
    """This library's step."""

    def __init__(self, model: Any, settings: TrainSettings, params: Any, shape: Any):
        self._model, self._settings = model, settings
        self._optimizer = optimizers.adamw(
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
            betas=(settings.beta1, settings.beta2),
        )
        self._state = step.initial_state(params, self._optimizer)
        with measure.compile_seconds() as compiling:
            lowered = step.train_step.lower(
                *(model, self._optimizer, self._state, np.ones(shape, np.int32)),
                accumulation=settings.accumulation,
            )
            self.memory_bytes = compiled.call_bytes(lowered.compile())
            self.compile_seconds = compiling()

    def step(self, tokens: np.ndarray) -> tuple[float, float]:
        """Seconds of one, and its loss."""
        start = time.perf_counter()
        self._state, metrics = step.train_step(
            *(self._model, self._optimizer, self._state, tokens),
            accumulation=self._settings.accumulation,
        )
        loss = float(metrics.loss)
        return time.perf_counter() - start, loss


class Torch:
    """The same model and optimiser in transformers, in a process of its own."""

    def __init__(self, model: Any, settings: TrainSettings, params: Any, folder: str):
        saved = pathlib.Path(folder) / "model"
        save.save_pretrained(saved, model, params)
        values = json.dumps(dataclasses.asdict(settings))
        module = "benchmarks.peers.torch_training"
        arguments = [str(saved), values, str(workers.threads())]
        self.worker = workers.Worker(
            [sys.executable, "-m", module, *arguments], pathlib.Path(folder) / "log"
        )
        self._rate, self.peak_bytes = settings.learning_rate, 0
        self.versions = self.worker.ready["versions"]

    def step(self, tokens: np.ndarray) -> tuple[float, float]:
        """Seconds of one, and its loss."""
        reply = self.worker.call(tokens=tokens.tolist(), rate=self._rate)
        self.peak_bytes = reply["peak_bytes"]
        return reply["seconds"], reply["loss"]


def benchmark(config: Any) -> dict[str, Any]:
    """Measures a config file's model; returns the object that `main` prints."""
    settings = config_files.train_settings(config)
    model_config = config_files.model_config(config)
    if model_config.param_dtype == "auto":
        model_config = model_config.replace(param_dtype="float32")
    length, parts = settings.length(model_config), settings.accumulation
    rows = settings.batch_size
    plan = memory.plan_memory(
        *(model_config, rows if isinstance(rows, str) else rows // parts, length),
        training=True,
        accumulated=parts > 1,
    )
    if not plan.fits:
        raise UserError(plan.refusal())
    settings = settings.replace(batch_size=parts * plan.batch_size)
    model = transformer.create_model(model_config)
    shape = (parts * plan.batch_size, length)
    result = report.header(
        "train",
        {"model": model.config.to_dict(), "train": dataclasses.asdict(settings)},
    )
    return result | _measured(model, settings, shape)


def _measured(model: Any, settings: TrainSettings, shape: Any) -> dict[str, Any]:
    """Rounds in which each program takes a step on the same batch, in turn first."""
    draw = np.random.default_rng(settings.seed)
    peers, seconds, peaks = {}, {}, []
    probe = measure.Product()
    with tempfile.TemporaryDirectory() as folder:
        params = transformer.init_params(model, settings.seed)
        try:
            if _wants_torch(model.config, settings):
                peers["torch"] = Torch(model, settings, params, folder)
            peers["ours"] = Ours(model, settings, params, shape)
            for taken in range(WARM_UPS + FLAGS.rounds):
                tokens = draw.integers(0, model.config.vocab_size, shape, np.int32)
                peaks.append(probe.probe())
                order = sorted(peers, reverse=bool(taken % 2))
                steps = {name: peers[name].step(tokens) for name in order}
                _check_losses({name: loss for name, (_, loss) in steps.items()})
                for name, (spent, _) in steps.items():
                    seconds.setdefault(name, []).append(spent)
        except workers.PeerError as error:
            raise UserError(f"torch: {error}; leave it out with --notorch") from None
        finally:
            if "torch" in peers:
                peers["torch"].worker.stop()
    seconds = {name: spent[WARM_UPS:] for name, spent in seconds.items()}
    return _summary(model.config, shape, peers, seconds, peaks[WARM_UPS:])


def _check_losses(losses: dict[str, float]) -> None:
    """Raises UserError where two programs do not take the same steps."""
    if max(losses.values()) - min(losses.values()) > APART:
        raise UserError(f"the programs' losses differ: {losses}")


def _summary(config: ModelConfig, shape, peers, seconds, peaks) -> dict[str, Any]:
    rows, length = shape
    flops, ours = costs.train_flops(config, rows, length), peers["ours"]
    known = machine.this_device().flops_per_second
    rates = {n: [rows * length / s for s in spent] for n, spent in seconds.items()}
    mfu = [
        flops / spent / (known or peak)
        for spent, peak in zip(seconds["ours"], peaks, strict=True)
    ]
    found: dict[str, Any] = {
        "tokens_per_step": rows * length,
        "compile_seconds": ours.compile_seconds,
        "tokens_per_second": measure.spread(rates["ours"]),
        "mfu": measure.spread(mfu),
        "product_flops_per_second": max(peaks),
        "memory_bytes": ours.memory_bytes,
        "peak_bytes": machine.peak_bytes(jax.devices()[0]),
        "torch": None,
    }
    if "torch" in peers:
        pairs = zip(rates["ours"], rates["torch"], strict=True)
        found["torch"] = {
            "tokens_per_second": measure.spread(rates["torch"]),
            "peak_bytes": peers["torch"].peak_bytes,
            "ratio": measure.spread([mine / theirs for mine, theirs in pairs]),
            "versions": peers["torch"].versions,
        }
    return found


def _wants_torch(config: ModelConfig, settings: TrainSettings) -> bool:
    """Whether the peer takes steps too: in float32, a batch at once, nothing twice."""
    names = ("torch", "transformers")
    there = all(importlib.util.find_spec(name) for name in names)
    same = config.dtype == "float32" and not config.remat and settings.accumulation == 1
    if FLAGS.torch and not there:
        raise UserError("--torch: needs pip install 'minillm_jax[parity]'")
    if FLAGS.torch and not same:
        raise UserError(
            "--torch: it takes the same step only in float32, without remat and with "
            "accumulation=1"
        )
    return there and same and FLAGS.torch is not False


def _show(result: dict[str, Any]) -> None:
    out, model = console.Console(highlight=False), result["config"]["model"]
    rows = result["config"]["train"]["batch_size"]
    out.print(
        f"{result['device']['name']} ({result['device']['platform']}), jax "
        f"{result['versions']['jax']}, {model['dtype']}, {rows} rows of "
        f"{result['tokens_per_step'] // rows} tokens\n"
    )
    shown = report.grid("", "tok/s", "(min-max)", "MFU", "memory GB", "peak GB")

    def add(name: str, found: dict[str, Any], mfu: str, size: str) -> None:
        speed = found["tokens_per_second"]
        spread = report.least_and_most(speed)
        peak = report.or_dash(found["peak_bytes"], lambda size: f"{size / 1e9:.2f}")
        shown.add_row(name, report.rate(speed["median"]), spread, mfu, size, peak)

    mfu, size = result["mfu"]["median"], result["memory_bytes"] / 1e9
    add("minillm_jax", result, f"{mfu:.2f}", f"{size:.2f}")
    if result["torch"] is not None:
        add("torch", result["torch"], "-", "-")
        ratio = result["torch"]["ratio"]
        out.print(shown)
        out.print(
            f"\nrate over torch's, round by round: {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    else:
        out.print(shown)
    out.print(
        "\nMFU: products of three forwards over the time, as a share of what a large\n"
        "product does (measured beside each round, or the device's own figure).\n"
        "memory: what XLA says the step takes; peak: of the process.\n"
    )


def main(config: Any) -> None:
    """Measures, then prints."""
    report.check_writable(FLAGS.json_path, "--json_path")
    result = benchmark(config)
    _show(result)
    report.write_json(result, FLAGS.json_path)


if __name__ == "__main__":
    define_flags()
    app.run(main)
