"""`masksolve budget`: a file of patterns that `prune` and `check` take, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from masksolve.checkpoint import budget_checkpoint
from tests.checkpoints import tensors_of, write_shard
from tests.cli.conftest import Run

ODD = 'qu"ote\\[0] *? \x7f\t\u00fc\U0001f600.weight'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "in.safetensors"
    tensors = {
        "layers.0.weight": rng.standard_normal((24, 16)).astype(np.float32),
        ODD: (3 * rng.standard_normal((16, 8))).astype(np.float32),
        "w": (2 * rng.standard_normal((12, 20))).astype(np.float32),
        "layers.w": rng.standard_normal((8, 8)).astype(np.float32) ** 3,
        "tokens.embedding": rng.standard_normal((50, 8)).astype(np.float32),
        "layers.0.bias": np.ones(24, np.float32),
    }
    write_shard(path, tensors)
    return path


@pytest.mark.parametrize("options", [[], ["--direction", "rows", "--most", 3], ["--exclude", "w", "--least", 0]])
def test_the_file_goes_through_prune_and_check(
    options: list[object], run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    file, output = tmp_path / "patterns.toml", tmp_path / "out.safetensors"
    code, out, _ = run("budget", checkpoint, "--m", 4, "--density", 0.45, *options, "--output", file)
    assert code == 0
    given = dict(zip((str(each).removeprefix("--") for each in options[::2]), options[1::2], strict=True))
    expected = budget_checkpoint(checkpoint, 4, 0.45, **given)  # type: ignore[arg-type]
    assert tomllib.loads(file.read_text(encoding="utf-8")) == expected.budget.to_dict()["patterns"]
    assert (
        f"kept importance of all {expected.kept_importance:.2%}; {expected.uniform_kept_importance:.2%} with 1:4" in out
    )
    assert f"density {expected.budget.density:.6g} (asked for 0.45)" in out
    assert "an embedding by its name" in out
    selection = [each for each in options if each in ("--direction", "rows", "--exclude", "w")]
    assert run("prune", checkpoint, "--pattern", file, *selection, "--output", output)[0] == 0
    assert run("check", output, "--pattern", file, *selection)[0] == 0
    pruned = tensors_of(output)
    chosen = {layer.name: layer for layer in expected.budget.layers}
    kept = sum(int((pruned[name] != 0).sum()) for name in chosen)
    assert kept == round(expected.budget.density * sum(layer.size for layer in chosen.values()))
    for name, layer in chosen.items():
        assert np.abs(pruned[name]).sum(dtype=np.float64) == pytest.approx(
            layer.values[layer.pattern.n - expected.budget.least], rel=1e-9
        )


def test_the_report_holds_the_figures(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--m", 4, "--density", 0.45, "--output", tmp_path / "patterns.toml"]
    assert run("budget", checkpoint, *arguments, "--report", report)[0] == 0
    expected = budget_checkpoint(checkpoint, 4, 0.45).to_dict()
    assert {**json.loads(report.read_text()), "seconds": 0} == {**expected, "seconds": 0}


def test_the_file_is_written_whoever_reads_what_is_printed(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from masksolve import cli

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_print_skipped", closed)
    file, report = tmp_path / "patterns.toml", tmp_path / "report.json"
    arguments = ["--m", 4, "--density", 0.45, "--output", file, "--report", report]
    code, _, err = run("budget", checkpoint, *arguments)
    assert (code, err) == (141, "")
    assert tomllib.loads(file.read_text(encoding="utf-8"))
    assert json.loads(report.read_text())


BAD = {
    "no m": (["--density", 0.5], "Missing option '--m'"),
    "m of 0": (["--m", 0, "--density", 0.5], "'--m': 0 is not in the range x>=1"),
    "no density": (["--m", 4], "Missing option '--density'"),
    "density 0": (["--m", 4, "--density", 0], "'--density': 0.0 is not in the range 0<x<=1"),
    "density 1.5": (["--m", 4, "--density", 1.5], "'--density': 1.5 is not in the range 0<x<=1"),
    "density NaN": (["--m", 4, "--density", "nan"], "'--density': nan is not a number"),
    "too small a density": (
        ["--m", 4, "--density", 0.1],
        "a density of 0.1 cannot be met: with 1 to 4 of every 4 kept, it is at least 0.25 and at most 1; ask for one "
        "between them, or for other bounds of n by --least and --most",
    ),
    "too large a density": (["--m", 4, "--density", 0.9, "--most", 2], "it is at least 0.25 and at most 0.5; ask"),
    "bounds": (["--m", 4, "--density", 0.5, "--least", 3, "--most", 2], "got least=3 and most=2"),
    "a large m": (["--m", 64, "--density", 0.5], "no tensor fits groups of 64 (layers.0.weight: 24x16 holds no whole"),
    "a glob": (["--m", 4, "--density", 0.5, "--include", "nope"], "--include 'nope' matches none of the 6 tensor"),
    "another kind of file": (
        ["--m", 4, "--density", 0.5, "--output", "x.json"],
        "the output x.json is not .toml; name",
    ),
    "a report of another kind": (
        ["--m", 4, "--density", 0.5, "--report", "x.html"],
        "the report x.html is not .json; name it so",
    ),
    "no folder": (["--m", 4, "--density", 0.5, "--output", "no/x.toml"], "the output's folder no does not exist"),
    "no input": (["--m", 4, "--density", 0.5, "--direction", "row"], "'row' is not one of 'both', 'rows', 'columns'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_gets_one_line_and_writes_nothing(case: str, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    options, message = BAD[case]
    before = sorted(tmp_path.iterdir())
    output = [] if "--output" in options else ["--output", tmp_path / "patterns.toml"]
    code, out, err = run("budget", checkpoint, *options, *output)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_exists_is_replaced_only_when_asked_and_as_a_whole(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "patterns.toml"
    file.write_text("precious")
    arguments = ["budget", checkpoint, "--m", 4, "--density", 0.5, "--output", file]
    code, _, err = run(*arguments)
    assert code == 2
    assert re.search(r"the output .*patterns.toml exists; name another file, or pass --overwrite", err)
    with monkeypatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", fail)
        code, _, err = run(*arguments, "--overwrite")
    assert code == 2
    assert "No space left on device" in err
    assert file.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == sorted([checkpoint, file])
    assert run(*arguments, "--overwrite")[0] == 0
    assert "layers.0.weight" in file.read_text(encoding="utf-8")
