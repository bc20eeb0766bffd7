"""`masksolve pack` and `unpack`: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from masksolve.checkpoint import prune_checkpoint
from tests.checkpoints import contents, write_sharded
from tests.cli.conftest import Run


def test_pack_and_unpack(run: Run, tmp_path: Path) -> None:
    prune_checkpoint(write_sharded(tmp_path / "in"), tmp_path / "out", "2:4")
    report = tmp_path / "report.json"
    code, out, err = run("pack", tmp_path / "out", "--output", tmp_path / "packed", "--report", report, "--workers", 1)
    assert (code, err) == (0, "")
    assert "left dense, says masksolve.json" in out
    assert [line.split("│")[1:5] for line in out.splitlines() if "layers.1.weight" in line] == [
        [" layers.1.weight           ", " 48x64     ", " 2:4     ", "             56.25% "]
    ]
    assert "tensors were identified by masksolve.json" in out
    assert "packed: 7 tensors packed; 71,496 bytes of weights are 44,267 now, 61.92%" in out
    assert json.loads(report.read_text())["tensors"][0]["pattern"] == "2:4"
    code, out, err = run("unpack", tmp_path / "packed", "--output", tmp_path / "again", "--workers", 1)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'again'}: 7 tensors unpacked, 71,496 bytes of weights\n"
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_bad_input_is_named_on_one_line(run: Run, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    prune_checkpoint(source, tmp_path / "out", "3:8")
    assert run("pack", tmp_path / "out", "--output", tmp_path / "packed", "--workers", 1)[0] == 0
    before = contents(tmp_path)
    for arguments, message in (
        (("pack", tmp_path / "out", "--output", tmp_path / "packed"), "exists; name another, or pass --overwrite"),
        (("pack", tmp_path / "packed", "--output", tmp_path / "x"), "packed is packed: it holds values and bits"),
        (("unpack", tmp_path / "out", "--output", tmp_path / "x"), "out is not packed; name a checkpoint that was"),
        (("pack", source, "--output", tmp_path / "x"), "was pruned; give --pattern"),
        (("pack", source, "--pattern", "3:8", "--output", tmp_path / "x"), "no tensor fits the packed form (layers.0."),
        (("pack", tmp_path / "out", "--output", tmp_path / "x", "--report", "x.html"), "is not .json; name it so"),
    ):
        code, out, err = run(*arguments, "--workers", 1)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("masksolve: ")
        assert message in err
        assert contents(tmp_path) == before
