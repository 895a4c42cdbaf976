"""Small: 58 M parameters; sequences of 1024 tokens, a cache of 2048.

    python -m benchmarks.decode --config=configs/small.py

On 2 cores of an AMD EPYC, JAX 0.10.2, float32: 250 tokens/s at a context of 128, 196 at
1024 (7.9 and 54.6 times a decode without cache).

Any field can be set behind it, such as --config.model.num_kv_heads=4. The numbers of
the preset are in minillm_jax/config.py.
"""

from minillm_jax.cli import config_files


def get_config():
    """The preset with its benchmark settings; change fields here."""
    config = config_files.preset("small")
    return config
