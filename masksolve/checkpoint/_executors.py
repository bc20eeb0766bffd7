"""Run work units on this process, on processes of this machine, on a Dask cluster or on any executor."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import traceback
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
from contextlib import ExitStack, contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from masksolve._cores import usable_cores
from masksolve._errors import NotInstalledError
from masksolve._inputs import as_count
from masksolve.checkpoint._file import CheckpointError

_logger = logging.getLogger("masksolve")
Item = TypeVar("Item")
Result = TypeVar("Result")

# A worker costs a second of CPU time to start and end: imports, and compiled code from the disk. One that runs prunes
# 256 MiB in it, so two are no faster than one below 512 MiB, and on cores that others use too not below 1 GiB.
_BYTES_A_WORKER = 1 << 29
_SECONDS_TO_ANSWER = 10
_LOGS_OF_DASK = ("distributed.client", "distributed.core", "distributed.comm.core")
# A worker that is restarted is away for about two.
_SECONDS_TO_THE_WARNING = 3.0
_SECONDS_BETWEEN_LOOKS = 0.5


class WorkerLostError(RuntimeError):
    """A worker ended in the middle of its work: killed, out of memory, or no longer to be reached."""


def workers_for(workers: int | None, nbytes: int) -> int:
    """Return how many processes work; for None as many as are worth starting, at most one per core."""
    if workers is None:
        return max(1, min(usable_cores(), nbytes // _BYTES_A_WORKER))
    return as_count(workers, "workers", 1)


@contextmanager
def executor_for(workers: int | Executor | None, nbytes: int) -> Iterator[Executor]:
    """Yield an executor: the one that is given, or a number of processes, of which one is a thread of this process.

    None starts as many processes as are worth it for `nbytes` of work.
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
def dask_executor(address: str, *, timeout: float = 60) -> Iterator[Executor]:
    """Use the workers of a Dask cluster that runs already.

    Parameters
    ----------
    address : str
        The address of its scheduler, such as "tcp://10.0.0.1:8786".
    timeout : float
        Seconds without any worker after which work ends with a WorkerLostError. A few seconds without one are logged.

    Yields
    ------
    Executor
        For `workers=`.

    Raises
    ------
    NotInstalledError
        If Dask is not installed.
    CheckpointError
        For an invalid address.
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
        raise NotInstalledError(
            f"a Dask cluster needs {error.name}, which is not installed; pip install 'masksolve[cluster]'"
        ) from None
    with ExitStack() as stack:
        stack.enter_context(_without_errors_of_dask())
        try:
            client = Client(address, timeout=_SECONDS_TO_ANSWER)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise CheckpointError(f"{address!r} is not the address of a scheduler: {error}") from error
        stack.enter_context(client)
        yield stack.enter_context(_Cluster(client, address, timeout))


class _Cluster(Executor):
    """The workers of a Dask cluster. Without any for too long, all work is cancelled, and `lost` says why."""

    def __init__(self, client: Any, address: str, timeout: float) -> None:
        self.lost: str | None = None
        self._client, self._address, self._timeout = client, address, timeout
        # What a task returns depends on files too: Dask must not take it for the same as an earlier one.
        self._executor = client.get_executor(pure=False)
        self._pending: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(work, *arguments, **options)
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(self._forget)
        if self.lost is not None:
            future.cancel()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closing.set()
        # Not for ever: it may be asking a scheduler that is gone.
        self._watcher.join(2 * _SECONDS_BETWEEN_LOOKS)

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._pending.discard(future)

    def _watch(self) -> None:
        """Look for workers every now and then: Dask waits for one without end and says nothing."""
        since, is_logged = time.monotonic(), False
        while not self._closing.wait(_SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            if self._has_workers():
                since, is_logged = now, False
            elif now - since > self._timeout:
                self.lost = (
                    f"the cluster at {self._address} has had no worker for {self._timeout:g} seconds; start workers "
                    "(dask worker ADDRESS), or give them more time with `timeout`"
                )
                with self._lock:
                    pending = list(self._pending)
                for future in pending:
                    future.cancel()
                return
            elif now - since > _SECONDS_TO_THE_WARNING and not is_logged:
                is_logged = True
                _logger.warning(
                    "the cluster at %s has no worker; waiting for one, for %g seconds at most",
                    self._address,
                    self._timeout,
                )

    def _has_workers(self) -> bool:
        try:
            return bool(self._client.nthreads())
        except Exception:  # of Dask or of its sockets: a scheduler that is gone shows in the work that it had
            return True


@contextmanager
def _without_errors_of_dask() -> Iterator[None]:
    """Silence the log of a lost scheduler, which is an error of ours: Dask logs it with tracebacks, and again later."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    loggers = [logging.getLogger(name) for name in _LOGS_OF_DASK]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def run_all(
    executor: Executor, work: Callable[..., Result], items: Sequence[tuple[Item, tuple[object, ...]]]
) -> Iterator[tuple[Item, Result]]:
    """Call work(*arguments) for every (item, arguments), and yield (item, result) as they are done.

    After an error, what has not begun is cancelled, and what runs is waited for and yielded too.

    Raises
    ------
    WorkerLostError
        If a worker ends in the middle. Executors that can start the work again, such as Dask's, do so first.
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
    if isinstance(executor, _Cluster) and executor.lost is not None:
        raise WorkerLostError(executor.lost) from failure
    if failure is not None and (isinstance(failure, _lost_worker_errors()) or _is_raised_by_dask(failure)):
        cause = str(failure).replace("\n", " ") or "it no longer answers"
        raise WorkerLostError(f"a worker was lost, killed or out of memory: {cause}") from failure
    if failure is not None:
        raise failure


def _lost_worker_errors() -> tuple[type[BaseException], ...]:
    distributed = sys.modules.get("distributed")
    return (BrokenExecutor, CancelledError, *([] if distributed is None else [distributed.KilledWorker]))


def _is_raised_by_dask(error: BaseException) -> bool:
    """Return whether Dask's own code failed: it does in any way if a scheduler goes while it hands on a result."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] == "distributed"


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
    # The parent decides what is still done after an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent: a worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
