"""Large: 1.36 B parameters; sequences of 4096 tokens, a cache of 8192.

    python -m benchmarks.decode --config=configs/large.py

On a machine that takes long at 4096 tokens, measure a short context:

    python -m benchmarks.decode --config=configs/large.py --config.decode.contexts=128

On 2 cores of an AMD EPYC, JAX 0.10.2, float32, that gives 7.89 tokens/s, 7.0 times a
decode without cache.

Any field can be set behind it, such as --config.model.num_kv_heads=4. The numbers of
the preset are in minillm_jax/config.py.
"""

from minillm_jax.cli import config_files


def get_config():
    """The preset with its benchmark settings; change fields here."""
    config = config_files.preset("large")
    return config
