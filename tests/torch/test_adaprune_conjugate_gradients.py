"""Conjugate gradients: every row that they call solved is, beside factors in float64 as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masksolve.torch._adaprune import conjugate_gradients as module
from masksolve.torch._adaprune import least_squares as chooser
from masksolve.torch._adaprune.conjugate_gradients import EXCESS, conjugate_gradients
from masksolve.torch._adaprune.curvature import Curvature
from masksolve.torch._adaprune.least_squares import least_squares

# Every input as large as the others; sizes over four decades; few directions that carry nearly everything; far fewer
# samples than inputs.
KINDS = ("white", "scaled", "outliers", "few samples")


def gram_of(kind: str, inputs: int, size: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, 9 if kind == "few samples" else 3 * inputs, generator=generator, dtype=torch.float64)
    if kind == "scaled":
        x *= torch.logspace(0, -4, inputs, dtype=torch.float64).unsqueeze(1)
    if kind == "outliers":
        mixing = torch.randn(inputs, 3, generator=generator, dtype=torch.float64)
        x += 30 * mixing @ torch.randn(3, x.shape[1], generator=generator, dtype=torch.float64)
    return x @ x.mT * size**2


def problem(kind: str, damping: float, size: float = 1.0) -> tuple[Curvature, Tensor, Tensor]:
    """Return H, weights and masks that keep from nothing to everything of a row."""
    generator = torch.Generator().manual_seed(1)
    curvature = Curvature(gram_of(kind, 80, size).unsqueeze(0), damping)
    weight = torch.randn(40, 80, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, 80, generator=generator) < torch.linspace(0, 1, 40).unsqueeze(1)
    mask[0], mask[-1] = False, True
    return curvature, weight, mask


def exact(weight: Tensor, mask: Tensor, curvature: Curvature) -> Tensor:
    """Solve every row by itself."""
    found = torch.where(mask, weight, 0.0)
    lost = weight - found
    for row, kept in enumerate(mask):
        right = (lost[row] @ curvature.gram[0])[kept]
        found[row, kept] += torch.linalg.solve(curvature.system[0][kept][:, kept], right)
    return found


def errors(weight: Tensor, repaired: Tensor, curvature: Curvature) -> Tensor:
    return ((weight - repaired) @ curvature.system[0] * (weight - repaired)).sum(1)


@pytest.mark.parametrize("size", [1e-140, 1.0, 1e140])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_row_that_is_called_solved_exceeds_the_least_by_no_more_than_is_said(
    kind: str, damping: float, size: float
) -> None:
    curvature, weight, mask = problem(kind, damping, size)
    system, lost = curvature.system[0], torch.where(mask, 0.0, weight)
    found, is_solved = conjugate_gradients(
        system, curvature.inverse[0], lost @ curvature.gram[0], mask, errors(weight, weight - lost, curvature)
    )
    assert not bool(found[~mask].any())
    least = errors(weight, exact(weight, mask, curvature), curvature)
    left = errors(weight, weight - lost + found, curvature)
    assert bool((left <= (1 + EXCESS) * least)[is_solved].all())
    if damping >= 1e-4:
        assert bool(is_solved.all())


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_by_conjugate_gradients_are_those_by_factors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for damping in (1e-2, 1e-9):
        curvature, weight, mask = problem(kind, damping)
        monkeypatch.setattr(chooser, "_FACTORS", 0)
        found = least_squares(weight.unsqueeze(0), mask.unsqueeze(0), curvature)[0]
        expected = exact(weight, mask, curvature)
        torch.testing.assert_close(
            errors(weight, found, curvature), errors(weight, expected, curvature), rtol=EXCESS, atol=0
        )


def test_rows_that_do_not_converge_are_solved_by_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    curvature, weight, mask = problem("outliers", 1e-2)
    monkeypatch.setattr(chooser, "_FACTORS", 0)
    monkeypatch.setattr(module, "_STEPS", 1)
    found = least_squares(weight.unsqueeze(0), mask.unsqueeze(0), curvature)[0]
    torch.testing.assert_close(found, exact(weight, mask, curvature), rtol=1e-9, atol=1e-9)


def test_a_row_is_solved_alike_whichever_rows_are_solved_with_it() -> None:
    curvature, weight, mask = problem("outliers", 1e-2)
    lost = torch.where(mask, 0.0, weight)
    right, error = lost @ curvature.gram[0], errors(weight, weight - lost, curvature)
    together, _ = conjugate_gradients(curvature.system[0], curvature.inverse[0], right, mask, error)
    for row in range(len(mask)):
        one = slice(row, row + 1)
        alone, _ = conjugate_gradients(curvature.system[0], curvature.inverse[0], right[one], mask[one], error[one])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4 * float(weight.abs().max()))


def test_a_layer_that_is_not_positive_definite_as_a_whole_is_solved_by_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inputs of opposite sign carry the same: a mask that keeps one of them has a solution."""
    monkeypatch.setattr(chooser, "_FACTORS", 0)
    gram = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
    weight, mask = torch.tensor([[[2.0, 3.0]]], dtype=torch.float64), torch.tensor([[[True, False]]])
    found = least_squares(weight, mask, Curvature(gram, 1e-300))
    torch.testing.assert_close(found, torch.tensor([[[-1.0, 0.0]]], dtype=torch.float64))
