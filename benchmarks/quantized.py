"""int8 beside the floats that it stands for: tokens per second, and accuracy.

    python -m benchmarks.quantized --config=medium --batch_sizes=1,8
    python -m benchmarks.quantized --config=small --models=$(ls -dm tests/goldens/*/)

`--forms` are those of `benchmarks.int8_forms`. The rates are of chunks of 16 decode
steps behind `--context` tokens, of each form in turn; the first one is the config's own
dtype. `--models` are folders whose logits are compared, each token behind a cache of
those before it: of a text where there is a tokenizer, else of random tokens, which a
small random model knows so little of that its logits are close together. Prints tables,
then one JSON object as the last line.
"""

import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich import console

from benchmarks import chunks, int8_forms, measure, report
from benchmarks.int8_forms import CACHE, FLOATS
from minillm_jax.cli import app, config_files
from minillm_jax.cli.app import UserError
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.decoding import verify
from minillm_jax.model import cache as kv
from minillm_jax.model import quantized, transformer
from minillm_jax.planning import compiled, costs, memory
from minillm_jax.weights import load

FLAGS = flags.FLAGS
STEPS, TOKENS = 16, 256
WARM_UPS = 3
ACCURACY = (*quantized.MODES, CACHE, f"w8a8+{CACHE}")  # forms that are compared


def define_flags() -> None:
    """Defines everything but --config."""
    flags.DEFINE_list("batch_sizes", ["1", "8"], "Rows.")
    flags.DEFINE_list(
        "forms", ["int8", CACHE, f"int8+{CACHE}"], "What is measured beside the floats."
    )
    flags.DEFINE_integer("context", 128, "Tokens that a row holds.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Turns of each form.", lower_bound=1)
    flags.DEFINE_list("models", [], "Hugging Face folders to compare the logits of.")
    flags.DEFINE_string("json_path", None, "Also write the JSON object to this file.")


def speeds(forms: list[tuple[str, ModelConfig]]) -> list[dict[str, Any]]:
    """Each form's rates, and their ratio to the first one's of the same turn."""
    made: dict[str, Any] = {}
    models = [transformer.create_model(config) for _, config in forms]
    for model in models:  # forms of the same kernels share them
        kernels = model.config.quantization
        if kernels not in made:
            made[kernels] = transformer.init_params(model)
    results = []
    for rows in map(int, FLAGS.batch_sizes):
        runs = [
            chunks.DecodeChunk(
                *(model, made[model.config.quantization]),
                kv.init_cache(model.config, rows, FLAGS.context + STEPS),
                context=FLAGS.context,
                steps=STEPS,
            )
            for model in models
        ]
        rates = _rates(runs, rows)
        for (form, _), model, run, found in zip(
            forms, models, runs, rates, strict=True
        ):
            pairs = zip(found, rates[0], strict=True)
            held = costs.seen(model.config, FLAGS.context)
            results.append(
                {
                    "batch_size": rows,
                    "form": form,
                    "quantization": model.config.quantization,
                    "cache_dtype": model.config.cache_dtype,
                    "weights_bytes": costs.weight_bytes(model.config),
                    "cache_bytes": costs.cache_bytes(model.config, rows, held),
                    "temp_bytes": compiled.temporary_bytes(run.executable),
                    "decode_tokens_per_second": measure.spread(found),
                    "ratio": measure.spread([ours / floats for ours, floats in pairs]),
                }
            )
    return results


def _rates(runs: list[chunks.DecodeChunk], rows: int) -> list[list[float]]:
    """Tokens per second of all rows, of each run in each turn."""
    rates: list[list[float]] = [[] for _ in runs]
    for turn in range(WARM_UPS + FLAGS.rounds):
        order = range(len(runs)) if turn % 2 else reversed(range(len(runs)))
        for index in order:
            seconds = runs[index].seconds()
            if turn >= WARM_UPS:
                rates[index].append(rows * STEPS / seconds)
    return rates


def accuracy(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What each form's logits of a folder are off by."""
    model, params, tokenizer = load.load_pretrained(folder, "float32")
    count = min(TOKENS, verify.longest(model.config))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, count)
    if tokenizer is not None:
        text = pathlib.Path(verify.__file__).read_text()
        tokens = np.asarray(tokenizer.encode(text)[:count])
    tokens = tokens.astype(np.int32)
    floats = cached_logits(model, params, tokens)
    results = []
    for form in ACCURACY:
        other = transformer.create_model(int8_forms.with_form(model.config, form))
        given = quantized.quantize(params, other.config.quantization)
        ours = cached_logits(other, given, tokens)
        line = verify.compared(form, ours, floats, verify.BUDGETS["w8a8"])
        bits = [_bits_per_token(logits, tokens) for logits in (floats, ours)]
        results.append(
            {
                "model": folder.name,
                "form": form,
                "difference": line.relative,
                "kl_nats": line.divergence,
                "greedy_agreement": line.agreement,
                "bits_per_token_ratio": bits[1] / bits[0],
            }
        )
    return results


