"""Model configuration: the fields, the four presets and the legacy names.

A `ModelConfig` is frozen, hashable and valid: it can be a static argument of `jax.jit`,
and nothing behind it checks a field twice. This module touches no device. What goes
together, and what follows from what, is in config_rules.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from minillm_jax import config_rules, validation
from minillm_jax.config_rules import HeadDim
from minillm_jax.rope_scaling import MAX_POSITIONS as MAX_POSITIONS
from minillm_jax.rope_scaling import RopeScaling as RopeScaling
from minillm_jax.rope_scaling import Tokens as Tokens
from minillm_jax.validation import ConfigError as ConfigError
from minillm_jax.validation import OneOf, Range

MAX_LAYERS = 4096
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "w8a16", "w8a8")
_Positive = Range(1e-6, 1e6)
Dtype = OneOf(("auto", *FLOAT_DTYPES))
CacheDtype = OneOf(("auto", *FLOAT_DTYPES, "int8"))
Kernel = OneOf(("auto", "xla", "cudnn"))

# Names other libraries use for the same thing. They work, with a DeprecationWarning.
LEGACY_NAMES = {
    "d_model": "dim_model",
    "embed_dim": "dim_model",
    "hidden_size": "dim_model",
    "model_dim": "dim_model",
    "n_embd": "dim_model",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "num_key_value_heads": "num_kv_heads",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "num_hidden_layers": "num_layers",
    "d_ff": "dim_ff",
    "ffn_dim": "dim_ff",
    "intermediate_size": "dim_ff",
    "block_size": "max_seq_len",
    "max_len": "max_seq_len",
    "max_length": "max_seq_len",
    "max_position_embeddings": "max_seq_len",
    "max_sequence_length": "max_seq_len",
    "n_positions": "max_seq_len",
    "kv_cache_len": "max_kv_cache_len",
    "max_cache_len": "max_kv_cache_len",
    "max_cache_length": "max_kv_cache_len",
    "n_vocab": "vocab_size",
    "layer_norm_epsilon": "norm_eps",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "attention_bias": "qkv_bias",
    "eos_token_id": "eos_token_ids",
}


@validation.checked_fields(
    config_rules.derive, config_rules.contradictions, LEGACY_NAMES
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, from its widths to its dtypes.

    Fields given as None are derived from the others, and derived again by `replace`;
    reading one gives the concrete value. "auto" dtypes stay so until `resolve`.

    Raises:
      ConfigError: for anything unknown, missing, ill-typed, out of range or
        contradictory, naming each field with its value, the rule and what to write.
    """

    # Longest sequence of a forward without cache (training), tokens.
    max_seq_len: Annotated[int, Tokens]
    # Tokens a row of the cache can hold, prompt and generated together. At least
    # max_seq_len; twice that is a good choice.
    max_kv_cache_len: Annotated[int, Tokens]
    dim_model: Annotated[int, Range(1, 2**20)]
    num_heads: Annotated[int, Range(1, 2**16)]
    vocab_size: Annotated[int, Range(1, 2**24)]
    num_layers: Annotated[int, Range(1, MAX_LAYERS)] = 8
    # Grouped-query attention (arXiv:2305.13245); None = num_heads.
    num_kv_heads: Annotated[int, Range(1, 2**16)] = None  # pyright: ignore
    head_dim: Annotated[int, HeadDim] = None  # pyright: ignore
    # Width of the gated MLP; None = 8/3 dim_model, rounded up to 128.
    dim_ff: Annotated[int, Range(1, 2**24)] = None  # pyright: ignore
    activation: Annotated[str, OneOf(("silu", "gelu_tanh"))] = "silu"  # of the gate
    eos_token_ids: tuple[int, ...] = ()

    # Positions.
    rope_theta: Annotated[float, Range(1.0, 1e12)] = 10000.0
    rope_scaling: RopeScaling | None = None
    # Leading elements of each head that RoPE turns; None = head_dim.
    rotary_dim: Annotated[int, HeadDim] = None  # pyright: ignore
    # A token sees itself and the sliding_window - 1 before it; None = all before it.
    sliding_window: Annotated[int | None, Tokens] = None
    # Layers that see all the same, counted from 0, where there is a sliding_window.
    global_layers: tuple[int, ...] = ()
    # RoPE base of the layers with the window, then without rope_scaling; None = as the
    # others.
    local_rope_theta: Annotated[float | None, Range(1.0, 1e12)] = None

    # Attention: biases, RMSNorm of each query and key head, scores / sqrt(scalar), then
    # cap tanh(scores / cap). The scalar None = head_dim.
    qkv_bias: bool = False
    qk_norm: bool = False
    query_pre_attn_scalar: Annotated[float, _Positive] = None  # pyright: ignore
    attention_softcap: Annotated[float | None, _Positive] = None

    # Norms; norm_unit_offset multiplies by 1 + scale, post_norms normalise what
    # attention and MLP add to the residual stream.
    norm_eps: Annotated[float, Range(1e-12, 1.0)] = 1e-5
    norm_unit_offset: bool = False
    post_norms: bool = False

    # Embedding and logits.
    tie_embeddings: bool = False
    embedding_scale: Annotated[float, _Positive] = 1.0
    logits_softcap: Annotated[float | None, _Positive] = None

    # How it runs.
    # Tokens of one prefill call at most; None = min(max_seq_len, 512).
    prefill_chunk: Annotated[int, Tokens] = None  # pyright: ignore
    # Training computes a layer's activations again for its gradients instead of storing
    # them: less memory, about a third more FLOPs.
    remat: bool = False
    # Kernels of attention on NVIDIA GPUs, of several tokens and of one with a cache:
    # "cudnn" flash attention where it serves, or "xla"; "auto" = what `create_model`
    # finds. Elsewhere it is always XLA.
    attention: Annotated[str, Kernel] = "auto"
    decode_attention: Annotated[str, Kernel] = "auto"
    dtype: Annotated[str, Dtype] = "auto"  # of computation
    param_dtype: Annotated[str, Dtype] = "auto"  # parameters as stored
    # Keys and values as stored; in int8 each head of a token has a float32 scale.
    cache_dtype: Annotated[str, CacheDtype] = "auto"
    # Kernels in int8 (model/quantized.py), to generate with: the weights alone, or
    # activations too; "int8" = what the platform multiplies natively.
    quantization: Annotated[str, OneOf(QUANTIZATIONS)] = "none"

    def window(self, layer: int) -> int | None:
        """Tokens that a query of a layer sees, itself included; None = all."""
        return None if layer in self.global_layers else self.sliding_window

    @property
    def queries_per_kv_head(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def replace(self, /, **changes: Any) -> "ModelConfig":
        """A new config with `changes`, validated again; derived fields follow."""
        changes, problems = validation.canonical_names(
            changes, LEGACY_NAMES, stacklevel=3
        )
        if problems:
            raise ConfigError(problems)
        return ModelConfig(**(self.given() | changes))

    __replace__ = replace

    def given(self) -> dict[str, Any]:
        """The fields without those that were derived from them."""
        names = [field.name for field in dataclasses.fields(self)]
        derived = vars(self)["derived"]
        return {name: getattr(self, name) for name in names if name not in derived}

    def resolve(self, platform: str) -> "ModelConfig":
        """Concrete dtypes for a JAX platform: bfloat16 on GPU and TPU, else float32.

        `param_dtype` and `cache_dtype` follow `dtype` where they are "auto"; the
        quantization "int8" is "w8a16" on GPU and TPU, else "w8a8".
        """
        accelerator = platform in ("gpu", "cuda", "rocm", "tpu")
        auto = "bfloat16" if accelerator else "float32"
        dtype = auto if self.dtype == "auto" else self.dtype
        stored = {n: getattr(self, n) for n in ("param_dtype", "cache_dtype")}
        concrete = {n: dtype if v == "auto" else v for n, v in stored.items()}
        if self.quantization == "int8":
            concrete["quantization"] = "w8a16" if accelerator else "w8a8"
        return self.replace(dtype=dtype, **concrete)

    def to_dict(self) -> dict[str, Any]:
        """Every field, derived ones included, as plain JSON values."""
        return dataclasses.asdict(self, dict_factory=_with_lists)

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any]) -> "ModelConfig":
        """The config of a mapping; raises ConfigError for anything that is not one."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config is a mapping, not {validation.shown(values)}")
        strange = [validation.shown(key) for key in values if not isinstance(key, str)]
        if strange:
            raise ConfigError(f"field names must be strings, not {', '.join(strange)}")
        return cls(**values)


def _with_lists(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {n: list(v) if isinstance(v, tuple) else v for n, v in fields}


def check_is_config(config: Any) -> None:
    """Raises ConfigError for an argument that is no ModelConfig at all."""
    if not isinstance(config, ModelConfig):
        kind = type(config).__name__
        raise ConfigError(f"config: must be a ModelConfig, not a {kind}")


class Configs:
    """The presets, one function each; any field of one is a `replace` away."""

    names = ("small", "medium", "large", "xlarge")

    @staticmethod
    def small() -> ModelConfig:
        """58 M parameters; sequences of 1K tokens, a cache of 2K."""
        return ModelConfig(
            max_seq_len=1024,
            max_kv_cache_len=2048,
            dim_model=512,
            num_heads=8,
            num_layers=8,
            dim_ff=1408,
            vocab_size=32000,
        )

    @staticmethod
    def medium() -> ModelConfig:
        """374 M parameters; sequences of 2K tokens, a cache of 4K."""
        return ModelConfig(
            max_seq_len=2048,
            max_kv_cache_len=4096,
            dim_model=1024,
            num_heads=16,
            num_layers=24,
            dim_ff=2816,
            vocab_size=32000,
        )

    @staticmethod
    def large() -> ModelConfig:
        """1.36 B parameters; sequences of 4K tokens, a cache of 8K."""
        return ModelConfig(
            max_seq_len=4096,
            max_kv_cache_len=8192,
            dim_model=2048,
            num_heads=32,
            num_layers=24,
            dim_ff=5632,
            vocab_size=32000,
        )

    @staticmethod
    def xlarge() -> ModelConfig:
        """6.7 B parameters; sequences of 8K tokens, a cache of 16K."""
        return ModelConfig(
            max_seq_len=8192,
            max_kv_cache_len=16384,
            dim_model=4096,
            num_heads=64,
            num_layers=32,
            dim_ff=11008,
            vocab_size=32000,
        )

    @classmethod
    def by_name(cls, name: str) -> ModelConfig:
        """The preset called `name`; raises ConfigError for any other."""
        if name not in cls.names:
            known = ", ".join(cls.names)
            hint = validation.did_you_mean(name, cls.names)
            raise ConfigError(f"preset {name!r}: must be one of {known}{hint}")
        return getattr(cls, name)()
