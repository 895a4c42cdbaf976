"""A Hugging Face folder in the place of a config's `model` section.

`--model=FOLDER`, or `config.model_path`: the folder's config, with what the command
line sets of `--config.model` on top of it, and its weights instead of random ones.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from minillm_jax import progress
from minillm_jax.cli import config_files
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.weights import hub, load

_SECTION = "model."


def put_in(config: Any, path: str, overrides: Mapping[str, Any]) -> None:
    """Makes a folder's config the `model` section.

    Args:
      config: a config file's.
      path: the folder, or "org/name" on the hub.
      overrides: fields that the command line sets, such as "model.max_kv_cache_len".
    """
    folder = hub.folder(path)
    model_config, _ = load.read_config(folder)
    fields = model_config.given() | {
        name.removeprefix(_SECTION): value
        for name, value in overrides.items()
        if name.startswith(_SECTION)
    }
    longest = fields["max_kv_cache_len"]
    shorter = "model.max_seq_len" not in overrides and isinstance(longest, int)
    if shorter:  # what a shorter cache can hold
        fields["max_seq_len"] = min(fields["max_seq_len"], longest)
        if "prefill_chunk" in fields and "model.prefill_chunk" not in overrides:
            fields["prefill_chunk"] = min(fields["prefill_chunk"], longest)
    with config.unlocked():
        config.model_path = str(folder)
        config.model = config_files.model_section(fields)
        for name in ("decode", "compare"):
            if f"{name}.contexts" not in overrides and name in config:
                longest = config_files.model_config(config).max_kv_cache_len
                contexts = [
                    context if isinstance(context, str) else min(context, longest)
                    for context in config[name].contexts
                ]
                config[name].contexts = tuple(dict.fromkeys(contexts))


def folder(config: Any) -> pathlib.Path | None:
    """The folder of a config, None for one without weights."""
    path = config.get("model_path")
    return None if path is None else pathlib.Path(path)


def params(config: Any, model: MiniLLM, seed: int = 0) -> dict[str, Any]:
    """The folder's weights, in the model's `param_dtype`, or random ones of a seed."""
    found = folder(config)
    if found is None:
        with progress.spinner("making random weights"):
            return jax.block_until_ready(transformer.init_params(model, seed))
    return load.read_params(found, model.config, load.read_family(found))
