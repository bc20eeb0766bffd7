"""The repair of one layer: it is the minimum that it claims to be, for every kind of layer, score and solver."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import AdaPruneReport, Conversion, adaprune
from masksolve.torch._adaprune.calibration import Moments
from masksolve.torch._adaprune.curvature import Curvature
from masksolve.torch._adaprune.input_pool import InputPool
from masksolve.torch._adaprune.least_squares import least_squares
from masksolve.torch._adaprune.source import called

ALONE: dict[str, Any] = {"keep_first_last": False}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (12,)),
    "linear on tokens": (lambda: nn.Linear(12, 10, bias=False), (5, 12)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3), (8, 5, 6)),
    "strided, dilated, reflecting": (
        lambda: nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), padding_mode="reflect", bias=False),
        (8, 6, 7),
    ),
    "grouped": (lambda: nn.Conv2d(16, 8, 3, padding="same", groups=2), (16, 5, 5)),
    "one-dimensional": (lambda: nn.Conv1d(8, 8, 3, padding=1), (8, 9)),
    "three-dimensional": (lambda: nn.Conv3d(4, 8, 2), (4, 3, 4, 3)),
}


def layer_and_inputs(kind: str, samples: int = 60) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    # Correlated, and not about zero: what makes a repair worth while.
    mixing = torch.randn(shape[0], shape[0]) if len(shape) != 2 or kind == "one-dimensional" else torch.randn(12, 12)
    x = torch.randn(samples, *shape) + 0.5
    if kind.startswith("linear"):
        return layer, x @ mixing
    return layer, torch.einsum("bc...,cd->bd...", x, mixing)


def difference(layer: nn.Module, dense: nn.Module, x: Tensor) -> Tensor:
    """The objective, by the layer's own forward."""
    return (layer.double()(x.double()) - dense.double()(x.double()).detach()).square().sum()


