"""Xlarge: 6.7 B parameters; sequences of 8192 tokens, a cache of 16384.

    python -m benchmarks.decode --config=configs/xlarge.py

Its weights alone take 27 GB in float32 and 13.5 GB in bfloat16.

Any field can be set behind it, such as --config.model.num_kv_heads=4. The numbers of
the preset are in minillm_jax/config.py.
"""

from minillm_jax.cli import config_files


def get_config():
    """The preset with its benchmark settings; change fields here."""
    config = config_files.preset("xlarge")
    return config
