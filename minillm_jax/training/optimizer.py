"""AdamW behind a clip, and its learning rate: up in a line, down along a cosine."""

from typing import Any

import jax
import numpy as np
import optax

_NOT_MATRICES = ("scale", "qkv_bias")  # of norms and biases, whatever their shape


def schedule(peak: float, *, steps: int, warmup: int, final_share: float = 0.1):
    """The learning rate of each update, counted from 0; an optax schedule.

    Update `warmup` is the first at the peak, update `steps` would be at its final
    share (SGDR's cosine without restarts, arXiv:1608.03983).
    """
    warmup = min(warmup, steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=peak * final_share,
    )


def rates(found: optax.Schedule, steps: int) -> np.ndarray:
    """All learning rates of a schedule, float32 `[steps]`, in one call."""
    return np.asarray(jax.jit(jax.vmap(found))(np.arange(steps, dtype=np.int32)))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) behind a global-norm clip; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, *betas, weight_decay=weight_decay, mask=_matrices),
    )


def _matrices(params: Any) -> Any:
    """Which parameters decay: neither norms nor biases."""

    def decays(path: Any, _: Any) -> bool:
        return path[-1].key not in _NOT_MATRICES

    return jax.tree_util.tree_map_with_path(decays, params)
