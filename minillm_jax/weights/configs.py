"""Between a Hugging Face config.json and a ModelConfig.

Strict both ways: a key that is not known and may change what the model computes is an
error, and so is a field that no architecture of transformers has.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from minillm_jax import validation
from minillm_jax.config import MAX_POSITIONS, ConfigError, ModelConfig
from minillm_jax.weights import families, rope_parameters, windows
from minillm_jax.weights.errors import CheckpointError
from minillm_jax.weights.families import FAMILIES, Family

_log = logging.getLogger("minillm_jax")
_SIZES = {
    "hidden_size": "dim_model",
    "intermediate_size": "dim_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
}
_SAME = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "attention_bias": "qkv_bias",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logits_softcap",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# A section of our own, for what transformers has no key for.
# What a machine runs a model with; a folder's dtype is that of its tensors.
_NOT_SAVED = (
    *("dtype", "param_dtype", "cache_dtype"),
    *("attention", "decode_attention", "remat", "quantization"),
)
_OWN, _OWN_FIELDS = "minillm_jax", ("max_seq_len", "max_kv_cache_len", "prefill_chunk")


def read_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    ignore_keys: Sequence[str] = (),
    where: object = "config.json",
) -> tuple[ModelConfig, Family]:
    """The config of a folder, its dtypes "auto".

    Args:
      values: its config.json.
      generation: its generation_config.json, whose EOS ids come first.
      ignore_keys: keys that are not known here and are to be passed over.
      where: the file, for messages.

    Raises:
      CheckpointError: with all that is wrong: an unknown architecture, RoPE scaling or
        key that may change the mathematics, a value that cannot be.
    """
    family = families.by_name(values)
    if family is None:
        known = ", ".join(family.architecture for family in FAMILIES)
        name = values.get("architectures") or values.get("model_type")
        raise CheckpointError(
            f"architecture {validation.shown(name)} is not known; known: {known}", where
        )
    kind = values.get("model_type")
    if kind not in (None, family.whole_type or family.model_type):
        raise CheckpointError(
            f"architectures={family.architecture} and model_type={kind} contradict",
            where,
        )
    if values.get("auto_map"):
        _log.warning("%s: auto_map is ignored: no code from a folder is run", where)
    if family.section is not None:
        values = _part(values, family.section, where)
    values = {"model_type": family.model_type, **family.keys, **_given(values, family)}
    problems = _unknown_keys(values, family, ignore_keys)
    fields = _fields(values, family, problems)
    ids = generation.get("eos_token_id")
    ids = values.get("eos_token_id") if ids is None else ids
    fields["eos_token_ids"] = _in_vocabulary(ids, values.get("vocab_size"), where)
    try:
        config = ModelConfig(**fields)
    except ConfigError as error:
        raise CheckpointError([*problems, *error.problems], where) from None
    if family.divides and config.dim_model % config.num_heads:
        problems.append("num_attention_heads: must divide hidden_size")
    if problems:
        raise CheckpointError(problems, where)
    return config, family


def _in_vocabulary(ids: Any, vocab_size: Any, where: object) -> Any:
    """EOS ids without those that no model of this vocabulary can sample."""
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    numbers = all(isinstance(i, int) for i in (*ids, vocab_size))
    kept = [i for i in ids if 0 <= i < vocab_size] if numbers else ids
    if kept != ids:
        _log.warning("%s: eos_token_id=%s is not in the vocabulary", where, ids)
    return kept


def _part(values: Mapping[str, Any], section: str, where: object) -> dict[str, Any]:
    """The section of a model's text part, with what stands outside of it."""
    inner = values.get(section)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{section} is missing", where)
    outside = ("eos_token_id", "tie_word_embeddings", _OWN)
    return dict(inner) | {key: values[key] for key in outside if key in values}


