"""The progress bar of AdaPrune, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from masksolve.torch._adaprune_records import PrunedLayer


@contextmanager
def progress_bar(shown: bool, total: int) -> Iterator[Callable[[PrunedLayer], None]]:
    """What to call with each layer that is done; it shows its errors, if anything is to be shown."""
    if not shown:
        yield lambda layer: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError(
            f"progress=True needs {error.name}, which is not installed; pip install 'masksolve[cli]'"
        ) from error
    columns = (
        TextColumn("repairing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda layer: progress.update(
            task, advance=1, description=f"{layer.name}: error {layer.error_before:.2%} -> {layer.error_after:.2%}"
        )
