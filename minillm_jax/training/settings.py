"""`config.train`: on what, how long and how a model is trained."""

import dataclasses
from typing import Annotated, Any

from minillm_jax import validation
from minillm_jax.config import ConfigError, ModelConfig, Tokens
from minillm_jax.planning import automatic
from minillm_jax.training import sources
from minillm_jax.validation import Range

MOST_ROWS = 100_000
_COUNT = Range(1, 10**9)
_SHARE = Range(0.0, 1.0)
_BETA = Range(0.0, 0.999999)
# What a resumed run may have otherwise than it began: none of it changes a step.
FREE = ("eval_every", "eval_batches", "checkpoint_every", "keep", "tensorboard")


def _contradictions(values: dict[str, Any], derived: frozenset[str]) -> list[str]:
    rows, parts = values.get("batch_size"), values.get("accumulation")
    if isinstance(rows, int) and parts and rows % parts:
        return [
            f"batch_size={rows}: must be a multiple of accumulation={parts}; write "
            f"{-(-rows // parts) * parts}"
        ]
    return []


@validation.checked_fields(contradictions=_contradictions)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a run of `cli.train` does; a run that is resumed keeps it.

    A batch is `batch_size` rows of `seq_len` tokens, packed documents; which ones
    follows from `seed` and the step alone.
    """

    # "python" (the standard library's source), a text file, a folder, .jsonl or .bin.
    data: str = sources.STANDARD_LIBRARY
    tokenizer: str | None = None  # a tokenizer.json or its folder; None = bytes
    steps: Annotated[int, _COUNT] = 1000
    batch_size: Annotated[int | str, automatic.Number(MOST_ROWS)] = 8
    seq_len: Annotated[int | None, Tokens] = None  # None = max_seq_len
    # Parts of a batch that are computed one after another, to need less memory.
    accumulation: Annotated[int, Range(1, MOST_ROWS)] = 1

    # AdamW: up to `learning_rate` in `warmup_steps`, then down along a cosine to
    # `final_share` of it at the last step.
    learning_rate: Annotated[float, Range(1e-12, 10.0)] = 3e-4
    warmup_steps: Annotated[int, Range(0, 10**9)] = 100
    final_share: Annotated[float, _SHARE] = 0.1
    weight_decay: Annotated[float, Range(0.0, 10.0)] = 0.1  # of matrices
    clip_norm: Annotated[float, Range(1e-6, 1e9)] = 1.0  # of all gradients together
    beta1: Annotated[float, _BETA] = 0.9
    beta2: Annotated[float, _BETA] = 0.95
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0  # of the weights and the batches

    eval_every: Annotated[int, _COUNT] = 100  # steps; the last one always
    eval_batches: Annotated[int, _COUNT] = 64  # at most, of the validation split
    checkpoint_every: Annotated[int, _COUNT] = 100  # steps; the last one always
    keep: Annotated[int, _COUNT] = 2  # newest checkpoints, beside the best
    tensorboard: bool = True  # also write WORKDIR/tensorboard

    def length(self, config: ModelConfig) -> int:
        """Tokens of a row; raises ConfigError where the model does not take as many."""
        longest = config.max_seq_len
        if self.seq_len is not None and self.seq_len > longest:
            raise ConfigError(
                f"config.train.seq_len={self.seq_len}: must be at most max_seq_len="
                f"{longest}; write {longest}, or raise config.model.max_seq_len"
            )
        return self.seq_len or longest

    def replace(self, **changes: Any) -> "TrainSettings":
        """New settings with `changes`, validated again."""
        return TrainSettings(**(dataclasses.asdict(self) | changes))
