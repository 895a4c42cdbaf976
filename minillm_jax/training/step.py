"""One step of training: loss, gradients, AdamW."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from minillm_jax.model.transformer import MiniLLM
from minillm_jax.training import loss


class TrainState(NamedTuple):
    """What a step changes; every leaf of it is donated."""

    step: jax.Array  # [] int32, steps taken
    params: Mapping[str, Any]
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """What a step tells."""

    loss: jax.Array  # [] nats per token, before the update
    grad_norm: jax.Array  # [] of all gradients together, before clipping


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) behind a global-norm clip; only matrices decay."""

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, *betas, weight_decay=weight_decay, mask=matrices),
    )


def initial_state(
    params: Mapping[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, around `params` themselves."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(dict(params)))


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer"), donate_argnames=("state",)
)
def train_step(
    model: MiniLLM,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update by the mean loss of a batch; `state` is donated.

    Args:
      model: from `create_model`. Static.
      optimizer: what `state` was made with. Static.
      state: before the step.
      tokens: a batch; T at most `max_seq_len`.
      segment_ids: packed documents from 1 on, 0 = padding; None = a row is one.
    """

    def mean_loss(params):
        total, counted = loss.next_token_loss(model, params, tokens, segment_ids)
        return total / jnp.maximum(counted, 1)

    value, grads = jax.value_and_grad(mean_loss)(state.params)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(value, optax.tree.norm(grads))
    return TrainState(state.step + 1, params, optimizer_state), metrics
