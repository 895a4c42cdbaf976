"""The parts of `benchmarks.gpu_suite`, each measured in a process of its own.

A part is a module with `run(scale, found)`, which yields its results again and again as
they grow: what is there counts, whatever happens next. `found` are those of the parts
before it, by name. The parts of presets are given theirs, too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from minillm_jax.config import Configs


class Part(NamedTuple):
    """A part's module in this folder, and what it may take."""

    module: str
    seconds: int
    preset: str | None = None


class Runner(Protocol):
    """The `run` of a part's module."""

    def __call__(
        self, scale: Any, found: dict[str, Any], *, preset: str = ...
    ) -> Iterator[dict[str, Any]]:
        """Measures; keys have their units."""
        ...


# In the order in which they run: what the later ones are judged by comes first.
PARTS = {
    "correctness": Part("correctness", 120),
    "ceilings": Part("ceilings", 60),
    **{name: Part("presets", 150, name) for name in Configs.names},
    "int8": Part("int8", 120),
    "profiles": Part("profiles", 90),
    "attention": Part("attention", 120),
    "launches": Part("launches", 90),
    "transformers": Part("transformers_peer", 150),
}
