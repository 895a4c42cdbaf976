"""Between ml_collections' config files and the library's frozen configs.

A config file's `get_config()` starts from `preset(name)` and changes fields. Its
sections become frozen once, in `model_config`, `decode_settings`, `compare_settings`
and `train_settings`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from ml_collections import config_dict

from minillm_jax import validation
from minillm_jax.config import (
    MAX_POSITIONS,
    ConfigError,
    Configs,
    ModelConfig,
    Tokens,
)
from minillm_jax.planning import automatic, memory, workload
from minillm_jax.planning.devices import Device
from minillm_jax.training.settings import MOST_ROWS, TrainSettings

_Section = TypeVar("_Section")
_TIMES = validation.Range(1, 100_000)
# A field of the model that may be "auto"; it becomes a number in `model_config`.
_LONGEST = "max_kv_cache_len"


@validation.checked_fields()
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """`config.decode`: what `benchmarks.decode` measures.

    "auto", or "auto:64" for at most 64, is the most that fits the device.
    """

    batch_size: Annotated[int | str, automatic.Number(MOST_ROWS)] = 1
    # Tokens a row holds when a measurement ends, one measurement each.
    contexts: tuple[int | str, ...] = ()
    # Generated tokens of each repeat; the prefill gives the first of them.
    new_tokens: Annotated[int, validation.Range(2, 2**20)] = 32
    # None = context - new_tokens; a number replaces `contexts` by one measurement.
    prompt_tokens: Annotated[int | None, Tokens] = None
    # Tokens the cache is made for; None = the smallest power of two that holds them.
    capacity: Annotated[int | None, Tokens] = None
    repeats: Annotated[int, _TIMES] = 5
    compare_no_cache: bool = True  # also decode by full forwards
    json_path: str | None = None  # also write the JSON object to this file
    plot_path: str | None = None  # also draw rates and memory into this PNG file

    def measured_contexts(self) -> tuple[int, ...]:
        """The contexts to measure, tokens; raises ConfigError if one is too short.

        Nothing may be automatic any more.
        """
        if self.prompt_tokens is not None:
            return (self.prompt_tokens + self.new_tokens,)
        contexts = tuple(int(context) for context in self.contexts)
        return _checked_contexts(contexts, self.new_tokens)


@validation.checked_fields()
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """`config.compare`: what `benchmarks.compare` measures, beside which programs."""

    peers: tuple[str, ...] = ()  # by name; none = all there are
    batch_sizes: tuple[int, ...] = (1, 8)
    # Tokens a row holds when a measurement ends, one measurement each.
    contexts: tuple[int, ...] = ()
    # Generated tokens of each repeat; the prefill gives the first of them.
    new_tokens: Annotated[int, validation.Range(2, 2**20)] = 32
    repeats: Annotated[int, _TIMES] = 5
    json_path: str | None = None  # also write the JSON object to this file
    plot_path: str | None = None  # also draw the decode rates into this PNG file

    def measured_contexts(self) -> tuple[int, ...]:
        """The contexts to measure, tokens; raises ConfigError if one is too short."""
        return _checked_contexts(self.contexts, self.new_tokens)


def _checked_contexts(contexts: tuple[int, ...], new_tokens: int) -> tuple[int, ...]:
    for context in contexts:
        if context <= new_tokens:
            raise ConfigError(
                f"contexts={contexts}: each must exceed new_tokens={new_tokens}, for a "
                f"prompt comes first; write {4 * new_tokens}"
            )
    if not contexts:
        raise ConfigError("contexts=(): needs at least one, such as (128,)")
    return contexts


def preset(name: str) -> Any:
    """The ConfigDict of a preset, every field open to the command line.

    Raises:
      ConfigError: if there is no such preset.
    """
    model = Configs.by_name(name)
    contexts = (128, model.max_seq_len)
    both = (128, min(1024, model.max_kv_cache_len))
    return config_dict.ConfigDict(
        {
            "model": model_section(model.given()),
            # A Hugging Face folder, whose config and weights take the section's place.
            "model_path": config_dict.placeholder(str),
            "decode": _section(DecodeSettings, {"contexts": contexts}),
            "compare": _section(CompareSettings, {"contexts": both}),
            "train": _section(TrainSettings, {}),
        }
    )


def model_section(given: dict[str, Any]) -> Any:
    """The `model` section of a ConfigDict, from the fields that are given."""
    return config_dict.ConfigDict(_section(ModelConfig, given))


def model_config(config: Any, device: str | Device = "this") -> ModelConfig:
    """The `model` section; raises ConfigError, with the section's name before it.

    A `max_kv_cache_len` of "auto" or "auto:65536" is the longest cache of which a row
    fits the device.
    """
    values = _values(config, "model")
    if isinstance(values.get(_LONGEST), str):
        return _with_longest_cache(values, memory.find_device(device))
    return _frozen(ModelConfig, values, "model")


def decode_settings(config: Any) -> DecodeSettings:
    """The `decode` section; raises ConfigError, with the section's name before it."""
    return _frozen(DecodeSettings, _values(config, "decode"), "decode")


def compare_settings(config: Any) -> CompareSettings:
    """The `compare` section; raises ConfigError, with the section's name before it."""
    return _frozen(CompareSettings, _values(config, "compare"), "compare")


def train_settings(config: Any) -> TrainSettings:
    """The `train` section; raises ConfigError, with the section's name before it."""
    return _frozen(TrainSettings, _values(config, "train"), "train")


def _section(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """Every field of a checked dataclass; those that may be None as placeholders.

    A plain None could not be overridden by a number from the command line.
    """
    section, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        default = given.get(field.name, field.default)
        if kind == int | str or field.name == _LONGEST:  # else of one type for good
            default = config_dict.FieldReference(default, field_type=object)
        if default is None or default is dataclasses.MISSING:
            plain = config_dict.ConfigDict if dataclasses.is_dataclass(kind) else kind
            default = config_dict.placeholder(plain)
        section[field.name] = default
    return section


def _with_longest_cache(values: Mapping[str, Any], device: Device) -> ModelConfig:
    """The `model` section with the longest cache of which a row fits."""
    name = f"config.model.{_LONGEST}"
    asked = automatic.parse(name, values[_LONGEST], MAX_POSITIONS)
    # What is wrong with other fields is told, whatever the length will be.
    config = _frozen(ModelConfig, {**values, _LONGEST: MAX_POSITIONS}, "model")
    longest = memory.plan_memory(config, device=device).max_context
    if longest == 0:
        shortest = memory.plan_memory(config, context=1, device=device)
        raise ConfigError(f"{name}={values[_LONGEST]}: {shortest.refusal()}")
    assert isinstance(asked, automatic.Auto), "a string is automatic or wrong"
    return workload.of_length(config, asked.choose(longest))


def _values(config: Any, name: str) -> Mapping[str, Any]:
    """The fields of a section."""
    section: Any = config.get(name) if hasattr(config, "get") else None
    values = section.to_dict() if hasattr(section, "to_dict") else section
    if not isinstance(values, Mapping):
        raise ConfigError(f"the config has no section {name!r}; start from a preset")
    return values


def _frozen(cls: type[_Section], values: Mapping[str, Any], name: str) -> _Section:
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError([f"config.{name}.{p}" for p in error.problems]) from None
