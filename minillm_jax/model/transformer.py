"""The decoder-only transformer: embedding, blocks, output head.

dtypes: parameters are stored in `param_dtype` and cast to `dtype` where they are used;
RMSNorm statistics, RoPE angles, attention scores, softmax and logits are float32.

Axes: B batch, T query length, D model dim, V vocab.
"""

import functools
import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from minillm_jax.config import ConfigError, ModelConfig, check_is_config
from minillm_jax.model import cache as kv
from minillm_jax.model import cudnn, layers, products, quantized, rope
from minillm_jax.model.attention import Attention, Places, Span


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    With `post_norms` what they add is normalised too (Gemma 2, arXiv:2408.00118).
    """

    config: ModelConfig
    window: int | None = None  # tokens that a query sees, itself included

    def setup(self):
        self.attention_norm = layers.RMSNorm(self.config)
        self.attention = Attention(self.config, self.window)
        self.mlp_norm = layers.RMSNorm(self.config)
        self.mlp = layers.MLP(self.config)
        if self.config.post_norms:
            self.attention_post_norm = layers.RMSNorm(self.config)
            self.mlp_post_norm = layers.RMSNorm(self.config)

    def __call__(
        self, x: Float[Array, "B T D"], span: Span, policy: kv.CachePolicy
    ) -> Float[Array, "B T D"]:
        post_norms = self.config.post_norms
        added = self.attention(self.attention_norm(x), span, policy)
        x = x + (self.attention_post_norm(added) if post_norms else added)
        added = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(added) if post_norms else added)


class MiniLLM(nn.Module):
    """Tokens to logits: the plain causal forward, or appending to a `cache` collection.

    It never creates cache variables: `init_cache` does. `create_model` makes one, with
    the config's dtypes resolved.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        table = (config.vocab_size, config.dim_model)
        self.embedding = layers.param(self, "embedding", table)
        windows = [config.window(layer) for layer in range(config.num_layers)]
        block = nn.remat(Block, static_argnums=(3,)) if config.remat else Block
        self.layers = [block(config, window) for window in windows]
        self.final_norm = layers.RMSNorm(config)
        if not config.tie_embeddings:
            self.lm_head = layers.param(self, "lm_head", table[::-1])

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        reach: Int[Array, " B"] | None = None,
        policy: kv.CachePolicy = kv.CachePolicy(),
    ) -> Float[Array, "B T V"]:
        """Next-token logits of every token, float32.

        Args:
          tokens: ids; those outside the vocabulary are clipped to it.
          lengths: valid tokens of this call in each row, the first ones; None = T. A
            row of 0 is not touched. Logits of the rest are 0, and so are those of
            tokens for which a row of the cache has no room: they are not stored.
          segment_ids: packed documents from 1 on; 0 = padding, whose logits are 0. Only
            without a cache.
          reach: tokens of each row after its whole prompt, of which this call has a
            chunk: some RoPE scalings turn by it. None = those after this call.
          policy: what the cache was made with.

        Raises:
          ValueError: if T is 0, above `max_seq_len` without a cache, more than a ring
            takes in one call; if a cache is not mutable, or comes with `segment_ids`.
        """
        x, counts = self.hidden(
            tokens,
            lengths=lengths,
            segment_ids=segment_ids,
            reach=reach,
            policy=policy,
        )
        logits = self.unembed(x)
        if counts is not None:
            valid = jnp.arange(tokens.shape[1])[None] < counts[:, None]
            logits = jnp.where(valid[..., None], logits, 0.0)
        if segment_ids is not None:
            logits = jnp.where((segment_ids > 0)[..., None], logits, 0.0)
        return logits

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        reach: Int[Array, " B"] | None = None,
        policy: kv.CachePolicy = kv.CachePolicy(),
    ) -> tuple[Float[Array, "B T D"], Int[Array, " B"] | None]:
        """The last layer's output and, unless all are, each row's valid tokens."""
        config, cached = self.config, self.has_variable("cache", "lengths")
        self._check_call(tokens, lengths, segment_ids, policy)
        batch, length = tokens.shape
        start = jnp.zeros((batch,), jnp.int32)
        counts = None if lengths is None else jnp.clip(lengths, 0, length)
        if cached:
            start = self.get_variable("cache", "lengths")
            capacity = kv.token_capacity(config, self.variables["cache"], policy)
            room = jnp.maximum(capacity - start, 0)
            counts = jnp.minimum(length if counts is None else counts, room)
            counts = counts.astype(jnp.int32)
            self.put_variable("cache", "lengths", start + counts)
        span = self._span(start, length, counts, segment_ids, reach)
        with jax.named_scope("embed"):
            x = products.rows(self.embedding, tokens)
            x = x.astype(jnp.dtype(config.dtype))
            if config.embedding_scale != 1.0:
                x = x * jnp.asarray(config.embedding_scale, x.dtype)
        for layer in self.layers:
            x = layer(x, span, policy)
        return x, counts

    def unembed(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes V"]:
        """Logits of hidden states, float32."""
        with jax.named_scope("unembed"):
            x = self.final_norm(x)
            tied = self.config.tie_embeddings
            head, axis = (self.embedding, 1) if tied else (self.lm_head, 0)
            logits = products.product(x, head, axis=axis, dtype=jnp.float32)
            return layers.softcap(logits, self.config.logits_softcap)

    @property
    def head_names(self) -> tuple[str, str]:
        """The parameters that `unembed` reads."""
        return "final_norm", "embedding" if self.config.tie_embeddings else "lm_head"

    def _check_call(self, tokens, lengths, segment_ids, policy) -> None:
        """Raises ValueError for shapes that this model or its cache cannot take."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens: must be [B, T], not of shape {tokens.shape}")
        length, config = tokens.shape[1], self.config
        if lengths is not None and lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths: must be [B] = {tokens.shape[:1]}, not {lengths.shape}"
            )
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(
                f"segment_ids: must be [B, T] = {tokens.shape}, not {segment_ids.shape}"
            )
        if length == 0:
            raise ValueError("tokens: a call needs at least one token per row")
        if not self.has_variable("cache", "lengths"):
            if length > config.max_seq_len:
                raise ValueError(
                    f"tokens: {length} per row, but max_seq_len={config.max_seq_len} "
                    "without a cache; shorten them, or raise it in the config"
                )
            return
        kv.check_cache(config, self.variables["cache"], policy)
        rows = self.get_variable("cache", "lengths").shape[0]
        if tokens.shape[0] != rows:
            raise ValueError(
                f"tokens: {tokens.shape[0]} rows, but the cache has {rows}"
            )
        if not self.is_mutable_collection("cache"):
            raise ValueError("a cache is updated: call apply with mutable=['cache']")
        if segment_ids is not None:
            raise ValueError("segment_ids: only without a cache")
        rings = policy.overflow == "ring" or config.sliding_window is not None
        if rings and length > config.prefill_chunk:
            raise ValueError(
                f"tokens: {length} per row, but a ring takes prefill_chunk="
                f"{config.prefill_chunk} in one call; `prefill` does it in chunks"
            )

    def _span(self, start, length: int, counts, segment_ids, reach) -> Span:
        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        if counts is None:
            counts = jnp.full(start.shape, length, jnp.int32)
        turned, lengths = positions, (start + counts)[:, None]
        if segment_ids is not None:
            turned, lengths = _inside_documents(segment_ids, counts)
        if reach is not None:
            lengths = jnp.maximum(lengths, reach[:, None])
        turns = local_turns = rope.cos_sin(self.config, turned, lengths)
        if self.config.local_rope_theta is not None:
            local_turns = rope.cos_sin(self.config, turned, lengths, local=True)
        return Span(Places(positions, segment_ids), counts, turns, local_turns)


def _inside_documents(segment_ids: Int[Array, "B T"], counts) -> tuple[Array, Array]:
    """Each token's place in its packed document, and the document's length; [B, T].

    RoPE needs differences of positions only, but far from 0 they would be rounded
    differently than in a document that stands alone.
    """
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    edge = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 1)))
    edge = edge.at[:, 0].set(True).at[:, -1].set(True)  # before each token, and the end
    first = jax.lax.cummax(jnp.where(edge[:, :-1], positions, 0), axis=1)
    end = jnp.where(edge[:, 1:], positions + 1, segment_ids.shape[1])
    end = jnp.minimum(jax.lax.cummin(end, axis=1, reverse=True), counts[:, None])
    return positions - first, end - first


def create_model(config: ModelConfig) -> MiniLLM:
    """The Linen module of a config, in which nothing is "auto" any more.

    Dtypes and kernels of attention become those of the default backend.

    Raises:
      ConfigError: if the config asks for a kernel that cannot serve there.
    """
    check_is_config(config)
    return MiniLLM(cudnn.resolve(config.resolve(jax.default_backend())))


def in_float32(
    model: MiniLLM, params: Mapping[str, Any], **changes: Any
) -> tuple[MiniLLM, dict[str, Any]]:
    """The same model and parameters in float32, with `changes` of the config.

    By the kernels of attention that every backend has: what others are compared with.
    """
    floats = dict.fromkeys(("dtype", "param_dtype", "cache_dtype"), "float32")
    kernels = dict.fromkeys(("attention", "decode_attention"), "xla")
    exact = floats | kernels | {"quantization": "none"}
    config, params = model.config.replace(**exact, **changes), quantized.restore(params)
    return MiniLLM(config), jax.tree.map(lambda x: x.astype(jnp.float32), params)


def param_shapes(model: MiniLLM) -> dict[str, Any]:
    """The `params` tree as `jax.ShapeDtypeStruct`; nothing is allocated."""
    mode = model.config.quantization
    return jax.eval_shape(
        lambda params: quantized.quantize(params, mode), _float_shapes(model)
    )


def _float_shapes(model: MiniLLM) -> dict[str, Any]:
    """The same before anything is quantized."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def as_stored(config: ModelConfig, name: str, leaf: jax.Array) -> Any:
    """A parameter as the config has it: quantized, or as it is."""
    inputs = quantized.inputs_of(name, tied=config.tie_embeddings)
    if config.quantization == "none" or inputs is None:
        return leaf
    return quantized.quantized(leaf, inputs, config.quantization)


def check_params(model: MiniLLM, params: Any) -> None:
    """Raises ConfigError where `params` is not the inner tree of this model."""

    def leaves(tree):
        paths = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=quantized.is_quantized
        )
        return {jax.tree_util.keystr(path): leaf for path, leaf in paths}

    def modes(tree):
        return {getattr(leaf, "mode", "none") for leaf in leaves(tree).values()}

    wanted, given = param_shapes(model), params
    if (modes(given) | {"none"}) != (modes(wanted) | {"none"}):
        mode = model.config.quantization
        raise ConfigError(
            f"params: are not as config.quantization={mode} has them; "
            f"mj.quantize(params, {mode!r}) makes them so, of those in floats"
        )
    wanted, given = (
        {name: np.shape(leaf) for name, leaf in leaves(tree).items()}
        for tree in (wanted, given)
    )
    missing, unexpected = wanted.keys() - given, given.keys() - wanted.keys()
    shapes = [
        f"{name} has shape {given[name]}, not {wanted[name]}"
        for name in wanted.keys() & given
        if given[name] != wanted[name]
    ]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not of this model" for name in unexpected] + shapes
    if problems:
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise ConfigError(
            f"params: must be the model's inner tree, as init_params gives it, but "
            f"{min(problems)}{more}"
        )


