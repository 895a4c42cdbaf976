"""RoPE as config.json says it, in both spellings, to a config's fields and back.

Until transformers 5:    "rope_theta": 5e5, "rope_scaling": {"rope_type": ...} or null
since then:              "rope_parameters": {"rope_theta": 5e5, "rope_type": ..., ...}
and by type of layer:    "rope_parameters": {"full_attention": {...}, ...}
"""

import math
from collections.abc import Mapping
from typing import Any

from minillm_jax.config import ModelConfig
from minillm_jax.weights.families import Family

KEYS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
    *("partial_rotary_factor", "original_max_position_embeddings"),
)
FULL, SLIDING = "full_attention", "sliding_attention"
_EVERY_TYPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
# Keys of each type. They are the fields of a RopeScaling, but for yarn's two of mscale.
_BY_TYPE = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
        *("truncate", "mscale", "mscale_all_dim"),
    ),
    "longrope": (
        *("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    ),
}
_Problems = list[str]


def read(
    values: Mapping[str, Any], family: Family, problems: _Problems
) -> dict[str, Any]:
    """The fields that RoPE's keys of a config.json make; what is wrong is appended.

    Args:
      values: config.json, with what its family takes for keys that are not there.
      family: its architecture.
      problems: of the whole file so far.

    Returns:
      `rope_theta`, `rope_scaling`, `local_rope_theta` where layers differ, and
      `partial_rotary_factor`, which is no field.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given, local = values.get(name) or {}, values.get("rope_local_base_freq")
    if not isinstance(given, Mapping):
        problems.append(f"{name}={given!r}: must be an object")
        return {}
    if local is not None and not family.rope_by_layer:
        problems.append(f"rope_local_base_freq: {family.architecture} has none")
    if family.rope_by_layer and values.get("rope_parameters"):
        given, local = _by_layer(values, problems)
    elif set(given) & {FULL, SLIDING}:
        problems.append(f"{name}: {family.architecture} has one for all layers")
    fields = {
        "rope_theta": given.get("rope_theta", values["rope_theta"]),
        "rope_scaling": _scaling(values, family, given, problems),
        "partial_rotary_factor": given.get(
            "partial_rotary_factor", values.get("partial_rotary_factor")
        ),
    }
    return fields if local is None else fields | {"local_rope_theta": local}


def _by_layer(
    values: Mapping[str, Any], problems: _Problems
) -> tuple[Mapping[str, Any], Any]:
    """The entry of the layers of full attention, and the base of the others."""
    given, none = values["rope_parameters"], ({}, None)
    if values.get("rope_scaling"):
        problems.append("rope_scaling and rope_parameters: give one")
        return none
    if not isinstance(given, Mapping) or set(given) - {FULL, SLIDING}:
        problems.append(f"rope_parameters: must have {FULL} and {SLIDING}, no others")
        return none
    full, sliding = given.get(FULL) or {}, given.get(SLIDING) or {}
    if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        problems.append("rope_parameters: must hold objects")
        return none
    if _type(sliding) is not None:
        problems.append(f"rope_parameters: only {FULL} can have a scaling")
    if full.get(_ORIGINAL) is None and values.get(_ORIGINAL) is not None:
        problems.append(f"{_ORIGINAL}: must be in rope_parameters, with {FULL}")
    base = sliding.get("rope_theta", values.get("rope_local_base_freq"))
    return full, base


def _type(given: Mapping[str, Any]) -> str | None:
    """The scaling's type, None for RoPE as it is."""
    kind = given.get("rope_type", given.get("type", "default"))
    return None if kind == "default" else kind


def _scaling(
    values: Mapping[str, Any],
    family: Family,
    given: Mapping[str, Any],
    problems: _Problems,
) -> dict[str, Any] | None:
    """The fields of a RopeScaling."""
    kind = _type(given)
    if isinstance(kind, str):
        kind = family.rope_aliases.get(kind, kind)
    known = _BY_TYPE.get(kind or "default") if isinstance(kind, str | None) else None
    if known is None:
        types = ", ".join(_BY_TYPE)
        problems.append(f"rope_scaling: rope_type={kind!r} is none of {types}")
        return None
    for key, value in given.items():
        if key not in (*known, *_EVERY_TYPE) and value not in (None, False):
            problems.append(
                f"rope_scaling: {kind or 'default'} knows no {key}={value!r}"
            )
    if kind is None:
        return None
    fields = {key: given[key] for key in known if given.get(key) is not None}
    longest = values["max_position_embeddings"]
    if kind == "dynamic":
        fields[_ORIGINAL] = longest
    elif _ORIGINAL in known:
        outside = None if family.rope_by_layer else values.get(_ORIGINAL)
        inside = fields.get(_ORIGINAL, longest)
        fields[_ORIGINAL] = inside if outside is None else outside
    scales = [fields.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    try:
        if kind in ("yarn", "longrope"):
            grown = longest / fields[_ORIGINAL]
            fields.setdefault("factor", grown if kind == "yarn" else max(1.0, grown))
        if all(scales):
            mscales = [0.1 * s * math.log(fields["factor"]) + 1.0 for s in scales if s]
            fields.setdefault("attention_factor", mscales[0] / mscales[1])
    except (TypeError, ValueError, ArithmeticError):
        problems.append(f"rope_scaling: {dict(given)!r} must hold numbers")
    return fields | {"rope_type": kind}


def write(config: ModelConfig) -> dict[str, Any]:
    """RoPE's keys for a config.json, in the older spelling, which both read."""
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rotary_dim != config.head_dim:
        values["partial_rotary_factor"] = _fraction(config.rotary_dim, config.head_dim)
    if config.local_rope_theta is not None:
        values["rope_local_base_freq"] = config.local_rope_theta
    scaling = config.rope_scaling
    if scaling is None:
        return values
    given: dict[str, Any] = {"rope_type": scaling.rope_type}
    for name in _BY_TYPE[scaling.rope_type]:
        value = getattr(scaling, name, None)
        if value is not None and value != ():
            given[name] = list(value) if isinstance(value, tuple) else value
    return values | {"rope_scaling": given}


def _fraction(part: int, whole: int) -> float:
    """A float of which `int(whole * fraction)` is `part`."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1.0)
