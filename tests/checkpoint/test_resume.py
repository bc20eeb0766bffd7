"""A run that ends anywhere is resumed by the next, and the result is the same to the last byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from masksolve import Pattern
from masksolve.checkpoint import CheckpointError, prune_checkpoint
from masksolve.checkpoint._workspace import Workspace, open_workspace
from tests import processes
from tests.checkpoints import HereExecutor, contents, write_shard, write_sharded
from tests.processes import let_interrupts_through

PATTERN = Pattern(3, 8)


class StopHereError(Exception):
    """Ends a run where a test wants it to."""


def stop_at(call: int) -> HereExecutor:
    """An executor that fails from one of its calls on."""

    def before(number: int) -> None:
        if number >= call:
            raise StopHereError

    return HereExecutor(before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "in")


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The output of a run that nothing interrupts."""
    prune_checkpoint(source, tmp_path / "whole", PATTERN, masks=tmp_path / "whole.masks")
    return {**contents(tmp_path / "whole"), **contents(tmp_path / "whole.masks")}


def outputs(folder: Path) -> dict[str, bytes]:
    return {**contents(folder / "out"), **contents(folder / "masks")}


def prune(tmp_path: Path, **options: object) -> None:
    prune_checkpoint(tmp_path / "in", tmp_path / "out", PATTERN, masks=tmp_path / "masks", **options)  # type: ignore[arg-type]


def workspace(tmp_path: Path) -> Path:
    return tmp_path / ".out.masksolve"


def is_clean(tmp_path: Path) -> bool:
    names = {path.name for path in tmp_path.iterdir()}
    return names <= {"in", "out", "masks", "whole", "whole.masks"}


