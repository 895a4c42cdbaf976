"""Trains a preset, a config of your own, or a model from a folder, on your text.

    python -m minillm_jax.cli.train --config=configs/small.py --workdir=runs/a
    python -m minillm_jax.cli.train --model=FOLDER --workdir=runs/b \
        --config.train.data=texts/ --config.train.learning_rate=1e-5

The same command goes on where a run was interrupted, bit for bit. Ctrl-C and SIGTERM
save first. Every setting is a field of `config.train` (training/settings.py).
"""

import contextlib
import pathlib
import signal
import sys
from typing import Any

import numpy as np
from absl import flags

from minillm_jax import progress
from minillm_jax.cli import app, config_files, model_folder
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.model import transformer
from minillm_jax.planning import advice, memory
from minillm_jax.text import tokenizer as tokenizers
from minillm_jax.training import metrics, run_folder
from minillm_jax.training.metrics import Row
from minillm_jax.training.settings import TrainSettings
from minillm_jax.weights import configs, load, save

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines everything but --config and --model."""
    flags.DEFINE_string("workdir", None, "The run's folder; it is resumed if there.")


class Stopping:
    """Whether somebody asked the run to end; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        _say(f"{signal.Signals(number).name}: ends after this step, and saves")


class Shown:
    """The bar of a run, and a line each time the validation split was measured."""

    def __init__(self, done: int, steps: int):
        self.bar = progress.bar("training", steps, done)

    def __call__(self, row: Row) -> None:
        progress.advance(self.bar, f"loss {row.loss:.3f}")
        if row.val_loss is not None:
            bits = row.val_bits_per_byte
            tail = "" if bits is None else f", {bits:.3f} bits per byte"
            rate = row.tokens_per_second
            tail += "" if rate is None else f", {rate:.0f} tokens/s"
            with contextlib.suppress(OSError, SystemExit):  # rich, if nobody reads
                self.bar.console.print(
                    f"step {row.step}: loss {row.loss:.3f}, "
                    f"validation {row.val_loss:.3f}{tail}",
                    highlight=False,
                )


def main(config: Any) -> None:
    """Trains, and writes the best model as a folder."""
    if FLAGS.workdir is None:
        raise UserError("--workdir is missing: the folder of the run, such as runs/a")
    train = _library()
    folder, settings = pathlib.Path(FLAGS.workdir), config_files.train_settings(config)
    tokenizer = _tokenizer(config, settings)
    model_config = _model_config(config, tokenizer)
    configs.write_config(model_config)  # raises where the model could not be saved
    settings = _with_batch(model_config, settings, folder)
    with run_folder.lock(folder):
        _train(train, folder, config, model_config, settings, tokenizer)


def _train(
    train: Any,
    folder: pathlib.Path,
    config: Any,
    model_config: ModelConfig,
    settings: TrainSettings,
    tokenizer: Any,
) -> None:
    model = transformer.create_model(model_config)
    weights = model_folder.folder(config)
    with progress.spinner("reading the data"):
        corpus = run_folder.documents(folder, model.config, settings, tokenizer)
    settings = run_folder.begin(
        *(folder, model.config, settings),
        weights=None if weights is None else str(weights),
    )
    trainer = train.Trainer(model, settings, corpus, folder)
    try:
        done = trainer.start(
            lambda: model_folder.params(config, model, seed=settings.seed)
        )
        _say(_beginning(folder, done, settings, corpus))
        shown = Shown(done, settings.steps)
        with shown.bar:
            finished = trainer.run(Stopping(), on_row=shown)
        path = folder / run_folder.MODEL
        save.save_pretrained(path, model, trainer.best_params(), tokenizer)
    finally:
        trainer.close()
    drawn = metrics.plot(folder)
    tail = "" if drawn is None else f"; its losses: {drawn}"
    left = "" if finished else f"stopped after step {trainer.done}; "
    _say(f"{left}the best model is in {path}{tail}")


def _library() -> Any:
    try:
        from minillm_jax.training import train
    except ImportError as error:
        raise UserError(
            f"training needs {error.name}: pip install 'minillm_jax[train]'"
        ) from None
    return train


def _tokenizer(config: Any, settings: TrainSettings) -> Any:
    if settings.tokenizer is not None:
        return tokenizers.load_tokenizer(settings.tokenizer)
    folder = model_folder.folder(config)
    found = None if folder is None else load.read_tokenizer(folder)
    return found or tokenizers.ByteTokenizer()


def _model_config(config: Any, tokenizer: Any) -> ModelConfig:
    """With float32 parameters, and the EOS ids of the tokenizer."""
    found = memory.as_trained(config_files.model_config(config))
    if (largest := max(tokenizer.known_ids)) >= found.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, but the model's are below "
            f"vocab_size={found.vocab_size}; set --config.model.vocab_size"
        )
    if not found.eos_token_ids:
        found = found.replace(eos_token_ids=tokenizer.eos_token_ids)
    return found


def _with_batch(
    config: ModelConfig, settings: TrainSettings, folder: pathlib.Path
) -> TrainSettings:
    """A number of rows that fits; raises UserError where none does."""
    if run_folder.has_begun(folder):  # it did fit, and is resumed as it was
        return settings
    parts, rows = settings.accumulation, settings.batch_size
    plan = memory.plan_memory(
        *(config, rows if isinstance(rows, str) else rows // parts),
        settings.length(config),
        training=True,
        accumulated=parts > 1,
    )
    if not plan.fits:
        fitting = advice.until_it_fits(plan, advice.singles(plan))
        hint = "" if fitting is None else f"; this fits: {fitting.change}"
        raise UserError(plan.refusal() + hint)
    return settings.replace(batch_size=parts * plan.batch_size)


def _beginning(folder: pathlib.Path, done: int, settings: Any, corpus: Any) -> str:
    what = f"resumes after step {done}" if done else "begins"
    lengths = np.diff(corpus.starts)
    kept = int(lengths[corpus.validation].sum())
    return (
        f"{folder} {what}, of {settings.steps} steps, on {lengths.sum() - kept} tokens "
        f"and {kept} for validation"
    )


def _say(text: str) -> None:
    """Prints, unless nobody reads any more: a run goes on and saves all the same."""
    with contextlib.suppress(OSError, RuntimeError):
        print(f"train: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
