"""What a query may see, and how its scores follow from products with the keys.

Axes: B batch, T query length, S key/value length, K key/value heads, G query heads of
each, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from minillm_jax.model import cache as kv
from minillm_jax.model import layers, products
from minillm_jax.model.quantized import Rounded

MASKED = -1e30  # finite: a query that sees nothing gets a mean, not NaN


class Places(NamedTuple):
    """Where a row's queries or keys stand."""

    positions: jax.Array  # [*B, T] or [*B, S] absolute; -1 = an empty slot
    segment_ids: jax.Array | None = None  # same shape: packed documents, 0 = padding


class Scoring(NamedTuple):
    """How a query's scores follow from its products with the keys."""

    rule: kv.SlotRule
    scale: float
    softcap: float | None


def visible(queries: Places, keys: Places, rule: kv.SlotRule) -> Bool[Array, "*B T S"]:
    """The mask: True where a query may attend to a key."""
    query, key = queries.positions[..., :, None], keys.positions[..., None, :]
    mask = (key >= 0) & (key <= query)
    if rule.window is not None:
        recent = key > query - (rule.window - rule.sinks)
        mask &= recent | (key < rule.sinks)
    if queries.segment_ids is not None and keys.segment_ids is not None:
        mine, theirs = queries.segment_ids[..., :, None], keys.segment_ids[..., None, :]
        mask &= (mine == theirs) & (theirs > 0)
    return mask


def scores(
    q: Float[Array, "*B K G T H"],
    k: Float[Array, "*B K S H"] | Rounded,
    scoring: Scoring,
) -> Float[Array, "*B K G T S"]:
    """Before the mask, float32."""
    keys = k.values if isinstance(k, Rounded) else k
    found = products.batched_product("...KGTH,...KSH->...KGTS", q, keys)
    if isinstance(k, Rounded):
        found *= _over_queries(k.scales)
    return layers.softcap(found * scoring.scale, scoring.softcap)


def masked(scores, mask):
    """Scores with those that a query may not see far below all others."""
    return jnp.where(over_heads(mask), scores, MASKED)


def over_heads(mask: Bool[Array, "*B T S"]) -> Bool[Array, "*B 1 1 T S"]:
    """A mask for scores, which have heads too."""
    return mask[..., None, None, :, :]


def mix(
    weights: Float[Array, "*B K G T S"],
    v: Float[Array, "*B K S H"] | Rounded,
    dtype: DTypeLike,
) -> Float[Array, "*B K G T H"]:
    """The values by their weights, summed in float32.

    Weights are multiplied in the dtype of floats, of int8 values in `dtype`.
    """
    if isinstance(v, Rounded):
        weights, v = weights * _over_queries(v.scales), v.values
        if dtype == jnp.float16:  # which ends before small weights by small scales do
            dtype = jnp.bfloat16
    else:
        dtype = v.dtype
    weights = weights.astype(dtype)
    return products.batched_product("...KGTS,...KSH->...KGTH", weights, v)


def _over_queries(scales: Float[Array, "*B K S 1"]) -> Float[Array, "*B K 1 1 S"]:
    """Scales of keys or values, for scores."""
    return jnp.swapaxes(scales, -1, -2)[..., None, :, :]


def split(x: jax.Array, axis: int, block: int) -> jax.Array:
    """`axis` padded and cut into blocks, which become the first axis."""
    axis %= x.ndim
    count = -(-x.shape[axis] // block)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * block - x.shape[axis])
    shape = (*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)


def join(blocks: jax.Array, axis: int, length: int) -> jax.Array:
    """The way back from `split`, of an axis counted from the end."""
    blocks = jnp.moveaxis(blocks, 0, axis - 1)
    shape = list(blocks.shape)
    shape[axis - 1 :] = [-1, *shape[axis - 1 :][2:]]
    return jax.lax.slice_in_dim(
        blocks.reshape(shape), 0, length, axis=len(shape) + axis
    )
