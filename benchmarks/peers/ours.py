"""This library: `prefill`, and all steps of a decode in one `decode_chunk`.

As its config is, with kernels in int8, or with keys and values in int8 too.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import chunks, int8_forms, peers
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import decode
from minillm_jax.model import cache as kv
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning import costs
from minillm_jax.weights import load as weights

FORMS = {
    peers.OURS: int8_forms.FLOATS,
    "ours_w8a8": "w8a8",
    peers.OURS_INT8: f"w8a8+{int8_forms.CACHE}",
}


class Ours:
    """The cache has the capacity that a Generator would give it."""

    def __init__(self, model: MiniLLM, params: decode.Params):
        self._model = MiniLLM(model.config.replace(eos_token_ids=()))
        self._params = params
        self._cache: dict[str, Any] = {}
        self._first = np.zeros((0,), np.int32)
        self._prompt_tokens = 0

    def begin(self, batch_size: int, context: int) -> None:
        config = self._model.config
        capacity = kv.capacity_bucket(config, context)
        self._cache = kv.init_cache(config, batch_size, capacity)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        cache = chunks.rewound(self._cache, 0)
        logits, self._cache = decode.prefill(self._model, self._params, cache, tokens)
        self._first = np.asarray(jnp.argmax(logits, axis=-1)).astype(np.int32)
        self._prompt_tokens = tokens.shape[1]
        return self._first

    def decode(self, steps: int) -> np.ndarray:
        cache = chunks.rewound(self._cache, self._prompt_tokens)
        out = decode.decode_chunk(
            *(self._model, self._params, cache, self._first),
            active=np.ones(len(self._first), bool),
            steps=steps,
        )
        self._cache = out.cache
        return np.asarray(out.sampled)

    def step_bytes(self, batch_size: int, held: int) -> int:
        return costs.decode_step_bytes(self._model.config, batch_size, held)


def load(name: str, folder: pathlib.Path, config: ModelConfig, threads: int) -> Ours:
    """The model; XLA takes as many threads as there are cores."""
    config = int8_forms.with_form(config, FORMS[name])
    params = weights.read_params(folder, config, weights.read_family(folder))
    return Ours(MiniLLM(config), params)
