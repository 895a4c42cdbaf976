"""Progress bars on stderr, drawn in terminals and notebooks only."""

import contextlib
import sys
from typing import Any

from rich import console, progress


def bar(description: str, total: int, done: int = 0) -> progress.Progress:
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
    found.add_task(description, total=total, completed=done)
    return found


def spinner(text: str) -> contextlib.AbstractContextManager[Any]:
    """Something that turns while the block runs, on a terminal only."""
    if sys.stderr is None or not sys.stderr.isatty():
        return contextlib.nullcontext()
    return console.Console(stderr=True).status(text)


def advance(shown: progress.Progress, description: str) -> None:
    """One step further, and what is being done now."""
    shown.update(shown.task_ids[0], advance=1, description=description)
