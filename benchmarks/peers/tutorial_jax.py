"""A sampler in JAX as tutorials write it: the same mathematics, none of the care.

`nn.scan` over stacked layers with the cache among its variables, a cache of
`max_kv_cache_len` slots that is read whole at every step, one jitted call per token, no
donation.

Axes: B batch, T query length, S slots, N query heads, K key/value heads, G = N // K,
H head dim, D model dim, F ffn dim, L layers.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import peers
from minillm_jax.config import ModelConfig
from minillm_jax.planning import costs
from minillm_jax.weights import load as weights


def _normal(module: nn.Module, name: str, *shape: int) -> jax.Array:
    return module.param(name, nn.initializers.normal(0.02), shape, jnp.float32)


def _rotated(x, positions, theta: float):
    """RoPE of `[B, T, heads, H]`, the two halves of H as pairs."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = x[..., :half], x[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1)


class Norm(nn.Module):
    """RMSNorm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
        scale = _normal(self, "scale", x.shape[-1])
        return x * jax.lax.rsqrt(mean_square + self.config.norm_eps) * scale[None, None]


class Attention(nn.Module):
    """Causal attention over all slots, `[B, S, K, H]`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, positions):
        c, batch = self.config, x.shape[0]
        groups = c.queries_per_kv_head
        kernel = _normal(
            self, "qkv", c.dim_model, c.num_kv_heads, groups + 2, c.head_dim
        )
        qkv = jnp.einsum("BTD,DKPH->BTKPH", x, kernel)
        q = qkv[..., :groups, :].reshape(*x.shape[:2], c.num_heads, c.head_dim)
        q = _rotated(q, positions, c.rope_theta)
        k = _rotated(qkv[..., groups, :], positions, c.rope_theta)

        shape = (batch, c.max_kv_cache_len, c.num_kv_heads, c.head_dim)
        keys = self.variable("cache", "k", jnp.zeros, shape, x.dtype)
        values = self.variable("cache", "v", jnp.zeros, shape, x.dtype)
        start = (0, positions[0, 0], 0, 0)
        keys.value = jax.lax.dynamic_update_slice(keys.value, k, start)
        v = qkv[..., groups + 1, :]
        values.value = jax.lax.dynamic_update_slice(values.value, v, start)

        q = q.reshape(*x.shape[:2], c.num_kv_heads, groups, c.head_dim)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, keys.value) / c.head_dim**0.5
        seen = jnp.arange(c.max_kv_cache_len)[None, None] <= positions[..., None]
        scores = jnp.where(seen[:, None, None], scores, -1e30)
        probs = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("BKGTS,BSKH->BTKGH", probs, values.value)
        out = _normal(self, "out", c.num_kv_heads, groups, c.head_dim, c.dim_model)
        return jnp.einsum("BTKGH,KGHD->BTD", mixed, out)


class MLP(nn.Module):
    """SwiGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate_up = _normal(self, "gate_up", c.dim_model, 2, c.dim_ff)
        down = _normal(self, "down", c.dim_ff, c.dim_model)
        gate, up = jnp.moveaxis(jnp.einsum("BTD,DCF->BTCF", x, gate_up), 2, 0)
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, down)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` asks for."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, positions):
        normed = Norm(self.config, name="attention_norm")(x)
        x = x + Attention(self.config, name="attention")(normed, positions)
        normed = Norm(self.config, name="mlp_norm")(x)
        return x + MLP(self.config, name="mlp")(normed), None


class Tutorial(nn.Module):
    """Tokens `[B, T]` to the logits of each row's last one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, start):
        c = self.config
        table = _normal(self, "embedding", c.vocab_size, c.dim_model)
        positions = jnp.broadcast_to(
            start + jnp.arange(tokens.shape[1])[None], tokens.shape
        )
        layers = nn.scan(
            Block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )
        x, _ = layers(c, name="layers")(table[tokens], positions)
        x = Norm(c, name="final_norm")(x[:, -1:])[:, 0]
        if c.tie_embeddings:
            return x @ table.T
        return x @ _normal(self, "lm_head", c.dim_model, c.vocab_size)


class TutorialPeer:
    """Prompts in one call, then a call per token; the cache is a value that is kept."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]):
        peers.check_plain(config)
        self._config = config
        self._params = _stacked(config, params)
        self._first = np.zeros((0,), np.int32)
        self._cache: Any = None
        self._prompt_tokens = 0

    def begin(self, batch_size: int, context: int) -> None:
        self._cache = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._cache = None
        token, self._cache = _step(self._config, self._params, {}, tokens, 0)
        self._prompt_tokens = tokens.shape[1]
        self._first = np.asarray(token)
        return self._first

    def decode(self, steps: int) -> np.ndarray:
        token, cache, out = self._first, self._cache, []
        for start in range(self._prompt_tokens, self._prompt_tokens + steps):
            token, cache = _step(
                self._config, self._params, cache, token[:, None], start
            )
            out.append(token)
        return np.stack([np.asarray(token) for token in out], axis=1)

    def step_bytes(self, batch_size: int, held: int) -> int:
        return costs.decode_step_bytes(self._config, batch_size, held)


@functools.partial(jax.jit, static_argnums=0)
def _step(config: ModelConfig, params, cache, tokens, start):
    """The next token `[B]` after `tokens`, and the cache; one that is empty is made."""
    logits, updated = Tutorial(config).apply(
        {"params": params, **cache}, tokens, start, mutable=["cache"]
    )
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), updated


def _stacked(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """This library's params with the layers' leaves stacked, `[L, ...]`."""
    layers = [params[f"layers_{layer}"] for layer in range(config.num_layers)]
    rest = {name: params[name] for name in params if not name.startswith("layers_")}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return jax.tree.map(jnp.asarray, rest) | {"layers": stacked}


def load(
    name: str, folder: pathlib.Path, config: ModelConfig, threads: int
) -> TutorialPeer:
    """The tutorial's model with a folder's weights, all of it in float32."""
    config = config.replace(
        dtype="float32", param_dtype="float32", cache_dtype="float32"
    )
    params = weights.read_params(folder, config, weights.read_family(folder))
    return TutorialPeer(config, params)
