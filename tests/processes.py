"""Processes of their own for tests: a Python script where nothing is imported yet, a program to interrupt."""

import os
import platform
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

POSIX = pytest.mark.skipif(os.name != "posix", reason="uses the signals, forks or limits of POSIX")
X86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the processors and their instructions are of x86-64"
)
LINUX = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")

# Kinds of processors: 16, 32 and 64 bytes in a register.
EVERY_PROCESSOR = pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512"])


def some_sizes(some: list[int], others: list[int]) -> pytest.MarkDecorator:
    """Parametrise by a list of sizes: some, whose code LLVM compiles in a second or so, and others, which are slow."""
    return pytest.mark.parametrize(
        "sizes", [some, pytest.param(others, marks=pytest.mark.slow)], ids=["some", "others"]
    )


def let_interrupts_through() -> None:
    """Let interrupts reach a new process: background jobs of a shell ignore SIGINT otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(script: str, *arguments: str | Path, stdin: str | None = None, **environment: str) -> str:
    """Return what the script prints; it fails the test if the script fails, prints a warning or takes two minutes."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120, check=False, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def compile_for(processor: str, sizes: list[int], modules: str, *, optimised: bool = True) -> None:
    """Compile for a processor the LLVM IR that a script yields, which knows the `sizes`.

    In a process of its own, for LLVM ends the process where it cannot compile.
    """
    script = f"""
from llvmlite import binding, ir

sizes = {sizes}

def modules():
{textwrap.indent(modules, " " * 4)}

binding.initialize_native_target()
binding.initialize_native_asmprinter()
target = binding.Target.from_default_triple()
machine = target.create_target_machine(cpu={processor!r}, features="", opt={3 if optimised else 0}, jit=True)
for module in modules():
    machine.emit_object(binding.parse_assembly(str(module)))
    print("compiled")
"""
    assert run(script).startswith("compiled\n" * len(sizes))
