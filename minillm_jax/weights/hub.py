"""A model's folder: one that is there, or one that huggingface_hub downloads."""

import os
import pathlib
import re

from minillm_jax.weights.errors import CheckpointError

# A small model of Python source that comes with the package.
SHIPPED = pathlib.Path(__file__).parents[1] / "models" / "python"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = [
    *("config.json", "generation_config.json", "model*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "added_tokens.json"),
]


def folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder at `path`, or that of a model "org/name" on the hub.

    Raises:
      CheckpointError: where there is none, and none to be had.
    """
    found = pathlib.Path(path)
    if os.path.isdir(found):  # False, too, of a name that is too long
        return found
    if isinstance(path, pathlib.Path) or not _NAME.fullmatch(path):
        raise CheckpointError("is not a folder", path)
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            "is not a folder here; to download it, install huggingface_hub (the extra "
            "`hub`), or download it elsewhere and pass its folder",
            path,
        ) from None
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(path, allow_patterns=_FILES)
        )
    except Exception as error:  # of the network, of the hub, of its many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"is not a folder here, and could not be downloaded ({reason}); without a "
            "network, download it elsewhere and pass its folder",
            path,
        ) from error
