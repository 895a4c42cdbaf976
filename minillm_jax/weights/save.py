"""Writes a Hugging Face folder that transformers loads.

Everything is written beside what is there, which it replaces when it is whole.
"""

import contextlib
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from minillm_jax.config import FLOAT_DTYPES, ConfigError
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.text import tokenizer as tokenizer_files
from minillm_jax.weights import configs, files, names
from minillm_jax.weights.families import Family

SHARD_BYTES = 4 * 10**9  # of one file, but for a tensor that is larger
_LAST = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TOKENIZER = ("tokenizer.json", *tokenizer_files.BESIDE)
_Place = tuple[names.Parameter, names.Piece]


def save_pretrained(
    path: str | pathlib.Path,
    model: MiniLLM,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config, weights and tokenizer; a model that is there already is replaced.

    Host memory holds a file's tensors at a time. What is interrupted leaves the model
    that was there, or a folder without config.json, never a mixture.

    Args:
      path: the folder; made where it is not there.
      model: its config decides the architecture.
      params: the inner tree, written in its own dtype, bit for bit.
      tokenizer: from `load_tokenizer` or `load_pretrained`, whose files are copied, or
        a ByteTokenizer, for which a tokenizer.json is written.
      shard_bytes: the most that a file of weights is to hold.

    Raises:
      ConfigError: before anything is written: for a config that no architecture of
        transformers can express, params of another model, or a tokenizer without files.
    """
    transformer.check_params(model, params)
    if model.config.quantization != "none":
        raise ConfigError("params: quantized; save those in floats that they are of")
    strange = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
    if not strange <= {*FLOAT_DTYPES, "float64"}:
        raise ConfigError(f"params: of dtype {', '.join(sorted(strange))}; floats only")
    values, family = configs.write_config(model.config)
    if tokenizer is not None and not getattr(tokenizer, "has_files", False):
        raise ConfigError("tokenizer: only one that was read from files can be saved")
    dtype = np.dtype(params["embedding"].dtype).name
    ids = values["eos_token_id"]
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with _staged(folder) as new:
        _write_weights(new, model, params, family, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)
        _write_json(new / "generation_config.json", {"eos_token_id": ids})
        _write_json(new / _LAST, values | {"torch_dtype": dtype})


def _write_weights(
    folder: pathlib.Path,
    model: MiniLLM,
    params: Mapping[str, Any],
    family: Family,
    shard_bytes: int,
) -> None:
    """Writes one file, or several and their index."""
    places = _places(model, family)
    sizes = {
        name: math.prod(shape) * _leaf(params, places[name][0][0]).dtype.itemsize
        for name, shape in names.tensors(model.config, family).items()
    }
    shards = _shards(sizes, shard_bytes)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = files.SINGLE if len(shards) == 1 else name
        tensors = {tensor: _tensor(params, places[tensor]) for tensor in shard}
        file = folder / name
        file.touch()
        mode = file.stat().st_mode  # which the library would narrow
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)
        index |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        _write_json(folder / files.INDEX, {"metadata": total, "weight_map": index})


def _places(model: MiniLLM, family: Family) -> dict[str, list[_Place]]:
    """The parameters and pieces that each tensor is made of, the first rows first."""
    places: dict[str, list[_Place]] = {}
    for parameter in names.parameters(model.config, family):
        for piece in parameter.pieces:
            places.setdefault(piece.tensor, []).append((parameter, piece))
    return places


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names of the tensors of each file, in their order."""
    shards, held = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _leaf(params: Mapping[str, Any], parameter: names.Parameter) -> Any:
    node: Any = params
    for name in parameter.path:
        node = node[name]
    return node


def _tensor(params: Mapping[str, Any], places: list[_Place]) -> np.ndarray:
    """A tensor as the file has it."""
    parts = []
    for parameter, piece in places:
        view = piece.view(np.asarray(_leaf(params, parameter)))
        count = names.rows(parameter, piece)
        parts.append(view.reshape(count, *piece.columns))
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def _staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Another folder to write to; what is in it takes its place when it is whole.

    While files are replaced there is no config.json: what is interrupted there is no
    model's folder, and never one of two models.
    """
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        new = pathlib.Path(temporary)
        yield new
        (folder / _LAST).unlink(missing_ok=True)
        for file in folder.iterdir():  # of the model that was there
            if file.is_dir():
                continue
            if _WEIGHTS.fullmatch(file.name) or file.name in _TOKENIZER:
                file.unlink()
        for file in sorted(new.iterdir(), key=lambda file: file.name == _LAST):
            file.replace(folder / file.name)
