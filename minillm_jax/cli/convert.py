"""Hugging Face folders, read and written again, and compared with transformers.

    python -m minillm_jax.cli.convert --model=FOLDER --check
    python -m minillm_jax.cli.convert --model=FOLDER --out=OTHER --dtype=bfloat16
    python -m minillm_jax.cli.convert --config=small --out=FOLDER --check

Writes a folder that transformers loads: of a model that is in another one, or of a
config with random weights. --check reads back what was written, bit for bit, and
compares the logits with transformers', where that is installed with torch; it prints a
line for each comparison, and exits with 1 if one fails.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from minillm_jax.cli import app, comparison, config_files, model_folder
from minillm_jax.cli.app import UserError
from minillm_jax.config import FLOAT_DTYPES
from minillm_jax.model import transformer
from minillm_jax.weights import load, save

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines everything but --config and --model."""
    flags.DEFINE_string("out", None, "The folder to write.")
    flags.DEFINE_enum("dtype", None, FLOAT_DTYPES, "Of what is written; else as it is.")
    flags.DEFINE_bool("overwrite", False, "Replace a model that --out has already.")
    flags.DEFINE_bool("check", False, "Compare it with transformers.")


def _check_out(out: pathlib.Path) -> None:
    """Raises UserError where something would be lost, before any work."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is not a folder")
    if (out / "config.json").exists() and not FLAGS.overwrite:
        raise UserError(
            f"--out={out}: has a model already; give --overwrite to replace it"
        )


def main(config: Any) -> None:
    """Converts, compares, or both."""
    folder = model_folder.folder(config)
    if FLAGS.out is None and (not FLAGS.check or folder is None):
        raise UserError("nothing to do: give --out=FOLDER, or --model=FOLDER --check")
    if FLAGS.out is not None:
        _check_out(pathlib.Path(FLAGS.out))
    model_config = config_files.model_config(config)
    dtype = FLAGS.dtype
    if dtype is None and folder is not None and model_config.param_dtype == "auto":
        dtype = load.stored_dtype(folder)
    if dtype is not None:
        model_config = model_config.replace(param_dtype=dtype)
    model = transformer.create_model(model_config)
    params = model_folder.params(config, model)
    passed = True
    if FLAGS.out is not None:
        tokenizer = None if folder is None else load.read_tokenizer(folder)
        save.save_pretrained(FLAGS.out, model, params, tokenizer)
        print(f"wrote {FLAGS.out}: {model.config.param_dtype}", flush=True)
    compared = FLAGS.out or folder
    if FLAGS.check and compared is not None:
        for line in comparison.lines(model, params, compared):
            print(line, flush=True)
            passed &= line.passed is not False
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
