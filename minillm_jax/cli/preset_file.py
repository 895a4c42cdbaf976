"""The config file behind `--config=small`: a preset, by the name after the colon."""

from minillm_jax.cli import config_files


def get_config(name: str):
    """The same as configs/NAME.py."""
    return config_files.preset(name)
