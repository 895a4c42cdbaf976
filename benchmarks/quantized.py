"""int8 kernels beside the floats that they are of: tokens per second, and accuracy.

    python -m benchmarks.quantized --config=medium --batch_sizes=1,8
    python -m benchmarks.quantized --config=small --models=$(ls -dm tests/goldens/*/)

The rates are of chunks of 16 decode steps, of each form in turn, from the same cache of
random tokens; the first form is the config's own dtype. `--models` are folders whose
logits are compared, of as many random tokens (a small random model is worse than a
trained one: its logits are close together). Prints tables, then one JSON object as the
last line.
"""

import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from rich import console

from benchmarks import measure, report
from minillm_jax.cli import app, config_files
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode, verify
from minillm_jax.model import cache as kv
from minillm_jax.model import quantized, transformer
from minillm_jax.planning import costs, memory
from minillm_jax.weights import load

FLAGS = flags.FLAGS
STEPS, TOKENS = 16, 256
WARM_UPS = 3


def define_flags() -> None:
    """Defines everything but --config."""
    flags.DEFINE_list("batch_sizes", ["1", "8"], "Rows.")
    flags.DEFINE_list("modes", ["int8"], "Forms beside the floats.")
    flags.DEFINE_integer("context", 128, "Tokens that a row holds.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Turns of each form.", lower_bound=1)
    flags.DEFINE_list("models", [], "Hugging Face folders to compare the logits of.")
    flags.DEFINE_string("json_path", None, "Also write the JSON object to this file.")


class Decoding:
    """A model's decode chunk, and its cache."""

    def __init__(self, model: transformer.MiniLLM, params: Any, rows: int):
        self._params, self._rows = params, rows
        held = FLAGS.context + STEPS
        self._cache = dict(kv.init_cache(model.config, rows, held))
        self._tokens, self._active = np.zeros(rows, np.int32), np.ones(rows, bool)
        given = (params, self._cache, self._tokens, self._active)
        self._call = decode.decode_chunk.lower(model, *given, steps=STEPS).compile()
        analysis: Any = self._call.memory_analysis()
        self.temp_bytes = analysis.temp_size_in_bytes

    def rate(self) -> float:
        """Tokens per second of all rows, now."""
        self._cache["lengths"] = jax.device_put(
            np.full(self._rows, FLAGS.context, np.int32)
        )
        start = time.perf_counter()
        out = self._call(self._params, self._cache, self._tokens, self._active)
        jax.block_until_ready(out)
        self._cache = dict(out.cache)
        return self._rows * STEPS / (time.perf_counter() - start)


def speeds(config: ModelConfig) -> list[dict[str, Any]]:
    """Each form's rates, and their ratio to the floats' of the same turn."""
    results = []
    forms = ["none", *FLAGS.modes]
    models = [transformer.create_model(config.replace(quantization=q)) for q in forms]
    params = [transformer.init_params(model) for model in models]
    for rows in map(int, FLAGS.batch_sizes):
        runs = [Decoding(m, p, rows) for m, p in zip(models, params, strict=True)]
        rates: list[list[float]] = [[] for _ in runs]
        for turn in range(WARM_UPS + FLAGS.rounds):
            order = range(len(runs)) if turn % 2 else reversed(range(len(runs)))
            for index in order:
                rate = runs[index].rate()
                if turn >= WARM_UPS:
                    rates[index].append(rate)
        for model, run, found in zip(models, runs, rates, strict=True):
            pairs = zip(found, rates[0], strict=True)
            results.append(
                {
                    "batch_size": rows,
                    "quantization": model.config.quantization,
                    "weights_bytes": costs.weight_bytes(model.config),
                    "temp_bytes": run.temp_bytes,
                    "decode_tokens_per_second": measure.spread(found),
                    "ratio": measure.spread([ours / floats for ours, floats in pairs]),
                }
            )
    return results


