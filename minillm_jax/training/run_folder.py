"""A run's folder, and what it was begun with, which a resumed run keeps.

WORKDIR/.lock          held by the process that trains
WORKDIR/config.json    model, settings, data and versions
WORKDIR/data/          the documents as token ids (corpus.py)
WORKDIR/checkpoints/   (checkpoint.py)
WORKDIR/metrics.csv    (metrics.py), and loss.png, tensorboard/
WORKDIR/model/         a Hugging Face folder: the best model, when training ends
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.json_files import read_object
from minillm_jax.planning import machine
from minillm_jax.text.tokenizer import Tokenizer
from minillm_jax.training import corpus, sources
from minillm_jax.training.corpus import Corpus
from minillm_jax.training.errors import DataError
from minillm_jax.training.settings import FREE, TrainSettings

_log = logging.getLogger(__name__)
CONFIG, DATA, MODEL = "config.json", "data", "model"


def trained_model(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a run's model; raises DataError where there is none yet."""
    model = pathlib.Path(folder) / MODEL
    if not model.is_dir():
        raise DataError(
            f"{folder}: has no model yet; cli.train writes it when a run ends or is "
            "stopped"
        )
    return model


def begin(
    folder: pathlib.Path,
    config: ModelConfig,
    settings: TrainSettings,
    weights: str | None = None,
) -> TrainSettings:
    """Writes what a new run begins with, or compares it with the run that is there.

    Args:
      folder: the run's; made where it is not there.
      config: nothing "auto" in it.
      settings: of a new run nothing "auto"; else "auto" is what the run has.
      weights: the folder that the first weights are from; None = random ones.

    Returns:
      The settings, with numbers for what is "auto".

    Raises:
      ConfigError: where they differ in what changes a step: all of it, in one message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = _begun(folder)
    if not there:
        _write(folder / CONFIG, _described(config, settings, weights))
        return settings
    had = there.get("train", {})
    if isinstance(settings.batch_size, str) and "batch_size" in had:
        settings = settings.replace(batch_size=had["batch_size"])
    described = _described(config, settings, weights)
    problems = [
        f"config.{section}.{name}={value!r}: the run has {there[section][name]!r}"
        for section in ("model", "train")
        for name, value in described[section].items()
        if name not in FREE and there.get(section, {}).get(name) != value
        if name in there.get(section, {})
    ]
    if there.get("weights") != weights:
        problems.append(
            f"weights from {weights}: the run began with {there['weights']}"
        )
    if problems:
        problems[-1] += f"; {folder} is resumed as it began: give another --workdir"
        raise ConfigError(problems)
    return settings


def has_begun(folder: pathlib.Path) -> bool:
    """Whether a run has begun in a folder.

    Raises:
      ConfigError: if its config.json is something else's, such as a model's.
    """
    return bool(_begun(folder))


def _begun(folder: pathlib.Path) -> dict[str, Any]:
    """What a run has begun with, nothing where there is none."""
    there = read_object(folder / CONFIG, ConfigError)
    if there and not {"model", "train", "weights"} <= there.keys():
        raise ConfigError(
            f"{folder / CONFIG}: is not a run's; give another --workdir, which may be "
            "a new folder"
        )
    return there


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
    """A block in which no other process trains in a folder, which is made.

    Raises:
      ConfigError: if one does already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:  # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{folder}: another process trains there; wait for it, or give "
                    "another --workdir"
                ) from None
            except OSError as error:  # such as a file system without locks
                _log.warning("%s: cannot be locked: %s", folder, error)
        yield


def documents(
    folder: pathlib.Path,
    config: ModelConfig,
    settings: TrainSettings,
    tokenizer: Tokenizer,
) -> Corpus:
    """The run's data, made of its source where it is not there yet.

    Raises:
      DataError: for a source that cannot be used, a damaged folder, or one of another
        source.
    """
    path = folder / DATA
    facts: dict[str, Any] = {"source": settings.data, "tokenizer": settings.tokenizer}
    if (path / "corpus.json").is_file():
        found = corpus.load(path)
        for name, value in facts.items():
            if found.facts.get(name) != value:
                raise DataError(
                    f"{path}: was made of {name}={found.facts.get(name)}, not {value}; "
                    "give another --workdir"
                )
        return found
    if settings.data == sources.STANDARD_LIBRARY:
        facts["python"] = platform.python_version()
    found = sources.documents(
        settings.data,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
    )
    return corpus.make(
        path, found, tokenizer, vocab_size=config.vocab_size, facts=facts
    )


def _described(
    config: ModelConfig, settings: TrainSettings, weights: str | None
) -> dict[str, Any]:
    values = {
        "model": config.to_dict(),
        "train": dataclasses.asdict(settings),
        "weights": weights,
        "versions": machine.versions(),
    }
    return json.loads(json.dumps(values))  # as it is read again


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(beside, path)
