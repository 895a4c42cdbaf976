"""Which tensors of a Hugging Face folder make which parameter, both ways.

A parameter is made of pieces: rows of a tensor, and their place in the parameter, given
as a view of it whose axes are in the tensor's order. Loading writes into the views,
saving reads them, so that there is one table for both.

Axes: N query heads, K key/value heads, G = N // K, H head dim, D model dim, F ffn dim,
V vocab. A tensor of a linear layer is [out, in].
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from minillm_jax.config import ModelConfig
from minillm_jax.weights.families import Family


class Piece(NamedTuple):
    """Rows of a tensor, and where they are in a parameter."""

    tensor: str
    # The parameter -> a view of the piece's place, whose shape is that of the rows but
    # for axes that the tensor has as one.
    view: Callable[[np.ndarray], np.ndarray]
    columns: tuple[int, ...]  # the rows' own shape: () of a vector, (in,)
    start: int = 0


class Parameter(NamedTuple):
    """A leaf of the `params` tree."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def rows(parameter: Parameter, piece: Piece) -> int:
    """Rows that a piece takes of its tensor."""
    empty = np.broadcast_to(np.zeros(()), parameter.shape)  # takes no memory
    return piece.view(empty).size // math.prod(piece.columns)


def parameters(config: ModelConfig, family: Family) -> Iterator[Parameter]:
    """Every parameter of a model."""
    dim, vocab = config.dim_model, config.vocab_size
    yield _whole(("embedding",), (vocab, dim), "model.embed_tokens")
    for layer in range(config.num_layers):
        block, prefix = f"layers_{layer}", f"model.layers.{layer}."
        for parameter in (
            *_norms(config, prefix),
            *_attention(config, family.fused, prefix),
            *_mlp(config, family.fused, prefix),
        ):
            yield parameter._replace(path=(block, *parameter.path))
    yield _whole(("final_norm", "scale"), (dim,), "model.norm")
    if not config.tie_embeddings:
        head = Piece("lm_head.weight", _transposed, (dim,))
        yield Parameter(("lm_head",), (dim, vocab), (head,))


def tensors(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a folder, by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(config, family):
        for piece in parameter.pieces:
            count = piece.start + rows(parameter, piece)
            before = shapes.get(piece.tensor, (0,))[0]
            shapes[piece.tensor] = (max(before, count), *piece.columns)
    return shapes


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _whole(path: tuple[str, ...], shape: tuple[int, ...], name: str) -> Parameter:
    return Parameter(path, shape, (Piece(f"{name}.weight", lambda x: x, shape[1:]),))


def _norms(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    dim, head = (config.dim_model,), (config.head_dim,)
    post = "post_attention_layernorm"
    names = {"attention_norm": "input_layernorm", "mlp_norm": post}
    if config.post_norms:
        names["mlp_norm"] = "pre_feedforward_layernorm"
        names["attention_post_norm"] = post
        names["mlp_post_norm"] = "post_feedforward_layernorm"
    for ours, theirs in names.items():
        yield _whole((ours, "scale"), dim, prefix + theirs)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        path = ("attention", name, "scale")
        yield _whole(path, head, f"{prefix}self_attn.{name}")


def _attention(config: ModelConfig, fused: bool, prefix: str) -> Iterator[Parameter]:
    """Of one layer, paths from the layer's on."""
    dim, heads, head = config.dim_model, config.num_kv_heads, config.head_dim
    groups, prefix = config.queries_per_kv_head, f"{prefix}self_attn."
    q, kv = config.num_heads * head, heads * head
    sources = [("q_proj", 0), ("k_proj", 0), ("v_proj", 0)]  # tensor, first row
    if fused:
        sources = [("qkv_proj", 0), ("qkv_proj", q), ("qkv_proj", q + kv)]
    places = (slice(0, groups), slice(groups, groups + 1), slice(groups + 1, None))

    def pieces(kind: str, view, columns: tuple[int, ...]) -> tuple[Piece, ...]:
        return tuple(
            Piece(f"{prefix}{name}.{kind}", view(place), columns, start)
            for (name, start), place in zip(sources, places, strict=True)
        )

    def kernel(place: slice):  # [D, K, P, H] -> [K, p, H, D]
        return lambda x: np.moveaxis(x[:, :, place], 0, -1)

    def bias(place: slice):  # [K, P, H] -> [K, p, H]
        return lambda x: x[:, place]

    shape = (heads, groups + 2, head)
    weights = pieces("weight", kernel, (dim,))
    yield Parameter(("attention", "qkv"), (dim, *shape), weights)
    if config.qkv_bias:
        yield Parameter(("attention", "qkv_bias"), shape, pieces("bias", bias, ()))
    out = Piece(f"{prefix}o_proj.weight", lambda x: np.moveaxis(x, -1, 0), (q,))
    yield Parameter(("attention", "out"), (heads, groups, head, dim), (out,))


def _mlp(config: ModelConfig, fused: bool, prefix: str) -> Iterator[Parameter]:
    dim, ff, prefix = config.dim_model, config.dim_ff, f"{prefix}mlp."
    sources = [("gate_proj", 0), ("up_proj", 0)]
    if fused:
        sources = [("gate_up_proj", 0), ("gate_up_proj", ff)]
    gate, up = [
        Piece(f"{prefix}{name}.weight", lambda x, i=i: x[:, i].T, (dim,), start)
        for i, (name, start) in enumerate(sources)
    ]
    yield Parameter(("mlp", "gate_up"), (dim, 2, ff), (gate, up))
    down = Piece(f"{prefix}down_proj.weight", _transposed, (ff,))
    yield Parameter(("mlp", "down"), (ff, dim), (down,))
