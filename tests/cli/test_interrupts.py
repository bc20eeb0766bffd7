"""Ctrl-C at any moment of a command, closed or full standard streams: one line at most, and a proper exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import processes
from tests.checkpoints import write_shard
from tests.processes import let_interrupts_through

pytestmark = processes.POSIX


def interrupted_at(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command, which gets an interrupt when it imports a module."""
    script = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from masksolve.__main__ import main\n"
        "sys.exit(main())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=let_interrupts_through,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    write_shard(path, {"w": np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)})
    return path


# In the order in which a prune imports them: of the package and of others, in Python and in C.
MODULES = [
    *("masksolve.cli", "numpy", "numpy._core._multiarray_umath", "masksolve._solve", "masksolve.diversity", "click"),
    *("rich.progress", "masksolve.checkpoint", "ml_dtypes", "safetensors", "masksolve.checkpoint._work", "llvmlite"),
]


@pytest.mark.parametrize(
    "module",
    [module if k % 2 == 0 else pytest.param(module, marks=pytest.mark.slow) for k, module in enumerate(MODULES)],
)
def test_an_interrupt_while_a_command_imports_ends_it_with_one_line(module: str, checkpoint: Path) -> None:
    output = checkpoint.with_name("out.safetensors")
    done = interrupted_at(module, "prune", checkpoint, "--pattern", "4:8", "--output", output)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "masksolve: interrupted; nothing was written\n")
    assert sorted(checkpoint.parent.iterdir()) == [checkpoint]


def test_an_interrupt_when_all_is_written_says_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from masksolve import cli

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    output = checkpoint.with_name("out.safetensors")
    monkeypatch.setattr(cli, "_print_pruned", interrupted)
    monkeypatch.setattr(
        sys, "argv", ["masksolve", "prune", str(checkpoint), "--pattern", "4:8", "--output", str(output)]
    )
    assert cli.main() == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"masksolve: interrupted; {output} is written, and complete"
    assert output.exists()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no groups of processes")
def test_ctrl_c_reaches_workers_that_are_still_importing_without_a_word_of_theirs(checkpoint: Path) -> None:
    """They are in the group of the command, as in a terminal; the last worker starts when the first has work."""
    folder = checkpoint.parent / "hooks"
    folder.mkdir()
    # A worker says that it has begun, and takes its time to import the rest.
    (folder / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if '--multiprocessing-fork' in sys.argv or 'spawn_main' in ' '.join(sys.orig_argv):\n"
        f"    pathlib.Path({str(folder)!r}, 'begun').touch()\n"
        "    time.sleep(2)\n"
    )
    command = [sys.executable, "-m", "masksolve", "prune", checkpoint, "--pattern", "4:8", "--workers", "2"]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(checkpoint.with_name("out.safetensors"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=let_interrupts_through,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )
    while not (folder / "begun").exists():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err == "masksolve: interrupted; nothing was written\n"


def shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "masksolve", *map(str, arguments)]
    command = f'exec "$@" {redirection}'
    return subprocess.run(["sh", "-c", command, "sh", *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "redirection",
    [
        ">&-",
        pytest.param("<&- >&-", marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", marks=pytest.mark.slow),
        "<&- >&- 2>&-",
    ],
)
def test_a_command_whose_standard_streams_are_closed_does_its_work(redirection: str, checkpoint: Path) -> None:
    output = checkpoint.with_name("out.safetensors")
    done = shell(redirection, "prune", checkpoint, "--pattern", "4:8", "--output", output, "--workers", 2)
    assert done.returncode == 0
    assert re.fullmatch(r"(pruned w: [0-9.]+%, optimal\n)?", done.stderr)
    assert shell(redirection, "check", output, "--pattern", "4:8").returncode == 0
    assert shell(redirection, "check", checkpoint, "--pattern", "4:8").returncode == 1
    assert shell(redirection, "check", output.with_name("none"), "--pattern", "4:8").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_standard_output_that_takes_nothing_more_is_told(checkpoint: Path) -> None:
    done = shell(">/dev/full", "methods")
    assert done.returncode == 2
    assert done.stderr == "masksolve: [Errno 28] No space left on device\n"
    output = checkpoint.with_name("out.safetensors")
    done = shell(">/dev/full", "prune", checkpoint, "--pattern", "4:8", "--output", output)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"masksolve: [Errno 28] No space left on device; {output} is written, and complete"


def test_a_standard_output_that_nobody_reads_is_no_check_that_failed(checkpoint: Path) -> None:
    output = checkpoint.with_name("out.safetensors")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        runs = ["prune", checkpoint, "--pattern", "4:8", "--output", output], ["check", output, "--pattern", "4:8"]
        for arguments in (*runs, ["--help"]):
            command = [sys.executable, "-m", "masksolve", *map(str, arguments)]
            done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
            assert done.returncode == 141
            assert re.fullmatch(r"(pruned w: [0-9.]+%, optimal\n)?", done.stderr)
    assert shell("", "check", output, "--pattern", "4:8").returncode == 0


def test_a_file_that_cannot_be_opened_is_not_called_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from masksolve import Pattern
    from masksolve.checkpoint import CheckpointError, plan_checkpoint

    circle = checkpoint.with_name("circle.safetensors")
    circle.symlink_to(circle.name)
    with pytest.raises(CheckpointError, match=r"circle\.safetensors cannot be read: Too many levels of symbolic links"):
        plan_checkpoint(circle, [Pattern(2, 4)])
    # Root may read everything, whatever a file's mode.
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == checkpoint:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"in\.safetensors cannot be read: Permission denied"):
        plan_checkpoint(checkpoint, [Pattern(2, 4)])
