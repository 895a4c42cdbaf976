"""What follows from what in a `ModelConfig`, and which of its fields contradict.

Every function takes the fields that are right on their own.
"""

from typing import Any

from minillm_jax import validation
from minillm_jax.rope_scaling import MAX_POSITIONS, RopeScaling
from minillm_jax.validation import Range

HeadDim = Range(2, 2**16)


def derive(values: dict[str, Any]) -> frozenset[str]:
    """Fills the fields left at None from those that are right; returns their names."""
    rules = {
        "num_kv_heads": lambda v: v["num_heads"],
        "head_dim": lambda v: v["dim_model"] // v["num_heads"],
        "rotary_dim": lambda v: v["head_dim"],
        "query_pre_attn_scalar": lambda v: float(v["head_dim"]),
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


def contradictions(v: dict[str, Any], derived: frozenset[str]) -> list[str]:
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
    else:
        problems += _rotary_contradictions(v, derived)
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
    return problems + _layer_contradictions(v)


def _rotary_contradictions(v: dict[str, Any], derived: frozenset[str]) -> list[str]:
    problems, dim, scaling = [], v.get("rotary_dim"), v.get("rope_scaling")
    name = "head_dim" if "rotary_dim" in derived else "rotary_dim"
    widest = v.get("head_dim", 0) // 2 * 2 if name == "rotary_dim" else 0
    if dim is not None and dim % 2:
        even = min(dim + 1, widest or dim + 1)
        problems.append(
            f"{name}={dim}: must be even, for RoPE turns pairs; write {even}"
        )
    elif dim is not None and dim > v.get("head_dim", dim):
        problems.append(
            f"rotary_dim={dim}: must be at most head_dim={v['head_dim']}; write "
            f"{widest}"
        )
    elif dim is not None and scaling is not None:
        problems += _scaling_contradictions(scaling, dim)
        if scaling.rope_type == "yarn" and v.get("rope_theta") == 1.0:
            problems.append("rope_scaling: yarn needs a rope_theta above 1")
    return problems


def _layer_contradictions(v: dict[str, Any]) -> list[str]:
    problems = []
    layers, count = v.get("global_layers", ()), v.get("num_layers", 0)
    if layers and v.get("sliding_window", 0) is None:
        problems.append(
            f"global_layers={validation.shown(layers)}: needs a sliding_window, or all "
            "layers see everything; write ()"
        )
    if count and list(layers) != sorted({i for i in layers if 0 <= i < count}):
        problems.append(
            f"global_layers={validation.shown(layers)}: must be layers from 0 to "
            f"{count - 1}, in ascending order"
        )
    return problems


def _scaling_contradictions(scaling: RopeScaling, dim: int) -> list[str]:
    kind = scaling.rope_type
    if kind in ("dynamic", "yarn") and dim == 2:
        return [f"rope_scaling: {kind} needs a rotary_dim of more than 2"]
    return [
        f"rope_scaling: {name} must be {dim // 2} numbers, one for each pair of "
        f"rotary_dim={dim}, not {len(getattr(scaling, name))}"
        for name in ("short_factor", "long_factor")
        if scaling.rope_type == "longrope" and len(getattr(scaling, name)) != dim // 2
    ]


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, min(number, 2 * wanted) + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
