"""The model that comes with the package: Python source, byte by byte, 3.8 M parameters.

    python -m minillm_jax.cli.train --config=configs/python.py --workdir=runs/python
    python -m minillm_jax.cli.generate --workdir=runs/python --prompt="def "

It learns from the source of Python's own standard library: nothing is downloaded. On 2
cores it takes 80 minutes or more, and comes to 0.845 bits per byte of files that it was
not trained on (Python 3.12.1, JAX 0.12.0.1; `python -m benchmarks.bits_per_byte`).
"""

from minillm_jax.cli import config_files


def get_config():
    """A model whose bfloat16 weights are below 8 MB; change fields here."""
    config = config_files.preset("small")

    config.model.vocab_size = 256  # bytes
    config.model.max_seq_len = 512
    config.model.max_kv_cache_len = 1024
    config.model.sliding_window = 512  # what it was trained with, at any length
    config.model.dim_model = 256
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.num_layers = 5
    config.model.dim_ff = 704
    config.model.tie_embeddings = True

    config.model.dtype = "bfloat16"  # to compute in; parameters stay float32

    config.train.steps = 5500  # of 4096 bytes: two times over the data
    config.train.batch_size = 8
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 150
    config.train.eval_every = 500
    config.train.checkpoint_every = 500

    config.decode.contexts = (128, 1024)
    return config