def init_params(model: MiniLLM, seed: int = 0) -> dict[str, Any]:
    """Random parameters, the inner `params` tree, in `param_dtype`.

    Each leaf is a jitted call of its initialiser (`layers.INITIALIZERS`), compiled once
    per shape and not once per layer; its key is folded from its path. They are made one
    by one and the largest first, while there is most room for what makes them.
    """
    key = jax.random.key(seed)
    found, tree = jax.tree_util.tree_flatten_with_path(_float_shapes(model))
    leaves: list[Any] = [None] * len(found)
    for index in sorted(range(len(found)), key=lambda i: -found[i][1].size):
        path, shape = found[index]
        path_hash = zlib.crc32(jax.tree_util.keystr(path).encode())
        leaf_key = jax.random.fold_in(key, path_hash)
        name = path[-1].key
        made = _init_leaf(leaf_key, name, model.config, shape.shape, shape.dtype)
        leaves[index] = jax.block_until_ready(as_stored(model.config, name, made))
    params = jax.tree.unflatten(tree, leaves)
    embedding = params["embedding"]
    if not isinstance(embedding, jax.core.Tracer):
        _random_embeddings[id(embedding)] = embedding
    return params


# Weak: an entry goes when its array does, before another can have its id.
_random_embeddings: weakref.WeakValueDictionary[int, jax.Array]
_random_embeddings = weakref.WeakValueDictionary()


def are_random(params: Mapping[str, Any]) -> bool:
    """Whether `init_params` made these very arrays: nothing has trained them."""
    embedding = params["embedding"]
    return _random_embeddings.get(id(embedding)) is embedding


@functools.partial(jax.jit, static_argnames=("name", "config", "shape", "dtype"))
def _init_leaf(key, name: str, config: ModelConfig, shape, dtype) -> jax.Array:
    return layers.initializer(name, config)(key, shape, dtype)
