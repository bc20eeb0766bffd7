"""The public face of `masksolve.checkpoint`: its names, and what its reports are."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from masksolve import NotInstalledError, checkpoint
from masksolve.checkpoint import (
    budget_checkpoint,
    check_checkpoint,
    compare_checkpoints,
    pack_checkpoint,
    plan_checkpoint,
    prune_checkpoint,
)
from tests.checkpoints import write_sharded


def test_all_is_the_public_face() -> None:
    assert checkpoint.__all__ == [
        "AnotherRunError",
        "CheckReport",
        "CheckpointBudget",
        "CheckpointError",
        "CheckpointPlan",
        "ChosenTensor",
        "Comparison",
        "PackReport",
        "PackedTensor",
        "PatternPlan",
        "PruneReport",
        "PrunedAs",
        "PrunedTensor",
        "SkippedTensor",
        "TensorCheck",
        "TensorComparison",
        "TensorInfo",
        "TileRecord",
        "WorkerLostError",
        "WorstTile",
        "apply_masks",
        "budget_checkpoint",
        "check_checkpoint",
        "compare_checkpoints",
        "dask_executor",
        "pack_checkpoint",
        "page",
        "plan_checkpoint",
        "prune_checkpoint",
        "read_masks",
        "unpack_checkpoint",
    ]


def test_what_needs_pytorch_is_imported_when_it_is_asked_for() -> None:
    lazily = {"CheckpointAdaPruneReport", "NoStackError", "adaprune_checkpoint", "permute_checkpoint"}
    assert lazily < set(dir(checkpoint)) - set(checkpoint.__all__)
    code = "import sys, masksolve.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'adaprune'"):
        _ = checkpoint.adaprune


def test_without_pytorch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("masksolve.torch", "masksolve.checkpoint._adaprune"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(checkpoint), "adaprune_checkpoint", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(NotInstalledError, match=r"pip install 'masksolve\[torch\]'"):
        _ = checkpoint.adaprune_checkpoint


@pytest.mark.parametrize("name", checkpoint.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(checkpoint, name).__doc__ or "").strip()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("face")
    source = write_sharded(folder / "in")
    return {
        "prune": prune_checkpoint(source, folder / "out", "3:8", direction="rows"),
        "plan": plan_checkpoint(source, ["3:8", "1:128"]),
        "check": check_checkpoint(source, "3:8"),
        "budget": budget_checkpoint(source, 8, 0.4, least=2, most=4),
        "pack": pack_checkpoint(folder / "out", folder / "packed"),
        "comparison": compare_checkpoints(source, folder / "out"),
    }


WORDS = {
    "prune": r"<PruneReport of .*/out: 7 tensors pruned to 3:8 along rows only, 7 skipped, mean kept importance \d\d\.",
    "plan": r"<CheckpointPlan of 14 tensors: 7 fit 3:8>",
    "check": r"<CheckReport: 7 of 7 tensors are bad, the first 'layers\.0\.weight': mask\[0, 0:8\] keeps 8 of 8",
    "budget": r"<CheckpointBudget: 7 tensors, 2 to 4 of 8, 7 skipped, density 0\.3\d+ \(asked for 0\.4\), kept impor",
    "pack": r"<PackReport of .*/packed: 7 tensors, 7 skipped; 36,\d\d\d bytes packed, 50\.\d\d% of 71,\d\d\d>",
    "comparison": r"<Comparison: 7 of 14 tensors differ, and 1 file beside them>",
}


@pytest.mark.parametrize("name", WORDS)
def test_a_report_is_frozen_prints_as_one_line_and_becomes_json(name: str, reports: dict[str, Any]) -> None:
    report = reports[name]
    assert re.match(WORDS[name], repr(report))
    assert "\n" not in repr(report)
    assert len(repr(report)) < 250
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.tensors = ()
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert {field.name for field in dataclasses.fields(report)} <= plain.keys()
    assert len(plain["tensors"]) == len(report.tensors)
    assert plain["tensors"][0]["name"] == report.tensors[0].name


def test_the_dict_of_a_report_repeats_what_the_report_says(reports: dict[str, Any]) -> None:
    prune = reports["prune"]
    plain = prune.to_dict()
    assert (plain["pattern"], plain["direction"], plain["optimal"]) == ("3:8", "rows", True)
    assert plain["mean_kept_importance"] == prune.mean_kept_importance
    assert plain["tensors"][0]["kept_importance"] == prune.tensors[0].kept_importance
    assert plain["worst_tiles"][0]["weights"] == np.array(prune.worst_tiles[0].weights).tolist()
    assert reports["check"].to_dict()["passed"] is False
    budget = reports["budget"]
    plain = budget.to_dict()
    assert plain["kept_importance"] == budget.kept_importance > budget.uniform_kept_importance
    assert plain["budget"]["patterns"].keys() == budget.patterns.keys()
    assert [tensor["to"]["pattern"] for tensor in plain["tensors"]] == [
        layer["pattern"] for layer in plain["budget"]["layers"]
    ]
    assert reports["plan"].to_dict()["misfits"].keys() == {"1:128"}
