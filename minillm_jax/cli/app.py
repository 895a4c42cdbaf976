"""Runs a command line: its config flag, and one clear line for every user mistake.

`--config` takes a file with `get_config()` or a preset's name. Whatever the user gave
wrong ends with exit code 2 and one line on stderr, without a traceback.
"""

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from minillm_jax import validation
from minillm_jax.cli import config_files, preset_file
from minillm_jax.config import Configs, ModelConfig
from minillm_jax.model.cache import CacheOverflowError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file, or a preset: " + ", ".join(Configs.names)
)


class UserError(Exception):
    """A mistake in what the user gave, told in one line."""


_USER_ERRORS = (UserError, validation.ConfigError, CacheOverflowError)


def run(main: Callable[[Any], None]) -> None:
    """Parses the command line and calls `main` with the config; exits."""

    def checked(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"stray arguments: {' '.join(argv[1:])}")
            if CONFIG.value is None:
                raise UserError(_no_config())
            main(CONFIG.value)
        except _USER_ERRORS as error:
            _exit(str(error))
        except KeyboardInterrupt:
            sys.exit(130)

    # absl shows every INFO line of JAX, such as the backends that are not there.
    logging.getLogger("jax").setLevel(logging.WARNING)
    app.run(checked, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Flags, with presets resolved; exits with one line where they are wrong."""
    path, absl = None, logging.getLogger("absl")
    try:
        argv, path = _resolve_config(list(argv))
        absl.disabled = True  # it would warn of what is told in one line below
        return flags.FLAGS(argv)
    except UserError as error:
        _exit(str(error))
    except Exception as error:  # a config file is code: anything may come out of it
        _exit(_raised_in(path, error) or _unknown_field(argv, error) or _text(error))
    finally:
        absl.disabled = False


def _no_config() -> str:
    if flags.FLAGS["config"].present:
        return "the config file's get_config() returns None; return the config"
    return f"--config is missing: a file, or one of {', '.join(Configs.names)}"


def _resolve_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments with a preset's name replaced by its file, and the file's path."""
    for index, arg in enumerate(argv):
        if arg in ("--config", "-config") and index + 1 < len(argv):
            argv[index : index + 2] = [f"--config={argv[index + 1]}"]
            return _resolve_config(argv)
        if not arg.startswith(("--config=", "-config=")):
            continue
        value = arg.split("=", 1)[1]
        if value in Configs.names:
            argv[index] = f"--config={preset_file.__file__}:{value}"
            return argv, preset_file.__file__
        path = value.split(":", 1)[0]
        if not os.path.isfile(path):
            hint = validation.did_you_mean(value, Configs.names)
            presets = ", ".join(Configs.names)
            raise UserError(
                f"--config={value}: no such file, nor a preset ({presets}){hint}"
            )
        return argv, path
    return argv, None


def _raised_in(path: str | None, error: BaseException | None) -> str | None:
    """`FILE:LINE: Error: text` of what was raised in the config file, if it was."""
    while path is not None and error is not None:
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if os.path.abspath(frame.filename) == os.path.abspath(path):
                kind = type(error).__name__
                return f"{path}:{frame.lineno}: {kind}: {_text(error)}"
        error = error.__cause__ or error.__context__
    return None


def _unknown_field(argv: Sequence[str], error: Exception) -> str | None:
    """A line for an override whose field no section has."""
    if not isinstance(error, (AttributeError, KeyError)):
        return None
    known = [
        field.name
        for section in (ModelConfig, config_files.DecodeSettings)
        for field in dataclasses.fields(section)
    ]
    for arg in argv:
        flag = arg.split("=", 1)[0]
        field = flag.rsplit(".", 1)[-1]
        if flag.startswith("--config.") and field in str(error):
            return f"{flag}: no such field{validation.did_you_mean(field, known)}"
    return None


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exit(message: str) -> NoReturn:
    program = os.path.basename(sys.argv[0]).removesuffix(".py")
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
