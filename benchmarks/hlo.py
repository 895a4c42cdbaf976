"""What a compiled function will do, read off the text of its optimised HLO.

A kernel is counted where XLA on a GPU launches one: an operation outside of a fusion
that computes or moves something. Loops count once per turn where XLA knows how many
there are, and of a conditional the dearest branch.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

# Operations that start nothing: they name, pass on or wait for what is there.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota"),
}
# What may give an array of a cache leaf's shape without copying it.
_IN_PLACE = {"dynamic-update-slice", "scatter", "while", "call", "conditional"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
_OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<shape>\(.*?\)|\S+) (?P<name>[a-z][\w-]*)\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')  # of XLA for TPU
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Operation(NamedTuple):
    """One line of a computation."""

    name: str  # "fusion", "custom-call", ...
    shape: str  # of its result, as written
    line: str

    def called(self, attribute: str) -> str | None:
        """The computation that `attribute` names, such as "calls" or "body"."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.line)
        return found.group(1) if found else None

    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        several = re.search(r"\bbranch_computations=\{([^}]*)\}", self.line)
        if several:
            return re.findall(r"[\w.-]+", several.group(1))
        two = (self.called("true_computation"), self.called("false_computation"))
        return [name for name in two if name]


def _one(operation: Operation) -> int:
    return 1


def _cycles(operation: Operation) -> int:
    found = _ESTIMATE.search(operation.line)
    return int(found.group(1)) if found else 0


class Module:
    """The computations of an HLO text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.entry, current = "", []
        for line in text.splitlines():
            header = re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line)
            if header:
                current = self.computations[header.group(2)] = []
                self.entry = header.group(2) if header.group(1) else self.entry
            elif found := _OPERATION.match(line):
                current.append(Operation(found["name"], found["shape"], line))

    def kernels(self) -> int:
        """Kernels that the whole launches."""
        return self._total(self.entry, _one)

    def loop_kernels(self) -> int:
        """Kernels of one turn of the entry's longest loop: a decode chunk's step."""
        return self._loop_total(_one)

    def cycles(self) -> int:
        """What XLA estimates the whole to take; 0 where it leaves no estimates."""
        return self._total(self.entry, _cycles)

    def loop_cycles(self) -> int:
        """The same of one turn of the entry's longest loop."""
        return self._loop_total(_cycles)

    def _loop_total(self, cost: Callable[[Operation], int]) -> int:
        loops = [
            self._total(operation.called("body") or "", cost)
            for operation in self.computations[self.entry]
            if operation.name == "while"
        ]
        return max(loops, default=0)

    def _total(self, computation: str, cost: Callable[[Operation], int]) -> int:
        total = 0
        for operation in self.computations[computation]:
            name = operation.name
            if name == "while":
                turns = _TURNS.search(operation.line)
                body = self._total(operation.called("body") or "", cost)
                total += body * (int(turns.group(1)) if turns else 1)
            elif name == "conditional":
                branches = operation.branches()
                total += max((self._total(b, cost) for b in branches), default=0)
            elif name == "call":
                total += self._total(operation.called("to_apply") or "", cost)
            elif name not in _FREE and not name.endswith("-done"):
                total += cost(operation)  # what runs beside the rest has start and done
        return total

    def waits(self) -> int:
        """Conditionals, each of which may have to ask the host."""
        found = [o for body in self._run() for o in body if o.name == "conditional"]
        return len(found)

    def copies(self, dims: tuple[int, ...]) -> list[str]:
        """Operations that make a new array of these dimensions, wherever they run.

        Not those into a memory of their own, S(1) in the text, which a TPU does ahead.
        """
        wanted = ",".join(map(str, dims))
        return [
            operation.name
            for body in self._run()
            for operation in body
            if _ARRAY.match(operation.shape)
            and operation.shape.split("[", 1)[1].split("]", 1)[0] == wanted
            and operation.name not in _FREE | _IN_PLACE
            and not operation.name.endswith(("-start", "-done"))
            and "S(" not in operation.shape
            and not self._writes_in_place(operation)
        ]

    def _run(self) -> list[list[Operation]]:
        """Computations that are run as they are, and not as a part of a fusion."""
        operations = [o for body in self.computations.values() for o in body]
        inner = {o.called("calls") for o in operations} | {
            o.called("to_apply") for o in operations if o.name != "call"
        }
        return [body for name, body in self.computations.items() if name not in inner]

    def _writes_in_place(self, operation: Operation) -> bool:
        """Whether it is a fusion around an update that moves nothing as large."""
        fused = self.computations.get(operation.called("calls") or "", [])
        size = _size(operation.shape)
        whole = {o.name for o in fused if _size(o.shape) == size}
        return bool(whole & _IN_PLACE) and not whole & {"copy", "transpose"}


def _size(shape: str) -> int:
    """Bytes of the largest array in a shape."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(shape)
    ]
    return max(sizes, default=0)
