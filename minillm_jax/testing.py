"""For tests, this package's and yours: a tiny model, and the oracle of its logits."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from minillm_jax.config import ModelConfig
from minillm_jax.reference import reference_logits as reference_logits


def tiny_config(**changes: Any) -> ModelConfig:
    """A config that compiles in a second and has every part of a big one."""
    fields: dict[str, Any] = {
        "max_seq_len": 64,
        "max_kv_cache_len": 96,
        "dim_model": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_layers": 2,
        "dim_ff": 64,
        "vocab_size": 61,
        "prefill_chunk": 16,
    }
    return ModelConfig(**(fields | changes))


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """The seconds of each compilation in the block, those ahead of time included."""
    compilations: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def plain_params(model: nn.Module) -> dict[str, Any]:
    """Zeros, and vectors such as norm scales of 1: of NumPy, so nothing compiles."""
    shapes = jax.eval_shape(
        lambda tokens: model.init(jax.random.key(0), tokens)["params"],
        jax.ShapeDtypeStruct((1, 1), np.int32),
    )

    def plain(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.full(leaf.shape, float(leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(plain, shapes)


def noisy_params(model: nn.Module, seed: int = 0, std: float = 0.2) -> dict[str, Any]:
    """Parameters with nothing in them at 0 or 1, on the device; nothing compiles."""
    return jax.device_put(perturbed(plain_params(model), seed, std))


def perturbed(params: Mapping[str, Any], seed: int = 0, std: float = 0.2) -> Any:
    """`params` plus normal noise: no scale is 1, no bias is 0, logits are near 1."""
    generator = np.random.default_rng(seed)

    def noisy(node):
        if isinstance(node, Mapping):
            return {name: noisy(child) for name, child in sorted(node.items())}
        leaf = np.asarray(node)
        return (leaf + std * generator.standard_normal(leaf.shape)).astype(leaf.dtype)

    return noisy(params)
