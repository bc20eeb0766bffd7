"""One run: a model trained by a recipe from a seed, finalized and tested."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from paper_figures._results import keep, path_of
from paper_figures.training.data import Data, load
from paper_figures.training.models import ARCHITECTURES
from paper_figures.training.recipes import Recipe

BATCH = 128
WARM_UP = 0.1


@dataclass(frozen=True)
class Setting:
    """How much is trained and tested."""

    seeds: int
    epochs: int
    images: int
    tested: int


@dataclass(frozen=True)
class Run:
    """Which run, and what came out.

    `accuracy` is that on the tested images, of the finalized model. `kept` is the mean over the masked weights of
    the importance that the last masks keep; `flips` the flip rate of all masked weights together at each refresh, with
    its step. `mask_share` is the part of the training time that refreshes took.
    """

    model: str
    recipe: str
    seed: int
    epochs: int
    images: int
    accuracy: float
    loss: float
    kept: float | None
    flips: list[tuple[int, float]]
    mask_share: float
    seconds: float


def run_from_folder(results: Path, name: str, recipe: Recipe, seed: int, setting: Setting, folder: Path) -> str:
    """One run in a process of its own, on the data of a folder; returns a line about it."""
    torch.set_num_threads(1)
    found = run(results, name, recipe, seed, setting.epochs, load(folder).first(setting.images, setting.tested))
    return f"{name}, {recipe.name}, seed {seed}: {found.accuracy:.2%} in {found.seconds:.0f} s"


def run(folder: Path, name: str, recipe: Recipe, seed: int, epochs: int, data: Data) -> Run:
    """Train, test and save; the weights of a dense run too, for those that start from them."""
    start = time.perf_counter()
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    # The layout that CPU convolutions compute in: a quarter of the convnet's time.
    model = architecture.make().to(memory_format=torch.channels_last)
    dense = path_of(folder, name, Recipe("dense"), seed).with_suffix(".pt")
    if recipe.retrains:
        model.load_state_dict(torch.load(dense, weights_only=True))
    optimizer = architecture.optimizer(model)
    sparsifier = recipe.sparsifier(model, architecture.include, seed)
    sizes = (
        {} if sparsifier is None else {line.name: math.prod(line.shape) for line in sparsifier.report if line.sparse}
    )
    steps = epochs * (len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    shuffle = torch.Generator().manual_seed(seed)
    flips: list[tuple[int, float]] = []
    in_masks = 0.0
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=shuffle)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(data.images[rows]), data.labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            record = None if sparsifier is None else sparsifier.step()
            if record is not None:
                flips.append((record.step, sum(layer.sad for layer in record.layers) / sum(sizes.values())))
                in_masks += record.seconds
    kept = None
    if sparsifier is not None:
        layers = sparsifier.last_refresh.layers
        kept = sum(layer.kept_importance * sizes[layer.name] for layer in layers) / sum(sizes.values())
        sparsifier.finalize()
    accuracy, loss_of_test = test(model, data.test_images, data.test_labels)
    seconds = time.perf_counter() - start
    found = Run(
        name,
        recipe.name,
        seed,
        epochs,
        len(data.labels),
        accuracy,
        loss_of_test,
        kept,
        flips,
        in_masks / seconds,
        seconds,
    )
    if recipe == Recipe("dense"):
        torch.save(model.state_dict(), dense)
    keep(path_of(folder, name, recipe, seed), asdict(found))
    return found


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a linear warm-up, then a cosine down to zero."""
    warm = WARM_UP * steps
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@torch.no_grad()
def test(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and loss."""
    model.eval()
    logits = torch.cat([model(part) for part in images.split(1000)])
    return float((logits.argmax(1) == labels).float().mean()), float(functional.cross_entropy(logits, labels))
