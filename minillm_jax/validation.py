"""Checks the fields of a frozen config and reports everything wrong with it at once.

Knows types, ranges, legacy names and spelling; what the fields mean is config.py's.
"""

import dataclasses
import difflib
import functools
import inspect
import operator
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

import numpy as np


class ConfigError(ValueError):
    """An invalid config or argument; `problems` lists every reason, a string each."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclasses.dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number."""

    low: float
    high: float

    def problem(self, value: float) -> str | None:
        """The rule that `value` breaks and the nearest value that keeps it."""
        if self.low <= value <= self.high:
            return None
        bounds = f"must be a number in [{self.low:.12g}, {self.high:.12g}]"
        if value != value:  # NaN
            return bounds
        return f"{bounds}; write {self.low if value < self.low else self.high:.12g}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The allowed values of a string."""

    values: tuple[str, ...]

    def problem(self, value: str) -> str | None:
        """The rule that `value` breaks, with the likeliest value that was meant."""
        if value in self.values:
            return None
        return (
            f"must be one of {', '.join(self.values)}{did_you_mean(value, self.values)}"
        )


_Class = TypeVar("_Class")


def checked_fields(
    derive: Callable[[dict[str, Any]], frozenset[str]] = lambda _: frozenset(),
    contradictions: Callable[[dict, frozenset], list[str]] = lambda v, d: [],
    legacy: Mapping[str, str] = {},
) -> Callable[[type[_Class]], type[_Class]]:
    """Makes a dataclass's `__init__` convert, derive and check its fields.

    Args:
      derive: fills the fields that are None in place; returns their names, which are
        kept in the instance's `derived`.
      contradictions: from the fields that are right on their own, and the names of the
        derived ones, the problems between them.
      legacy: other names of a field -> its name.

    Returns:
      A class decorator. The new `__init__` raises nothing but ConfigError.
    """

    def decorate(cls: type[_Class]) -> type[_Class]:
        generated = cls.__init__

        @functools.wraps(generated)
        def __init__(self, /, **given: Any) -> None:  # noqa: N807
            given, problems = canonical_names(given, legacy, stacklevel=3)
            problems += _unknown_names(cls, given, legacy)
            values, wrong = _converted(cls, given)
            problems += wrong
            derived = derive(values)
            problems += contradictions(values, derived)
            if problems:
                raise ConfigError(problems)
            generated(self, **values)
            object.__setattr__(self, "derived", derived)

        # No annotations, and any name: it converts, and tells itself what is wrong.
        signature = inspect.signature(generated)
        plain = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ]
        plain.append(inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD))
        __init__.__signature__ = signature.replace(parameters=plain)  # pyright: ignore
        __init__.__annotations__ = {}
        del __init__.__wrapped__
        cls.__init__ = __init__  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate


def canonical_names(
    given: dict[str, Any], legacy: Mapping[str, str], *, stacklevel: int = 2
) -> tuple[dict[str, Any], list[str]]:
    """Legacy names replaced by the fields they stand for, with one warning for all.

    Returns:
      The fields, and a problem for each that was given twice with different values.
    """
    fields, problems, used = {}, [], []
    for name, value in given.items():
        target = legacy.get(name, name)
        if target != name:
            used.append(f"{name} -> {target}")
        if target in fields and _text(fields[target]) != _text(value):
            both = f"{shown(fields[target])} and {shown(value)}"
            problems.append(f"{target}: given under two names, as {both}; keep one")
        fields[target] = value
    if used:
        message = f"legacy config names: {', '.join(used)}"
        warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
    return fields, problems


def whole_number(name: str, value: Any, bounds: Range) -> int:
    """An argument as an int; raises ConfigError with its name, value and rule."""
    try:
        number = _to_int(value)
        problem = bounds.problem(number)
        if problem is None:
            return number
    except ValueError as error:
        problem = str(error)
    raise ConfigError(f"{name}={shown(value)}: {problem}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_names(cls: Any, given: Iterable[str], legacy: Iterable[str]) -> list[str]:
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in given if name not in known]
    return [
        f"{name}: unknown field{did_you_mean(name, [*known, *legacy])}"
        for name in unknown
    ]


def _converted(cls: Any, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Each field in its own type, defaults filled in, and the problems met."""
    values, problems = {}, []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        value = given.get(field.name)
        if value is None and field.default is dataclasses.MISSING:
            problems.append(f"{field.name}: missing, and it has no default")
        elif value is None:
            values[field.name] = field.default
        else:
            try:
                values[field.name] = _convert(hints[field.name], value)
            except ValueError as error:
                problems.append(f"{field.name}={shown(value)}: {error}")
    return values, problems


def _convert(hint: Any, value: Any) -> Any:
    """`value` in the type of an annotation; raises ValueError with the broken rule."""
    rules = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rules = typing.get_args(hint)
    for kind in typing.get_args(hint) if type(None) in typing.get_args(hint) else ():
        if kind is not type(None):
            hint = kind
    if dataclasses.is_dataclass(hint):
        return _to_dataclass(hint, value)
    value = _CONVERTERS[hint](value)
    for rule in rules:
        problem = rule.problem(value)
        if problem:
            raise ValueError(problem)
    return value


def shown(value: Any) -> str:
    """`value` as a message shows it: 40 characters at most, whatever it is."""
    text = _text(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _text(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to print whole numbers of over 4300 digits
        if isinstance(value, int):
            return f"a number of about {value.bit_length()} bits"
        return f"a {type(value).__name__} with a number too long to print"


def _to_int(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise ValueError("must be a whole number, not a truth value")
    try:
        return operator.index(value)
    except TypeError:
        whole = isinstance(value, float) and value.is_integer()
        hint = f"; write {int(value)}" if whole else ""
        raise ValueError(f"must be a whole number{hint}") from None


def _to_float(value: Any) -> float:
    numbers = (int, float, np.integer, np.floating)
    if isinstance(value, numbers) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError("must be a number")


def _to_bool(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError("must be True or False")
    return bool(value)


def _to_name(value: Any) -> str:
    """A string; a NumPy dtype or JAX scalar type gives its name."""
    if isinstance(value, (type, np.dtype)):
        try:
            return np.dtype(value).name
        except TypeError:
            pass
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _to_ints(value: Any) -> tuple[int, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()  # of no axis: one number
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_to_int(item) for item in items)


def _to_number(value: Any) -> int | str:
    """A whole number, or the words that stand for one."""
    return value if isinstance(value, str) else _to_int(value)


def _to_numbers(value: Any) -> tuple[int | str, ...]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_to_number(item) for item in items)


def _to_floats(value: Any) -> tuple[float, ...]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_to_float(item) for item in items)


def _to_strings(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(item, str) and item for item in items):
        raise ValueError("must be a non-empty string, or several")
    return tuple(items)


def _to_weights(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of ids to numbers")
    return {_to_int(key): _to_float(number) for key, number in value.items()}


def _to_dataclass(cls: Any, value: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"must be a {cls.__name__} or a mapping of its fields")
    return cls(**value)


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_name,
    int | str: _to_number,
    tuple[int, ...]: _to_ints,
    tuple[int | str, ...]: _to_numbers,
    tuple[float, ...]: _to_floats,
    tuple[str, ...]: _to_strings,
    Mapping[int, float]: _to_weights,
}
