r"""Xlarge: 6.7 B parameters; sequences of 8192 tokens, a cache of 16384.

    python -m benchmarks.decode --config=configs/xlarge.py

Its weights alone take 27 GB in float32 and 13.5 GB in bfloat16. On 2 cores of an AMD
EPYC, JAX 0.12.0.1, 1.56 tokens/s with a peak of 15.9 GB:

    python -m benchmarks.decode --config=configs/xlarge.py \
        --config.model.dtype=bfloat16 --config.decode.contexts=128 \
        --config.decode.compare_no_cache=False

Any field can be set behind it, such as --config.model.num_kv_heads=4. The numbers of
the preset are in minillm_jax/config.py.
"""

from minillm_jax.cli import config_files


def get_config():
    """The preset with its benchmark settings; change fields here."""
    config = config_files.preset("xlarge")
    return config
