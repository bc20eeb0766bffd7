"""The library speaks Python, the command its flags."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from masksolve import checkpoint, cli

FOLDER = Path(checkpoint.__file__).parent


def messages() -> Iterator[str]:
    """Every text in the code of `masksolve.checkpoint` that is not a docstring."""
    for path in FOLDER.glob("*.py"):
        if path.name == "_html.py":  # full of style sheets
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and ast.get_docstring(node) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.value


def test_no_message_of_the_library_names_a_flag() -> None:
    # The report holds the command that does the same again.
    of_commands = {"--masks", "--pattern", "--method", "--output", "--direction", "--other-weights", "--"}
    flags = [text for text in messages() if re.search(r"--[a-z]|--$", text)]
    assert set(flags) <= of_commands


def test_every_parameter_that_a_message_names_is_a_parameter_and_has_a_flag() -> None:
    named = {match[1] for text in messages() for match in re.finditer(r"`(\w+)(=True)?`", text)}
    assert {"overwrite", "resume", "other_weights", "exclude", "stack"} <= named
    doors = [getattr(checkpoint, name) for name in checkpoint.__all__ if inspect.isfunction(getattr(checkpoint, name))]
    parameters = {name for door in doors for name in inspect.signature(door).parameters}
    assert named <= parameters
    for name in named - {"target"}:  # without which the command does not get so far
        assert cli._with_flags(f"`{name}`") == f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("pass `overwrite=True`, or name w in `exclude`", "pass --overwrite, or name w in --exclude"),
        ("/runs/overwrite=True/exclude is not `mine=True`", "/runs/overwrite=True/exclude is not `mine=True`"),
    ],
)
def test_the_command_puts_its_flags_where_the_library_names_parameters(said: str, read: str) -> None:
    assert cli._with_flags(said) == read
    assert cli._fail(said, click.ClickException(said)) == 2
