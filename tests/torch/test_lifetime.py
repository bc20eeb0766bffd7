"""Memory that is no longer used is freed: masks keep no model, no optimizer and no process group alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from masksolve.torch import Sparsifier
from masksolve.torch._training.masking import GRADIENTS, Gradient


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_model_that_nobody_uses_any_more_is_freed_with_its_sparsifier(gradient: Gradient, steps: int) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    sparsifier = Sparsifier(model, "1:4", refresh_every=1, gradient=gradient)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        sparsifier.step()
    left = [weakref.ref(each) for each in (model, *model.parameters(), sparsifier)]
    del model, sparsifier, optimizer
    gc.collect()
    assert not [reference for reference in left if reference() is not None]
