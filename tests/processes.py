"""Run a Python script in a process of its own, where nothing is imported yet."""

import os
import subprocess
import sys
from pathlib import Path


def run(script: str, *arguments: str | Path, stdin: str | None = None, **environment: str) -> str:
    """What the script prints; it fails the test if the script fails, prints a warning or takes two minutes."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120, check=False, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
