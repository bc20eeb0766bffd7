"""One run: a model that is trained by a recipe from a seed, and tested."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from masksolve.torch import Sparsifier, adaprune
from masksolve.torch.dynamic import DynamicSparsifier
from masksolve.torch.filters import prune_filters
from paper_figures._results import keep, path_of
from paper_figures.neighbours.models import MODELS
from paper_figures.neighbours.recipes import Recipe
from paper_figures.training.data import Data, load
from paper_figures.training.train import Setting, test

BATCH = 64
CALIBRATED = 1024


@dataclass(frozen=True)
class Run:
    """Which run, and what came out.

    `density` is the share of the dense model's weights that are not zero, and there; `layers` the same by layer, of
    Linear and convolutions, in their order. `before` is the accuracy before it was trained again, if it was.
    """

    model: str
    recipe: Recipe
    seed: int
    accuracy: float
    before: float | None
    density: float
    layers: list[float]
    seconds: float


def run_from_folder(results: Path, name: str, recipe: Recipe, seed: int, setting: Setting, folder: Path) -> str:
    """One run in a process of its own, on the data of a folder; returns a line about it."""
    torch.set_num_threads(1)
    found = run(results, name, recipe, seed, setting.epochs, load(folder).first(setting.images, setting.tested))
    return f"{name}, {recipe.name}, seed {seed}: {found.accuracy:.2%} at {found.density:.2%}, {found.seconds:.0f} s"


def run(folder: Path, name: str, recipe: Recipe, seed: int, epochs: int, data: Data) -> Run:
    """Do it, test and save; the weights of the dense run too, from which others start."""
    start = time.process_time()
    torch.manual_seed(seed)
    # Nearly twice as fast on a CPU as the usual order.
    model = MODELS[name]().to(memory_format=torch.channels_last)
    sizes = [weight.numel() for _, weight in weights_of(model)]
    dense = path_of(folder, name, Recipe("dense"), seed).with_suffix(".pt")
    if recipe.starts_trained:
        model.load_state_dict(torch.load(dense, weights_only=True))
    before = _make(model, recipe, seed, epochs, data)
    accuracy, _ = test(model, data.test_images, data.test_labels)
    kept = [int((weight != 0).sum()) for _, weight in weights_of(model)]
    found = Run(
        name,
        recipe,
        seed,
        accuracy,
        before,
        sum(kept) / sum(sizes),
        [count / size for count, size in zip(kept, sizes, strict=True)],
        time.process_time() - start,
    )
    if recipe.kind == "dense":
        torch.save(model.state_dict(), dense)
    keep(path_of(folder, name, recipe, seed), asdict(found))
    return found


def weights_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights of Linear layers and convolutions, in their order."""
    layers = ((name, each) for name, each in model.named_modules() if isinstance(each, (nn.Linear, nn.Conv2d)))
    return [(f"{name}.weight", layer.weight.detach()) for name, layer in layers]


def _make(model: nn.Module, recipe: Recipe, seed: int, epochs: int, data: Data) -> float | None:
    """Train by the recipe; return the accuracy before a model was trained again, if it was."""
    calibration = data.images[:CALIBRATED].split(128)
    if recipe.kind == "dense":
        train(model, seed, epochs, data)
        return None
    if recipe.kind == "dynamic":
        dynamic = DynamicSparsifier(model, alpha=recipe.amount)
        train(model, seed, epochs, data, penalty=dynamic.penalty)
        dynamic.finalize()
        if not recipe.pattern:
            return None
        before, _ = test(model, data.test_images, data.test_labels)
        adaprune(model, calibration, recipe.pattern, respect_zeros=True, exclude=_ends(model), keep_first_last=False)
        return before
    if recipe.kind == "sr-ste":
        sparsifier = Sparsifier(model, recipe.pattern, gradient="sr-ste", refresh_every=1, exclude=_ends(model))
        train(model, seed, epochs, data, after_step=sparsifier.step)
        sparsifier.finalize()
        return None
    if recipe.kind == "magnitude":
        masks = largest(model, recipe.amount)
    else:
        prune_filters(model, calibration, recipe.amount, method=recipe.kind, seed=seed)
        masks = {}
    apply(model, masks)
    before, _ = test(model, data.test_images, data.test_labels)
    # The batches of the first training come in another order.
    if recipe.pattern:
        sparsifier = Sparsifier(model, recipe.pattern, refresh_every=1, exclude=_ends(model))
        train(model, seed + 100, epochs, data, after_step=sparsifier.step)
        sparsifier.finalize()
    else:
        train(model, seed + 100, epochs, data, after_step=lambda: apply(model, masks))
    return before


def _ends(model: nn.Module) -> list[str]:
    """Return the first weight and the last, which stay dense under N:M, as in the training study."""
    names = [name for name, _ in weights_of(model)]
    return [names[0], names[-1]]


def largest(model: nn.Module, density: float) -> dict[str, Tensor]:
    """Return masks of the largest weights of the whole model."""
    sizes = {name: weight.abs() for name, weight in weights_of(model)}
    flat = torch.cat([size.flatten() for size in sizes.values()])
    threshold = flat.kthvalue(max(1, round((1 - density) * flat.numel()))).values
    return {name: size > threshold for name, size in sizes.items()}


@torch.no_grad()
def apply(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Write the zeros of masks."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


def train(
    model: nn.Module,
    seed: int,
    epochs: int,
    data: Data,
    *,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[], object] | None = None,
) -> None:
    """Train with momentum; the learning rate falls linearly to zero."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    steps = epochs * (len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=shuffle)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(data.images[rows]), data.labels[rows])
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            optimizer.step()
            schedule.step()
            if after_step is not None:
                after_step()
    model.eval()


def read(folder: Path) -> list[Run]:
    """All results of a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [Run(**{**record, "recipe": Recipe(**record["recipe"])}) for record in records]
