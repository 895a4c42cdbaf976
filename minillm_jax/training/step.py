"""One step of training: loss, gradients, update.

Axes: A parts of a batch, B rows of all of them, T sequence length.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.config import ConfigError
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.training import loss

Params = Mapping[str, Any]


class TrainState(NamedTuple):
    """What a step changes; every leaf of it is donated."""

    step: jax.Array  # [] int32, steps taken
    params: Params
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """What a step tells."""

    loss: jax.Array  # [] nats per token, before the update
    grad_norm: jax.Array  # [] of all gradients together, before clipping


def initial_state(
    params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, around `params` themselves."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(dict(params)))


@functools.partial(
    jax.jit,
    static_argnames=("model", "optimizer", "accumulation"),
    donate_argnames=("state",),
)
def train_step(
    model: MiniLLM,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    accumulation: int = 1,
) -> tuple[TrainState, StepMetrics]:
    """One update by the mean loss of a batch; `state` is donated.

    Args:
      model: from `create_model`. Static.
      optimizer: what `state` was made with. Static.
      state: before the step.
      tokens: a batch; T at most `max_seq_len`.
      segment_ids: packed documents from 1 on, 0 = padding; None = a row is one.
      accumulation: A; the batch is computed in so many parts, one after another, each
        counting by its tokens: the gradient is the whole batch's. It divides B. Static.

    Raises:
      ConfigError: for parameters that are not float32, in which a mean over many tokens
        and most updates would be lost, or an `accumulation` that does not divide B.
    """
    _check(state.params, tokens, accumulation)
    total, counted, grads = _summed(
        model, state.params, tokens, segment_ids, accumulation
    )
    counted = jnp.maximum(counted, 1)
    grads = jax.tree.map(lambda grad: grad / counted.astype(grad.dtype), grads)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(total / counted, optax.tree.norm(grads))
    return TrainState(state.step + 1, params, optimizer_state), metrics


@functools.partial(jax.jit, static_argnames=("model",))
def eval_step(
    model: MiniLLM,
    params: Params,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    chosen: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The loss of a batch in nats, a sum, and how many tokens it is the sum of."""
    return loss.next_token_loss(model, params, tokens, segment_ids, chosen)


def _check(params: Params, tokens: Any, accumulation: int) -> None:
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(params)} - {"float32"}
    if narrow:
        raise ConfigError(
            f"params: {', '.join(sorted(narrow))}; a step takes float32 ones: set "
            "param_dtype='float32' (dtype may be bfloat16)"
        )
    if tokens.shape[0] % accumulation:
        raise ConfigError(
            f"accumulation={accumulation}: must divide the batch of {tokens.shape[0]}"
        )


def _summed(model, params, tokens, segment_ids, accumulation: int):
    """Loss and gradients of a batch, sums over its tokens, and how many these are."""

    def part(tokens, segment_ids):
        def total(params):
            return loss.next_token_loss(model, params, tokens, segment_ids)

        (value, counted), grads = jax.value_and_grad(total, has_aux=True)(params)
        return value, counted, grads

    if accumulation == 1:
        return part(tokens, segment_ids)
    parts = jax.tree.map(
        lambda x: x.reshape(accumulation, -1, x.shape[-1]), (tokens, segment_ids)
    )

    def add(sums, given):
        return jax.tree.map(jnp.add, sums, part(*given)), None

    zeros = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    nothing = (*zeros, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, nothing, parts)[0]
