"""Code that the studies share: results that are kept one by one, and processes that make those that are missing."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol


class Named(Protocol):
    """A recipe, by its name."""

    @property
    def name(self) -> str:
        """As rows have it."""
        ...


def path_of(folder: Path, model: str, recipe: Named, seed: int) -> Path:
    """Where the result of a run is kept."""
    return folder / f"{model} {recipe.name} seed {seed}.json".replace(" ", "_").replace(":", "-")


def keep(path: Path, record: object) -> None:
    """Write a result as JSON; one that is there is complete, so that the next start goes on after it."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(path)


def make(work: Callable[..., str], calls: Sequence[tuple[Any, ...]], processes: int, *, alone: bool = False) -> None:
    """Call `work` in several processes, and print the line that each call returns; `alone`, each in one of its own.

    A call that fails stops no other; the first error is raised in the end.
    """
    # Processes that are started afresh: a fork would copy the threads' locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1 if alone else None) as pool:
        futures = {pool.submit(work, *call): call for call in calls}
        for done, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            line = future.result() if error is None else f"FAILED: {error!r} in {futures[future]}"
            print(f"{done}/{len(calls)}  {line}", flush=True)
    for future in futures:
        future.result()
