"""A Dask cluster of separate processes does the same work, and survives the loss of a worker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from masksolve import MethodNotInstalledError, NotInstalledError, Pattern
from masksolve.checkpoint import WorkerLostError, _executors, check_checkpoint, dask_executor, prune_checkpoint
from tests import processes
from tests.checkpoints import contents, write_shard, write_sharded

distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")

# The library's own threads and sockets end when they like.
pytestmark = pytest.mark.filterwarnings("default")

PATTERN = Pattern(3, 8)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:
        yield cluster


def large_enough_to_interrupt(path: Path) -> Path:
    rng = np.random.default_rng(0)
    write_shard(path, {f"w{i}": rng.standard_normal((128, 256), dtype=np.float32) for i in range(20)})
    return path


def test_a_cluster_gives_the_same_bytes(cluster: Any, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    prune_checkpoint(source, tmp_path / "here", PATTERN, masks=tmp_path / "here.masks")
    with dask_executor(cluster.scheduler_address) as executor:
        report = prune_checkpoint(source, tmp_path / "there", PATTERN, masks=tmp_path / "there.masks", workers=executor)
        checks = check_checkpoint(tmp_path / "there", PATTERN, workers=executor).tensors
    assert report.optimal
    assert all(check.problem is None for check in checks)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert contents(tmp_path / "there.masks") == contents(tmp_path / "here.masks")


def test_no_weight_passes_through_the_scheduler(cluster: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    write_shard(source, {"w": np.random.default_rng(0).standard_normal((2048, 2048))})
    with dask_executor(cluster.scheduler_address) as executor:
        sizes: list[int] = []
        submit = executor.submit

        def measured(work: Any, *arguments: Any) -> Any:
            sizes.append(len(distributed.protocol.pickle.dumps((work, arguments))))
            future = submit(work, *arguments)
            future.add_done_callback(lambda done: sizes.append(len(distributed.protocol.pickle.dumps(done.result()))))
            return future

        executor.submit = measured  # type: ignore[method-assign]
        prune_checkpoint(source, tmp_path / "out.safetensors", PATTERN, workers=executor)
    assert len(sizes) >= 8
    assert max(sizes) < 5000


@processes.POSIX
def test_a_worker_killed_in_the_middle_is_made_up_for(cluster: Any, tmp_path: Path) -> None:
    source = large_enough_to_interrupt(tmp_path / "in.safetensors")
    prune_checkpoint(source, tmp_path / "here.safetensors", PATTERN, method="flow")
    victims = [cluster.workers[0].pid]

    def kill_once(phase: str, done: int, total: int) -> None:
        if phase == "pruning" and done > total / 4 and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    with dask_executor(cluster.scheduler_address) as executor:
        prune_checkpoint(
            source, tmp_path / "there.safetensors", PATTERN, method="flow", workers=executor, on_progress=kill_once
        )
    assert not victims
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_a_lost_scheduler_ends_the_run_which_is_resumed_without_it(tmp_path: Path) -> None:
    source = large_enough_to_interrupt(tmp_path / "in.safetensors")
    prune_checkpoint(source, tmp_path / "here.safetensors", PATTERN, method="flow")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:
        closed = []

        def close_once(phase: str, done: int, total: int) -> None:
            if phase == "pruning" and done > total / 4 and not closed:
                closed.append(True)
                cluster.close()

        with dask_executor(cluster.scheduler_address) as executor, pytest.raises(WorkerLostError) as caught:
            prune_checkpoint(
                source, tmp_path / "out.safetensors", PATTERN, method="flow", workers=executor, on_progress=close_once
            )
    assert "`resume=True` continues" in caught.value.__notes__[0]
    prune_checkpoint(source, tmp_path / "out.safetensors", PATTERN, method="flow", resume=True)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


class Failing(ThreadPoolExecutor):
    """Its work fails in code of this module."""

    def __init__(self, module: str) -> None:
        super().__init__(1)
        self.scope = {"__name__": module}
        exec("def work(): raise TypeError('cannot unpack')", self.scope)


@pytest.mark.parametrize(
    ("module", "expected"), [("distributed.cfexecutor", WorkerLostError), ("masksolve.checkpoint._work", TypeError)]
)
def test_an_error_in_dask_is_a_lost_worker(module: str, expected: type[Exception]) -> None:
    with Failing(module) as executor, pytest.raises(expected, match="cannot unpack"):
        list(_executors.run_all(executor, executor.scope["work"], [(0, ())]))


@contextmanager
def started(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program of Dask's, which is killed at the end."""
    command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "lost", ["no worker", *(pytest.param(lost, marks=pytest.mark.slow) for lost in ("the worker", "the scheduler"))]
)
def test_a_cluster_that_does_not_work_ends_the_command_with_a_line(lost: str, tmp_path: Path) -> None:
    source = large_enough_to_interrupt(tmp_path / "in.safetensors")
    with ExitStack() as stack:
        scheduler = stack.enter_context(started("dask_scheduler", "--port", "0", "--host", "127.0.0.1"))
        assert scheduler.stderr is not None
        found = (re.search(r"Scheduler at: +(tcp://\S+)", line) for line in scheduler.stderr)
        address = next(match[1] for match in found if match)
        victim = scheduler
        if lost != "no worker":
            worker = stack.enter_context(started("dask_worker", address, "--no-nanny", "--nthreads", "1"))
            victim = worker if lost == "the worker" else scheduler
        command = [sys.executable, "-m", "masksolve", "prune", str(source), "--pattern", "3:8", "--method", "lp"]
        command += ["--output", str(tmp_path / "out.safetensors"), "--scheduler", address, "--timeout", "5"]
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        assert process.stderr is not None
        if lost != "no worker":
            assert process.stderr.readline().startswith("pruned w")
            victim.kill()
        *before, last = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2
    before = [line for line in before if not line.startswith("pruned w")]
    if lost == "the scheduler":
        assert before == []
        assert last.startswith("masksolve: a worker was lost, killed or out of memory: it no longer answers; ")
    else:
        assert before == [f"the cluster at {address} has no worker; waiting for one, for 5 seconds at most"]
        assert last.startswith(f"masksolve: the cluster at {address} has had no worker for 5 seconds; start workers")
    assert last.endswith("the same with --resume continues") == (lost != "no worker")


def test_workers_that_come_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sharded(tmp_path / "in")
    monkeypatch.setattr(_executors, "_SECONDS_TO_THE_WARNING", 0.1)
    warned: list[str] = []
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:

        def warn(text: str, *arguments: object) -> None:
            warned.append(text % arguments)
            cluster.scale(1)

        monkeypatch.setattr(_executors._logger, "warning", warn)
        with dask_executor(cluster.scheduler_address, timeout=120) as executor:
            prune_checkpoint(source, tmp_path / "there", PATTERN, workers=executor)
    assert warned[0].endswith("has no worker; waiting for one, for 120 seconds at most")
    prune_checkpoint(source, tmp_path / "here", PATTERN)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_executors, "_SECONDS_TO_ANSWER", 0.5)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"), dask_executor("tcp://127.0.0.1:9"):
        pass


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = r"a Dask cluster needs distributed, which is not installed; pip install 'masksolve\[cluster\]'"
    with pytest.raises(NotInstalledError, match=words) as caught, dask_executor("tcp://127.0.0.1:9"):
        pass
    assert not isinstance(caught.value, MethodNotInstalledError)
