"""One-sided masks: N:M along rows or columns alone, in training, in the bridge to torch's pruning, on any device."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import masksolve as ms
from masksolve._tiles import DIRECTIONS, Direction
from masksolve.torch import (
    Sparsifier,
    acceleration_reason,
    adaprune,
    finalize,
    patterns_from_zeros,
    semi_structured,
)
from masksolve.torch._layers import Layout
from masksolve.torch._solver import solve as tensor_solver
from masksolve.torch._solver.device import solve_on_device
from masksolve.torch._training.distributed import _holds_whole_tiles
from tests.tables import Pair, name_of, weights_of
from tests.torch.masked import held

ONE_SIDED: tuple[Direction, ...] = ("rows", "columns")
PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 8), (2, 5)]


class Layers(nn.Module):
    """One of each layer, with ragged edges for M = 5 and 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose2d(24, 16, 1, groups=2)
        self.linear = nn.Linear(16, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.transposed(self.grouped(images)).flatten(2).mT
        tokens = self.linear(pooled)
        return self.attention(tokens, tokens, tokens)[0]  # type: ignore[no-any-return]


PLACES = ["grouped.weight", "transposed.weight", "linear.weight", "attention.in_proj_weight"]


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def out_in(name: str, weight: Tensor) -> np.ndarray[Any, Any]:
    """The matrices (out, in) of a weight, one for each group and kernel position, spelled out."""
    if name == "attention.in_proj_weight":
        return np.stack([part.numpy() for part in weight.chunk(3)])
    found = []
    for part in weight.chunk(2 if weight.ndim == 4 else 1):
        flat = part.reshape(part.shape[0], part.shape[1], -1)
        matrices = [flat[:, :, k].numpy() for k in range(flat.shape[2])]
        found += [matrix.T for matrix in matrices] if name == "transposed.weight" else matrices
    return np.stack(found)


def most(scores: np.ndarray[Any, Any], n: int, m: int, direction: str) -> float:
    """The most that one-sided masks keep of matrices: the n largest of every group, added up one by one."""
    lines = scores if direction == "rows" else scores.swapaxes(-2, -1)
    groups = [
        line[start : start + m] for line in lines.reshape(-1, lines.shape[-1]) for start in range(0, len(line), m)
    ]
    return sum(sum(sorted(map(float, np.abs(group)), reverse=True)[:n]) for group in groups)


def assert_best(name: str, weight: Tensor, mask: Tensor, pattern: Pair, direction: str) -> None:
    n, m = pattern
    dense, ones = out_in(name, weight.detach().double()), out_in(name, mask)
    ms.check_mask(ones, n, m, direction=direction, saturated=True)
    kept = float((np.abs(dense) * ones).sum())
    assert kept == pytest.approx(most(dense, n, m, direction), rel=1e-12)
    expected = ms.solve_matrix(dense, n, m, direction=direction)
    assert kept == pytest.approx(float((np.abs(dense) * expected).sum()), rel=1e-12)


def train(model: nn.Module, sparsifier: Sparsifier, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        sparsifier.step()


@pytest.fixture(params=["cpu", "device"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's solver, and that of other devices."""
    if request.param == "device":
        monkeypatch.setattr(tensor_solver, "_is_solved_where_it_lies", lambda scores: True)
    return str(request.param)


@pytest.mark.parametrize("direction", ONE_SIDED)
@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_every_refresh_finds_valid_one_sided_masks_that_keep_the_most(
    pattern: Pair, direction: Direction, solver: str
) -> None:
    model = Layers()
    sparsifier = Sparsifier(model, pattern, direction=direction, refresh_every=1)
    assert sparsifier.direction == direction
    for step in range(3):
        for name in PLACES:
            weight, mask = held(*place(model, name))
            assert_best(name, weight, mask, pattern, direction)
        train(model, sparsifier, range(step, step + 1))
    record = next(each for each in sparsifier.last_refresh.layers if each.name == "linear.weight")
    dense = out_in("linear.weight", held(model.linear)[0].detach().double())
    assert record.kept_importance == pytest.approx(most(dense, *pattern, direction) / np.abs(dense).sum(), rel=1e-5)


@pytest.mark.parametrize("direction", ONE_SIDED)
@pytest.mark.parametrize("gradient", ["ste", "sr-ste", "masked"])
def test_optimizer_steps_keep_the_zeros_and_finalize_writes_them(gradient: Any, direction: Direction) -> None:
    model = Layers()
    sparsifier = Sparsifier(model, (3, 8), direction=direction, gradient=gradient, refresh_every=None)
    masks = {name: held(*place(model, name))[1].clone() for name in PLACES}
    train(model, sparsifier, range(3))
    expected = {}
    for name, mask in masks.items():
        weight, now = held(*place(model, name))
        assert torch.equal(now, mask)
        expected[name] = torch.where(mask, weight.detach(), 0)
        assert torch.equal(getattr(*place(model, name)), expected[name])
    twin = copy.deepcopy(model)
    finalize(twin)
    sparsifier.finalize()
    for name, weight in expected.items():
        for each in (model, twin):
            assert torch.equal(getattr(*place(each, name)), weight)
        assert ms.is_valid_mask(out_in(name, weight) != 0, 3, 8, direction=direction)
    assert list(model.state_dict()) == list(Layers().state_dict())


@pytest.mark.parametrize("direction", ONE_SIDED)
def test_a_resumed_one_sided_run_is_the_uninterrupted_one(direction: Direction) -> None:
    def start() -> tuple[nn.Module, Sparsifier]:
        model = Layers()
        return model, Sparsifier(model, "2:4", direction=direction, refresh_every=2)

    whole, half, resumed = start(), start(), start()
    train(*whole, range(5))
    train(*half, range(3))
    for part, saved in zip(resumed, half, strict=True):
        part.load_state_dict(saved.state_dict())
    train(*resumed, range(3, 5))
    assert resumed[1].steps == 5
    for (key, value), expected in zip(resumed[0].state_dict().items(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


def test_states_and_masks_of_another_direction_are_refused_in_words() -> None:
    rows, columns = (Sparsifier(nn.Linear(16, 16), "1:4", direction=direction) for direction in ONE_SIDED)
    with pytest.raises(ValueError, match=r"masks of direction 'columns', this Sparsifier is for 'rows'; make one with"):
        rows.load_state_dict(columns.state_dict())
    state = rows.state_dict()
    del state["direction"]
    with pytest.raises(ValueError, match="this is not the state_dict of a Sparsifier: it lacks direction"):
        rows.load_state_dict(state)
    models = {direction: nn.Sequential(nn.Linear(16, 16)) for direction in ("rows", "columns", "both")}
    for direction, model in models.items():
        Sparsifier(model, "1:4", direction=direction)  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError, match=r"weight_mask: mask\[.*1:4 along rows .*nothing was loaded; .*pattern and direction"
    ):
        models["rows"].load_state_dict(models["columns"].state_dict())
    with pytest.raises(RuntimeError, match=r"weight_mask: mask\[.*1:4 along columns .*nothing was loaded"):
        models["both"].load_state_dict(models["rows"].state_dict())
    # A transposable mask is a one-sided one too.
    models["rows"].load_state_dict(models["both"].state_dict())


FAMILIES = ["gaussian float32", "int8", "half zero", "constant", "all zero", "tenths", "student-t", "negative zero"]


@pytest.mark.parametrize("direction", ONE_SIDED)
@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_sided_masks_of_a_device_keep_what_those_of_the_cpu_keep_ties_included(
    family: str, saturated: bool, direction: Direction
) -> None:
    for n, m in [*PATTERNS, (16, 32), (0, 4), (4, 4)]:
        array = weights_of(family, (2, 13, 35)).astype(np.float32)
        for weights in (torch.from_numpy(array), torch.from_numpy(array).bfloat16()):
            found = solve_on_device(weights, ms.Pattern(n, m), saturated=saturated, direction=direction)
            exact = weights.double().numpy()
            expected = ms.solve_matrix(exact, n, m, saturated=saturated, direction=direction)
            ms.check_mask(found.masks.numpy(), n, m, saturated=saturated, direction=direction)
            assert (np.abs(exact) * found.masks.numpy()).sum() == (np.abs(exact) * expected).sum()
            assert found.solved_on_cpu == 0
            if family == "gaussian float32" and weights.dtype == torch.float32:
                assert (found.masks.numpy() == expected).all()


def test_of_equal_weights_a_device_keeps_the_first() -> None:
    masks = solve_on_device(torch.ones(1, 10), ms.Pattern(2, 4), direction="rows").masks
    assert masks.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize("direction", ONE_SIDED)
def test_a_matrix_too_large_to_sort_at_once_is_sorted_in_parts(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = solve_on_device(weights, ms.Pattern(3, 8), direction=direction).masks
    monkeypatch.setattr("masksolve.torch._solver.device._SORTED", 200)
    assert torch.equal(solve_on_device(weights, ms.Pattern(3, 8), direction=direction).masks, expected)


@pytest.mark.parametrize("direction", ONE_SIDED)
def test_one_sided_weights_that_are_not_finite_are_refused_by_position(direction: Direction) -> None:
    weights = torch.ones(8, 8)
    weights[5, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weights\[5, 3\]"):
        solve_on_device(weights, ms.Pattern(2, 4), direction=direction)


def test_a_matrix_needs_whole_groups_along_its_own_direction_only() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 16))

    rows = {
        line.name: line.reason for line in Sparsifier(model(), "2:4", direction="rows").report if len(line.shape) > 1
    }
    assert rows == {"0.weight": None, "1.weight": "16x3 holds no whole group of 4 along rows"}
    columns = Sparsifier(model(), "2:4", direction="columns", ragged="skip").report
    assert [line.reason for line in columns if len(line.shape) > 1] == [
        "3x16 holds no whole group of 4 along columns",
        None,
    ]
    ragged = Sparsifier(nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 10)), "2:4", direction="rows", ragged="skip")
    assert ragged.report[0].reason == "16x10 is not a multiple of 4 along rows, and ragged='skip'"
    assert ragged.report[2].sparse


@pytest.mark.parametrize("direction", ONE_SIDED)
def test_rows_of_a_transposed_convolution_are_its_outputs_as_in_every_other_layer(direction: Direction) -> None:
    few_outputs = nn.Sequential(nn.ConvTranspose1d(16, 3, 1), nn.Conv1d(16, 3, 1), nn.Linear(16, 3), nn.Linear(8, 8))
    reasons = [line.reason for line in Sparsifier(few_outputs, "2:4", direction=direction).report[:6:2]]
    assert reasons == [None if direction == "rows" else "3x16 holds no whole group of 4 along columns"] * 3


@pytest.mark.parametrize("method", ["greedy", "two-approx", "flow"])
def test_any_method_makes_one_sided_masks(method: str, solver: str) -> None:
    model = nn.Linear(16, 16)
    Sparsifier(model, "1:4", method=method, direction="columns")
    assert ms.is_valid_mask(held(model)[1].numpy(), 1, 4, direction="columns")


@pytest.mark.parametrize("direction", ONE_SIDED)
def test_one_sided_masks_are_not_packed_and_the_reason_says_so(direction: Direction) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    Sparsifier(layer, "2:4", direction=direction, accelerate=True)
    kept = "2 along rows and 4 along columns" if direction == "rows" else "4 along rows and 2 along columns"
    assert f"as transposable 2:4 masks do; this one keeps up to {kept}" in acceleration_reason(layer)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight * 1, layer.bias))


@pytest.mark.parametrize("direction", ONE_SIDED)
def test_the_bridge_prunes_one_sided(direction: Direction, solver: str) -> None:
    for layer, name in ((nn.Linear(24, 16), "linear.weight"), (nn.ConvTranspose2d(16, 8, 2, groups=2), PLACES[1])):
        weight = layer.weight.detach().clone()
        assert semi_structured(layer, "weight", "3:8", direction=direction) is layer
        assert_best(name, weight, layer.weight_mask.bool(), (3, 8), direction)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="unknown direction 'across'"):
        semi_structured(nn.Linear(8, 8), "weight", "2:4", direction="across")  # type: ignore[arg-type]


