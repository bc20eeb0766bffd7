"""One-sided masks of a checkpoint: the same laws as for transposable ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import masksolve as ms
from masksolve.checkpoint import CheckpointError, apply_masks, check_checkpoint, plan_checkpoint, prune_checkpoint
from tests.checkpoint.test_sharded import small_bands
from tests.checkpoints import RECORD, contents, tensors_of, write_shard
from tests.tables import spread

OPTIONS: dict[str, Any] = {"stack": ["experts"], "convolution": ["conv"]}


def matrices(name: str, w: np.ndarray) -> np.ndarray:
    """The stack of matrices (..., rows, columns) that a tensor is."""
    return np.moveaxis(w, 2, 0) if name == "conv" else w


def write(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((21, 50)).astype(np.float32),
        "flat": rng.standard_normal((3, 40)).astype(np.float16),
        "high": rng.standard_normal((40, 3)),
        "conv": rng.standard_normal((16, 24, 3)).astype(np.float32),
        "experts": rng.standard_normal((5, 20, 16)).astype(np.float32),
        "bias": rng.standard_normal(40),
    }
    folder.mkdir()
    write_shard(folder / "model.safetensors", tensors)
    return tensors


FITTING = {"rows": {"w", "flat", "conv", "experts"}, "columns": {"w", "high", "conv", "experts"}}


@pytest.mark.parametrize(
    ("method", "bands", "direction"), spread(["exact", "greedy"], ["small", "whole"], FITTING, one_in=2)
)
def test_each_matrix_gets_the_one_sided_mask_of_solve_matrix(
    direction: str, bands: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bands == "small":
        small_bands(monkeypatch)
    before = write(tmp_path / "in")
    report = prune_checkpoint(
        *(tmp_path / "in", tmp_path / "out", "3:8"), direction=direction, method=method, masks=tmp_path / "m", **OPTIONS
    )
    assert {tensor.name for tensor in report.tensors} == FITTING[direction]
    assert report.direction == direction
    after = tensors_of(tmp_path / "out" / "model.safetensors")
    for tensor in report.tensors:
        w, kept = matrices(tensor.name, before[tensor.name]), matrices(tensor.name, after[tensor.name])
        mask = ms.solve_matrix(w, 3, 8, direction=direction, method=method)
        assert np.array_equal(kept, np.where(mask, w, np.zeros_like(w)))
        certificate = ms.certify(w, mask, 3, 8, direction=direction)
        assert tensor.optimal == certificate.optimal == (method == "exact" or certificate.optimal)
        assert tensor.gap == pytest.approx(certificate.gap)
        assert tensor.kept == pytest.approx(certificate.kept)
        # A tile is a group.
        rows, columns = w.shape[-2:]
        groups = rows * -(-columns // 8) if direction == "rows" else columns * -(-rows // 8)
        assert sum(tensor.tile_gaps) == groups * (w.size // (rows * columns))
        assert {(len(tile.mask) > 1, len(tile.mask[0]) > 1) for tile in tensor.worst_tiles} <= {
            (direction == "columns", direction == "rows"),
            (False, False),  # at a ragged edge
        }
    assert f"--direction {direction}" in report.command

    applied = apply_masks(tmp_path / "in", tmp_path / "m", tmp_path / "applied")
    assert applied.direction == direction
    assert "--direction" not in applied.command  # the file says it
    assert contents(tmp_path / "applied") == contents(tmp_path / "out")

    checked = check_checkpoint(tmp_path / "out")
    assert checked.passed
    assert checked.recorded
    assert {(tensor.name, tensor.direction) for tensor in checked.tensors} == {
        (name, direction) for name in FITTING[direction]
    }
    (tmp_path / "out" / RECORD).unlink()
    assert check_checkpoint(tmp_path / "out", "3:8", direction=direction, **OPTIONS).passed
    assert not check_checkpoint(tmp_path / "out", "3:8", **OPTIONS).passed


@pytest.mark.parametrize(("direction", "reason"), [("rows", "along its rows"), ("columns", "along its columns")])
def test_a_matrix_without_a_whole_group_is_skipped(direction: str, reason: str, tmp_path: Path) -> None:
    write(tmp_path / "in")
    (plan,) = plan_checkpoint(tmp_path / "in", ["3:8"], direction=direction, **OPTIONS).plans
    assert {tensor.name for tensor in plan.chosen} == FITTING[direction]
    assert plan.direction == direction
    reasons = {tensor.name: tensor.reason for tensor in plan.skipped}
    shape = {"rows": "40x3", "columns": "3x40"}[direction]
    assert reasons[{"rows": "high", "columns": "flat"}[direction]] == f"{shape} holds no whole group of 8 {reason}"


@pytest.mark.parametrize(
    ("shape", "direction", "is_asked"),
    [
        ((2, 2, 16), "rows", True),  # as a stack, though not as a convolution
        ((2, 16, 2), "rows", True),
        ((16, 2, 2), "rows", False),
        ((16, 2, 2), "columns", True),
        ((2, 16, 2), "columns", True),
        ((2, 2, 16), "columns", False),
        ((2, 16, 2), "both", False),
        ((16, 16, 2), "both", True),
    ],
)
def test_three_axes_are_asked_about_where_a_group_fits_one_way_or_the_other(
    shape: tuple[int, ...], direction: str, is_asked: bool, tmp_path: Path
) -> None:
    write_shard(tmp_path / "in", {"t": np.ones(shape), "w": np.ones((8, 8))})
    (plan,) = plan_checkpoint(tmp_path / "in", ["4:8"], direction=direction).plans
    (skipped,) = plan.skipped
    assert ("say which by `stack` or `convolution`" in skipped.reason) == is_asked


def test_another_direction_is_not_resumed(tmp_path: Path) -> None:
    write(tmp_path / "in")

    def end(phase: str, done: int, total: int) -> None:
        if phase == "pruning" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", "3:8", direction="rows", on_progress=end)
    with pytest.raises(CheckpointError, match="direction was rows, now it is columns"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", "3:8", direction="columns", resume=True)
    prune_checkpoint(tmp_path / "in", tmp_path / "out", "3:8", direction="rows", resume=True)
    assert check_checkpoint(tmp_path / "out", "3:8", direction="rows").passed


def test_one_sided_masks_that_break_the_pattern_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.ones((16, 16), np.float32)})
    prune_checkpoint(tmp_path / "in", None, "3:8", masks=tmp_path / "masks", direction="columns")
    content = bytearray((tmp_path / "masks").read_bytes())
    content[-32:] = bytes([1, 1] * 16)  # two bytes per row: all of the first and of the ninth column
    (tmp_path / "masks").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"are not 3:8: mask\[0:8, 0\] keeps 8 of 8 entries; 3:8 along columns"):
        apply_masks(tmp_path / "in", tmp_path / "masks", tmp_path / "out")


DOORS = {
    "prune": lambda folder, direction: prune_checkpoint(folder / "in", folder / "out", "4:8", direction=direction),
    "plan": lambda folder, direction: plan_checkpoint(folder / "in", ["4:8"], direction=direction),
    "check": lambda folder, direction: check_checkpoint(folder / "in", "4:8", direction=direction),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_direction_that_is_none_is_refused(door: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.ones((16, 16), np.float32)})
    with pytest.raises(ValueError, match=r"unknown direction 'row'.*did you mean 'rows'"):
        DOORS[door](tmp_path, "row")
