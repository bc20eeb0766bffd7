"""Masks that are found together with the weights: each step is what it claims to be, and the masks are better ones."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import adaprune
from masksolve.torch._adaprune import admm as module
from masksolve.torch._adaprune.admm import admm

ALONE: dict[str, Any] = {"keep_first_last": False}
DIRECTIONS = pytest.mark.parametrize("direction", ["both", "rows", "columns"])
PATTERNS = pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8)], ids=lambda pair: f"{pair[0]}:{pair[1]}")


def problem(seed: int, outputs: int = 24, inputs: int = 16) -> tuple[nn.Linear, Tensor]:
    """Inputs that are correlated, and of different sizes."""
    torch.manual_seed(seed)
    mixing = torch.randn(inputs, inputs) * torch.rand(inputs)
    return nn.Linear(inputs, outputs, bias=False), torch.randn(200, inputs) @ mixing


def system_of(x: Tensor) -> Tensor:
    gram = x.double().T @ x.double()
    return (gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))[None]


def projection(n: int, m: int, direction: Any = "both") -> Callable[..., Tensor]:
    def project(scores: Tensor, first: int = 0) -> Tensor:
        return torch.from_numpy(ms.solve_matrix(scores[0].numpy(), n, m, direction=direction))[None]

    return project


def test_a_step_is_the_published_one() -> None:
    layer, x = problem(0)
    dense, rho = layer.weight.detach().double()[None], 0.7
    system = system_of(x)
    system /= system.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    system /= system.diagonal(dim1=1, dim2=2).unsqueeze(1).mT
    steps = module._Steps(dense.float(), system, projection(2, 4))
    h, w0 = system[0].numpy(), dense[0].numpy().T
    d, v = steps.masked[0].double().numpy().T, np.zeros_like(w0)
    for _ in range(4):
        steps.step(rho)
        w = np.linalg.solve(h + rho * np.eye(len(h)), h @ w0 - v + rho * d)
        moved = w + v / rho
        d = moved * ms.solve_matrix(np.square(moved), 2, 4)
        v = v + rho * (w - d)
        for found, expected in ((steps.weight, w), (steps.masked, d), (steps.prices, v)):
            np.testing.assert_allclose(found[0].numpy().T, expected, atol=1e-4)


@DIRECTIONS
@PATTERNS
def test_every_step_masks_no_worse_than_the_last_mask_would(pattern: tuple[int, int], direction: Any) -> None:
    """Convergence is proven from this."""
    layer, x = problem(1)
    seen: list[Tensor] = []

    def project(scores: Tensor, first: int) -> Tensor:
        mask = projection(*pattern, direction)(scores)
        assert ms.is_valid_mask(mask[0].numpy(), *pattern, direction=direction)
        if seen:
            assert float(scores[mask].double().sum()) >= float(scores[seen[-1]].double().sum()) * (1 - 1e-6)
        seen.append(mask)
        return mask

    admm(layer.weight.detach().double()[None], system_of(x), project)
    assert 10 <= len(seen) <= 301


@DIRECTIONS
@PATTERNS
def test_errors_are_smaller_than_those_of_every_score_of_single_weights(
    pattern: tuple[int, int], direction: Any
) -> None:
    errors: dict[str, list[float]] = {}
    for seed in range(20):
        dense, x = problem(seed)
        for importance in ("magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"):
            layer = copy.deepcopy(dense)
            options: dict[str, Any] = {"direction": direction, "importance": importance, **ALONE}
            (found,) = adaprune(layer, [x], pattern, **options).layers
            assert ms.is_valid_mask(layer.weight.detach().numpy() != 0, *pattern, direction=direction)
            errors.setdefault(importance, []).append(found.error_after)
    total = {importance: sum(found) for importance, found in errors.items()}
    assert total["admm"] < 0.95 * min(found for importance, found in total.items() if importance != "admm")
    assert all(found < plain for found, plain in zip(errors["admm"], errors["magnitude"], strict=True))


def test_of_inputs_that_are_not_correlated_masks_keep_nearly_the_largest_weights() -> None:
    """The best there are then; steps that start far below the final rho overshoot, and lose one or two percent."""
    for seed in range(10):
        torch.manual_seed(seed)
        weight, project = torch.randn(1, 16, 24, dtype=torch.float64), projection(3, 8)
        lost = [
            float(weight.square()[~project(scores)].sum())
            for scores in (weight.square(), admm(weight, torch.eye(24, dtype=torch.float64)[None], project).square())
        ]
        assert lost[0] <= lost[1] < 1.04 * lost[0]


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_sizes_of_weights_and_inputs_do_not_matter(size: float) -> None:
    layer, x = problem(2)
    weight, system, project = layer.weight.detach().double()[None], system_of(x), projection(2, 4)
    expected = admm(weight, system, project)
    assert torch.equal(admm(size * weight, system, project), size * expected)
    assert torch.equal(admm(weight, size**2 * system, project), size * expected)


def test_weights_of_zeros_score_nothing() -> None:
    _, x = problem(3)
    assert not admm(torch.zeros(1, 8, 16, dtype=torch.float64), system_of(x), projection(2, 4)).any()
    layer = nn.Linear(16, 8, bias=False)
    nn.init.zeros_(layer.weight)
    (found,) = adaprune(layer, [x], "2:4", importance="admm", **ALONE).layers
    assert found.error_after == 0


def test_zeros_that_are_respected_stay_zero() -> None:
    layer, x = problem(4)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.4] = 0
    zero = layer.weight == 0
    adaprune(layer, [x], "2:4", importance="admm", respect_zeros=True, **ALONE)
    assert not layer.weight[zero].any()
    assert ms.is_valid_mask(layer.weight.detach().numpy() != 0, 2, 4, saturated=False)


def test_the_record_says_what_share_of_squares_is_kept() -> None:
    dense, x = problem(5)
    layer = copy.deepcopy(dense)
    (found,) = adaprune(layer, [x], "2:4", importance="admm", **ALONE).layers
    system = system_of(x)
    scores = admm(dense.weight.detach().double()[None], system, projection(2, 4)).square()[0].numpy()
    mask = layer.weight.detach().numpy() != 0
    assert found.kept_importance == pytest.approx(scores[mask].sum() / scores.sum(), rel=1e-3)
    # Most of what the others weighed has moved to those that are kept.
    assert found.kept_importance > 0.9


def test_the_relative_importance_is_the_published_one() -> None:
    dense, x = problem(6)
    with torch.no_grad():
        dense.weight[3] = 0
        dense.weight[:, 5] = 0
    layer = copy.deepcopy(dense)
    (found,) = adaprune(layer, [x], "3:8", importance="ria", **ALONE).layers
    w, norms = np.abs(dense.weight.detach().double().numpy()), x.double().norm(dim=0).numpy()
    scores = np.zeros_like(w)
    for i, j in zip(*np.nonzero(w), strict=True):
        scores[i, j] = (w[i, j] / w[:, j].sum() + w[i, j] / w[i].sum()) * norms[j] ** 0.5
    mask = ms.solve_matrix(scores, 3, 8)
    assert found.kept_importance == pytest.approx(scores[mask].sum() / scores.sum(), rel=1e-9)


@pytest.mark.parametrize("importance", ["sparsegpt", "admm"])
def test_masks_that_are_found_with_weights_are_not_found_again(importance: Any) -> None:
    layer, x = problem(7)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"alternations=2 .*'{importance}' does so already; leave out one"):
        adaprune(layer, [x], "2:4", importance=importance, alternations=2, **ALONE)
    assert torch.equal(layer.weight, before)
