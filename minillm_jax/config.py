"""Model configuration: the fields, the four presets and the legacy names.

A `ModelConfig` is frozen, hashable and valid: it can be a static argument of `jax.jit`,
and nothing behind it checks a field twice. This module touches no device.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from minillm_jax import validation
from minillm_jax.validation import ConfigError as ConfigError
from minillm_jax.validation import OneOf, Range

MAX_POSITIONS = 2**24  # RoPE takes positions in float32, exact up to here
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
Tokens = Range(1, MAX_POSITIONS)
HeadDim = Range(2, 2**16)
Dtype = OneOf(("auto", *FLOAT_DTYPES))

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


def _derive(values: dict[str, Any]) -> frozenset[str]:
    """Fills the fields left at None from those that are right; returns their names."""
    rules = {
        "num_kv_heads": lambda v: v["num_heads"],
        "head_dim": lambda v: v["dim_model"] // v["num_heads"],
        "dim_ff": lambda v: -(-8 * v["dim_model"] // (3 * 128)) * 128,
        "prefill_chunk": lambda v: min(v["max_seq_len"], 512),
    }
    derived = set()
    for name, rule in rules.items():
        if name in values and values[name] is None:
            derived.add(name)
            try:
                values[name] = rule(values)
            except KeyError:  # a field it needs is wrong, and reported as such
                del values[name]
    return frozenset(derived)


def _contradictions(v: dict[str, Any], derived: frozenset[str]) -> list[str]:
    """Problems between fields; those missing from `v` have a problem of their own."""

    def broken(rule, *names: str) -> bool:
        return all(name in v for name in names) and rule(*(v[name] for name in names))

    problems = []
    if broken(lambda s, c: c < s, "max_seq_len", "max_kv_cache_len"):
        problems.append(
            f"max_kv_cache_len={v['max_kv_cache_len']}: must be at least max_seq_len="
            f"{v['max_seq_len']}; write {min(2 * v['max_seq_len'], MAX_POSITIONS)}"
        )
    if "head_dim" in derived and broken(lambda d, n: d % n, "dim_model", "num_heads"):
        divisor = _nearest_divisor(v["dim_model"], v["num_heads"])
        problems.append(
            f"num_heads={v['num_heads']}: must divide dim_model={v['dim_model']}; "
            f"write {divisor}, or set head_dim"
        )
    elif broken(lambda h: HeadDim.problem(h) is not None, "head_dim"):
        problems.append(f"head_dim={v['head_dim']}: {HeadDim.problem(v['head_dim'])}")
    elif broken(lambda h: h % 2, "head_dim"):
        problems.append(
            f"head_dim={v['head_dim']}: must be even, for RoPE turns pairs; "
            f"write {v['head_dim'] + 1}"
        )
    if broken(lambda n, k: n % k, "num_heads", "num_kv_heads"):
        divisor = _nearest_divisor(v["num_heads"], v["num_kv_heads"])
        problems.append(
            f"num_kv_heads={v['num_kv_heads']}: must divide num_heads="
            f"{v['num_heads']}; write {divisor}"
        )
    if "prefill_chunk" not in derived and broken(
        lambda chunk, cache: chunk > cache, "prefill_chunk", "max_kv_cache_len"
    ):
        problems.append(
            f"prefill_chunk={v['prefill_chunk']}: must be at most max_kv_cache_len="
            f"{v['max_kv_cache_len']}; write {min(512, v['max_kv_cache_len'])}"
        )
    if broken(
        lambda ids, n: any(not 0 <= i < n for i in ids), "eos_token_ids", "vocab_size"
    ):
        problems.append(
            f"eos_token_ids={validation.shown(v['eos_token_ids'])}: must be in the "
            f"vocabulary, 0 to {v['vocab_size'] - 1}"
        )
    return problems


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, min(number, 2 * wanted) + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))


def _scaling_contradictions(v: dict[str, Any], _: frozenset[str]) -> list[str]:
    low, high = v.get("low_freq_factor"), v.get("high_freq_factor")
    if low is None or high is None or low < high:
        return []
    return [f"low_freq_factor={low}: must be below high_freq_factor={high}"]


@validation.checked_fields(contradictions=_scaling_contradictions)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the trained context.

    Field names are those of Hugging Face's `rope_scaling` entry. `linear` divides every
    frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` only the low
    ones, with a smooth transition (Llama 3.1, arXiv:2407.21783).
    """

    rope_type: Annotated[str, OneOf(("linear", "llama3"))]
    factor: Annotated[float, Range(1.0, 1e6)]
    low_freq_factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    high_freq_factor: Annotated[float, Range(1e-6, 1e6)] = 4.0
    original_max_position_embeddings: Annotated[int, Tokens] = 8192


@validation.checked_fields(_derive, _contradictions, LEGACY_NAMES)
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
    num_layers: Annotated[int, Range(1, 4096)] = 8
    # Grouped-query attention (arXiv:2305.13245); None = num_heads.
    num_kv_heads: Annotated[int, Range(1, 2**16)] = None  # pyright: ignore
    head_dim: Annotated[int, HeadDim] = None  # pyright: ignore
    # Width of the gated MLP; None = 8/3 dim_model, rounded up to 128.
    dim_ff: Annotated[int, Range(1, 2**24)] = None  # pyright: ignore
    rope_theta: Annotated[float, Range(1.0, 1e12)] = 10000.0
    rope_scaling: RopeScaling | None = None
    # A token sees itself and the sliding_window - 1 before it; None = all before it.
    sliding_window: Annotated[int | None, Tokens] = None
    norm_eps: Annotated[float, Range(1e-12, 1.0)] = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    # Tokens of one prefill call at most; None = min(max_seq_len, 512).
    prefill_chunk: Annotated[int, Tokens] = None  # pyright: ignore
    dtype: Annotated[str, Dtype] = "auto"  # of computation
    param_dtype: Annotated[str, Dtype] = "auto"  # parameters as stored
    cache_dtype: Annotated[str, Dtype] = "auto"  # keys and values as stored

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

        `param_dtype` and `cache_dtype` follow `dtype` where they are "auto".
        """
        accelerator = platform in ("gpu", "cuda", "rocm", "tpu")
        auto = "bfloat16" if accelerator else "float32"
        dtype = auto if self.dtype == "auto" else self.dtype
        stored = {n: getattr(self, n) for n in ("param_dtype", "cache_dtype")}
        concrete = {n: dtype if v == "auto" else v for n, v in stored.items()}
        return self.replace(dtype=dtype, **concrete)

    def to_dict(self) -> dict[str, Any]:
        """Every field, derived ones included, as plain JSON values."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any]) -> "ModelConfig":
        """The config of a mapping; raises ConfigError for anything that is not one."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a config is a mapping, not {validation.shown(values)}")
        strange = [validation.shown(key) for key in values if not isinstance(key, str)]
        if strange:
            raise ConfigError(f"field names must be strings, not {', '.join(strange)}")
        return cls(**values)


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
