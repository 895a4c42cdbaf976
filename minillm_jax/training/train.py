"""The training loop. It owns a run's state and files, and knows no command line.

1. The newest complete checkpoint is taken, or step 0 is begun.
2. A step is dispatched, then the next batch is made, then the metrics of the step
   before are read: the device never waits for the host.
3. Every `eval_every` steps the validation split is measured, every `checkpoint_every`
   the state is saved, in the background.

On CPU with the same number of devices a run that was killed gives, resumed, the losses
that it would have given, bit for bit.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import costs, machine
from minillm_jax.training import checkpoint, optimizer, step
from minillm_jax.training.checkpoint import Checkpoints
from minillm_jax.training.corpus import Corpus
from minillm_jax.training.errors import TrainingError
from minillm_jax.training.metrics import MetricsFile, Row
from minillm_jax.training.packing import Batch, Packing
from minillm_jax.training.settings import TrainSettings
from minillm_jax.training.step import StepMetrics, TrainState
from minillm_jax.weights.errors import CheckpointError

CHECKPOINTS = "checkpoints"


class _Pending(NamedTuple):
    """A step that was dispatched and whose metrics were not read yet."""

    number: int  # steps with this one
    metrics: StepMetrics


class Trainer:
    """A run in a folder: `start` it, `run` it, `close` it."""

    def __init__(
        self,
        model: MiniLLM,
        settings: TrainSettings,
        corpus: Corpus,
        folder: pathlib.Path,
    ):
        """Opens the run's files.

        Args:
          model: with float32 parameters, whatever it computes in.
          settings: nothing "auto".
          corpus: what to train on.
          folder: WORKDIR.
        """
        self.model, self.settings = model, settings
        self._on_row: Callable[[Row], None] = lambda row: None
        self._rows = int(settings.batch_size)
        self._length = settings.length(model.config)
        self._train, self._validation = (
            Packing(
                *(corpus, corpus.split(validation=split), self._length),
                seed=settings.seed,
            )
            for split in (False, True)
        )
        self._bits_per_byte = _bits_per_byte(corpus)
        self._optimizer, self._rates = _optimizer(settings)
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, settings.keep)
        self._folder = folder
        flops = costs.train_flops(model.config, self._rows, self._length)
        peak = machine.this_device().flops_per_second
        self._flops_share = None if peak is None else flops / peak
        self._settled_at: float | None = None  # when metrics were read, seconds

    def start(self, make_params: Callable[[], Any]) -> int:
        """Restores the newest complete checkpoint, or begins with `make_params()`.

        Returns:
          The steps taken so far.

        Raises:
          CheckpointError: if there are checkpoints and none can be used, or they are of
            another seed.
        """
        found = self.checkpoints.newest()
        if found is not None and found.about.get("seed") != self.settings.seed:
            raise CheckpointError(
                f"{self.checkpoints.folder / str(found.step)}: is of a run of seed "
                f"{found.about.get('seed')}, not {self.settings.seed}"
            )
        if found is None:
            self.done = 0
            self._state = step.initial_state(make_params(), self._optimizer)
        else:
            self.done = found.step
            self._state = self.checkpoints.restore(found.step, self._shapes())
        self._file = MetricsFile(
            self._folder, self.done, tensorboard=self.settings.tensorboard
        )
        return self.done

    def run(
        self,
        stopping: Callable[[], bool] = lambda: False,
        *,
        on_row: Callable[[Row], None] = lambda row: None,
    ) -> bool:
        """Takes the steps that are left, or those until `stopping()`; then saves.

        `on_row` is told of every step.

        Returns:
          Whether all steps are done.

        Raises:
          TrainingError: if a loss or gradient is not finite.
          CheckpointError: if a checkpoint could not be written.
        """
        steps, pending, self._on_row = self.settings.steps, None, on_row
        batch = self._train.batch(self.done, self._rows)
        while self.done < steps and not stopping():
            self._state, metrics = self._dispatch(batch)
            self.done += 1
            batch = self._train.batch(self.done, self._rows)
            self._settle(pending)
            pending = _Pending(self.done, metrics)
            if self._due(self.settings.eval_every, self.settings.checkpoint_every):
                self._settle(pending, evaluate=self._due(self.settings.eval_every))
                pending = None
            self.checkpoints.check()
        self._settle(pending)
        if not self._is_saved():
            self._save(None)
        self.checkpoints.wait()
        return self.done == steps

    def best_params(self) -> dict[str, Any]:
        """Parameters of the checkpoint of the lowest validation loss, or the newest."""
        best = self.checkpoints.best()
        if best is None or best.step == self.done:
            return dict(self._state.params)
        del self._state  # there may not be room for two
        return self.checkpoints.restore(best.step, self._shapes()).params

    def close(self) -> None:
        """Waits for what is being written, and closes the files."""
        try:
            self.checkpoints.close()
        finally:
            if hasattr(self, "_file"):
                self._file.close()

    def evaluate(self) -> float:
        """Nats per token of the validation split, or of its first `eval_batches`."""
        parts = self.settings.accumulation  # memory was planned for so many rows
        batches = self._validation.epoch(
            self._rows // parts, self.settings.eval_batches * parts
        )
        sums = [
            step.eval_step(self.model, self._state.params, *batch) for batch in batches
        ]
        totals, counts = np.asarray(jax.device_get(sums), np.float64).T
        return float(totals.sum() / max(1.0, counts.sum()))

    def _dispatch(self, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return step.train_step(
            *(self.model, self._optimizer, self._state, *batch),
            accumulation=self.settings.accumulation,
        )

    def _due(self, *periods: int) -> bool:
        last = self.done == self.settings.steps
        return last or any(self.done % period == 0 for period in periods)

    def _settle(self, pending: _Pending | None, *, evaluate: bool | None = None):
        """Reads a step's metrics; with `evaluate` given also what is due after it."""
        if pending is None:
            return
        loss, grad_norm = (float(x) for x in jax.device_get(pending.metrics))
        now, rate = time.perf_counter(), None
        if self._settled_at is not None:
            rate = self._rows * self._length / (now - self._settled_at)
        self._settled_at = now
        self._check_finite(pending.number, {"loss": loss, "gradient norm": grad_norm})
        val_loss = self.evaluate() if evaluate else None
        if val_loss is not None:
            self._check_finite(pending.number, {"validation loss": val_loss})
        row = Row(
            step=pending.number,
            loss=loss,
            val_loss=val_loss,
            learning_rate=float(self._rates[pending.number - 1]),
            grad_norm=grad_norm,
            tokens_per_second=rate,
            mfu=self._mfu(rate),
            val_bits_per_byte=self._in_bits(val_loss),
            memory_bytes=machine.peak_bytes(jax.devices()[0]),
        )
        self._file.add(row)
        self._on_row(row)
        if evaluate is not None:
            if self._due(self.settings.checkpoint_every):
                self._save(val_loss)
            self._settled_at = None  # what came between is not a step's time

    def _check_finite(self, number: int, found: Mapping[str, float]) -> None:
        if all(map(math.isfinite, found.values())):
            return
        self.checkpoints.wait()
        saved = self.checkpoints.saved()
        last = f"of step {saved[-1].step}" if saved else "none"
        seed = self.settings.seed
        values = ", ".join(f"{name} {value}" for name, value in found.items())
        raise TrainingError(
            f"step {number}: {values}, on batch {number - 1} of seed {seed}; the last "
            f"good checkpoint is {last}; in a new --workdir a lower learning_rate, "
            "more warmup_steps or a smaller clip_norm may help"
        )

    def _mfu(self, rate: float | None) -> float | None:
        if rate is None or self._flops_share is None:
            return None
        return self._flops_share * rate / (self._rows * self._length)

    def _in_bits(self, loss: float | None) -> float | None:
        if loss is None or self._bits_per_byte is None:
            return None
        return loss * self._bits_per_byte

    def _save(self, val_loss: float | None) -> None:
        self._file.sync()
        about = {
            "seed": self.settings.seed,
            "next_batch": self.done,
            "model": self.model.config.to_dict(),
            "train": dataclasses.asdict(self.settings),
        }
        self.checkpoints.save(self.done, self._state, val_loss=val_loss, about=about)

    def _is_saved(self) -> bool:
        self.checkpoints.wait()
        return any(saved.step == self.done for saved in self.checkpoints.saved())

    def _shapes(self) -> Any:
        return checkpoint.shapes(
            lambda params: step.initial_state(params, self._optimizer),
            transformer.param_shapes(self.model),
        )


@functools.cache
def _optimizer(settings: TrainSettings):
    """AdamW and the learning rate of every step; the same for equal settings.

    An optimiser is a static argument: another one would be compiled for again.
    """
    schedule = optimizer.schedule(
        settings.learning_rate,
        steps=settings.steps,
        warmup=settings.warmup_steps,
        final_share=settings.final_share,
    )
    found = optimizer.adamw(
        schedule,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        betas=(settings.beta1, settings.beta2),
    )
    return found, optimizer.rates(schedule, settings.steps)


def _bits_per_byte(corpus: Corpus) -> float | None:
    """What nats per token are multiplied by; None where texts' bytes are not known."""
    validation = corpus.split(validation=True)
    num_bytes = int(corpus.num_bytes[validation].sum())
    if num_bytes == 0:
        return None
    tokens = int(np.diff(corpus.starts)[validation].sum())
    return tokens / num_bytes / math.log(2)
