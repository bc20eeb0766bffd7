"""Processes of their own for tests: a Python script where nothing is imported yet, a program to interrupt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

POSIX = pytest.mark.skipif(os.name != "posix", reason="uses the signals, forks or limits of POSIX")
LINUX = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


def let_interrupts_through() -> None:
    """What to call in a new process that is to be interrupted: background jobs of a shell ignore SIGINT otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(script: str, *arguments: str | Path, stdin: str | None = None, **environment: str) -> str:
    """What the script prints; it fails the test if the script fails, prints a warning or takes two minutes."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120, check=False, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
