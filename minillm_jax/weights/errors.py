"""What is wrong with a checkpoint."""

from collections.abc import Iterable

MOST_SHOWN = 1000  # of a message that a damaged file could make endless


class CheckpointError(ValueError):
    """A folder of weights that cannot be used; `problems` lists every reason."""

    def __init__(self, problems: str | Iterable[str], where: object = None):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        shown, left = self.problems[:MOST_SHOWN], len(self.problems) - MOST_SHOWN
        text = "; ".join([*shown, f"and {left} more"] if left > 0 else shown)
        super().__init__(text if where is None else f"{where}: {text}")
