"""Medium: 374 M parameters; sequences of 2048 tokens, a cache of 4096.

    python -m benchmarks.decode --config=configs/medium.py

Any field can be set behind it, such as --config.model.num_kv_heads=4. The numbers of
the preset are in minillm_jax/config.py.
"""

from minillm_jax.cli import config_files


def get_config():
    """The preset with its benchmark settings; change fields here."""
    config = config_files.preset("medium")
    return config
