"""Who does the work: this process, processes on this machine, a Dask cluster, or any executor; all in the same way."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TypeVar

from masksolve._errors import MethodNotInstalledError
from masksolve._inputs import as_count
from masksolve._methods._chunks import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

# A process takes a second to start, in which one that runs prunes about so many bytes.
_BYTES_A_WORKER = 1 << 28
_SECONDS_TO_ANSWER = 10


class WorkerLostError(RuntimeError):
    """A worker ended in the middle of its work: killed, out of memory, or no longer to be reached."""


def workers_for(workers: int | None, nbytes: int) -> int:
    """How many processes work: so many, or, for None, as many as are worth starting, at most one a core."""
    if workers is None:
        return max(1, min(usable_cores(), nbytes // _BYTES_A_WORKER))
    return as_count(workers, "workers", 1)


@contextmanager
def executor_for(workers: int | Executor | None, nbytes: int) -> Iterator[Executor]:
    """Somebody who does the work: an executor as it is, or so many processes; one is a thread of this process.

    None is as many processes as are worth starting for so many bytes.
    """
    if isinstance(workers, Executor):
        yield workers
        return
    count = workers_for(workers, nbytes)
    if count == 1:
        with ThreadPoolExecutor(1) as thread:
            yield thread
        return
    with ProcessPoolExecutor(count, mp_context=_WorkerContext(), initializer=_start_worker) as pool:
        yield pool


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """The workers of a Dask cluster that runs already.

    Parameters
    ----------
    address : str
        Of its scheduler, such as "tcp://10.0.0.1:8786".

    Yields
    ------
    Executor
        What `workers=` takes.

    Raises
    ------
    MethodNotInstalledError
        If Dask is not installed.
    OSError
        If no scheduler answers.

    Examples
    --------
    >>> with dask_executor("tcp://10.0.0.1:8786") as workers:  # doctest: +SKIP
    ...     prune_checkpoint("model/", "sparse/", Pattern(4, 8), workers=workers)
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MethodNotInstalledError(
            f"--scheduler needs {error.name}, which is not installed; pip install 'masksolve[cluster]'"
        ) from None
    with Client(address, timeout=_SECONDS_TO_ANSWER) as client:  # type: ignore[no-untyped-call]
        # What a task returns depends on files too: Dask must not take it for the same as an earlier one.
        yield client.get_executor(pure=False)


def run_all(
    executor: Executor, work: Callable[..., Result], items: Sequence[tuple[Item, tuple[object, ...]]]
) -> Iterator[tuple[Item, Result]]:
    """Call work(*arguments) for every (item, arguments), and yield (item, result) as they are done.

    After an error, what has not begun is cancelled, and what runs is waited for and yielded too.

    Raises
    ------
    WorkerLostError
        If a worker ends in the middle. Executors that can start the work anew, such as Dask's, do so first.
    """
    futures: dict[Future[Result], Item] = {}
    failure: BaseException | None = None
    try:
        for item, arguments in items:
            futures[executor.submit(work, *arguments)] = item
        for future in as_completed(futures):
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                yield futures[future], future.result()
            elif failure is None:
                failure = error
                for waiting in futures:
                    waiting.cancel()
    except BrokenExecutor as error:  # of `submit`
        failure = failure or error
    finally:
        wait([future for future in futures if not future.cancel()])
    if isinstance(failure, _lost_worker_errors()):
        cause = str(failure).replace("\n", " ") or "it no longer answers"
        raise WorkerLostError(f"a worker was lost, killed or out of memory: {cause}") from failure
    if failure is not None:
        raise failure


def _lost_worker_errors() -> tuple[type[BaseException], ...]:
    distributed = sys.modules.get("distributed")
    return (BrokenExecutor, CancelledError, *([] if distributed is None else [distributed.KilledWorker]))


class _WorkerProcess(SpawnProcess):
    def start(self) -> None:
        # Ctrl-C reaches every process of the terminal, in the middle of a worker's imports too: it begins with the
        # signal blocked, as this thread has it.
        if not hasattr(signal, "pthread_sigmask"):  # on Windows
            super().start()
            return
        # It unblocks signals when it starts, so not in between.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerContext(SpawnContext):
    # Not forked: this process has threads, whose locks a child would find held for ever.
    Process = _WorkerProcess


def _start_worker() -> None:
    # The one that gave the work out decides what is still done after an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
