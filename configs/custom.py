r"""A config of your own: start from a preset, change what differs.

    python -m benchmarks.decode --config=configs/custom.py

As it stands: a 16K context with a 32K cache at the size of `small`, with grouped-query
attention, so that the cache takes a quarter of the memory. The same fields can be set
from the command line:

    python -m benchmarks.decode --config=configs/custom.py \
        --config.model.max_seq_len=4096 --config.model.max_kv_cache_len=8192

Copy this file for another one; config files are loaded by path and need no package.
"""

from minillm_jax.cli import config_files


def get_config():
    """`small` with a longer context; contexts to measure are in tokens."""
    config = config_files.preset("small")

    config.model.max_seq_len = 16384
    config.model.max_kv_cache_len = 32768  # prompt and generated tokens together
    config.model.num_kv_heads = 2

    config.decode.contexts = (128, 1024, 4096)
    config.decode.new_tokens = 32
    return config
