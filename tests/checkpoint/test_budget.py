"""Budgets of checkpoints: what `choose_patterns` finds of the whole arrays, whatever bands, workers and files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from masksolve.budget import choose_patterns
from masksolve.checkpoint import CheckpointError, budget_checkpoint, check_checkpoint, prune_checkpoint
from tests.checkpoint.test_sharded import small_bands
from tests.checkpoints import PRUNED, HereExecutor, contents, tensors_of, write_shard, write_sharded

OPTIONS: dict[str, Any] = {"stack": ["experts"], "convolution": ["conv"], "transposed": ["c_fc"]}


def write(path: Path) -> dict[str, np.ndarray]:
    """Write weights of every kind: the matrices (..., out, in) that they are."""
    rng = np.random.default_rng(0)
    tensors = {
        "layers.0.weight": rng.standard_normal((21, 50)).astype(np.float32),
        "layers.1.weight": 2 * rng.standard_normal((16, 8)),
        "h.c_fc.weight": rng.standard_normal((24, 20)).astype(np.float16),
        "conv.weight": (3 * rng.standard_normal((16, 24, 3))).astype(np.float32),
        "experts": rng.standard_normal((5, 20, 16)).astype(ml_dtypes.bfloat16),
        "zeros.weight": np.zeros((8, 8), np.float32),
    }
    bias = {"layers.0.bias": rng.standard_normal(40)}
    write_shard(path, {**tensors, **bias})
    matrices = {"conv.weight": np.moveaxis(tensors["conv.weight"], 2, 0), "h.c_fc.weight": tensors["h.c_fc.weight"].T}
    return {**tensors, **matrices}


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_the_choice_is_that_of_the_whole_arrays(
    direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bands(monkeypatch)
    path = tmp_path / "in.safetensors"
    weights = write(path)
    # Two widths of floats, and patterns that are not M/2 beside it.
    expected = choose_patterns(weights, 4, 0.45, direction=direction)
    phases = []
    found = budget_checkpoint(
        path, 4, 0.45, direction=direction, **OPTIONS, on_progress=lambda *each: phases.append(each)
    )
    assert found.patterns == expected.patterns
    assert found.budget.density == expected.density <= 0.45
    for one, other in zip(found.budget.layers, expected.layers, strict=True):
        assert (one.name, one.size, one.counts) == (other.name, other.size, other.counts)
        assert one.values == pytest.approx(other.values, rel=1e-12)
    shares = [np.abs(each.astype(np.float64)).sum() for each in weights.values()]
    assert found.importance == pytest.approx(shares, rel=1e-12)
    assert found.kept_importance == pytest.approx(expected.value / sum(shares), rel=1e-12)
    assert [each.name for each in found.skipped] == ["layers.0.bias"]
    assert len(phases) > len(weights)
    assert phases[-1][0] == "measuring"
    assert phases[-1][1] == phases[-1][2]


@pytest.mark.parametrize("direction", ["both", "rows"])
def test_a_prune_and_a_check_take_the_patterns(direction: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write(source)
    found = budget_checkpoint(source, 4, 0.4, direction=direction, **OPTIONS)
    assert len(set(found.patterns.values())) > 1
    report = prune_checkpoint(source, target, found.patterns, direction=direction, **OPTIONS)
    assert {each.name: each.pattern for each in report.tensors} == {
        each.name: each.pattern for each in found.budget.layers
    }
    assert [each.kept for each in report.tensors] == pytest.approx(
        [layer.values[layer.pattern.n - 1] for layer in found.budget.layers], rel=1e-12
    )
    assert report.optimal
    pruned = tensors_of(target)
    assert sum(int((pruned[each.name] != 0).sum()) for each in found.tensors) <= 0.4 * sum(
        each.size for each in found.budget.layers
    )
    assert check_checkpoint(target, found.patterns, direction=direction, **OPTIONS).passed


def test_workers_find_the_same_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bands(monkeypatch)
    source = write_sharded(tmp_path / "in")
    before = contents(tmp_path)
    found = [budget_checkpoint(source, 8, 0.3, least=2, most=3, workers=each).budget for each in (1, HereExecutor())]
    assert found[0] == found[1]
    assert {layer.name for layer in found[0].layers} == PRUNED
    assert contents(tmp_path) == before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "density 0": ({"density": 0.0}, "density must be more than 0 and at most 1, got 0.0"),
    "too small a density": (
        {"density": 0.1},
        "a density of 0.1 cannot be met: with 1 to 4 of every 4 kept, it is at least 0.25",
    ),
    "too large a density": ({"density": 0.9, "most": 2}, "a density of 0.9 cannot be met: .* and at most 0.5"),
    "bounds": ({"least": 3, "most": 2}, "0 <= least <= most <= m=4, got least=3 and most=2"),
    "a large m": ({"m": 64}, "no tensor fits groups of 64 \\(a.weight: 16x16 holds no whole 64x64 tile"),
    "a glob": ({"include": "nope"}, "`include` 'nope' matches none of the 3 tensor names"),
    "NaN": ({"exclude": "b"}, r"tensor 'bad': weights\[1, 2\] is nan"),
    "an overflow": ({"include": "b"}, "tensor 'b': the sum of abs\\(weights\\) is beyond float64"),
    "nothing left": ({"include": "a.weight", "exclude": "a"}, "no tensor fits groups of 4 \\(.*excluded by 'a'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said(case: str, tmp_path: Path) -> None:
    options, message = BAD[case]
    bad = np.ones((8, 8), np.float32)
    bad[1, 2] = np.nan
    tensors = {"a.weight": np.ones((16, 16), np.float32), "b": np.full((8, 8), 1e308), "bad": bad}
    write_shard(tmp_path / "in.safetensors", tensors)
    arguments = {"m": 4, "density": 0.5, "exclude": ["b", "bad"], **options}
    if options.get("include"):
        arguments["exclude"] = options.get("exclude", [])
    with pytest.raises(CheckpointError, match=message):
        budget_checkpoint(tmp_path / "in.safetensors", **arguments)


def test_many_equal_choices_are_refused_as_an_error_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("masksolve._knapsack._MOST_SUMS", 2)
    shapes = [(16, 5), (9, 8), (13, 21), (4, 6)]
    rng = np.random.default_rng(0)
    write_shard(tmp_path / "in.safetensors", {f"{shape}.weight": rng.standard_normal(shape) for shape in shapes})
    with pytest.raises(CheckpointError, match=re.escape("bound n closer by `least` and `most`")):
        budget_checkpoint(tmp_path / "in.safetensors", 4, 0.47)