def cached_logits(
    model: transformer.MiniLLM, params: Any, tokens: np.ndarray
) -> np.ndarray:
    """`[T, V]`, of each token behind a cache of those before it."""
    cache, found = kv.init_cache(model.config, 1, len(tokens)), []
    append = jax.jit(model.apply, static_argnames="mutable")
    for start in range(0, len(tokens), model.config.prefill_chunk):
        part = jnp.asarray(tokens[None, start : start + model.config.prefill_chunk])
        variables = {"params": params, "cache": cache}
        logits, updated = append(variables, part, mutable=("cache",))
        cache = updated["cache"]
        found.append(np.asarray(logits[0]))
    return np.concatenate(found)


def _bits_per_token(logits: np.ndarray, tokens: np.ndarray) -> float:
    logp = np.asarray(jax.nn.log_softmax(logits[:-1]))
    chosen = np.take_along_axis(logp, tokens[1:, None], axis=-1)
    return -float(chosen.mean()) / np.log(2)


def benchmark(config: ModelConfig) -> dict[str, Any]:
    """Measures; returns the object that `main` prints."""
    if config.quantization != "none" or config.cache_dtype == "int8":
        raise UserError("--forms are what is in int8; the config is their floats")
    longest = max(map(int, FLAGS.batch_sizes))
    try:
        names = (FLOATS, *FLAGS.forms)
        forms = [(name, int8_forms.with_form(config, name)) for name in names]
    except ConfigError as error:
        raise UserError(f"--forms: {error}") from None
    plan, *others = (
        memory.plan_memory(form, longest, FLAGS.context + STEPS) for _, form in forms
    )
    held = sum(one.total_bytes for one in (plan, *others))
    if held > plan.limit_bytes:
        raise UserError(
            f"the forms take {memory.gigabytes(held)} together, of "
            f"{memory.gigabytes(plan.limit_bytes)}; name fewer, or fewer rows"
        )
    folders = [pathlib.Path(name.strip()) for name in FLAGS.models if name.strip()]
    result = report.header("quantized", {"model": plan.config.to_dict()})
    result |= {"context": FLAGS.context, "results": speeds(forms), "accuracy": []}
    for folder in folders:
        result["accuracy"] += accuracy(folder)
    return result


def _show(result: dict[str, Any]) -> None:
    out, dtype = console.Console(highlight=False), result["config"]["model"]["dtype"]
    out.print(
        f"{result['device']['name']}, jax {result['versions']['jax']}, context "
        f"{result['context']}\n"
    )
    shown = report.grid("batch", "form", "GB", "cache", "tok/s", "", "ratio", "")
    for row in result["results"]:
        rate, ratio = row["decode_tokens_per_second"], row["ratio"]
        shown.add_row(
            str(row["batch_size"]),
            dtype if row["form"] == FLOATS else row["form"],
            f"{row['weights_bytes'] / 1e9:.3g}",
            f"{row['cache_bytes'] / 1e9:.3g}",
            report.rate(rate["median"]),
            report.least_and_most(rate),
            f"{ratio['median']:.2f}",
            f"({ratio['min']:.2f}-{ratio['max']:.2f})",
        )
    out.print(shown)
    if result["accuracy"]:
        _show_accuracy(out, result["accuracy"])
    out.print()


def _show_accuracy(out: console.Console, rows: list[dict[str, Any]]) -> None:
    off = report.grid("model", "form", "max |d|", "KL", "greedy", "bits")
    for row in rows:
        off.add_row(
            row["model"],
            row["form"],
            f"{row['difference']:.1e}",
            f"{row['kl_nats']:.1e}",
            f"{row['greedy_agreement']:.3f}",
            f"{row['bits_per_token_ratio']:.4f}",
        )
    out.print("\nagainst the floats they are of, in float32:\n", off, "")
    for form in ACCURACY:
        mine = [row for row in rows if row["form"] == form]
        bits = [row["bits_per_token_ratio"] for row in mine]
        most = max(row["kl_nats"] for row in mine)
        agreed = statistics.mean(row["greedy_agreement"] for row in mine)
        out.print(
            f"{form}: KL at most {most:.1e} nats; greedy tokens the same: {agreed:.3f};"
            f" bits {min(bits):.4f} to {max(bits):.4f}"
        )


def main(config: Any) -> None:
    """Measures, then prints."""
    report.check_writable(FLAGS.json_path, "--json_path")
    result = benchmark(config_files.model_config(config))
    _show(result)
    report.write_json(result, FLAGS.json_path)


if __name__ == "__main__":
    define_flags()
    app.run(main)
