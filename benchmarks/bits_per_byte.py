"""How well a model knows text, beside gzip and xz.

    python -m benchmarks.bits_per_byte
    python -m benchmarks.bits_per_byte --workdir=runs/a
    python -m benchmarks.bits_per_byte --model=FOLDER --data=texts/

Of a run it is the validation split; else that of --data, split as `cli.train` does.
Without a model it is the one that comes with the package, which was trained on the
library of one Python: of another it has seen most. Every byte counts, each with
half of `max_seq_len` before it or more (training/evaluation.py); the compressors get
the same texts, one after another, as one file. Prints a table, then one JSON object as
the last line.
"""

import gzip
import lzma
import pathlib
import tempfile
import time
from typing import Any

from absl import flags
from rich import console

from benchmarks import report
from minillm_jax import json_files, progress
from minillm_jax.cli import app
from minillm_jax.cli.app import UserError
from minillm_jax.config import FLOAT_DTYPES, QUANTIZATIONS
from minillm_jax.text import tokenizer as tokenizers
from minillm_jax.training import corpus, evaluation, run_folder, sources
from minillm_jax.training.corpus import Corpus
from minillm_jax.training.settings import TrainSettings
from minillm_jax.weights import hub, load
from minillm_jax.weights.errors import CheckpointError

FLAGS = flags.FLAGS
TRAINING = "training.json"  # of the model that comes with the package


def define_flags() -> None:
    """Defines all of them."""
    flags.DEFINE_string("model", None, "A Hugging Face folder.")
    flags.DEFINE_string("workdir", None, "A training run, with its model and its data.")
    flags.DEFINE_string(
        *("data", sources.STANDARD_LIBRARY),
        "As config.train.data; without --workdir.",
    )
    flags.DEFINE_enum("dtype", None, FLOAT_DTYPES, "To compute in; else the device's.")
    flags.DEFINE_enum(
        *("quantization", "none", QUANTIZATIONS),
        "Of the kernels, as the config's field.",
    )
    flags.DEFINE_integer("batch_size", 16, "Windows of a batch.", lower_bound=1)
    flags.DEFINE_string("json_path", None, "Also write the JSON object to this file.")


def _folder() -> pathlib.Path:
    if FLAGS.model is not None and FLAGS.workdir is not None:
        raise UserError("--model and --workdir: give one")
    if FLAGS.workdir is not None:
        return run_folder.trained_model(FLAGS.workdir)
    return hub.SHIPPED if FLAGS.model is None else hub.folder(FLAGS.model)


def _corpus(config: Any, tokenizer: Any, scratch: str) -> Corpus:
    if FLAGS.workdir is not None:
        return corpus.load(pathlib.Path(FLAGS.workdir) / run_folder.DATA)
    with progress.spinner("reading the data"):
        settings = TrainSettings(data=FLAGS.data)
        return run_folder.documents(pathlib.Path(scratch), config, settings, tokenizer)


def main() -> None:
    """Measures, then prints."""
    report.check_writable(FLAGS.json_path, "--json_path")
    folder = _folder()
    model, params, tokenizer = load.load_pretrained(
        folder, FLAGS.dtype, quantization=FLAGS.quantization
    )
    tokenizer = tokenizer or tokenizers.ByteTokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        found = _corpus(model.config, tokenizer, scratch)
        result = report.header("bits_per_byte", {"model": model.config.to_dict()})
        result |= {"folder": folder.name, "data": dict(found.facts)}
        result["held_out"] = _held_out(folder, found)
        result |= _measured(model, params, tokenizer, found)
    _show(result)
    report.write_json(result, FLAGS.json_path)


def _held_out(folder: pathlib.Path, found: Corpus) -> bool:
    """Whether it is known that the model was not trained on what is measured."""
    if FLAGS.workdir is not None:
        return True
    trained = json_files.read_object(folder / TRAINING, CheckpointError)
    return trained.get("data", {}).get("sha256") == found.facts["sha256"]


def _measured(model, params, tokenizer, found: Corpus) -> dict[str, Any]:
    documents = found.split(validation=True)
    if not found.num_bytes[documents].all():
        raise UserError("the data are token ids, and the bytes of their texts unknown")
    start = time.perf_counter()
    windows = evaluation.num_windows(found, documents, model.config.max_seq_len)
    with progress.bar("windows", windows) as bar:
        score = evaluation.score(
            *(model, params, found, documents),
            rows=FLAGS.batch_size,
            on_window=lambda: progress.advance(bar, "windows"),
        )
    seconds = time.perf_counter() - start
    text = b"".join(
        tokenizer.decode(found.tokens[slice(*ends)].tolist()).encode()
        for ends in zip(*(found.starts[documents + i] for i in (0, 1)), strict=True)
    )
    compressed = {
        "gzip -9": gzip.compress(text, 9),
        "xz -9": lzma.compress(text, preset=9),
    }
    return {
        "documents": len(documents),
        "num_bytes": score.num_bytes,
        "num_tokens": score.num_tokens,
        "seconds": seconds,
        "bits_per_byte": score.bits_per_byte,
        "compressors": {n: 8 * len(c) / len(text) for n, c in compressed.items()},
    }


def _show(result: dict[str, Any]) -> None:
    out, config = console.Console(highlight=False), result["config"]["model"]
    data = result["data"]
    of = f"Python {data['python']}" if "python" in data else data["source"]
    seen = "none" if result["held_out"] else "IT IS NOT KNOWN WHICH"
    out.print(
        f"{result['documents']} documents of {of}, {result['num_bytes']} bytes, "
        f"{result['num_tokens']} tokens; trained on: {seen}\n"
    )
    shown = report.grid("", "bits per byte")
    ours = f"{result['folder']}, {config['dtype']}"
    if config["quantization"] != "none":
        ours += f", {config['quantization']}"
    rates = {ours: result["bits_per_byte"], **result["compressors"]}
    for name, rate in rates.items():
        shown.add_row(name, f"{rate:.3f}")
    out.print(shown)
    out.print()


if __name__ == "__main__":
    define_flags()
    app.run_plain(main)
