"""What a run tells of its steps: WORKDIR/metrics.csv, TensorBoard files, a plot."""

import contextlib
import csv
import dataclasses
import io
import os
import pathlib
from typing import Any

from minillm_jax.validation import ConfigError

CSV = "metrics.csv"
PLOT = "loss.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One step; None where something was not taken."""

    step: int  # from 1 on
    loss: float  # nats per token of the step's batch, before its update
    val_loss: float | None = None  # nats per token, after it
    learning_rate: float
    grad_norm: float  # before clipping
    tokens_per_second: float | None = None
    mfu: float | None = None  # share of the FLOP/s that the device could do
    val_bits_per_byte: float | None = None
    memory_bytes: int | None = None  # the most in use so far


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


class MetricsFile:
    """The rows of a run, each step once, whatever happened to the run."""

    def __init__(
        self, folder: pathlib.Path, last_step: int, *, tensorboard: bool = False
    ):
        """Keeps what is there of steps up to `last_step`; the rest is taken again."""
        path = folder / CSV
        kept = [row for row in read(path) if int(row["step"]) <= last_step]
        beside = path.with_suffix(".new")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(beside, path)
        self._file = path.open("a", newline="")
        self._board = _board(folder, last_step) if tensorboard else None

    def add(self, row: Row) -> None:
        """Appends a row."""
        values = dataclasses.asdict(row)
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS).writerow(values)
        self._file.write(line.getvalue())
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row.step)

    def sync(self) -> None:
        """Until the rows are on disk."""
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv; none where there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last
    rows = csv.DictReader(whole)
    return [
        {name: row.get(name) or "" for name in COLUMNS}
        for row in rows
        if (row.get("step") or "").isdecimal()
    ]


def _board(folder: pathlib.Path, last_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError:
        raise ConfigError(
            "config.train.tensorboard: needs tensorboardX: install the extra `train`, "
            "or set it to False"
        ) from None
    return tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=last_step + 1
    )


def plot(folder: pathlib.Path) -> pathlib.Path | None:
    """Draws the losses of a metrics.csv; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read(folder / CSV)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    axes.plot(
        *(steps, [float(row["loss"]) for row in rows]), color="#9ecae1", label="batch"
    )
    taken = [row for row in rows if row["val_loss"]]
    axes.plot(
        [int(row["step"]) for row in taken],
        [float(row["val_loss"]) for row in taken],
        *("o-",),
        color="#08519c",
        markersize=3,
        label="validation",
    )
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / PLOT
    figure.savefig(path, dpi=150)
    return path