def _given(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What config.json says; null where the family has a number is as if not there."""
    numbers = (
        *("rope_theta", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("hidden_activation", "tie_word_embeddings", "query_pre_attn_scalar"),
    )
    return {
        key: value
        for key, value in values.items()
        if key != "model_type" and not (value is None and key in numbers)
    }


def _unknown_keys(
    values: Mapping[str, Any], family: Family, ignore_keys: Sequence[str]
) -> list[str]:
    read = {*_SIZES, *family.keys, *rope_parameters.KEYS, _OWN, *ignore_keys}
    if family.model_type in ("gemma", "gemma2", "gemma3_text"):
        read |= {"hidden_act", "hidden_activation"}
    problems = []
    for key, value in values.items():
        known = key in read or key in families.HARMLESS or key.startswith("_")
        copy = key == "sliding_window_size" and value == values.get("sliding_window")
        if known or copy or value in families.NEUTRAL.get(key, ()):
            continue
        off = value is None or (value is False and key not in families.NOT_FALSE)
        if off or value in ([], {}):
            continue
        problems.append(
            f"{key}={validation.shown(value)} is not known for {family.architecture} "
            "and may change what it computes"
        )
    return problems


def _fields(
    values: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """A ModelConfig's fields; what is wrong with them alone is appended."""
    fields = dict(family.fields)
    for key, name in _SIZES.items():
        if values.get(key) is None:
            problems.append(f"{key} is missing")
        fields[name] = values.get(key)
    fields |= {name: values[key] for key, name in _SAME.items() if key in family.keys}
    key = "hidden_activation" if "hidden_activation" in family.keys else "hidden_act"
    known = _ACTIVATIONS
    if family.model_type == "gemma":  # whose first configs meant the approximation
        known = {**known, "gelu": "gelu_tanh"}
    name = validation.shown(values[key]).strip("'")
    if name not in known:
        problems.append(f"{key}={name}: must be one of {', '.join(known)}")
    fields["activation"] = known.get(name)
    if family.fields.get("norm_unit_offset") and _is_size(values.get("hidden_size")):
        fields["embedding_scale"] = math.sqrt(values["hidden_size"])
    fields |= windows.read(values, family, problems)
    turns = rope_parameters.read(values, family, problems)
    part = turns.pop("partial_rotary_factor", None)
    fields |= turns
    scaling = turns.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] not in family.rope_types:
        problems.append(
            f"rope_scaling: {family.architecture} has no {scaling['rope_type']}"
        )
    if part is not None and part != 1.0:
        head = values.get("head_dim") or _quotient(values)
        number = isinstance(part, float) and 0.0 < part < 1.0 and _is_size(head)
        fields["rotary_dim"] = int((head or 0) * part) if number else part
        if not family.partial_rotary:
            problems.append(
                f"partial_rotary_factor={part}: {family.architecture} has none"
            )
    own_head = values["head_dim"] not in (None, _quotient(values))
    if family.partial_rotary and scaling is not None and own_head:
        problems.append(
            "head_dim: must be hidden_size / num_attention_heads beside longrope"
        )
    return fields | _lengths(values, problems)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < MAX_POSITIONS


def _quotient(values: Mapping[str, Any]) -> int | None:
    sizes = values.get("hidden_size"), values.get("num_attention_heads")
    return sizes[0] // sizes[1] if all(map(_is_size, sizes)) else None  # pyright: ignore


def _lengths(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    longest = values["max_position_embeddings"]
    fields = {"max_seq_len": longest, "max_kv_cache_len": longest}
    own = values.get(_OWN) or {}
    if not isinstance(own, Mapping) or set(own) - set(_OWN_FIELDS):
        problems.append(f"{_OWN}={validation.shown(own)}: may have {_OWN_FIELDS}")
        return fields
    return fields | dict(own)


def write_config(config: ModelConfig) -> tuple[dict[str, Any], Family]:
    """The config.json of the architecture that a config's data make.

    Raises:
      ConfigError: where no architecture of transformers has all of its fields, with
        those that keep it from the nearest.
    """
    problems: list[list[str]] = []
    for family in (family for family in FAMILIES if family.section is None):
        values = _values(config, family)
        try:
            back, _ = read_config(values, values)
            wrong = _differences(config, back)
        except CheckpointError as error:
            wrong = list(error.problems)
        if not wrong:
            return values, family
        problems.append([f"{problem} ({family.architecture})" for problem in wrong])
    least = min(map(len, problems))
    nearest = [problem for p in problems if len(p) == least for problem in p]
    raise ConfigError(
        ["no architecture of transformers has all fields of this config", *nearest]
    )


def _differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields, as config.json has them, in which two configs differ."""
    return [
        f"{field.name}={validation.shown(getattr(config, field.name))}: would become "
        f"{validation.shown(getattr(other, field.name))}"
        for field in dataclasses.fields(config)
        if field.name not in _NOT_SAVED
        and getattr(config, field.name) != getattr(other, field.name)
    ]


def _values(config: ModelConfig, family: Family) -> dict[str, Any]:
    """config.json, as well as the family can say it."""
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    names = _SIZES | {key: name for key, name in _SAME.items() if key in family.keys}
    values |= {key: getattr(config, name) for key, name in names.items()}
    acts = {name: key for key, name in reversed(_ACTIVATIONS.items())}
    for key in ("hidden_act", "hidden_activation"):
        if key in family.keys:
            values[key] = acts[config.activation]
    if "query_pre_attn_scalar" in family.keys:  # whose class takes whole numbers only
        values["query_pre_attn_scalar"] = int(config.query_pre_attn_scalar)
    values["pad_token_id"] = None  # or a class may take one outside the vocabulary
    values |= rope_parameters.write(config)
    values |= windows.write(config, family)
    scaling, longest = config.rope_scaling, config.max_seq_len
    original = longest
    if scaling is not None and scaling.original_max_position_embeddings is not None:
        original = scaling.original_max_position_embeddings
    if scaling is not None and scaling.rope_type == "dynamic":
        longest = original
    values["max_position_embeddings"] = longest
    if "original_max_position_embeddings" in family.keys:
        values["original_max_position_embeddings"] = original
    usual = {"max_seq_len": longest, "max_kv_cache_len": longest}
    usual["prefill_chunk"] = min(config.max_seq_len, 512)
    own = {name: getattr(config, name) for name in _OWN_FIELDS}
    own = {name: value for name, value in own.items() if value != usual[name]}
    if own:
        values[_OWN] = own
    ids = list(config.eos_token_ids)
    return values | {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}
