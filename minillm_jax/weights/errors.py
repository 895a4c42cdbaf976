"""What is wrong with a checkpoint."""

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A folder of weights that cannot be used; `problems` lists every reason."""

    def __init__(self, problems: str | Iterable[str], where: object = None):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        text = "; ".join(self.problems)
        super().__init__(text if where is None else f"{where}: {text}")
