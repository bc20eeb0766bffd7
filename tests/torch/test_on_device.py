"""The Sparsifier on weights that are solved on their device, here the CPU: its laws hold, and records say the same."""

import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import Sparsifier, semi_structured
from masksolve.torch._solver import device
from masksolve.torch._solver import solve as tensor_solver
from tests import oracle
from tests.torch.test_sparsifier import effective, held, matrices, net, sparse_names, train


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Solves all exact masks by the device's solver, and notes the potentials that it was given."""
    given: list[Tensor | None] = []
    solve = device.solve_on_device

    def noting(weights: Tensor, pattern: ms.Pattern, **options: Any) -> Any:
        given.append(options["potentials"])
        return solve(weights, pattern, **options)

    monkeypatch.setattr(tensor_solver, "_is_solved_where_it_lies", lambda scores: True)
    monkeypatch.setattr(tensor_solver, "solve_on_device", noting)
    return given


def trained(pattern: str, **options: Any) -> tuple[nn.Sequential, Sparsifier]:
    model = net()
    sparsifier = Sparsifier(model, pattern, refresh_every=2, **options)
    train(model, torch.optim.SGD(model.parameters(), 0.5), sparsifier, range(4))
    return model, sparsifier


def kept(sparsifier: Sparsifier) -> list[float]:
    return [layer.kept_importance for layer in sparsifier.last_refresh.layers]


def test_only_weights_on_the_cpu_are_solved_by_numpy() -> None:
    assert not tensor_solver._is_solved_where_it_lies(torch.zeros(4, 4))
    assert tensor_solver._is_solved_where_it_lies(torch.zeros(4, 4, device="meta"))


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_masks_of_the_device_are_optimal_and_records_those_of_the_cpu(
    pattern: str, saturated: bool, request: pytest.FixtureRequest
) -> None:
    _, expected = trained(pattern, saturated=saturated)
    given = request.getfixturevalue("on_device")
    model, sparsifier = trained(pattern, saturated=saturated)
    assert len(given) == 3 * len(sparse_names(sparsifier))
    assert kept(sparsifier) == pytest.approx(kept(expected), rel=1e-6)
    assert [layer.sad for layer in sparsifier.last_refresh.layers] == [x.sad for x in expected.last_refresh.layers]
    parsed = ms.Pattern.parse(pattern)
    for name in sparse_names(sparsifier):
        weight, mask = held(model, name)
        assert oracle.is_optimal(matrices(weight), matrices(mask), parsed.n, parsed.m, saturated)
    sparsifier.finalize()
    assert list(model.state_dict()) == list(net().state_dict())
    assert all(ms.is_valid_mask(matrices(effective(model, x)) != 0, parsed.n, parsed.m) for x in ("2.weight",))


def test_refreshes_on_the_device_start_from_the_potentials_of_the_last(on_device: list[Tensor | None]) -> None:
    layer = nn.Linear(24, 16)
    sparsifier = Sparsifier(layer, "4:8")
    first = sparsifier.last_refresh.layers
    assert sparsifier.refresh().layers == first
    cold, warm = on_device
    assert cold is None
    assert warm is not None
    assert warm.any()
    assert warm.shape == (2, 3, 8)


@pytest.mark.parametrize("methods", ["greedy", lambda scores, pattern: scores.abs() > 0.1], ids=["name", "callable"])
def test_other_methods_are_none_of_the_device(methods: Any, on_device: list[Tensor | None]) -> None:
    Sparsifier(net(), "2:4", method=methods)
    assert on_device == []


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_a_run_on_a_device_resumes(pattern: str, on_device: list[Tensor | None]) -> None:
    model, sparsifier = trained(pattern)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), sparsifier.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    twin = net(1)
    resumed = Sparsifier(twin, pattern, refresh_every=2)
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    on_device.clear()
    assert resumed.refresh().layers == sparsifier.refresh().layers
    assert all((potentials is not None and bool(potentials.any())) == (pattern == "3:8") for potentials in on_device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e38])
@pytest.mark.parametrize("solved_first", ["device", "cpu"])
def test_potentials_of_one_device_start_the_solver_of_another(
    solved_first: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (torch.linspace(-3, 3, 512, dtype=torch.float64).sin() * min(scale, torch.finfo(dtype).max / 2)).to(dtype)
    recipe = tensor_solver.Recipe(pattern=ms.Pattern(3, 8), method="exact")
    found = tensor_solver.MaskSolution(masks=torch.empty(0))
    for solver in (solved_first, "cpu" if solved_first == "device" else "device"):
        monkeypatch.setattr(tensor_solver, "_is_solved_where_it_lies", lambda scores, solver=solver: solver == "device")
        found = tensor_solver.solve_masks(weights.view(16, 32), recipe, found.potentials)
        assert ms.certify(weights.view(16, 32).numpy(), found.masks.numpy(), 3, 8).optimal


def test_potentials_of_other_shapes_are_left_aside(on_device: list[Tensor | None]) -> None:
    recipe = tensor_solver.Recipe(pattern=ms.Pattern(2, 4), method="exact")
    tensor_solver.solve_masks(torch.ones(8, 8), recipe, torch.ones(1, 2, 4))
    assert on_device == [None]


def test_weights_that_are_not_finite_are_named_and_every_mask_is_kept(on_device: list[Tensor | None]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(8, 8, 3, groups=2))
    sparsifier = Sparsifier(model, "2:4")
    before = [held(model, name)[1].clone() for name in ("0.weight", "1.weight")]
    with torch.no_grad():
        held(model, "0.weight")[0].normal_()
        held(model, "1.weight")[0][6, 1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter '1.weight': \[6, 1, 2, 0\] is nan; .*no mask was changed"):
        sparsifier.refresh()
    assert all(torch.equal(mask, held(model, f"{k}.weight")[1]) for k, mask in enumerate(before))


def test_records_tell_how_many_tiles_the_device_left_to_the_cpu(
    on_device: list[Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages_for = device.stages_for
    layer = nn.Linear(24, 16)
    assert Sparsifier(layer, "4:8", refresh_every=1).last_refresh.layers[0].solved_on_cpu == 0
    monkeypatch.setattr(
        device, "stages_for", lambda *tile: tuple(dataclasses.replace(x, last=-1) for x in stages_for(*tile))
    )
    layer = nn.Linear(24, 16)
    record = Sparsifier(layer, "4:8").last_refresh
    assert record.scalars()["masks/solved_on_cpu/weight"] == 6
    assert oracle.is_optimal(*(x.detach().numpy() for x in held(layer, "weight")), 4, 8)


def test_the_default_dtype_does_not_reach_the_potentials(on_device: list[Tensor | None]) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = device.solve_on_device(torch.ones(8, 8), ms.Pattern(3, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.potentials is not None
    assert found.potentials.dtype == torch.float32


def test_a_pruning_of_torch_is_found_on_the_device_too(on_device: list[Tensor | None]) -> None:
    layer = semi_structured(nn.Linear(8, 8), "weight", "1:4")
    assert len(on_device) == 1
    assert oracle.is_optimal(layer.weight_orig.detach().numpy(), layer.weight_mask.bool().numpy(), 1, 4)  # type: ignore[union-attr, operator]