def accuracy(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What each form's logits of a folder are off by."""
    model, params, tokenizer = load.load_pretrained(folder, "float32")
    count = min(TOKENS, verify.longest(model.config))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, count))
    if tokenizer is not None:
        text = pathlib.Path(verify.__file__).read_text()
        tokens = np.asarray([tokenizer.encode(text)[:count]])
    forward = jax.jit(lambda model, *given: model.apply(*given), static_argnums=0)
    given = tokens.astype(np.int32)
    floats = forward(model, {"params": params}, given)
    results = []
    for mode in quantized.MODES:
        other = transformer.create_model(model.config.replace(quantization=mode))
        ours = forward(other, {"params": quantized.quantize(params, mode)}, given)
        line = verify.compared(mode, ours, floats, verify.BUDGETS["w8a8"])
        bits = [_bits_per_token(logits, given) for logits in (floats, ours)]
        results.append(
            {
                "model": folder.name,
                "quantization": mode,
                "difference": line.relative,
                "kl_nats": line.divergence,
                "greedy_agreement": line.agreement,
                "bits_per_token_ratio": bits[1] / bits[0],
            }
        )
    return results


def _bits_per_token(logits: jax.Array, tokens: np.ndarray) -> float:
    logp = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    chosen = np.take_along_axis(logp, tokens[:, 1:, None], axis=-1)
    return -float(chosen.mean()) / np.log(2)


def benchmark(config: ModelConfig) -> dict[str, Any]:
    """Measures; returns the object that `main` prints."""
    longest = max(map(int, FLAGS.batch_sizes))
    plan = memory.plan_memory(config, longest, FLAGS.context + STEPS)
    if not plan.fits:
        raise UserError(plan.refusal())
    folders = [pathlib.Path(name.strip()) for name in FLAGS.models if name.strip()]
    result = report.header("quantized", {"model": plan.config.to_dict()})
    result |= {"context": FLAGS.context, "results": speeds(config), "accuracy": []}
    for folder in folders:
        result["accuracy"] += accuracy(folder)
    return result


def _show(result: dict[str, Any]) -> None:
    out, dtype = console.Console(highlight=False), result["config"]["model"]["dtype"]
    out.print(
        f"{result['device']['name']}, jax {result['versions']['jax']}, context "
        f"{result['context']}\n"
    )
    shown = report.grid("batch", "kernels", "GB", "tok/s", "(min-max)", "ratio", "")
    for row in result["results"]:
        rate, ratio = row["decode_tokens_per_second"], row["ratio"]
        kind = row["quantization"]
        shown.add_row(
            str(row["batch_size"]),
            dtype if kind == "none" else kind,
            f"{row['weights_bytes'] / 1e9:.3g}",
            report.rate(rate["median"]),
            report.least_and_most(rate),
            f"{ratio['median']:.2f}",
            f"({ratio['min']:.2f}-{ratio['max']:.2f})",
        )
    out.print(shown)
    if result["accuracy"]:
        off = report.grid("model", "kernels", "max |d|", "KL", "greedy", "bits")
        for row in result["accuracy"]:
            off.add_row(
                row["model"],
                row["quantization"],
                f"{row['difference']:.1e}",
                f"{row['kl_nats']:.1e}",
                f"{row['greedy_agreement']:.3f}",
                f"{row['bits_per_token_ratio']:.4f}",
            )
        out.print("\nagainst the floats they are of, in float32:\n", off)
        worst = functools.partial(max, result["accuracy"])
        kl = worst(key=lambda row: row["kl_nats"])["kl_nats"]
        agreed = statistics.mean(row["greedy_agreement"] for row in result["accuracy"])
        out.print(f"\nKL at most {kl:.1e} nats; greedy tokens the same: {agreed:.3f}")
    out.print()


def main(config: Any) -> None:
    """Measures, then prints."""
    report.check_writable(FLAGS.json_path, "json_path")
    result = benchmark(config_files.model_config(config))
    _show(result)
    report.write_json(result, FLAGS.json_path)


if __name__ == "__main__":
    define_flags()
    app.run(main)
