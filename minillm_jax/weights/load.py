"""Reads a Hugging Face folder: its config, its tokenizer, its weights.

A parameter at a time is in host memory, until it is on the device, and a block of what
is read of a file.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax import progress
from minillm_jax.config import ModelConfig
from minillm_jax.model.transformer import MiniLLM, as_stored, create_model
from minillm_jax.text.tokenizer import FileTokenizer, load_tokenizer
from minillm_jax.weights import configs, families, files, hub, names
from minillm_jax.weights.errors import CheckpointError
from minillm_jax.weights.families import Family

BLOCK = 2**22  # elements that are read of a file at a time
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFER = ".rotary_emb.inv_freq"  # in files of before 2023; computed here


def load_pretrained(
    path: str | pathlib.Path = hub.SHIPPED,
    dtype: str | None = None,
    *,
    quantization: str = "none",
    ignore_keys: Sequence[str] = (),
) -> tuple[MiniLLM, dict[str, Any], FileTokenizer | None]:
    """A model, its parameters and its tokenizer from a Hugging Face folder.

    Args:
      path: a folder with config.json and safetensors; or "org/name", which
        huggingface_hub downloads where it is installed (the extra `hub`); without one
        the small model of Python source that comes with the package.
      dtype: of parameters, computation and cache; None = bfloat16 on GPU and TPU,
        float32 on CPU, whatever the files have.
      quantization: of the kernels, as the config's field: "int8" halves what is read
        for a token, in the form that the backend has.
      ignore_keys: keys of config.json that are not known here and are to be passed
        over: the model may then not be the one of the files.

    Returns:
      The module, the inner `params` tree on the default device, and the tokenizer: None
      where the folder has no tokenizer.json.

    Raises:
      CheckpointError: for a folder that is not a whole model of a known architecture,
        with every missing, unexpected and wrong tensor, or every key that is not known.
      TokenizerError: for tokenizer files that cannot be used.
      ConfigError: for another dtype or quantization.
    """
    folder = hub.folder(path)
    config, family = read_config(folder, dtype, ignore_keys=ignore_keys)
    config = config.replace(quantization=quantization)
    tokenizer = read_tokenizer(folder)
    model = create_model(config)
    return model, read_params(folder, model.config, family), tokenizer


def read_config(
    folder: pathlib.Path, dtype: str | None = None, *, ignore_keys: Sequence[str] = ()
) -> tuple[ModelConfig, Family]:
    """The config of a folder, its dtypes "auto" where `dtype` is None."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError("has no config.json: not a model's folder", folder)
    config, family = configs.read_config(
        files.read_json(folder, "config.json"),
        files.read_json(folder, "generation_config.json"),
        ignore_keys=ignore_keys,
        where=file,
    )
    return (config if dtype is None else config.replace(dtype=dtype)), family


def read_tokenizer(folder: pathlib.Path) -> FileTokenizer | None:
    """The tokenizer of a folder, None where it has no tokenizer.json."""
    there = (folder / "tokenizer.json").is_file()
    return load_tokenizer(folder) if there else None


def read_family(folder: pathlib.Path) -> Family:
    """The architecture of a folder whose config has been read."""
    family = families.by_name(files.read_json(folder, "config.json"))
    assert family is not None
    return family


def stored_dtype(folder: pathlib.Path) -> str:
    """The dtype that most of a folder's parameters have."""
    sizes: dict[str, int] = {}
    for tensor in files.read_headers(folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return _NAMES.get(max(sizes, key=sizes.__getitem__), "float32")


def read_params(
    folder: pathlib.Path, config: ModelConfig, family: Family
) -> dict[str, Any]:
    """The inner tree, in `param_dtype`, on the default device; quantized one by one.

    Raises:
      CheckpointError: with everything wrong, before any data is read.
    """
    found = _of_the_text(files.read_headers(folder), family)
    _check(folder, config, family, found)
    tree: dict[str, Any] = {}
    wanted = list(names.parameters(config, family))
    with progress.bar("weights", len(wanted)) as bar:
        for parameter in wanted:
            progress.advance(bar, "/".join(parameter.path))
            *parents, last = parameter.path
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            host = _read(parameter, found, jnp.dtype(config.param_dtype))
            leaf = as_stored(config, last, jax.device_put(host))
            node[last] = jax.block_until_ready(leaf)
    return tree


def _read(
    parameter: names.Parameter, found: dict[str, files.Tensor], dtype: np.dtype
) -> np.ndarray:
    """A parameter in host memory; what is read of a file comes in blocks."""
    leaf = np.empty(parameter.shape, dtype)
    for piece in parameter.pieces:
        tensor, view = found[piece.tensor], piece.view(leaf)
        rows = names.rows(parameter, piece) // len(view)  # of one index of the view
        step = max(1, BLOCK // (rows * math.prod(piece.columns)))
        for first in range(0, len(view), step):
            part = view[first : first + step]
            start = piece.start + first * rows
            block = files.read_rows(tensor, start, len(part) * rows)
            part[...] = block.reshape(part.shape)
    return leaf


def _of_the_text(
    found: dict[str, files.Tensor], family: Family
) -> dict[str, files.Tensor]:
    """The tensors under the names of a model that is text alone."""
    renamed = {}
    for name, tensor in found.items():
        if name.startswith(family.others):
            continue
        for theirs, ours in family.prefixes.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        renamed[name] = tensor
    return renamed


def _check(
    folder: pathlib.Path,
    config: ModelConfig,
    family: Family,
    found: dict[str, files.Tensor],
) -> None:
    """Raises CheckpointError where the files' tensors are not the model's."""
    wanted = names.tensors(config, family)
    problems = [f"{name} is missing" for name in wanted.keys() - found]
    for name, tensor in found.items():
        if name.endswith(_BUFFER) or (config.tie_embeddings and name == _HEAD):
            continue
        if name not in wanted:
            problems.append(f"{name} is unexpected")
        elif tensor.shape != wanted[name]:
            problems.append(f"{name} has shape {tensor.shape}, not {wanted[name]}")
        elif tensor.dtype not in files.DTYPES:
            known = ", ".join(files.DTYPES)
            problems.append(f"{name} is of dtype {tensor.dtype}, not one of {known}")
    if not problems and config.tie_embeddings and not _is_tied(found):
        problems.append(
            f"{_HEAD} is not {_EMBEDDING}, although tie_word_embeddings says so: set "
            "that to false in config.json, or remove the tensor"
        )
    if problems:
        raise CheckpointError(sorted(problems), folder)


def _is_tied(found: dict[str, files.Tensor]) -> bool:
    """Whether an output head beside tied embeddings, if there is one, is the same."""
    if _HEAD not in found:
        return True
    one, other = found[_EMBEDDING], found[_HEAD]
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    step = max(1, BLOCK // max(1, one.shape[1]))
    for start in range(0, one.shape[0], step):
        count = min(step, one.shape[0] - start)
        pair = [
            files.read_rows(found[name], start, count).tobytes()
            for name in (_EMBEDDING, _HEAD)
        ]
        if pair[0] != pair[1]:
            return False
    return True
