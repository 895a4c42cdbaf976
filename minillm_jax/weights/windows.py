"""Sliding windows as config.json says them, to a config's fields and back.

Newer files list each layer's type; older ones leave it to a rule of the family.
"""

from collections.abc import Mapping
from typing import Any

from minillm_jax.config import MAX_LAYERS, ModelConfig
from minillm_jax.weights.families import Family
from minillm_jax.weights.rope_parameters import FULL, SLIDING


def read(
    values: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, Any]:
    """`sliding_window` and `global_layers`; what is wrong is appended."""
    window, count = values.get("sliding_window"), values.get("num_hidden_layers")
    if "use_sliding_window" in family.keys and not values["use_sliding_window"]:
        window = None
    if family.windows == "none" or window is None:
        if SLIDING in str(values.get("layer_types")):
            problems.append(f"layer_types: {SLIDING} needs a sliding_window")
        return {}
    if not isinstance(count, int) or not 0 < count <= MAX_LAYERS:
        return {}
    if family.windows == "all":
        return {"sliding_window": window}
    types = _layer_types(values, family, count, problems)
    global_layers = [i for i, name in enumerate(types) if name == FULL]
    if len(global_layers) == len(types):
        return {}
    return {"sliding_window": window, "global_layers": global_layers}


def _layer_types(
    values: Mapping[str, Any], family: Family, count: int, problems: list[str]
) -> list[str]:
    """Each layer's, as listed, or by the rule of the family's older files."""
    listed = values.get("layer_types")
    if listed is not None:
        right = isinstance(listed, list) and all(
            name in (FULL, SLIDING) for name in listed
        )
        if right and len(listed) == count:
            return listed
        problems.append(f"layer_types: must be {count} of {FULL} or {SLIDING}")
        return []
    if "max_window_layers" in family.keys:
        first = values["max_window_layers"]
        if not isinstance(first, int):
            problems.append(f"max_window_layers={first!r}: must be a whole number")
            return []
        return [SLIDING if i >= first else FULL for i in range(count)]
    every = 2 if family.model_type == "gemma2" else count + 1
    pattern = values.get("sliding_window_pattern", every)
    if not isinstance(pattern, int) or pattern < 1:
        problems.append(f"sliding_window_pattern={pattern!r}: must be a number")
        return []
    return [SLIDING if (i + 1) % pattern else FULL for i in range(count)]


def write(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys for a config.json, as far as the family has them."""
    values: dict[str, Any] = {}
    if "sliding_window" in family.keys:
        values["sliding_window"] = config.sliding_window
    if "use_sliding_window" in family.keys:
        values["use_sliding_window"] = config.sliding_window is not None
    if "layer_types" in family.keys:
        windows = [config.window(layer) for layer in range(config.num_layers)]
        values["layer_types"] = [FULL if w is None else SLIDING for w in windows]
    return values
