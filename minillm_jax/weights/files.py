"""The files of a Hugging Face folder: what is there, checked before memory is taken.

Only safetensors: the older .bin files are pickles, programs that loading would run.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors import SafetensorError

from minillm_jax import json_files
from minillm_jax.weights.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
_FRAMEWORK = "numpy"


class Tensor(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder, empty where there is no such file."""
    return json_files.read_object(folder / name, CheckpointError)


def read_headers(folder: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors, by name; reads no data.

    Raises:
      CheckpointError: where there are none, or a file is damaged, missing or outside
        the folder: its header, the tensors' offsets and sizes, or the file's length.
    """
    files, listed = _weight_files(folder)
    found: dict[str, Tensor] = {}
    problems = []
    for file in files:
        for name, tensor in _headers(file):
            if name in found:
                both = f"{found[name].file.name} and {file.name}"
                problems.append(f"{name} is in {both}")
            found[name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].file != file:
            problems.append(f"{name} is not in {file.name}, where {INDEX} has it")
    if problems:
        raise CheckpointError(problems, folder)
    return found


def read_rows(tensor: Tensor, start: int, count: int) -> np.ndarray:
    """Some rows of a tensor, copied out of its file."""
    try:
        with safetensors.safe_open(tensor.file, framework=_FRAMEWORK) as opened:
            whole = start == 0 and count == tensor.shape[0]
            if whole:
                return opened.get_tensor(tensor.name)
            return opened.get_slice(tensor.name)[start : start + count]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensor.name}: {error}", tensor.file) from error


def _weight_files(
    folder: pathlib.Path,
) -> tuple[list[pathlib.Path], dict[str, pathlib.Path]]:
    """The files, and in which of them the index has each tensor."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_nothing_there(folder), folder)
    listed = read_json(folder, INDEX).get("weight_map")
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError("has no weight_map of tensors to files", folder / INDEX)
    names = {str(name) for name in listed.values()}
    wrong = []
    for name in sorted(names):
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            wrong.append(f"{name!r} is not the name of a .safetensors file in it")
        elif not os.path.isfile(folder / name):  # False, too, of a name too long
            wrong.append(f"{name!r} is not there")
    if wrong:
        raise CheckpointError(wrong, folder / INDEX)
    files = [folder / name for name in sorted(names)]
    return files, {tensor: folder / str(name) for tensor, name in listed.items()}


def _nothing_there(folder: pathlib.Path) -> str:
    if any(folder.glob("*.bin")):
        return (
            "has no safetensors, only .bin files; those are pickles, which can run any "
            "code when they are loaded, and are not read. Most models have safetensors "
            "too; transformers' save_pretrained writes them"
        )
    return f"has neither {SINGLE} nor {INDEX}"


def _headers(file: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safetensors.safe_open(file, framework=_FRAMEWORK) as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                yield name, Tensor(file, name, part.get_dtype(), shape)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"is damaged: {error}", file) from error
