"""Numbers that are left to the planner: "auto", or "auto:64" for at most 64."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from minillm_jax import validation

_RULE = 'must be a whole number, "auto", or "auto:64" for at most 64'
_DIGITS = 30  # Python reads no more than 4300; no bound has as many as these


@dataclasses.dataclass(frozen=True)
class Auto:
    """The largest number that fits, up to a cap."""

    cap: int

    def choose(self, largest: int, *, least: int = 1) -> int:
        """Of a largest that fits; the least there can be where nothing does."""
        return max(least, min(self.cap, largest))


class Number:
    """A rule of a field: a whole number from 1 to a bound, or automatic."""

    def __init__(self, bound: int):
        self._bound = bound

    def problem(self, value: int | str) -> str | None:
        """The rule that `value` breaks."""
        if isinstance(value, str) and not _is_automatic(value):
            return _RULE
        try:
            parse("", value, self._bound)
        except validation.ConfigError as error:
            return str(error).split(": ", 1)[1]
        return None


def parse(name: str, value: Any, bound: int) -> int | Auto:
    """An argument that is a whole number from 1 to `bound`, or automatic.

    Raises:
      ConfigError: for anything else, with the argument's name.
    """
    bounds = validation.Range(1, bound)
    if not isinstance(value, str):
        return validation.whole_number(name, value, bounds)
    if not _is_automatic(value):
        raise validation.ConfigError(f"{name}={validation.shown(value)}: {_RULE}")
    _, _, cap = value.partition(":")
    return Auto(validation.whole_number(name, _int(cap), bounds) if cap else bound)


def from_text(text: str) -> int | str:
    """What a command line was given, for `parse`: a whole number, or words."""
    return _int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def _is_automatic(text: str) -> bool:
    return re.fullmatch(r"auto(:\d+)?", text) is not None


def _int(digits: str) -> int:
    """Of as many digits as tell that a number is out of bounds."""
    return int(digits[:_DIGITS])


def largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to `bound` that fits, where all smaller ones do; or 0."""
    low, high = 0, 1
    while high <= bound and fits(high):
        low, high = high, 2 * high
    high = min(high, bound + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
