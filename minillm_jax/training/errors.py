"""What can go wrong with a training run, apart from its config."""


class DataError(ValueError):
    """Data that cannot be trained on; names the file and what is wrong with it."""


class TrainingError(RuntimeError):
    """A run that cannot go on; says at which step, and what there is of it."""
