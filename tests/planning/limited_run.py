"""Runs what a plan is of, in a process that may take no more than some bytes.

    python tests/planning/limited_run.py '{"config": {...}, "limit_bytes": ...}'

The limit is of data (RLIMIT_DATA): private memory that is written to. One of address
space would count what is only reserved.
"""

import json
import resource
import sys


def main() -> None:
    asked = json.loads(sys.argv[1])
    limit = asked["limit_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    import jax
    import numpy as np

    import minillm_jax as mj
    from minillm_jax.decoding import decode
    from minillm_jax.training import optimizer as optimizers
    from minillm_jax.training import step

    config, rows = mj.ModelConfig.from_dict(asked["config"]), asked["batch_size"]
    model, context = mj.create_model(config), asked["context"]
    params = jax.block_until_ready(mj.init_params(model))
    if asked["training"]:
        optimizer = optimizers.adamw(1e-3)
        state = step.initial_state(params, optimizer)
        del params
        tokens = np.zeros((rows, context), np.int32)
        state, metrics = step.train_step(model, optimizer, state, tokens)
        metrics.loss.block_until_ready()
    else:
        policy = mj.CachePolicy(overflow=asked["overflow"])
        cache = mj.init_cache(config, rows, asked["capacity"], policy=policy)
        length = min(config.prefill_chunk, context - 4)
        prompt = np.ones((rows, length), np.int32)
        logits, cache = mj.prefill(model, params, cache, prompt, policy=policy)
        tokens = np.argmax(logits, axis=-1).astype(np.int32)
        active = np.ones(rows, bool)
        out = decode.decode_chunk(
            model, params, cache, tokens, active, steps=4, policy=policy
        )
        out.sampled.block_until_ready()
    print("ran", flush=True)


if __name__ == "__main__":
    main()
