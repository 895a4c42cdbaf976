"""The device's logits beside the float64 reference of the CPU, and beside each other.

In float32 the products are asked for in float32 ("highest"): by default a GPU rounds
them to TF32, a TPU to bfloat16. That default's difference is reported, and not judged.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minillm_jax as mj
from benchmarks import int8_forms
from benchmarks.suite import int8
from benchmarks.suite.scale import Scale
from minillm_jax import testing
from minillm_jax.config import ModelConfig
from minillm_jax.model import cudnn, quantized
from minillm_jax.model.transformer import MiniLLM

ROWS, LENGTH, DECODED = 3, 48, 8
LENGTHS = np.array([48, 31, 7], np.int32)
ERROR, RING = mj.CachePolicy(), mj.CachePolicy(overflow="ring", num_sinks=2)
RING_CAPACITY = 24
# max |d logit| over the standard deviation of the logits: in float32 the library's
# promises, in bfloat16, of 8 bits, what some layers of rounding come to.
LIMITS = {"float32": {"reference": 2e-5, "itself": 1e-5}}
LIMITS["bfloat16"] = {"reference": 0.25, "itself": 0.25}


def run(scale: Scale, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each dtype, kernel of attention and check, with whether it passed."""
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        config = testing.tiny_config(head_dim=64, dtype=dtype, num_kv_heads=2)
        problem = cudnn.why_not(config.resolve(jax.default_backend()))
        for kernel in ["xla"] if problem else ["xla", "cudnn"]:
            chosen = config.replace(attention=kernel, decode_attention=kernel)
            for check in _checks(mj.create_model(chosen)):
                rows.append({"dtype": dtype, "attention": kernel} | check)
                yield {"checks": rows, "passed": _all_passed(rows)}
    for check in _int8_checks():
        rows.append({"dtype": "bfloat16", "attention": "xla"} | check)
        yield {"checks": rows, "passed": _all_passed(rows)}


def _all_passed(rows: list[dict[str, Any]]) -> bool:
    return all(row["passed"] is not False for row in rows)


def _checks(model: MiniLLM) -> Iterator[dict[str, Any]]:
    config, draw = model.config, np.random.default_rng(0)
    params = testing.perturbed(mj.init_params(model))
    params = jax.device_put(params)
    tokens = draw.integers(0, config.vocab_size, (ROWS, LENGTH), np.int32)
    limits = LIMITS[config.dtype]
    expected = testing.reference_logits(config, params, tokens)
    ring = testing.reference_logits(
        config, params, tokens, window=RING_CAPACITY, sinks=RING.num_sinks
    )
    unit = float(np.std(expected))

    def judged(name: str, against: str, measure: Callable[[], float]) -> dict[str, Any]:
        with _precise(config):
            return _judged(name, measure() / unit, limits[against])

    def forward() -> np.ndarray:
        apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
        return np.asarray(apply(params, jnp.asarray(tokens)))

    yield judged(
        "forward = reference", "reference", lambda: _largest(forward(), expected)
    )
    if config.dtype == "float32":
        difference = _largest(forward(), expected) / unit
        name = "forward = reference, in the device's own precision"
        yield _judged(name, difference, None)
    yield judged(
        *("cached = uncached", "itself"),
        lambda: _largest(_decoded(model, params, tokens), forward()[:, -DECODED:]),
    )
    yield judged(
        *("ring = window of the reference", "reference"),
        lambda: _largest(
            _decoded(model, params, tokens, policy=RING, capacity=RING_CAPACITY),
            ring[:, -DECODED:],
        ),
    )
    wide = MiniLLM(config.replace(prefill_chunk=64))
    yield judged(
        *("chunked = one-shot", "itself"),
        lambda: _largest(
            _prefilled(model, params, tokens), _prefilled(wide, params, tokens)
        ),
    )
    yield judged(*("padded = alone", "itself"), lambda: _padding(model, params, tokens))


def _int8_checks() -> Iterator[dict[str, Any]]:
    """Kernels, keys and values in int8, beside the reference of the floats they are."""
    tokens = np.random.default_rng(0).integers(0, 61, (ROWS, LENGTH), np.int32)
    config = testing.tiny_config(head_dim=64, dtype="bfloat16")
    for form in int8.FORMS:
        model = mj.create_model(int8_forms.with_form(config, form))
        params = mj.init_params(MiniLLM(model.config.replace(quantization="none")))
        params = jax.device_put(testing.perturbed(params))
        params = mj.quantize(params, model.config.quantization)
        floats = quantized.restore(params)
        expected = testing.reference_logits(model.config, floats, tokens)
        off = _largest(_decoded(model, params, tokens), expected[:, -DECODED:])
        yield _judged(
            f"{form} = reference of its floats",
            off / float(np.std(expected)),
            LIMITS["bfloat16"]["reference"],
        )


def _judged(name: str, difference: float, limit: float | None) -> dict[str, Any]:
    """A check's row; what has no limit is told alone."""
    passed = None if limit is None else bool(difference <= limit)
    return {"check": name, "difference": difference, "limit": limit, "passed": passed}


def _precise(config: ModelConfig) -> contextlib.AbstractContextManager[Any]:
    if config.dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _largest(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other)).max())


def _decoded(
    model: MiniLLM,
    params: Any,
    tokens: np.ndarray,
    *,
    policy: mj.CachePolicy = ERROR,
    capacity: int | None = None,
) -> np.ndarray:
    """Logits of the last DECODED tokens, each a step after a prefill of the rest."""
    cache = mj.init_cache(model.config, ROWS, capacity, policy=policy)
    first = LENGTH - DECODED
    _, cache = mj.prefill(model, params, cache, tokens[:, :first], policy=policy)
    steps = []
    for token in tokens[:, first:].T:
        logits, cache = mj.decode_step(model, params, cache, token, policy=policy)
        steps.append(np.asarray(logits))
    return np.stack(steps, axis=1)


def _prefilled(
    model: MiniLLM, params: Any, tokens: np.ndarray, lengths: np.ndarray | None = None
) -> np.ndarray:
    cache = mj.init_cache(model.config, len(tokens))
    return np.asarray(mj.prefill(model, params, cache, tokens, lengths)[0])


def _padding(model: MiniLLM, params: Any, tokens: np.ndarray) -> float:
    """Rows of different lengths side by side, and each of them alone."""
    together = _prefilled(model, params, tokens, LENGTHS)
    return max(
        _largest(
            together[row : row + 1],
            _prefilled(model, params, tokens[row : row + 1, :length]),
        )
        for row, length in enumerate(LENGTHS)
    )
