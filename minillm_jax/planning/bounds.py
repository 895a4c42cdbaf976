"""The best that a device could do with a config: no code can be faster.

A decode step reads every weight and the keys and values of the tokens held; a prompt
must be multiplied through. The slower of the device's memory and its arithmetic decides
(the roofline of Williams et al. 2009, doi:10.1145/1498765.1498785).
"""

from typing import NamedTuple

from minillm_jax.config import ModelConfig
from minillm_jax.planning import costs
from minillm_jax.planning.devices import Device


class Bound(NamedTuple):
    """Of one batch size, with rows that hold `context` tokens."""

    batch_size: int
    context: int
    decode_tokens_per_second: float  # of all rows together
    ttft_seconds: float  # prefill of a prompt of `context` tokens in every row


def best_case(
    config: ModelConfig, device: Device, batch_size: int, context: int
) -> Bound | None:
    """The bound; None where the device's rates are not known.

    Args:
      config: nothing in it is "auto".
      device: what runs it.
      batch_size: rows.
      context: tokens that each holds.
    """
    if device.bytes_per_second is None or device.flops_per_second is None:
        return None
    step = max(
        costs.decode_step_bytes(config, batch_size, context) / device.bytes_per_second,
        batch_size
        * costs.forward_flops(config, 1, context - 1)
        / device.flops_per_second,
    )
    prefill = max(
        batch_size * costs.prefill_flops(config, context) / device.flops_per_second,
        costs.weight_bytes(config) / device.bytes_per_second,
    )
    return Bound(batch_size, context, batch_size / step, prefill)
