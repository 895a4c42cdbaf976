"""What XLA itself says of the calls that a plan is made of: compiled from shapes.

Nothing is allocated, so a model may be planned that this machine could not hold.
"""

from typing import Any

import jax
import numpy as np

from minillm_jax.decoding import decode, sampling
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.planning.workload import Workload
from minillm_jax.training import optimizer as optimizers
from minillm_jax.training import step

DECODE_STEPS = 16  # of the chunk; how many makes no difference


def total_bytes(work: Workload) -> dict[str, int]:
    """Bytes of arguments, results and temporaries at each moment that is one call.

    For the default backend. Raises ConfigError where shapes cannot be compiled for it.
    """
    model = transformer.create_model(work.config)
    lowered = _training(model, work) if work.training else _decoding(model, work)
    return {name: call_bytes(call.compile()) for name, call in lowered.items()}


def call_bytes(executable: Any) -> int:
    """Arguments, results and temporaries of a compiled function, as XLA reports."""
    found = executable.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def temporary_bytes(executable: Any) -> int:
    """What XLA holds beside the arguments and results of a compiled function."""
    return executable.memory_analysis().temp_size_in_bytes


def _decoding(model: MiniLLM, work: Workload) -> dict[str, Any]:
    config, rows = model.config, work.batch_size
    params = transformer.param_shapes(model)
    cache = kv.cache_shapes(config, rows, work.allocated, policy=work.policy)
    requests = sampling.equal_requests(
        sampling.SamplingParams(), rows, config.vocab_size
    )
    chunk = min(config.prefill_chunk, work.allocated)
    prefill = decode.prefill_chunk.lower(
        *(model, params, cache),
        np.zeros((rows, config.vocab_size), np.float32),
        np.zeros((rows, chunk), np.int32),
        np.zeros(rows, np.int32),
        policy=work.policy,
    )
    going_on = decode.decode_requests.lower(
        *(model, params, cache),
        *(sampling.initial_state(requests), requests, np.ones(rows, bool)),
        steps=DECODE_STEPS,
        policy=work.policy,
    )
    return {"prefill": prefill, "decode": going_on}


def _training(model: MiniLLM, work: Workload) -> dict[str, Any]:
    optimizer = optimizers.adamw(1e-3)
    state = jax.eval_shape(
        lambda params: step.initial_state(params, optimizer),
        transformer.param_shapes(model),
    )
    parts = 2 if work.accumulated else 1
    shape = (parts * work.batch_size, work.context)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    lowered = step.train_step.lower(
        *(model, optimizer, state, tokens, tokens), accumulation=parts
    )
    return {"train": lowered}
