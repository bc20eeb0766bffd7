"""Masks found from the first input to the last, each against a step that inverts what is left of H."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import adaprune
from masksolve.torch._adaprune import sparsegpt as module
from masksolve.torch._adaprune.sparsegpt import sparsegpt

ALONE: dict[str, Any] = {"keep_first_last": False}


def problem(seed: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Weights, and H of inputs that are correlated and of different sizes."""
    torch.manual_seed(seed)
    x = torch.randn(60, inputs, dtype=torch.float64) @ (torch.randn(inputs, inputs).double() * torch.rand(inputs))
    return torch.randn(1, outputs, inputs, dtype=torch.float64), (x.T @ x + 0.1 * torch.eye(inputs))[None]


def one_by_one(weight: NDArray[Any], h: NDArray[Any], n: int, m: int, direction: Any) -> tuple[Any, Any]:
    """Return scores and masks: every error moves what follows by optimal brain surgeon's formula, H inverted again."""
    moved, scores = weight.copy(), np.zeros_like(weight)
    mask = np.zeros(weight.shape, bool)
    inputs = weight.shape[1]
    for first in range(0, inputs, m):
        tile = slice(first, min(first + m, inputs))
        left = [np.linalg.inv(h[j:, j:])[0, 0] for j in range(tile.start, tile.stop)]
        scores[:, tile] = moved[:, tile] ** 2 / left
        mask[:, tile] = ms.solve_matrix(scores[:, tile], n, m, direction=direction)
        for j in range(tile.start, tile.stop):
            inverse = np.linalg.inv(h[j:, j:])
            lost = moved[:, j] * ~mask[:, j]
            moved[:, j:] -= np.outer(lost / inverse[0, 0], inverse[0])
    return scores, mask


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("block", [1, 8, 128])
@pytest.mark.parametrize(("n", "m", "outputs", "inputs"), [(2, 4, 8, 16), (1, 4, 12, 22), (3, 8, 8, 24), (2, 4, 6, 3)])
def test_errors_move_what_follows_as_if_h_were_inverted_anew(
    n: int, m: int, outputs: int, inputs: int, block: int, direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    weight, h = problem(0, outputs, inputs)
    masks = np.zeros((outputs, inputs), bool)

    def project(scores: Tensor, first: int) -> Tensor:
        mask = ms.solve_matrix(scores[0].numpy(), n, m, direction=direction)
        masks[:, first : first + mask.shape[1]] = mask
        return torch.from_numpy(mask)[None]

    scores = sparsegpt(weight, torch.linalg.inv(h), m, project)[0].numpy()
    expected, mask = one_by_one(weight[0].numpy(), h[0].numpy(), n, m, direction)
    assert (masks == mask).all()
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert (ms.solve_matrix(scores, n, m, direction=direction) == mask).all()


@pytest.mark.parametrize("respect_zeros", [False, True])
def test_a_convolution_is_masked_by_channels_at_each_position_of_its_kernel(respect_zeros: bool) -> None:
    torch.manual_seed(0)
    dense, x = nn.Conv2d(10, 8, (3, 2), bias=False).double(), torch.randn(40, 10, 5, 5, dtype=torch.float64)
    if respect_zeros:
        with torch.no_grad():
            dense.weight[torch.rand_like(dense.weight) < 0.4] = 0
    layer = copy.deepcopy(dense)
    options: dict[str, Any] = {"importance": "sparsegpt", "solver": "none", "respect_zeros": respect_zeros, **ALONE}
    adaprune(layer, [x], "2:4", **options)
    kept = (layer.weight != 0).numpy()
    patches = nn.functional.unfold(x, (3, 2)).transpose(1, 2).reshape(-1, 60).numpy()
    h = patches.T @ patches
    h += 1e-2 * np.diag(h).mean() * np.eye(60)
    moved, nonzero = dense.weight.detach().flatten(1).numpy().copy(), (dense.weight != 0).numpy()
    for first in range(0, 10, 4):
        channels = slice(first, min(first + 4, 10))
        columns = range(6 * channels.start, 6 * channels.stop)
        left = [np.linalg.inv(h[j:, j:])[0, 0] for j in columns]
        scores = (moved[:, columns] ** 2 / left).reshape(8, -1, 3, 2) * nonzero[:, channels]
        for at in np.ndindex(3, 2):
            where = (slice(None), channels, *at)
            assert ms.certify(
                scores[(slice(None), slice(None), *at)], kept[where], 2, 4, saturated=not respect_zeros
            ).optimal
        for j in columns:
            inverse = np.linalg.inv(h[j:, j:])
            lost = moved[:, j] * ~kept.reshape(8, -1)[:, j]
            moved[:, j:] -= np.outer(lost / inverse[0, 0], inverse[0])


def test_errors_are_smaller_than_those_of_masks_that_are_found_at_once() -> None:
    errors: dict[str, float] = {}
    for seed in range(20):
        torch.manual_seed(seed)
        dense = nn.Linear(32, 24, bias=False)
        x = torch.randn(200, 32) @ (torch.randn(32, 32) * torch.rand(32))
        for importance in ("magnitude", "wanda", "hessian", "sparsegpt"):
            options: dict[str, Any] = {"importance": importance, **ALONE}
            (found,) = adaprune(copy.deepcopy(dense), [x], "2:4", **options).layers
            errors[importance] = errors.get(importance, 0.0) + found.error_after
    assert errors["sparsegpt"] < 0.98 * min(error for name, error in errors.items() if name != "sparsegpt")
