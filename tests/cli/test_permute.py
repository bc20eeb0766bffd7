"""`masksolve permute`: what it prints, and its exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from tests.checkpoint.test_adaprune import folder_of  # noqa: E402
from tests.cli.conftest import Run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = folder_of(tmp_path / "in")
    capsys.readouterr()  # transformers shows bars
    return folder


def test_permute_then_prune(run: Run, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    code, out, err = run("permute", source, "--pattern", "1:2", "--output", target)
    assert (code, err) == (0, "")
    lines = [line.split("│")[1:-1] for line in out.splitlines() if "model.layers.1.mlp.down_proj" in line]
    assert [cell.strip() for cell in lines[0][1:3]] == ["hidden", "32"]
    assert lines[0][3].strip() < lines[0][4].strip()
    assert f"{target}: 4 of 4 axes reordered for 1:2 (keeps 1 of every 2, zeroes 1), mean gain " in out
    assert "on random tokens the outputs of blocks change by " in out
    code, out, _ = run("prune", target, "--pattern", "1:2", "--output", tmp_path / "sparse", "--workers", 1)
    assert code == 0
    assert run("check", tmp_path / "sparse", "--workers", 1)[0] == 0


def test_axes_that_are_left_are_named(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, _ = run("permute", source, "--pattern", "4:8", "--output", tmp_path / "out", "--time-limit", 5)
    assert code == 0
    assert "8 lines are fewer than two stripes of 8" in out
    assert ": 2 of 4 axes reordered for 4:8 (" in out


def test_bad_input_is_named_on_one_line(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ((source, "--pattern", "1:2", "--output", source), "is the input"),
        ((source, "--pattern", "*=1:2", "--output", tmp_path / "x"), "got '*=1:2'"),
        ((source, "--pattern", "1:2", "--output", tmp_path / "x", "--time-limit", 0), "0.0 is not in the range x>0"),
        ((tmp_path / "none", "--pattern", "1:2", "--output", tmp_path / "x"), "none' does not exist"),
        ((tmp_path / "empty", "--pattern", "1:2", "--output", tmp_path / "x"), "it holds no .safetensors file"),
    ):
        code, out, err = run("permute", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("masksolve: ")
        assert message in err
        assert sorted(tmp_path.rglob("*")) == before


def test_without_torch_the_extra_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import masksolve.checkpoint

    for name in [name for name in sys.modules if name.startswith(("masksolve.torch", "masksolve.checkpoint._permute"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("NoStackError", "permute_checkpoint"):
        monkeypatch.delitem(vars(masksolve.checkpoint), name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run("permute", tmp_path, "--pattern", "1:2", "--output", "out")
    assert code == 2
    assert "needs torch, which is not installed; pip install 'masksolve[torch]'" in err
