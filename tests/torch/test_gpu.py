"""The kernel on a real GPU: `make test-gpu`. Everywhere else its interpreter and its compiled code are tested."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import masksolve as ms
from masksolve._tiles import Direction
from masksolve.torch import Sparsifier
from masksolve.torch._solver import batched, device
from masksolve.torch._solver.device import solve_on_device
from masksolve.torch._training.unbiased import BITS, thin_groups
from tests.tables import name_of, weights_of
from tests.torch.test_device import KERNEL_PATTERNS
from tests.torch.test_sparsifier import held, images, matrices, net, sparse_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set; use `make test-gpu`"
    ),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("family", ["gaussian float32", "int8", "half zero", "constant", "student-t", "all zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), KERNEL_PATTERNS, ids=map(name_of, KERNEL_PATTERNS))
def test_masks_on_the_gpu_are_optimal_and_the_batched_versions_bits(
    n: int, m: int, dtype: torch.dtype, family: str, saturated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.from_numpy(weights_of(family, (2, 5 * m + 1, 7 * m - 1)).astype(np.float32)).to(dtype)
    found = solve_on_device(weights.cuda(), ms.Pattern(n, m), saturated=saturated)
    array = weights.double().numpy()
    assert ms.certify(array, found.masks.cpu().numpy(), n, m, saturated=saturated).optimal
    monkeypatch.setattr(device, "_solver", lambda tiles: batched)
    expected = solve_on_device(weights, ms.Pattern(n, m), saturated=saturated)
    assert torch.equal(found.masks.cpu(), expected.masks)
    assert found.solved_on_cpu == expected.solved_on_cpu


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("family", ["gaussian float32", "int8", "half zero", "constant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_sided_masks_on_the_gpu_are_those_of_the_same_sort_on_the_cpu(
    dtype: torch.dtype, family: str, direction: Direction
) -> None:
    weights = torch.from_numpy(weights_of(family, (2, 43, 90)).astype(np.float32)).to(dtype)
    for n, m in KERNEL_PATTERNS:
        found = solve_on_device(weights.cuda(), ms.Pattern(n, m), direction=direction).masks
        assert torch.equal(found.cpu(), solve_on_device(weights, ms.Pattern(n, m), direction=direction).masks)


def test_the_gpu_uses_the_kernel() -> None:
    weights = torch.zeros(64, 64, device="cuda")
    (region,) = device.regions(64, 64, ms.Pattern(2, 4), "both", True)
    assert device._solver(device._tiles(weights, region)) is device.triton_module() is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m"), KERNEL_PATTERNS, ids=map(name_of, KERNEL_PATTERNS))
def test_values_thinned_on_the_gpu_are_those_of_the_same_numbers_on_the_cpu(n: int, m: int, dtype: torch.dtype) -> None:
    values = torch.from_numpy(weights_of("student-t", (5, m, 333)).astype(np.float32)).to(dtype)
    values[0] = values[0].round()
    uniform = torch.randint(1 << BITS, (5, 333), dtype=torch.int32)
    expected = torch.empty_like(values)
    thin_groups(values, uniform, expected, n)
    found = torch.ops.masksolve.thin(values.flatten(0, 1).cuda(), uniform.cuda(), n, m)
    assert torch.equal(found.cpu().view_as(values), expected)


def test_strides_and_warm_starts_on_the_gpu() -> None:
    weights = torch.randn(96, 160, device="cuda", dtype=torch.bfloat16)
    for view in (weights.T, weights[::2, ::3], weights[:, 1:]):
        cold = solve_on_device(view, ms.Pattern(4, 8))
        warm = solve_on_device(view, ms.Pattern(4, 8), potentials=cold.potentials)
        for solution in (cold, warm):
            assert ms.certify(view.float().cpu().numpy(), solution.masks.cpu().numpy(), 4, 8).optimal


def test_what_is_not_finite_is_refused_by_position_on_the_gpu() -> None:
    weights = torch.ones(16, 16, device="cuda")
    weights[9, 2] = float("nan")
    with pytest.raises(ValueError, match=r"weights\[9, 2\] is nan"):
        solve_on_device(weights, ms.Pattern(2, 4))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_model_on_the_gpu_keeps_its_masks_and_potentials_there(pattern: str) -> None:
    model = net().cuda()
    sparsifier = Sparsifier(model, pattern, refresh_every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(images(step).cuda()).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    state = sparsifier.state_dict()
    assert all(found.is_cuda for found in (*state["masks"].values(), *state["potentials"].values()))
    assert list(state["potentials"]) == ([] if pattern == "2:4" else sparse_names(sparsifier))
    n, m = ms.Pattern.parse(pattern).n, ms.Pattern.parse(pattern).m
    for name in sparse_names(sparsifier):
        weight, mask = held(model, name)
        assert ms.certify(matrices(weight.cpu()), matrices(mask.cpu()), n, m).optimal


def test_a_checkpoint_moves_between_the_gpu_and_the_cpu() -> None:
    for source, target in (("cuda", "cpu"), ("cpu", "cuda")):
        model, twin = net().to(source), net().to(target)
        saved, resumed = Sparsifier(model, "4:8"), Sparsifier(twin, "4:8")
        twin.load_state_dict(model.state_dict())
        resumed.load_state_dict(saved.state_dict())
        found, expected = resumed.refresh(), saved.refresh()
        assert [layer.kept_importance for layer in found.layers] == pytest.approx(
            [layer.kept_importance for layer in expected.layers], rel=1e-5
        )
        assert all(layer.sad == 0 for layer in found.layers)


def test_what_is_not_finite_names_the_parameter_on_the_gpu() -> None:
    model = net().cuda()
    sparsifier = Sparsifier(model, "2:4")
    with torch.no_grad():
        held(model, "2.weight")[0][3, 1, 2, 0] = float("inf")
    with pytest.raises(ValueError, match=r"parameter '2.weight': \[3, 1, 2, 0\] is inf; .*no mask was changed"):
        sparsifier.refresh()