def error(layer: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return float(difference(layer, dense, x).detach())


def matrices(weight: Tensor, groups: int = 1) -> np.ndarray[Any, Any]:
    array = weight.detach().float().numpy()
    if array.ndim == 2:
        return array
    return np.moveaxis(array.reshape(groups, -1, *array.shape[1:]), (1, 2), (-2, -1))


def one(report: AdaPruneReport) -> Any:
    (layer,) = report.layers
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_the_least_squares_repair_is_a_stationary_point_of_the_masked_objective(kind: str) -> None:
    dense, x = layer_and_inputs(kind)
    dense.double()
    layer = copy.deepcopy(dense)
    adaprune(layer, [x.double()], "3:4", damping=1e-12, **ALONE)
    mask = layer.weight != 0
    loss = difference(layer, dense, x)
    loss.backward()
    scale = error(copy_with(dense, dense.weight * mask), dense, x)
    assert float(loss.detach()) < 0.9 * scale
    assert float((layer.weight.grad * mask).abs().max()) < 1e-6 * scale
    if layer.bias is not None:
        assert float(layer.bias.grad.abs().max()) < 1e-6 * scale


@pytest.mark.parametrize("importance", ["magnitude", "hessian"])
def test_inputs_that_never_change_are_repaired_by_the_bias(importance: Any) -> None:
    """About their mean they are zero: what rounding makes of that must not be taken for a Gram matrix."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 64)
    for count in (7, 11):
        layer = copy.deepcopy(dense)
        x = (3 * torch.randn(1, 64) + 10).repeat(count, 1)
        assert one(adaprune(layer, [x], "2:4", importance=importance, **ALONE)).error_after == 0
        assert torch.equal(layer.weight, dense.weight * (layer.weight != 0))
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def copy_with(dense: nn.Module, weight: Tensor) -> nn.Module:
    layer = copy.deepcopy(dense)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_the_repair_equals_a_least_squares_solve_of_every_row_by_itself(damping: float) -> None:
    dense, x = layer_and_inputs("linear on tokens")
    layer = copy.deepcopy(dense)
    adaprune(layer, [x], "1:4", damping=damping, **ALONE)
    rows, weight = x.reshape(-1, 12).double().numpy(), dense.weight.detach().double().numpy()
    ridge = np.sqrt(damping * (rows**2).sum(axis=0).mean())
    for row, found in zip(weight, layer.weight.detach().numpy(), strict=True):
        kept = found != 0
        # Damping is rows of their own, which ask for the weights as they were.
        system = np.vstack([rows[:, kept], ridge * np.eye(kept.sum())])
        right = np.concatenate([rows @ row, ridge * row[kept]])
        np.testing.assert_allclose(found[kept], np.linalg.lstsq(system, right, rcond=None)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("solver", ["lstsq", "adam"])
@pytest.mark.parametrize("samples", [1, 60])
def test_a_repair_never_raises_the_calibration_error(kind: str, solver: Any, samples: int) -> None:
    dense, x = layer_and_inputs(kind, samples)
    alone, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    adaprune(alone, [x], "1:4", solver="none", correct_bias=False, **ALONE)
    adaprune(repaired, [x], "1:4", solver=solver, iterations=5, **ALONE)
    assert error(repaired, dense, x) <= error(alone, dense, x) * (1 + 1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"correct_bias": False}, {"solver": "absorb"}, {"solver": "none"}, {"solver": "adam", "iterations": 20}],
    ids=str,
)
def test_the_errors_reported_are_those_of_the_outputs(kind: str, options: dict[str, Any]) -> None:
    dense, x = layer_and_inputs(kind)
    layer = copy.deepcopy(dense)
    found = one(adaprune(layer, [x], "2:4", **options, **ALONE))
    bare = copy.deepcopy(dense).double()
    if bare.bias is not None:
        nn.init.zeros_(bare.bias)
    energy = float(bare(x.double()).detach().square().sum())
    alone = copy_with(dense, dense.weight * (layer.weight != 0))
    assert found.error_before == pytest.approx(error(alone, dense, x) / energy, rel=1e-5)
    assert found.error_after == pytest.approx(error(layer, dense, x) / energy, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_what_the_kept_inputs_can_express_is_recovered(kind: str) -> None:
    """Channels that repeat each other, n of every m apart: one-sided masks lose nothing that others do not carry."""
    dense, _ = layer_and_inputs(kind)
    dense.double()
    channels = LAYERS[kind][1][0]
    x = torch.randn(400, channels // 4, *LAYERS[kind][1][1:], dtype=torch.float64).repeat_interleave(4, dim=1)
    layer = copy.deepcopy(dense)
    report = adaprune(layer, [x[:200]], "1:4", direction="rows", damping=1e-10, **ALONE)
    assert one(report).error_before > 0.1
    assert one(report).error_after < 1e-12
    torch.testing.assert_close(layer(x[200:]), dense(x[200:]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("solver", ["lstsq", "adam", "absorb", "none"])
@pytest.mark.parametrize("importance", ["magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"])
def test_masks_stay_valid_to_the_last_bit(kind: str, solver: Any, importance: Any) -> None:
    layer, x = layer_and_inputs(kind, samples=8)
    groups = getattr(layer, "groups", 1)
    before = layer.weight.detach().clone()
    adaprune(layer, [x], "3:4", solver=solver, importance=importance, iterations=2, **ALONE)
    assert ms.is_valid_mask(matrices(layer.weight, groups) != 0, 3, 4)
    assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    kept = layer.weight != 0
    if solver in ("lstsq", "none"):
        assert torch.equal(layer.weight[kept], before[kept]) == (solver == "none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    dense, x = layer_and_inputs("linear")
    for solver in ("lstsq", "adam"):
        layer = copy.deepcopy(dense).to(dtype)
        report = adaprune(layer, [x.to(dtype)], "2:4", solver=solver, iterations=5, **ALONE)  # type: ignore[arg-type]
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert ms.is_valid_mask(matrices(layer.weight) != 0, 2, 4, saturated=False)
        assert one(report).error_after < one(report).error_before


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_a_repair_that_overflows_is_left_aside(solver: Any) -> None:
    """Adam squares errors beyond float32; the exact values of the kept weights are beyond float16."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(50, 16) * 1e20
    if solver == "lstsq":
        layer.weight.data *= 1e5
        layer.half()
        x = (torch.randn(50, 4).repeat_interleave(4, dim=1) * torch.tensor([1, 1e-3, 1, 1e-3]).repeat(4)).half()
    dense = layer.weight.detach().clone()
    found = one(adaprune(layer, [x], "1:4", solver=solver, iterations=5, damping=1e-12, **ALONE))
    assert torch.equal(layer.weight, dense * (layer.weight != 0))
    assert bool(torch.isfinite(layer.bias).all())
    assert found.error_after <= found.error_before


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_it_works_where_the_caller_has_switched_gradients_off(solver: Any) -> None:
    layers, x = [], layer_and_inputs("convolution")[1]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        layers.append(layer_and_inputs("convolution")[0])
        with mode():
            adaprune(layers[-1], [x], "2:4", solver=solver, iterations=2, memory_mib=0, **ALONE)
    for other in layers[1:]:
        assert torch.equal(other.weight, layers[0].weight)
        assert torch.equal(other.bias, layers[0].bias)


def test_transposable_masks_are_optimal_for_each_score() -> None:
    dense, x = layer_and_inputs("linear")
    rows = x.double()
    centred = rows - rows.mean(0)
    gram = (centred.T @ centred).numpy()
    damped = gram + 1e-2 * np.diag(gram).mean() * np.eye(12)
    weight = dense.weight.detach().double().numpy()
    expected = {
        "magnitude": np.abs(weight),
        "wanda": np.abs(weight) * rows.norm(dim=0).numpy(),
        "hessian": weight**2 / np.diag(np.linalg.inv(damped)),
    }
    for score, importance in expected.items():
        layer = copy.deepcopy(dense)
        found = one(adaprune(layer, [x], "3:4", importance=score, **ALONE))  # type: ignore[arg-type]
        mask = layer.weight.detach().numpy() != 0
        assert ms.certify(importance, mask, 3, 4).optimal
        assert found.kept_importance == pytest.approx(importance[mask].sum() / importance.sum())


def test_the_second_order_score_is_the_error_that_removing_a_weight_leaves_after_repair() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(4, 4, bias=False).double(), (torch.randn(50, 4) @ torch.randn(4, 4)).double()
    gram = (x.T @ x).numpy()
    scores = dense.weight.detach().numpy() ** 2 / np.diag(np.linalg.inv(gram))
    removed = torch.eye(4, dtype=torch.bool)
    layer = copy.deepcopy(dense)
    adaprune(layer, [x], "3:4", masks={"weight": ~removed}, damping=1e-12, **ALONE)
    left = (layer(x) - dense(x)).square().sum(0).detach().numpy()
    np.testing.assert_allclose(left, np.diag(scores), rtol=1e-6)


def test_absorbing_adds_the_mean_of_what_a_group_loses_to_what_it_keeps() -> None:
    layer = nn.Linear(8, 8, bias=False)
    dense = layer.weight.detach().clone()
    adaprune(layer, [torch.ones(1, 8)], "1:4", solver="absorb", **ALONE)
    for before, after in zip(dense.reshape(-1, 4), layer.weight.detach().reshape(-1, 4), strict=True):
        kept = after != 0
        assert float(after[kept]) == pytest.approx(float(before[kept] + before[~kept].mean()), rel=1e-5)


def test_adam_comes_near_to_least_squares() -> None:
    dense, x = layer_and_inputs("linear", samples=200)
    errors = {}
    for solver in ("lstsq", "adam"):
        found = one(adaprune(copy.deepcopy(dense), [x / 4], "2:4", solver=solver, **ALONE))  # type: ignore[arg-type]
        errors[solver] = found.error_after / found.error_before
    assert errors["lstsq"] < errors["adam"] < 0.8


@pytest.mark.parametrize("solver", ["lstsq", "adam"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_results_do_not_depend_on_how_batches_are_split(kind: str, solver: Any) -> None:
    dense, x = layer_and_inputs(kind)
    model = nn.Sequential(dense, nn.BatchNorm1d(10) if kind == "linear" else nn.BatchNorm2d(12))
    states = []
    for size in (60, 17, 1):
        layer = copy.deepcopy(model)
        adaprune(layer, x.split(size), "2:4", solver=solver, iterations=20, importance="hessian", **ALONE)
        states.append(layer.state_dict())
    for state in states[1:]:
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["lstsq", "adam"])
def test_images_of_several_sizes_calibrate_one_convolution(solver: Any) -> None:
    dense, x = layer_and_inputs("convolution")
    batches = [x, x[:20, :, :4], x[:1, :, 1:]]
    layer = copy.deepcopy(dense)
    found = one(adaprune(layer, batches, "2:4", solver=solver, iterations=100, **ALONE))
    left = sum(error(layer, dense, batch) for batch in batches)
    alone = copy_with(dense, dense.weight * (layer.weight != 0))
    lost = sum(error(alone, dense, batch) for batch in batches)
    assert found.error_after / found.error_before == pytest.approx(left / lost, rel=1e-4)
    assert left < 0.8 * lost


def test_what_exceeds_the_cap_goes_to_files_that_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dense, x = layer_and_inputs("linear")
    weights = []
    for memory_mib in (1024, 0):
        layer = copy.deepcopy(dense)
        adaprune(layer, x.split(7), "2:4", solver="adam", iterations=5, memory_mib=memory_mib, **ALONE)
        weights.append(layer.weight)
    assert torch.equal(*weights)
    assert not list(tmp_path.iterdir())
    with InputPool(cap=2 * x[:7].numel() * 4) as pool:
        for part in x.split(7):
            pool.add(called(dense), part, range(1))
        assert pool.spilled == len(x.split(7)) - 2
        assert len(pool) == 60
        chosen = torch.randint(60, (50,), generator=torch.Generator().manual_seed(0))
        ((taken, _),) = pool.take(chosen)
        assert torch.equal(torch.sort(taken.sum(1))[0], torch.sort(x[chosen].sum(1))[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "hessian"])
@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_alternation_lowers_the_error_or_stops(importance: Any, direction: Any) -> None:
    dense, x = layer_and_inputs("linear", samples=200)
    options: dict[str, Any] = {"importance": importance, "direction": direction, **ALONE}
    once = one(adaprune(copy.deepcopy(dense), [x], "2:4", **options))
    layer = copy.deepcopy(dense)
    found = one(adaprune(layer, [x], "2:4", alternations=5, **options))
    assert once.alternations == ()
    assert 1 <= len(found.alternations) <= 5
    assert found.error_after == min(once.error_after, *found.alternations)
    assert all(later < before for before, later in zip(found.alternations, found.alternations[1:-1], strict=False))
    assert ms.is_valid_mask(layer.weight.detach().numpy() != 0, 2, 4, direction=direction)


def test_alternation_finds_a_better_mask_where_magnitude_is_wrong() -> None:
    """Inputs 0 and 1 of each group are nearly constant: large weights that carry next to nothing."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(16, 16) + 1)
        layer.weight[:, torch.arange(16) % 4 < 2] += 1
    x = torch.randn(100, 16)
    x[:, torch.arange(16) % 4 < 2] *= 1e-3
    found = one(adaprune(layer, [x], "2:4", importance="wanda", direction="rows", alternations=1, **ALONE))
    assert found.error_after < 1e-4
    found = one(adaprune(layer, [x], "1:4", direction="rows", alternations=3, importance="wanda", **ALONE))
    assert len(found.alternations) > 0


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_zeros_are_respected_and_what_is_touched_is_counted(direction: Any, pattern: str) -> None:
    torch.manual_seed(0)
    n, m = map(int, pattern.split(":"))
    layer = nn.Linear(64, 64)
    zeros = torch.rand(64, 64) < 0.6
    with torch.no_grad():
        layer.weight.masked_fill_(zeros, 0)
    dense = layer.weight.detach().abs().numpy().copy()
    x = torch.randn(100, 64)
    found = one(adaprune(layer, [x], pattern, direction=direction, respect_zeros=True, **ALONE))
    kept = (layer.weight != 0).numpy()
    assert not (kept & zeros.numpy()).any()
    assert ms.is_valid_mask(kept, n, m, direction=direction)
    record: Conversion = found.conversion
    assert record.touched == int((~zeros).sum()) - kept.sum()
    assert record.sparsity == pytest.approx(float(zeros.double().mean()))
    if direction == "both":
        assert record.fitting == ms.odds.share_of_tiles(~zeros.numpy(), n, m)
    else:
        assert record.fitting == ms.odds.share_of_groups(~zeros.numpy(), n, m, direction=direction)
    assert record.fitting == pytest.approx(record.odds, abs=0.06)
    # At most n is all that is asked: no mask keeps more of what was there.
    best = ms.solve_matrix(dense, n, m, direction=direction, saturated=False)
    assert dense[kept].sum() == pytest.approx(dense[best].sum())


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_zeros_are_worth_nothing_where_they_are_respected_whatever_a_callable_scores_them(direction: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(16, 16) < 0.5, 0)
    scores = torch.rand(16, 16)
    worth = torch.where(layer.weight != 0, scores, 0).double().numpy()
    x = torch.randn(40, 16)
    adaprune(
        layer, [x], "2:4", direction=direction, importance=lambda name, weight: scores, respect_zeros=True, **ALONE
    )
    best = ms.solve_matrix(worth, 2, 4, direction=direction, saturated=False)
    assert worth[(layer.weight != 0).numpy()].sum() == pytest.approx(worth[best].sum())


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("solver", ["lstsq", "adam", "absorb", "none"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_sided_layers_are_pruned_to_the_mask_that_keeps_the_most(kind: str, solver: Any, direction: Any) -> None:
    layer, x = layer_and_inputs(kind, samples=8)
    groups = getattr(layer, "groups", 1)
    dense = np.abs(matrices(layer.weight.detach(), groups))
    adaprune(layer, [x], (3, 4), direction=direction, solver=solver, iterations=2, **ALONE)
    kept = matrices(layer.weight.detach(), groups) != 0
    assert (kept == ms.solve_matrix(dense, 3, 4, direction=direction)).all()


def test_a_callable_importance_scores_the_weights_by_name() -> None:
    dense, x = layer_and_inputs("linear")
    scale = torch.rand(dense.weight.shape, generator=torch.Generator().manual_seed(1))
    asked = []

    def importance(name: str, weight: nn.Parameter) -> Tensor:
        asked.append((name, type(weight)))
        return weight.abs() * scale

    layer = copy.deepcopy(dense)
    found = one(adaprune(layer, [x], "3:4", importance=importance, **ALONE))
    scores = (dense.weight.detach().abs() * scale).numpy()
    mask = ms.solve_matrix(scores, 3, 4)
    assert asked == [("weight", nn.Parameter)]
    assert (layer.weight.detach().numpy() != 0).tolist() == mask.tolist()
    assert found.kept_importance == pytest.approx(scores[mask].sum() / scores.sum(), rel=1e-5)
    # Under given masks it is what the kept importance is a share of.
    given = {"weight": torch.from_numpy(ms.solve_matrix(dense.weight.detach().numpy(), 3, 4))}
    found = one(adaprune(copy.deepcopy(dense), [x], "3:4", importance=importance, masks=given, **ALONE))
    assert found.kept_importance == pytest.approx(scores[given["weight"].numpy()].sum() / scores.sum(), rel=1e-5)


def test_zeros_are_respected_under_given_masks_too() -> None:
    layer, x = layer_and_inputs("linear")
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    zeros = layer.weight == 0
    mask = torch.ones(10, 12, dtype=torch.bool)
    mask[:, 3:] = False
    adaprune(layer, [x], "3:4", masks={"weight": mask}, direction="rows", respect_zeros=True, **ALONE)
    assert torch.equal(layer.weight != 0, mask & ~zeros)


def test_a_layer_that_fits_already_is_left_as_it_is() -> None:
    layer, x = layer_and_inputs("linear")
    mask = torch.from_numpy(ms.random_mask(2, 4, size=(2, 3), rng=0)).transpose(1, 2).reshape(8, 12)
    with torch.no_grad():
        layer.weight[:8].mul_(mask)
        layer.weight[8:] = 0
    before = copy.deepcopy(layer)
    found = one(adaprune(layer, [x], "2:4", respect_zeros=True, **ALONE))
    assert (found.conversion.touched, found.conversion.fitting, found.error_before) == (0, 1.0, 0.0)
    assert torch.equal(layer.weight, before.weight)
    assert torch.equal(layer.bias, before.bias)


@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-11])
@pytest.mark.parametrize("size", [1e-140, 1.0, 1e140])
def test_least_squares_are_as_exact_as_float64_for_inputs_of_any_size_and_condition(
    damping: float, size: float
) -> None:
    """Factors in float32 carry the first two; the last needs float64 from the start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 12, 48, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 12, 48, generator=generator) < torch.linspace(0, 1, 12).unsqueeze(1)
    x = torch.randn(48, 30, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, 48).double().unsqueeze(1)
    gram = (x @ x.mT * size**2).unsqueeze(0)
    curvature = Curvature(gram, damping)
    found, system = least_squares(weight, mask, curvature), curvature.system[0]
    for row in range(12):
        kept = mask[0, row]
        right = (torch.where(kept, 0.0, weight[0, row]) @ gram[0])[kept]
        expected = weight[0, row][kept] + torch.linalg.solve(system[kept][:, kept], right)
        torch.testing.assert_close(found[0, row][kept], expected, rtol=1e-5 if damping < 1e-9 else 1e-9, atol=1e-9)
        assert not bool(found[0, row][~kept].any())


@pytest.mark.parametrize("kind", ["linear", "grouped convolution"])
def test_moments_of_wide_layers_are_those_of_their_inputs(kind: str) -> None:
    """Wider than the strips that their products are found in."""
    torch.manual_seed(0)
    linear = kind == "linear"
    layer = nn.Linear(450, 8) if linear else nn.Conv1d(900, 8, 1, groups=2)
    x = torch.randn(2, 40, 450) + 1 if linear else torch.randn(2, 900, 40) + 1
    moments = Moments.of(called(layer))
    for sample in x:
        moments.add(called(layer), sample, range(len(moments.count)))
    rows = x.reshape(1, 80, 450) if linear else x.mT.reshape(80, 2, 450).transpose(0, 1)
    rows = rows.double()
    about_mean = rows - rows.mean(1, keepdim=True)
    torch.testing.assert_close(moments.gram(), rows.mT @ rows, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(moments.centred(), about_mean.mT @ about_mean, rtol=1e-12, atol=1e-9)


def test_any_number_of_threads_finds_the_same_and_torch_keeps_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 300, 96, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 300, 96, generator=generator) < 0.5
    x = torch.randn(2, 200, 96, generator=generator, dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(least_squares(weight, mask, Curvature(x.mT @ x, 1e-2)))
            assert torch.get_num_threads() == threads
            with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                least_squares(weight, mask, Curvature(-(x.mT @ x), 1e-2))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
