"""How much is measured: all of it on an accelerator, or tiny shapes anywhere."""

from typing import NamedTuple

from minillm_jax import testing
from minillm_jax.config import Configs, ModelConfig


class Scale(NamedTuple):
    """Shapes and repeats of every part."""

    configs: dict[str, ModelConfig]  # by preset
    batch_sizes: tuple[int, ...]  # of decode, at `context`
    context: int  # tokens a row holds at the end
    long_context: int  # the same, at batch size 1
    prompts: tuple[int, ...]  # tokens
    prefill_chunks: tuple[int, ...]  # tokens of a call
    steps: int  # of a decode chunk
    chunks: int  # enqueued one after the other in a repeat
    repeats: int
    probe_bytes: int  # read and copied for the memory's ceiling
    probe_size: int  # of the square matrices for that of products


def full() -> Scale:
    """For a data-centre GPU: the four presets, in bfloat16."""
    longest = {"max_seq_len": 8192, "max_kv_cache_len": 16384, "prefill_chunk": 2048}
    presets = {name: Configs.by_name(name).replace(**longest) for name in Configs.names}
    return Scale(
        configs={
            name: preset.replace(dtype="bfloat16") for name, preset in presets.items()
        },
        batch_sizes=(1, 8, 32),
        context=1024,
        long_context=8192,
        prompts=(512, 2048, 8192),
        prefill_chunks=(512, 2048),
        steps=16,
        chunks=8,
        repeats=5,
        probe_bytes=2 << 30,
        probe_size=8192,
    )


def tiny() -> Scale:
    """For a test of the suite itself, on a CPU."""
    config = testing.tiny_config(
        vocab_size=256, max_seq_len=128, max_kv_cache_len=512, head_dim=8
    )
    return Scale(
        configs={name: config for name in Configs.names},
        batch_sizes=(1, 2),
        context=32,
        long_context=64,
        prompts=(16, 32),
        prefill_chunks=(8, 16),
        steps=4,
        chunks=2,
        repeats=2,
        probe_bytes=1 << 20,
        probe_size=64,
    )
