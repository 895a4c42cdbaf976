"""Runs a command line: its config flag, and one clear line for every user mistake.

`--config` takes a file with `get_config()` or a preset's name, `--model` a Hugging Face
folder, whose config and weights take the place of the model's. Whatever the user gave
wrong ends with exit code 2 and one line on stderr, without a traceback.
"""

import _thread
import contextlib
import dataclasses
import functools
import io
import logging
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from minillm_jax import compilation_cache, validation
from minillm_jax.cli import config_files, model_folder, preset_file
from minillm_jax.config import LEGACY_NAMES, Configs, ModelConfig
from minillm_jax.decoding.prompt_cache import PromptCacheError
from minillm_jax.model.cache import CacheOverflowError
from minillm_jax.text.tokenizer import TokenizerError
from minillm_jax.training.errors import DataError, TrainingError
from minillm_jax.training.settings import TrainSettings
from minillm_jax.weights.errors import CheckpointError


class UserError(Exception):
    """A mistake in what the user gave, told in one line."""


def check_writable(path: str, name: str) -> None:
    """Raises UserError where the file that `name` gives can never be."""
    place = pathlib.Path(path)
    if place.is_dir() or not place.parent.is_dir():
        raise UserError(f"{name}={path}: must be a file in a folder that is there")
    if not os.access(place.parent, os.W_OK):
        raise UserError(f"{name}={path}: its folder cannot be written to")


_PRESETS = ", ".join(Configs.names)
_USER_ERRORS = (
    *(UserError, validation.ConfigError, CacheOverflowError, PromptCacheError),
    *(TokenizerError, CheckpointError, DataError, TrainingError),
)


def run(
    main: Callable[[Any], None],
    *,
    optional: bool = False,
    named: Callable[[], str | None] | None = None,
    unnamed: str | None = None,
) -> None:
    """Parses the command line and calls `main` with the config; exits.

    Args:
      main: gets the config.
      optional: whether it may be missing; `main` then gets None.
      named: tells the model's folder that the flag --workdir names, if it does.
      unnamed: what --model is where the command line names neither config nor model.
    """
    help_text = f"A config file, or a preset: {_PRESETS}"
    flag = config_flags.DEFINE_config_file("config", None, help_text)
    model_help = "A Hugging Face folder to take config and weights from."
    model = flags.DEFINE_string("model", None, model_help)
    cache_help = "Keep what is compiled in this folder; default = the user's cache."
    cache = flags.DEFINE_string("compilation_cache", None, cache_help)

    def with_config() -> None:
        if flag.value is not None:
            _use_folder(flag.value, model.value, None if named is None else named())
        elif flag.present or not optional:
            raise UserError(_no_config())
        if cache.value is not None:
            folder = None if cache.value == "default" else cache.value
            compilation_cache.use_compilation_cache(folder)
        main(flag.value)

    folders = ("model",) if named is None else ("model", "workdir")
    _run(with_config, functools.partial(_parse, folders=folders, unnamed=unnamed))


def run_plain(main: Callable[[], None]) -> None:
    """Parses the command line and calls `main`, which needs no config; exits."""
    _run(main, functools.partial(_parse, folders=(), unnamed=None))


def _run(main: Callable[[], None], parse: Callable[[Sequence[str]], Any]) -> None:

    def checked(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"stray arguments: {' '.join(argv[1:])}")
            main()
        except _USER_ERRORS as error:
            _exit(str(error))
        except KeyboardInterrupt:
            _leave_at_once(130)
        except BrokenPipeError:  # whoever read the output has left
            _leave_at_once(1)
        except OSError as error:  # such as a full disk
            print(f"{_program()}: error: {_text(error)}", file=sys.stderr)
            _leave_at_once(2)

    # absl shows every INFO line of JAX, such as the backends that are not there; orbax
    # tells absl of each file.
    logging.getLogger("jax").setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.WARNING)
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter(f"{_program()}: %(message)s"))
    library = logging.getLogger("minillm_jax")
    library.addHandler(notes)
    library.propagate = False
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot write becomes "?"
            stream.reconfigure(errors="replace")
    sys.unraisablehook = _interrupt_again
    app.run(checked, flags_parser=parse)