def test_a_run_that_ends_at_any_unit_is_resumed(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    executor = HereExecutor()
    prune(tmp_path, workers=executor)
    assert outputs(tmp_path) == expected
    for call in range(1, executor.calls, 3):
        with pytest.raises(StopHereError) as caught:
            prune(tmp_path, workers=stop_at(call), overwrite=True)
        assert f"{call} of {executor.calls} parts are done and kept" in caught.value.__notes__[0]
        again = HereExecutor()
        prune(tmp_path, workers=again, resume=True, overwrite=True)
        assert again.calls == executor.calls - call
        assert outputs(tmp_path) == expected
        assert is_clean(tmp_path)


def test_nothing_appears_under_the_names_before_all_is_done(source: Path, tmp_path: Path) -> None:
    seen = []
    prune(tmp_path, on_progress=lambda phase, done, total: seen.append((tmp_path / "out").exists()))
    assert len(seen) > 20
    assert not any(seen)
    assert not (tmp_path / "out").with_name(".out.masksolve").exists()


def test_a_journal_cut_at_any_byte_is_resumed(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(8))
    journal = workspace(tmp_path) / "journal"
    whole = journal.read_bytes()
    for size in range(len(whole) - 1, len(whole) - 900, -97):
        journal.write_bytes(whole[:size])
        with pytest.raises(StopHereError):
            prune(tmp_path, workers=stop_at(0), resume=True)
        assert journal.read_bytes() == whole[: whole[:size].rfind(b"\n") + 1]
    prune(tmp_path, resume=True)
    assert outputs(tmp_path) == expected


def test_the_order_in_which_units_are_done_does_not_matter(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(3) as pool:
        prune(tmp_path, workers=pool)
    assert outputs(tmp_path) == expected
    prune(tmp_path, workers=2, overwrite=True)
    assert outputs(tmp_path) == expected


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_ends_while_files_get_their_names_is_resumed(
    steps: int, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sharded(tmp_path / "out", seed=1)
    done = []

    def ending(step: Callable[..., object]) -> Callable[..., object]:
        def limited(self: Path | Workspace, *arguments: object) -> object:
            # Neither the manifest's renaming nor the first clearing is a step of publishing.
            if self.is_verified() if isinstance(self, Workspace) else self.name != "manifest.json.tmp":
                done.append(self)
                if len(done) > steps:
                    raise StopHereError
            return step(self, *arguments)

        return limited

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "rename"), (Workspace, "clear")):
            patch.setattr(owner, name, ending(getattr(owner, name)))
        with pytest.raises(StopHereError):
            prune(tmp_path, overwrite=True)
    prune(tmp_path, resume=True, overwrite=steps < 3)
    assert outputs(tmp_path) == expected
    assert is_clean(tmp_path)


def end_before_the_last_clearing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the files have their names."""

    def end(self: Workspace) -> None:
        if self.is_verified():
            raise StopHereError
        clear(self)

    clear = Workspace.clear
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "clear", end)
        with pytest.raises(StopHereError):
            prune(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"), [("masks", "masks was"), ("pattern", "pattern was 3:8, now it is 4:8")]
)
def test_other_arguments_than_those_of_what_was_finished_discard_nothing(
    changed: str, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_before_the_last_clearing(tmp_path, monkeypatch)
    (tmp_path / "masks").unlink()
    before = contents(workspace(tmp_path))
    other: dict[str, object] = {"masks": {"masks": tmp_path / "m"}, "pattern": {"pattern": Pattern(4, 8)}}[changed]
    options = {"pattern": PATTERN, "masks": tmp_path / "masks", **other}  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=message):
        prune_checkpoint(source, tmp_path / "out", resume=True, **options)  # type: ignore[arg-type]
    assert contents(workspace(tmp_path)) == before


@pytest.mark.parametrize("removed", [("out",), ("masks",), ("out", "masks")], ids=" and ".join)
def test_what_was_finished_and_removed_before_the_run_ended_is_made_anew(
    removed: tuple[str, ...],
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    end_before_the_last_clearing(tmp_path, monkeypatch)
    for name in removed:
        if name == "out":
            shutil.rmtree(tmp_path / name)
        else:
            (tmp_path / name).unlink()
    if len(removed) == 1:
        with pytest.raises(
            FileExistsError, match=rf"{removed[0]} was finished by an earlier run.* or pass `overwrite=True`"
        ):
            prune(tmp_path, resume=True)
    prune(tmp_path, resume=True, overwrite=len(removed) == 1)
    assert outputs(tmp_path) == expected
    assert is_clean(tmp_path)
    assert "was finished by an earlier run, and has been removed since: it is made again" in caplog.text


def test_what_the_disk_lost_is_written_again(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    executor = stop_at(9)
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=executor)
    (data,) = workspace(tmp_path).glob("data-*")
    first, second = sorted((data / "output").glob("*.safetensors"))[:2]
    spoilt = bytearray(first.read_bytes())
    spoilt[1200] ^= 1
    first.write_bytes(spoilt)
    os.truncate(second, second.stat().st_size // 2)
    (data / "masks.safetensors").write_bytes(bytes((data / "masks.safetensors").stat().st_size))
    prune(tmp_path, resume=True)
    assert outputs(tmp_path) == expected


def test_an_output_that_appears_meanwhile_is_not_replaced(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def intrude(phase: str, done: int, total: int) -> None:
        if phase == "verifying" and done == 0:
            write_sharded(tmp_path / "out", seed=1)

    with pytest.raises(FileExistsError, match="has appeared meanwhile; move it away"):
        prune(tmp_path, on_progress=intrude)
    (tmp_path / "out").rename(tmp_path / "intruder")
    prune(tmp_path, resume=True)
    assert outputs(tmp_path) == expected


DIFFERENT: dict[str, tuple[dict[str, object], str]] = {
    "pattern": ({"pattern": Pattern(4, 8)}, "pattern was 3:8, now it is 4:8"),
    "method": ({"method": "greedy"}, "method was exact, now it is greedy"),
    "exclude": ({"exclude": ("conv*",)}, "exclude was none, now it is conv*"),
    "include": ({"include": ("l*", "c*")}, "include was none, now it is l* c*"),
    "masks": ({"masks": None}, "masks was"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_arguments_are_not_resumed(case: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    before = contents(workspace(tmp_path))
    options: dict[str, object] = {"pattern": PATTERN, "masks": tmp_path / "masks"}
    different, message = DIFFERENT[case]
    with pytest.raises(CheckpointError, match="cannot be resumed") as caught:
        prune_checkpoint(source, tmp_path / "out", resume=True, **{**options, **different})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert contents(workspace(tmp_path)) == before


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"])
def test_a_changed_weight_is_not_resumed_and_is_named(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    content = bytearray((source / name).read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 4] ^= 1
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the input has changed: rows 0:.* of tensor 'layers") as caught:
        prune(tmp_path, resume=True)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "journal"])
def test_a_spoilt_manifest_or_journal_is_named(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    with (workspace(tmp_path) / name).open("r+b") as file:
        file.write(bytes(8))
    with pytest.raises(CheckpointError, match=f"remove it to begin again: {workspace(tmp_path)} is not valid JSON"):
        prune(tmp_path, resume=True)


def test_a_changed_header_is_not_resumed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    shard = source / "model-00003-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"dtype": "F64", "shape": [40, 100]', b'"dtype": "F64", "shape": [100, 40]'))
    assert shard.read_bytes() != content
    with pytest.raises(CheckpointError, match="the input has changed"):
        prune(tmp_path, resume=True)


def test_ctrl_c_while_a_resumed_run_reads_says_what_is_kept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))

    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        prune(tmp_path, resume=True, on_progress=interrupt)
    assert caught.value.__notes__ == ["5 of 16 parts are done and kept; the same with `resume=True` continues"]


def test_a_new_file_in_the_input_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    (source / "notes.txt").write_text("new")
    with pytest.raises(CheckpointError, match=r"the input has changed: notes\.txt"):
        prune(tmp_path, resume=True)


def test_an_unfinished_run_is_neither_forgotten_nor_trampled_on(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    with pytest.raises(FileExistsError, match="`resume=True` continues it, `overwrite=True` discards"):
        prune(tmp_path)
    executor = HereExecutor()
    prune(tmp_path, workers=executor, overwrite=True)
    assert outputs(tmp_path) == expected


def test_resume_without_an_unfinished_run_just_runs(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    prune(tmp_path, resume=True)
    assert outputs(tmp_path) == expected


def test_a_shard_truncated_halfway_is_named_and_resumed_when_it_is_whole_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    shard = source / "model-00003-of-00003.safetensors"
    content = shard.read_bytes()

    def before(call: int) -> None:
        if call == 6:
            shard.write_bytes(content[: len(content) // 2])

    with pytest.raises(CheckpointError, match=r"model-00003.* is truncated: it ends within bytes") as caught:
        prune(tmp_path, workers=HereExecutor(before))
    assert "are done and kept" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError, match=r"model-00003.* is not a whole safetensors file"):
        prune(tmp_path, resume=True)
    shard.write_bytes(content)
    prune(tmp_path, resume=True)
    assert outputs(tmp_path) == expected


def test_a_weight_that_changes_while_it_is_read_is_named(source: Path, tmp_path: Path) -> None:
    shard = source / "model-00003-of-00003.safetensors"

    def before(call: int) -> None:
        if call == 2:
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"the input changed while it was read: .* of tensor 'patch'"):
        prune(tmp_path, workers=HereExecutor(before))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_resumed(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    def before(call: int) -> None:
        if call >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        prune(tmp_path, workers=HereExecutor(before))
    assert "7 of" in caught.value.__notes__[0]
    prune(tmp_path, resume=True)
    assert outputs(tmp_path) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small file system, and only on Linux")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_without_room_is_noticed_before_anything_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(map(len, contents(source).values()))
    told: list[str] = []

    def with_room_for(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    with_room_for(size - 1)
    with pytest.raises(OSError, match=f"no room for {size} bytes: No space left on device"):
        prune(tmp_path, on_progress=lambda phase, done, total: told.append(phase))
    assert told == []
    assert is_clean(tmp_path)
    with_room_for(size)
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(5))
    with_room_for(0)  # the unfinished run has taken it
    prune(tmp_path, resume=True)


def test_a_full_disk_is_noticed_before_the_work_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    write_shard(source, {"w": np.random.default_rng(0).standard_normal((512, 512))})
    with pytest.raises(OSError, match=r"no room for \d+ bytes: No space left on device"):
        prune_checkpoint(source, small_disk / "out.safetensors", PATTERN)
    assert list(small_disk.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="finds what is synchronised in /proc")
def test_unfinished_files_are_on_the_disk_before_a_manifest_names_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronised: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synchronised.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with pytest.raises(StopHereError):
        prune(tmp_path, workers=stop_at(0))
    (data,) = workspace(tmp_path).glob("data-*")
    before = synchronised[: synchronised.index(workspace(tmp_path) / "manifest.json.tmp")]
    assert {data, data / "output", data / "output" / "tokenizer"} <= set(before)
    assert workspace(tmp_path) in synchronised


@pytest.mark.parametrize("output", ["out", "masks"])
def test_two_runs_on_one_output_are_refused(output: str, source: Path, tmp_path: Path) -> None:
    with (
        open_workspace(tmp_path / output),
        pytest.raises(CheckpointError, match=rf"another run is writing .*{output}; wait until it has ended"),
    ):
        prune(tmp_path)
    prune(tmp_path)
    assert is_clean(tmp_path)


def test_a_run_that_begins_as_another_leaves_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: None)  # as if removed right after it was made
    with pytest.raises(CheckpointError, match="another run is writing"), open_workspace(tmp_path / "out"):
        pass


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "masksolve", *map(str, arguments)]


def large_enough_to_interrupt(path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {f"w{index}": rng.standard_normal((128, 512), dtype=np.float32) for index in range(20)}
    write_shard(path, tensors)
    return path


def wait_for_progress(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert process.stderr.readline().startswith("pruned")


def test_the_second_of_two_commands_on_one_output_is_refused(tmp_path: Path) -> None:
    source, output = large_enough_to_interrupt(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    arguments = command("prune", source, "--pattern", "3:8", "--method", "flow", "--output", output)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as first:
        wait_for_progress(first)
        second = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert f"another run is writing {output}" in second.stderr
        first.kill()


@processes.POSIX
def test_ctrl_c_stops_cleanly_and_says_how_to_resume(tmp_path: Path) -> None:
    source, output = large_enough_to_interrupt(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    arguments = command("prune", source, "--pattern", "3:8", "--output", output, "--workers", 2, "--method", "flow")
    with subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=let_interrupts_through,
    ) as process:
        wait_for_progress(process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert last.startswith("masksolve: interrupted; ")
    assert last.endswith("are done and kept; the same with --resume continues")
    assert "Traceback" not in err
    assert not output.exists()


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_worker_that_is_killed_ends_the_run_which_is_resumed(tmp_path: Path) -> None:
    source, output = large_enough_to_interrupt(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    arguments = ["prune", source, "--pattern", "3:8", "--method", "flow", "--output", output, "--workers", 2]
    with subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        wait_for_progress(process)
        workers = [
            pid for pid in children_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker was lost" in err.splitlines()[-1]
    assert "the same with --resume continues" in err.splitlines()[-1]
    journal = (tmp_path / ".out.safetensors.masksolve" / "journal").read_text().splitlines()
    assert len([json.loads(line) for line in journal]) >= 1
    prune_checkpoint(source, output, PATTERN, method="flow", resume=True)
    prune_checkpoint(source, tmp_path / "whole.safetensors", PATTERN, method="flow")
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    source, output = large_enough_to_interrupt(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    arguments = command("prune", source, "--pattern", "3:8", "--method", "flow", "--output", output, "--workers", 2)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        wait_for_progress(process)
        workers = children_of(process.pid)
        process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def kill_again_and_again(kills: int, folder: Path, workers: int, seed: int) -> str:
    """Kill a run, and what resumes it, at random moments; whenever one comes to its end, compare and begin again."""
    source, output = large_enough_to_interrupt(folder / "in.safetensors"), folder / "out.safetensors"
    arguments = command("prune", source, "--pattern", "3:8", "--output", output, "--resume", "--workers", workers)
    start = time.monotonic()
    prune = subprocess.run(arguments, capture_output=True, text=True, check=False)
    longest = time.monotonic() - start
    assert prune.returncode == 0, prune.stderr
    expected = output.read_bytes()
    output.unlink()
    generator = random.Random(seed)
    killed = finished = kept = 0
    while killed < kills or not output.exists():
        if output.exists():
            output.unlink()
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            try:
                # Half of the kills come after the imports.
                process.wait(generator.uniform(0, longest) if killed < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
        if output.exists():
            assert output.read_bytes() == expected
            finished += 1
        elif (folder / ".out.safetensors.masksolve" / "manifest.json").exists():
            kept += 1
    assert sorted(folder.iterdir()) == [source, output]
    return f"{killed} kills, {kept} with work to resume, {finished} results, all the same to the last byte"


def test_three_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    kill_again_and_again(3, tmp_path, workers=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_at_random_moments_change_nothing(workers: int, tmp_path: Path) -> None:
    print(kill_again_and_again(20, tmp_path, workers, seed=1))
