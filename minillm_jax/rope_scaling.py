"""How RoPE is stretched beyond the trained context: the part of a config that says so.

What the types compute is in minillm_jax/model/rope.py.
"""

import dataclasses
from typing import Annotated, Any

from minillm_jax import validation
from minillm_jax.validation import OneOf, Range

MAX_POSITIONS = 2**24  # RoPE takes positions in float32, exact up to here
Tokens = Range(1, MAX_POSITIONS)
_Factor = Range(1e-6, 1e6)


def _derive(values: dict[str, Any]) -> frozenset[str]:
    name = "original_max_position_embeddings"
    if values.get("rope_type") != "llama3" or values.get(name, 0) is not None:
        return frozenset()
    values[name] = 8192  # Llama 3's own
    return frozenset({name})


def _contradictions(v: dict[str, Any], _: frozenset[str]) -> list[str]:
    problems, kind = [], v.get("rope_type")
    for low, high in (
        ("low_freq_factor", "high_freq_factor"),
        ("beta_slow", "beta_fast"),
    ):
        if low in v and high in v and v[low] >= v[high]:
            problems.append(f"{low}={v[low]}: must be below {high}={v[high]}")
    needed = {"dynamic": (), "yarn": (), "longrope": ("short_factor", "long_factor")}
    for name in ("original_max_position_embeddings", *needed.get(kind or "", ())):
        if kind in needed and name in v and not v[name]:
            problems.append(f"{name}: missing, and rope_type={kind!r} needs it")
    for name in ("short_factor", "long_factor"):
        wrong = [_Factor.problem(factor) for factor in v.get(name, ())]
        problems += [f"{name}: each {problem}" for problem in wrong if problem][:1]
    return problems


@validation.checked_fields(_derive, _contradictions)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the trained context.

    Fields are named as in Hugging Face's `rope_scaling`; a type reads those it knows:

        linear    factor
        dynamic   factor, original_max_position_embeddings
        llama3    factor, original_max_position_embeddings, low_ and high_freq_factor
        yarn      factor, original_max_position_embeddings, attention_factor, beta_fast,
                  beta_slow, truncate
        longrope  factor, original_max_position_embeddings, attention_factor,
                  short_factor, long_factor
    """

    rope_type: Annotated[
        str, OneOf(("linear", "dynamic", "llama3", "yarn", "longrope"))
    ]
    # The context that can be reached, over the original one.
    factor: Annotated[float, Range(1.0, 1e6)]
    # Tokens of the context that the model was trained with; None = 8192 for llama3.
    original_max_position_embeddings: Annotated[int, Tokens] = None  # pyright: ignore
    low_freq_factor: Annotated[float, _Factor] = 1.0
    high_freq_factor: Annotated[float, _Factor] = 4.0
    # Of cosine and sine, for queries and keys alike; None = the paper's.
    attention_factor: Annotated[float | None, _Factor] = None
    beta_fast: Annotated[float, _Factor] = 32.0
    beta_slow: Annotated[float, _Factor] = 1.0
    truncate: bool = True  # the borders of yarn's ramp to whole pairs
    # A divisor for each pair, up to the original context and beyond it.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