def _interrupt_again(dropped: "sys.UnraisableHookArgs") -> None:
    """A Ctrl-C counts where Python drops what is raised, as in JAX's GC callback."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        later = threading.Timer(0.05, _thread.interrupt_main)  # outside of it
        later.daemon = True
        later.start()
    else:
        sys.__unraisablehook__(dropped)


def _parse(
    argv: Sequence[str], *, folders: Sequence[str], unnamed: str | None
) -> list[str]:
    """Flags, with presets resolved; exits with one line where they are wrong.

    Args:
      argv: the program and its arguments.
      folders: flags that name a folder with a config of its own.
      unnamed: what --model is where nothing names a config or such a folder.
    """
    path, absl = None, logging.getLogger("absl")
    try:
        argv, path = _resolve_config(_with_model([*argv], folders, unnamed), folders)
        absl.disabled = True  # it would warn of what is told in one line below
        return flags.FLAGS(argv)
    except UserError as error:
        _exit(str(error))
    except (Exception, SystemExit) as error:  # a config file is code, and may do both
        if path is None and isinstance(error, SystemExit):
            raise  # --help
        _exit(_raised_in(path, error) or _unknown_field(argv, error) or _text(error))
    finally:
        absl.disabled = False


def _with_model(
    argv: list[str], folders: Sequence[str], unnamed: str | None
) -> list[str]:
    names = {arg.split("=")[0].lstrip("-") for arg in argv[1:] if arg.startswith("-")}
    if unnamed is None or names & {"config", *folders}:
        return argv
    return [*argv[:1], f"--model={unnamed}", *argv[1:]]


def _use_folder(config: Any, given: str | None, of_run: str | None) -> None:
    path = config.get("model_path") if hasattr(config, "get") else None
    names = {"--model": given, "--workdir": of_run, "config.model_path": path}
    there = {name: value for name, value in names.items() if value is not None}
    if len(there) > 1:
        told = " and ".join(f"{name}={value}" for name, value in there.items())
        raise UserError(f"{told}: give one")
    for path in there.values():
        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        model_folder.put_in(config, path, overrides)


def _no_config() -> str:
    if flags.FLAGS["config"].present:
        return "the config file's get_config() returns None; return the config"
    return f"--config is missing: a file, or one of {_PRESETS}; or give --model=FOLDER"


def _resolve_config(
    argv: list[str], folders: Sequence[str]
) -> tuple[list[str], str | None]:
    """The arguments with a preset's name replaced by its file, and the file's path."""
    for index, arg in enumerate(argv[:-1]):
        if arg in ("--config", "-config"):
            argv[index : index + 2] = [f"--config={argv[index + 1]}"]
            return _resolve_config(argv, folders)
    given = [i for i, a in enumerate(argv) if a.startswith(("--config=", "-config="))]
    if not given and any(a.split("=")[0].lstrip("-") in folders for a in argv):
        argv.insert(1, f"--config={Configs.names[0]}")  # for its other sections
        given = [1]
    if not given:
        return argv, None
    if len(given) > 1:
        raise UserError(f"--config is given {len(given)} times; give one")
    value = argv[given[0]].split("=", 1)[1]
    if value in Configs.names:
        argv[given[0]] = f"--config={preset_file.__file__}:{value}"
        return argv, preset_file.__file__
    path = value.split(":", 1)[0]
    if not os.path.isfile(path):
        hint = validation.did_you_mean(value, Configs.names)
        raise UserError(
            f"--config={value}: no such file, nor a preset ({_PRESETS}){hint}"
        )
    return argv, path


def _raised_in(path: str | None, error: BaseException | None) -> str | None:
    """`FILE:LINE: Error: text` of what was raised in the config file, if it was."""
    if path is None:
        return None
    while error is not None:
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if os.path.abspath(frame.filename) == os.path.abspath(path):
                kind = type(error).__name__
                return f"{path}:{frame.lineno}: {kind}: {_text(error)}"
        if "get_config" in str(error) and error.__context__ is None:
            return f"{path}: {_text(error)}"  # there is none, or it takes no argument
        error = error.__cause__ or error.__context__
    return None


def _unknown_field(argv: Sequence[str], error: BaseException) -> str | None:
    """A line for an override whose field no section has."""
    if not isinstance(error, (AttributeError, KeyError)):
        return None
    known = ["model", "decode", "compare", "train"]
    settings = (config_files.DecodeSettings, config_files.CompareSettings)
    for section in (ModelConfig, *settings, TrainSettings):
        known += [field.name for field in dataclasses.fields(section)]
    for flag in (arg.split("=", 1)[0] for arg in argv if arg.startswith("--config.")):
        for name in flag.split(".")[1:]:
            if f"'{name}" in str(error):
                new = LEGACY_NAMES.get(name)
                hint = f"; write {new}" if new else validation.did_you_mean(name, known)
                return f"{flag}: there is no {name}{hint}"
    return None


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exit(message: str) -> NoReturn:
    print(f"{_program()}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _leave_at_once(code: int) -> NoReturn:
    """Exits without the interpreter's teardown.

    JAX 0.10 may crash in that if a compilation was interrupted; and it would try to
    write once more what could not be written.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _program() -> str:
    return os.path.basename(sys.argv[0]).removesuffix(".py")
