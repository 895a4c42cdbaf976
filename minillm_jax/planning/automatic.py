"""Numbers that are left to the planner: "auto", or "auto:64" for at most 64."""

import dataclasses
from typing import Any

from minillm_jax import validation


@dataclasses.dataclass(frozen=True)
class Auto:
    """The largest number that fits, up to a cap."""

    cap: int

    def choose(self, largest: int) -> int:
        """Of a largest that fits; 1 where nothing does."""
        return max(1, min(self.cap, largest))


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