@pytest.mark.parametrize(("direction", "tile"), [("both", (4, 4)), ("rows", (1, 4)), ("columns", (4, 1))])
def test_shards_need_whole_tiles_along_the_direction_only(direction: Direction, tile: tuple[int, int]) -> None:
    recipe = tensor_solver.Recipe(pattern=ms.Pattern(2, 4), method="exact", direction=direction)
    assert recipe.tile_shape == tile

    class Sharded:
        shape, ndim, device_mesh = torch.Size((12, 8)), 2, torch.empty(2)
        placements = (Shard(0),)

    scores: Any = Sharded()
    assert _holds_whole_tiles(scores, Layout(), tile) == (direction == "rows")
    Sharded.placements = (Shard(1),)
    assert _holds_whole_tiles(scores, Layout(), tile)


@pytest.mark.parametrize("pattern", ["1:4", (1, 4), ms.Pattern(1, 4)], ids=repr)
def test_a_pattern_is_spelled_in_three_ways_at_every_door(pattern: Any) -> None:
    model = nn.Linear(8, 8)
    assert Sparsifier(model, pattern).pattern == ms.Pattern(1, 4)
    layer = semi_structured(nn.Linear(8, 8), "weight", pattern)
    assert int(layer.weight_mask.sum()) == 16  # type: ignore[operator, union-attr, arg-type]


def test_patterns_of_a_sparse_model_are_those_of_layers_with_a_whole_group_along_the_direction() -> None:
    model = nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 16), nn.Linear(16, 16))
    with torch.no_grad():
        for layer in model:
            layer.weight.masked_fill_(torch.arange(layer.weight.numel()).view_as(layer.weight) % 10 < 8, 0)
    found = {direction: list(patterns_from_zeros(model, 4, direction=direction)) for direction in DIRECTIONS}
    assert found == {
        "both": ["2.weight"],
        "rows": ["0.weight", "2.weight"],
        "columns": ["1.weight", "2.weight"],
    }
    with pytest.raises(ValueError, match="unknown direction 'across'"):
        patterns_from_zeros(model, 4, direction="across")  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["2:4", (2, 4), ms.Pattern(2, 4)], ids=repr)
def test_adaprune_takes_a_pattern_in_three_ways_alone_and_in_a_mapping(pattern: Any) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    for given in (pattern, {"weight": pattern}):
        layer = nn.Linear(8, 8)
        report = adaprune(layer, [x], given, keep_first_last=False)
        assert report.layers[0].pattern == ms.Pattern(2, 4)
        assert ms.is_valid_mask(layer.weight.detach().numpy() != 0, 2, 4)
