"""Flash attention of NVIDIA's cuDNN, where a model's attention can be told by lengths.

cuDNN skips what a length or the causal rule excludes, and reads the keys and values
that are held instead of all slots. It knows two shapes of mask, and a call is made of
these:

    a prompt alone       causal, over its own keys and values
    a prefill chunk      causal over its own, and all of the tokens held before it;
                         the two are put together by their log-sum-exp
    a decode step        all of the tokens held

`attends` says which calls those are; the others take `attention.attend`, and so do all
on another device: what is built here is one branch of `jax.lax.platform_dependent`.

Axes: B batch, T query length, S slots, K key/value heads, G queries per key/value head,
N = K * G, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.model import cache as kv

DTYPES = ("bfloat16", "float16")


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with its kernels of attention chosen for the default backend.

    "auto" is cuDNN for several tokens wherever that can be, and XLA for one.

    Raises:
      ConfigError: if cuDNN is asked for, and cannot serve; it says why.
    """
    problem = why_not(config)
    decode_problem = problem
    if problem is None and config.cache_dtype != config.dtype:
        decode_problem = f"needs a cache in {config.dtype}, not {config.cache_dtype}"

    def chosen(name: str, auto: str, problem: str | None) -> str:
        value = getattr(config, name)
        if value == "cudnn" and problem is not None:
            raise ConfigError(f"{name}='cudnn': {problem}; write 'auto' or 'xla'")
        return auto if value == "auto" else value

    return config.replace(
        attention=chosen("attention", "xla" if problem else "cudnn", problem),
        decode_attention=chosen("decode_attention", "xla", decode_problem),
    )


def why_not(config: ModelConfig) -> str | None:
    """Why cuDNN cannot attend for a config of concrete dtypes here; None = it can."""
    if config.dtype not in DTYPES:
        return f"needs a dtype of {' or '.join(DTYPES)}, not {config.dtype}"
    if config.attention_softcap is not None:
        return f"has no attention_softcap={config.attention_softcap}"
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, not {jax.default_backend()}"
    heads = (config.num_kv_heads, config.queries_per_kv_head, config.head_dim)
    return _refusal(*heads, config.dtype)


@functools.cache
def _refusal(kv_heads: int, groups: int, head_dim: int, dtype: str) -> str | None:
    """What JAX says of these shapes on this GPU with this cuDNN; nothing compiles.

    Its checks are made while tracing, those of training when a gradient is.
    """
    q = jax.ShapeDtypeStruct((1, kv_heads, groups, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, kv_heads, 8, head_dim), dtype)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)

    def both(q, k, first):
        def alone(q):
            return jnp.sum(attend_alone(q, k, k, window=None, scale=1.0))

        return jax.grad(alone)(q), attend_after(q, k, k, k, k, first=first, scale=1.0)

    try:
        jax.eval_shape(both, q, k, count)
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        return f"cannot be used here ({' '.join(str(e).split())})"
    return None


def attends(
    config: ModelConfig,
    tokens: int,
    rule: kv.SlotRule,
    *,
    cached: bool,
    packed: bool = False,
) -> bool:
    """Whether a call of so many tokens per row goes to cuDNN.

    Slots that wrap, and windows behind tokens held, are no lengths; nor are packed
    documents.
    """
    kernel = config.decode_attention if cached and tokens == 1 else config.attention
    if kernel != "cudnn" or packed:
        return False
    plain = not rule.wraps and rule.window is None
    return plain and config.cache_dtype == config.dtype if cached else True


def attend_alone(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "B K G T H"]:
    """Causal attention of a sequence to itself; a `window` has the query in it."""
    out = _flash(q, k, v, scale=scale, window=window)
    return out.reshape(q.shape)


def attend_after(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    held_k: Float[Array, "B K S H"],
    held_v: Float[Array, "B K S H"],
    *,
    first: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B K G T H"]:
    """Causal attention to new tokens and to those in the first `first` slots."""
    own, own_lse = _flash(q, k, v, scale=scale, with_lse=True)
    # Over no key at all a softmax is not defined: one is read, and counts for nothing.
    lengths = jnp.maximum(first, 1)
    past, past_lse = _flash(q, held_k, held_v, scale=scale, held=lengths, with_lse=True)
    past_lse = jnp.where(first[:, None, None] > 0, past_lse, -jnp.inf)
    share = jax.nn.sigmoid(past_lse - own_lse)[..., None]
    mixed = share * past.astype(jnp.float32) + (1 - share) * own.astype(jnp.float32)
    return mixed.astype(q.dtype).reshape(q.shape)


def attend_held(
    q: Float[Array, "B K G 1 H"],
    held_k: Float[Array, "B K S H"],
    held_v: Float[Array, "B K S H"],
    *,
    held: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B K G 1 H"]:
    """Attention of one token per row to the first `held` slots, its own among them."""
    out = _flash(q, held_k, held_v, scale=scale, held=jnp.maximum(held, 1))
    return out.reshape(q.shape)


def _flash(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    scale: float,
    window: int | None = None,
    held: Int[Array, " B"] | None = None,
    with_lse: bool = False,
) -> Any:
    """Causal attention, or that to the first `held` slots: `[B, N, T, H]`.

    With the log-sum-exp, `[B, N, T]` in float32, where that is asked for. JAX's public
    `dot_product_attention` would round it to the dtype of q, and wants heads behind
    slots, for which the cache would be transposed.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    batch, _, _, length, head_dim = q.shape
    masks, lengths = fused.MaskType, None
    if held is not None:
        lengths = jnp.full((batch,), length, jnp.int32)
    return fused.dot_product_attention(
        *(q.reshape(batch, -1, length, head_dim), k, v),
        q_seqlen=lengths,
        kv_seqlen=held,
        scale=scale,
        mask_type=masks.CAUSAL if held is None else masks.PADDING,
        qkv_layout="BNTH",
        sliding_window_length=window,
        return_residual=with_lse,
    )
