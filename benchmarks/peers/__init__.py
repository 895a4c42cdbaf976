"""The programs that `benchmarks.compare` measures, this library's among them.

Each is a module with `load(name, folder, config, threads)`, which returns a `Peer`. The
worker alone imports it, so that what it needs is needed by that process alone.
"""

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from minillm_jax.config import ConfigError, ModelConfig

OURS, OURS_INT8, TUTORIAL = "ours", "ours_int8", "tutorial_jax"


class Peer(Protocol):
    """A model that is held in memory and decodes greedily."""

    def begin(self, batch_size: int, context: int) -> None:
        """Makes room for rows of up to `context` tokens; what was held is dropped."""
        ...

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """`[B, T]` int32, from empty rows -> each row's first new token `[B]`."""
        ...

    def decode(self, steps: int) -> np.ndarray:
        """The next tokens `[B, steps]`, each time from where the prefill ended."""
        ...

    def step_bytes(self, batch_size: int, held: int) -> int:
        """Bytes that a decode step must read when each row holds `held` tokens."""
        ...


class Loader(Protocol):
    """The `load` of a peer's module."""

    def __call__(
        self, name: str, folder: pathlib.Path, config: ModelConfig, threads: int
    ) -> Peer:
        """The peer `name`, with the weights of a Hugging Face folder."""
        ...


class Kind(NamedTuple):
    """Where a peer is, and what it needs beyond this library."""

    module: str  # in this folder
    packages: Mapping[str, str] = {}  # name to import -> name to install


_TORCH = Kind("torch_models", {"torch": "torch", "transformers": "transformers"})
_LLAMA_CPP = Kind("llama_cpp_models", {"llama_cpp": "llama-cpp-python", "gguf": "gguf"})
PEERS = {
    OURS: Kind("ours"),
    "ours_w8a8": Kind("ours"),
    OURS_INT8: Kind("ours"),
    TUTORIAL: Kind("tutorial_jax"),
    "transformers_eager": _TORCH,
    "transformers_compiled": _TORCH,
    "llama_cpp_f32": _LLAMA_CPP,
    "llama_cpp_bf16": _LLAMA_CPP,
    "llama_cpp_q8_0": _LLAMA_CPP,
    "llama_cpp_q4_0": _LLAMA_CPP,
}


def missing(name: str) -> list[str]:
    """What would have to be installed for a peer; nothing is imported."""
    packages = PEERS[name].packages
    return [packages[m] for m in packages if importlib.util.find_spec(m) is None]


def versions(name: str) -> dict[str, str]:
    """Versions of the packages that an installed peer needs."""
    installed = PEERS[name].packages.values()
    return {package: importlib.metadata.version(package) for package in installed}


def check_plain(config: ModelConfig) -> None:
    """Raises ConfigError for a model that is more than Llama's architecture."""
    plain = {
        "activation": "silu",
        "rope_scaling": None,
        "rotary_dim": config.head_dim,
        "sliding_window": None,
        "qkv_bias": False,
        "qk_norm": False,
        "query_pre_attn_scalar": config.head_dim,
        "attention_softcap": None,
        "norm_unit_offset": False,
        "post_norms": False,
        "embedding_scale": 1.0,
        "logits_softcap": None,
    }
    for field, value in plain.items():
        if getattr(config, field) != value:
            raise ConfigError(f"{field}: this peer knows plain Llama models only")
