"""Numbers that are left to the planner: "auto", or "auto:64" for at most 64."""

import dataclasses
from collections.abc import Callable
from typing import Any

from minillm_jax import validation


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
    word, _, cap = value.partition(":")
    if word != "auto" or (":" in value and not cap.isdecimal()):
        raise validation.ConfigError(
            f'{name}={validation.shown(value)}: must be a whole number, "auto", or '
            f'"auto:64" for at most 64'
        )
    return Auto(validation.whole_number(name, int(cap), bounds) if cap else bound)


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
