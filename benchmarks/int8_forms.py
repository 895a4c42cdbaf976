"""Kernels, or keys and values, in int8: the forms that benchmarks set side by side.

A form is a quantization of the kernels, "kv8" for keys and values in int8, or both,
with a "+" between them: "w8a16+kv8".
"""

from minillm_jax.config import QUANTIZATIONS, ConfigError, ModelConfig

FLOATS, CACHE = "none", "kv8"


def with_form(config: ModelConfig, form: str) -> ModelConfig:
    """A config in that form; raises ConfigError for what is none."""
    for part in form.split("+"):
        if part not in (*QUANTIZATIONS, CACHE):
            known = ", ".join((*QUANTIZATIONS, CACHE))
            raise ConfigError(f"{form!r}: {part!r} is none of {known}")
        field = "cache_dtype" if part == CACHE else "quantization"
        config = config.replace(**{field: "int8" if part == CACHE else part})
    return config
