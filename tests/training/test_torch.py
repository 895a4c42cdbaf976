"""200 steps of `small` on the default data, beside PyTorch's from the same weights.

python -m pytest -m slow tests/training/test_torch.py -s
"""

import dataclasses
import json
import sys

import numpy as np
import pytest

import minillm_jax as mj
from benchmarks import workers
from minillm_jax.text.tokenizer import ByteTokenizer
from minillm_jax.training import corpus, optimizer, sources, step
from minillm_jax.training.packing import Packing
from minillm_jax.training.settings import TrainSettings

pytestmark = pytest.mark.slow

STEPS, ROWS, LENGTH = 200, 2, 160  # longer than a block of attention
# Training amplifies rounding: where the learning rate is at its peak the loss of a
# single batch of 320 tokens is apart by up to 1e-2, and as much where our own weights
# are disturbed by a few parts in a million.
BEFORE, LAST = 50, 50


def test_the_losses_of_200_steps_are_those_of_torch(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    settings = TrainSettings(steps=STEPS, batch_size=ROWS, seq_len=LENGTH)
    config = mj.Configs.small().replace(dtype="float32", param_dtype="float32")
    model = mj.create_model(config)
    params = mj.init_params(model)
    mj.save_pretrained(tmp_path / "model", model, params)
    arguments = (
        *(sys.executable, "-m", "benchmarks.peers.torch_training"),
        str(tmp_path / "model"),
        json.dumps(dataclasses.asdict(settings) | {"compiled": False}),
        str(workers.threads()),
    )
    peer = workers.Worker([*arguments], tmp_path / "log")

    documents = sources.documents("python", vocab_size=config.vocab_size)
    data = corpus.make(
        *(tmp_path / "data", documents, ByteTokenizer()),
        vocab_size=config.vocab_size,
        facts={},
    )
    packing = Packing(data, data.split(validation=False), LENGTH, seed=0)
    schedule = optimizer.schedule(settings.learning_rate, steps=STEPS, warmup=100)
    rates = optimizer.rates(schedule, STEPS)
    chosen = optimizer.adamw(schedule)
    state = step.initial_state(params, chosen)
    ours, theirs = [], []
    try:
        for number in range(STEPS):
            batch = packing.batch(number, ROWS)
            state, found = step.train_step(model, chosen, state, *batch)
            ours.append(float(found.loss))
            reply = peer.call(
                tokens=batch.tokens.tolist(),
                segment_ids=batch.segment_ids.tolist(),
                rate=float(rates[number]),
            )
            theirs.append(reply["loss"])
    finally:
        peer.stop()
    apart = np.abs(np.subtract(ours, theirs))
    at_the_end = abs(np.mean(ours[-LAST:]) - np.mean(theirs[-LAST:]))
    print(f"\nloss {ours[0]:.4f} -> {ours[-1]:.4f}, torch's {theirs[-1]:.4f}; apart by")
    print(f"{apart[:BEFORE].max():.2g} at most in the first {BEFORE} steps, then by")
    print(f"{apart.max():.2g}; the means of the last {LAST} by {at_the_end:.2g}")
    assert ours[-1] < ours[0] - 2.0
    assert apart[:BEFORE].max() <= 1e-4
    assert at_the_end <= 1e-3
