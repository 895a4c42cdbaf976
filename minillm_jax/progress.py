"""Progress bars on stderr, drawn in terminals and notebooks only."""

import sys

from rich import console, progress


def bar(description: str, total: int) -> progress.Progress:
    """A bar with one task, to be used as a context manager; gone when it is done."""
    stderr = console.Console(stderr=True)
    drawn = sys.stderr is not None and (stderr.is_terminal or stderr.is_jupyter)
    found = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=not drawn,
    )
    found.add_task(description, total=total)
    return found


def advance(shown: progress.Progress, description: str) -> None:
    """One step further, and what is being done now."""
    shown.update(shown.task_ids[0], advance=1, description=description)
