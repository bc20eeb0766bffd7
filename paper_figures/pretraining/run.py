"""One run: a model trained from scratch by a recipe and a seed, and tested as it learns."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from masksolve.torch import RefreshRecord
from paper_figures._results import keep, path_of
from paper_figures.pretraining.models import Problem
from paper_figures.pretraining.recipes import Recipe

WARM_UP = 0.1
TESTS = 8


@dataclass(frozen=True)
class Run:
    """Which run, and what came out.

    `losses` are those on the data held out, with the number of steps before; `kept` is the mean importance that the
    last masks keep; `flips` the mean flip rate of a refresh; `seconds` those of one core, without the tests, and
    `in_masks` the part of them that refreshes took.
    """

    model: str
    recipe: str
    seed: int
    steps: int
    losses: list[tuple[int, float]]
    accuracy: float
    kept: float | None
    flips: float | None
    seconds: float
    in_masks: float


def run(folder: Path, problems: Mapping[str, Problem], name: str, recipe: Recipe, seed: int) -> str:
    """Train, test and save; return a line about it."""
    torch.set_num_threads(1)
    found = train(name, problems[name], recipe, seed)
    keep(path_of(folder, name, recipe, seed), asdict(found))
    return f"{name}, {recipe.name}, seed {seed}: loss {found.losses[-1][1]:.4f} in {found.seconds:.0f} s of one core"


def train(name: str, problem: Problem, recipe: Recipe, seed: int) -> Run:
    """Train and test."""
    torch.manual_seed(seed)
    model = problem.model()
    after_step: Callable[[int], Any] = recipe.mask(model, problem.include, seed)
    optimizer = problem.optimizer(model)
    recipe.hasten(model, optimizer)
    steps = problem.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    records: list[RefreshRecord] = []
    losses, accuracy, in_tests = [], math.nan, 0.0
    start = time.process_time()
    for step, (inputs, targets) in enumerate(problem.batches(seed), 1):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
        optimizer.step()
        schedule.step()
        record = after_step(step)
        if record is not None:
            records.append(record)
        if step % max(1, steps // TESTS) == 0 or step == steps:
            before = time.process_time()
            loss, accuracy = test(model, problem)
            losses.append((step, loss))
            in_tests += time.process_time() - before
    layers = [layer for record in records for layer in record.layers]
    last = records[-1].layers if records else ()
    return Run(
        name,
        recipe.name,
        seed,
        steps,
        losses,
        accuracy,
        sum(layer.kept_importance for layer in last) / len(last) if last else None,
        sum(layer.flip_rate for layer in layers) / len(layers) if layers else None,
        time.process_time() - start - in_tests,
        sum(record.seconds for record in records),
    )


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a linear warm-up, then a cosine down to a tenth."""
    warm = WARM_UP * steps
    return (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))


@torch.inference_mode()
def test(model: nn.Module, problem: Problem) -> tuple[float, float]:
    """Return the mean loss and the accuracy on the data held out."""
    model.eval()
    loss, right, number = 0.0, 0, 0
    for inputs, targets in problem.tested():
        logits, wanted = model(inputs).flatten(0, -2), targets.flatten()
        loss += float(functional.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(1) == wanted).sum())
        number += len(wanted)
    model.train()
    return loss / number, right / number


def read(folder: Path) -> list[Run]:
    """All results of a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [Run(**{**each, "losses": [tuple(loss) for loss in each["losses"]]}) for each in found]
