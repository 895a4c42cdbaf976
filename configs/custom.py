r"""A config of your own: start from a preset, change what differs.

    python -m minillm_jax.cli.plan --config=configs/custom.py --device=rtx4090
    python -m benchmarks.decode --config=configs/custom.py

As it stands: a 16K context with a 32K cache at the size of `small`, with grouped-query
attention, so that the cache takes a quarter of the memory. Copy this file for another
one; config files are loaded by path and need no package. The same fields can be set
from the command line:

    python -m benchmarks.decode --config=configs/custom.py \
        --config.model.max_seq_len=4096 --config.model.max_kv_cache_len=8192

Where the hardware should decide, a number may be "auto", or "auto:65536" for at most so
much: `max_kv_cache_len`, `decode.batch_size` and the `decode.contexts`.
"""

from minillm_jax.cli import config_files


def get_config():
    """`small` with a longer context; lengths are in tokens."""
    config = config_files.preset("small")

    # The model. What is not set here is the preset's; num_layers, dim_ff, vocab_size,
    # rope_scaling, sliding_window and the others are in minillm_jax/config.py.
    config.model.max_seq_len = 16384  # the longest sequence in training
    config.model.max_kv_cache_len = 32768  # prompt and generated tokens together
    config.model.num_kv_heads = 2  # divides num_heads=8; the cache shrinks with it

    # What `benchmarks.decode` measures.
    config.decode.contexts = (128, 1024, 4096)
    config.decode.new_tokens = 32
    return config
