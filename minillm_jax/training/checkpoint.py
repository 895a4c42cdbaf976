"""Checkpoints of a run: written beside the training, complete or not there at all.

FOLDER/120/                the state after 120 steps, as orbax writes it
FOLDER/120/manifest.json   sizes and SHA-256 of those files; written last

A step without a manifest was never finished, and is as if it had never been begun. One
whose files are not as the manifest says is damaged: it is named, and the one before it
is taken.
"""

import concurrent.futures
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from minillm_jax.json_files import read_object
from minillm_jax.weights.errors import CheckpointError

MANIFEST = "manifest.json"
_PIECE = 2**20  # bytes read at a time
_WRONG_VALUES = (AttributeError, KeyError, TypeError, ValueError)  # of a manifest

_log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A complete checkpoint."""

    step: int
    val_loss: float | None  # nats per token, where it was taken at that step
    about: Mapping[str, Any]  # what the run kept with it


class Checkpoints:
    """The checkpoints of a folder: the `keep` newest ones, and the best.

    One is written at a time, by a thread; training goes on meanwhile.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int):
        """Opens a folder, or makes it."""
        self.folder = pathlib.Path(folder).absolute()
        self._keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None,  # they are deleted here, once a later one is complete
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    def save(
        self,
        step: int,
        state: Any,
        *,
        val_loss: float | None = None,
        about: Mapping[str, Any] = {},
    ) -> None:
        """Begins to write a state; returns once it may be donated.

        Raises:
          CheckpointError: if the one before could not be written, or this one.
        """
        self.wait()
        saved = Saved(step, val_loss, about)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            raise self._not_written(step, error) from error
        self._writing = self._pool.submit(self._finish, saved)

    def check(self) -> None:
        """Raises CheckpointError if what was being written could not be."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what is being written is; raises CheckpointError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits, and ends the threads."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    def saved(self) -> list[Saved]:
        """The complete ones, the oldest first; only their manifests are read."""
        found = [self._read(step) for step in self._steps() if self._is_whole(step)]
        return [saved for saved in found if saved is not None]

    def best(self) -> Saved | None:
        """The one of the lowest validation loss, or the newest where none is known.

        Of those whose files are as they should be.
        """
        left = self.saved()
        while left:
            found = best_of(left) or left[-1]
            if self._problem(found.step) is None:
                return found
            left.remove(found)
        return None

    def newest(self) -> Saved | None:
        """The newest one whose files are as its manifest says; others are named.

        Those after it are deleted: training writes them again.

        Raises:
          CheckpointError: if there are finished ones and none is as it should be.
        """
        problems = []
        if not any(self._is_whole(step) for step in self._steps()):
            self._delete(self._steps())
        for step in reversed(self._steps()):
            problem = self._problem(step)
            if problem is None:
                for line in problems:
                    _log.warning("%s; step %d is taken instead", line, step)
                self._delete([later for later in self._steps() if later > step])
                return self._read(step)
            problems.append(problem)
        if problems:
            raise CheckpointError(
                f"no checkpoint is whole: {'; '.join(problems)}; delete {self.folder} "
                "to begin again"
            )
        return None

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, into the shapes, dtypes and devices of `like`.

        Raises:
          CheckpointError: if it is another model's, or cannot be read.
        """
        try:
            args = ocp.args.StandardRestore(like)
            return self._manager.restore(step, args=args)
        except Exception as error:
            path = self.folder / str(step)
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    def _finish(self, saved: Saved) -> None:
        """Waits for orbax, writes the manifest, then deletes what is not kept."""
        folder = self.folder / str(saved.step)
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            manifest = {**saved._asdict(), "files": _listed(folder)}
            _write_last(folder / MANIFEST, manifest)
        except Exception as error:
            raise self._not_written(saved.step, error) from error
        complete = self.saved()
        kept = {found.step for found in complete[-self._keep :]}
        if (best := best_of(complete)) is not None:
            kept.add(best.step)
        self._delete([found.step for found in complete if found.step not in kept])

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        steps = [found.step for found in self.saved() if found.step != step]
        left = f"step {steps[-1]} is the newest" if steps else "there is none before it"
        reason = " ".join(str(error).split())
        return CheckpointError(
            f"checkpoint {self.folder / str(step)} could not be written: {reason}; "
            f"{left}"
        )

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _is_whole(self, step: int) -> bool:
        return (self.folder / str(step) / MANIFEST).is_file()

    def _read(self, step: int) -> Saved | None:
        """What a manifest says; None where it cannot be read."""
        try:
            values = read_object(self.folder / str(step) / MANIFEST, CheckpointError)
        except CheckpointError:
            return None
        return Saved(step, values.get("val_loss"), values.get("about", {}))

    def _problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint, with the file's name."""
        folder = self.folder / str(step)
        if not self._is_whole(step):
            return f"{folder}: was never finished"
        try:
            values = read_object(folder / MANIFEST, CheckpointError)
            for name, (size, sha256) in values["files"].items():
                file = folder / name
                if not file.is_file():
                    return f"{file}: is missing"
                if file.stat().st_size != size:
                    return f"{file}: has {file.stat().st_size} bytes instead of {size}"
                if _sha256(file) != sha256:
                    return f"{file}: is damaged: its SHA-256 is another"
        except (CheckpointError, OSError, *_WRONG_VALUES) as error:
            return f"{folder / MANIFEST}: is damaged: {error}"
        return None

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            # Without its manifest first: half a deletion leaves no whole checkpoint.
            (self.folder / str(step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
        if steps:
            self._manager.reload()


def best_of(saved: list[Saved]) -> Saved | None:
    """The one of the lowest validation loss, where any is known."""
    known = [found for found in saved if math.isfinite(_loss(found))]
    return min(known, key=_loss, default=None)


def _loss(saved: Saved) -> float:
    return math.inf if saved.val_loss is None else saved.val_loss


def shapes(make: Callable[..., Any], *arguments: Any) -> Any:
    """What a function would make of its arguments, as shapes on the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(make, *arguments),
    )


def _listed(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _sha256(path))
        for path in files
    }


def _sha256(file: pathlib.Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _write_last(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes JSON that is there as a whole or not at all."""
    beside = file.with_suffix(".new")
    with beside.open("w") as opened:
        json.dump(values, opened, indent=2, default=_plain)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(beside, file)


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist()
