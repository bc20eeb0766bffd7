"""The progress bar of AdaPrune, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """One bar for several phases, each with steps of its own."""

    def phase(self, name: str, steps: int) -> Callable[[str], None]:
        """Begin a phase; return the function to call after each of its steps, with the text to show."""


class _Silent:
    def phase(self, name: str, steps: int) -> Callable[[str], None]:
        return lambda text: None


@contextmanager
def progress_bar(shown: bool) -> Iterator[ProgressBar]:
    """Yield a bar on stderr, or one that shows nothing.

    Raises
    ------
    ImportError
        If rich is not installed.
    """
    if not shown:
        yield _Silent()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError(
            f"progress=True needs {error.name}, which is not installed; pip install 'masksolve[cli]'"
        ) from error
    columns = (
        TextColumn("{task.fields[phase]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Layers of a block take different times, so that the speed is estimated over several blocks.
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task("", total=None, phase="")

        class Bar:
            def phase(self, name: str, steps: int) -> Callable[[str], None]:
                # Without it the last state of the previous phase is never drawn.
                progress.refresh()
                progress.reset(task, description="", total=steps, phase=name)
                return lambda text: progress.update(task, advance=1, description=text)

        yield Bar()
