"""Recipes to compare, and how many of the three products of a training step each makes sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

import masksolve as ms
from masksolve.torch import Sparsifier
from paper_figures.pretraining.rivals import DoublyMasked
from paper_figures.training.recipes import random

PATTERNS = ("2:4", "4:8", "8:16", "16:32")
GRADIENTS = ("ste", "sr-ste", "hysteresis", "soft")
# The paper's number of steps between refreshes, for comparison: all others find their masks again after every step.
RARELY = 40
# Of STE with hysteresis: a tile's mask changes for one that keeps this share more.
HYSTERESIS = 0.05


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    `masks` is "dense", "one-sided", "transposable", "random" (transposable, never changed), "bi-mask" or "slope".
    `thinned` is the pattern of the gradients that the weight's is computed from, `every` the steps between refreshes,
    `rate` the learning rate of masked weights, as a multiple of that of others.
    """

    masks: str
    pattern: str = "-"
    gradient: str = "-"
    thinned: str = "-"
    every: int = 1
    rate: int = 1

    @property
    def name(self) -> str:
        """The name in the table."""
        words = [self.masks, self.pattern, self.gradient, "-" if self.thinned == "-" else f"mvue {self.thinned}"]
        words += [f"every {self.every}"] if self.every > 1 else []
        words += [f"rate {self.rate}"] if self.rate > 1 else []
        return " ".join(word for word in words if word != "-")

    @property
    def sparse_products(self) -> int:
        """How many of the three products have a sparse factor."""
        products = {"dense": 0, "one-sided": 1}.get(self.masks, 2)
        return products + (self.thinned != "-")

    @property
    def work(self) -> float:
        """The multiplications of the masked layers that are left, as a share of the dense ones."""
        if self.masks == "dense":
            return 1.0
        kept = ms.Pattern.parse(self.pattern)
        thinned = ms.Pattern.parse(self.thinned) if self.thinned != "-" else ms.Pattern(1, 1)
        of_weights = self.sparse_products - (self.thinned != "-")
        shares = [Fraction(kept.n, kept.m)] * of_weights + [Fraction(thinned.n, thinned.m)]
        return float((sum(shares) + 3 - len(shares)) / 3)

    def mask(self, model: nn.Module, include: tuple[str, ...], seed: int) -> Callable[[int], Any]:
        """Mask the model; return what is to be called with the number of each step after it."""
        if self.masks == "dense":
            return lambda step: None
        if self.masks in ("bi-mask", "slope"):
            return _double(model, ms.Pattern.parse(self.pattern), self.masks == "slope", seed)
        options: dict[str, Any] = {"refresh_every": self.every, "gradient": self.gradient}
        if self.gradient == "hysteresis":
            options.update(gradient="ste", hysteresis=HYSTERESIS)
        if self.masks == "random":
            options.update(method=random(seed), refresh_every=None)
        else:
            options["direction"] = "rows" if self.masks == "one-sided" else "both"
        if self.thinned != "-":
            options["gradient_sparsity"] = self.thinned
        sparsifier = Sparsifier(model, self.pattern, include=include, **options)
        return lambda step: sparsifier.step()

    def hasten(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Let a masked model's weights have their learning rate."""
        if self.rate == 1:
            return
        masks = {name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")}
        masked = {id(each) for name, each in model.named_parameters() if name in masks}
        for group in list(optimizer.param_groups):
            mine = [each for each in group["params"] if id(each) in masked]
            group["params"] = [each for each in group["params"] if id(each) not in masked]
            optimizer.add_param_group({**group, "params": mine, "lr": self.rate * group["lr"]})


def _double(model: nn.Module, pattern: ms.Pattern, is_random: bool, seed: int) -> Callable[[int], None]:
    rng = np.random.default_rng(seed)
    layers = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            owner, _, attribute = name.rpartition(".")
            layer = DoublyMasked(module, pattern, is_random=is_random, rng=rng)
            setattr(model.get_submodule(owner), attribute, layer)
            layers.append(layer)

    def step(number: int) -> None:
        for layer in layers:
            layer.renew(number)

    return step


RECIPES = (
    Recipe("dense"),
    *(Recipe("one-sided", "2:4", gradient) for gradient in ("ste", "sr-ste")),
    *(Recipe("transposable", pattern, gradient) for pattern in PATTERNS for gradient in GRADIENTS),
    *(Recipe("transposable", pattern, "ste", "2:4") for pattern in ("2:4", "16:32")),
    *(Recipe("transposable", pattern, "ste", every=RARELY) for pattern in ("2:4", "8:16")),
    # Soft masks multiply what is kept by about as much.
    Recipe("transposable", "8:16", "ste", rate=2),
    Recipe("random", "2:4", "ste"),
    Recipe("bi-mask", "2:4"),
    Recipe("slope", "2:4"),
)
# The rivals multiply in layers of their own, which the transformer of PyTorch has not.
WITHOUT_RIVALS = tuple(recipe for recipe in RECIPES if recipe.masks not in ("bi-mask", "slope"))
FEW = (
    Recipe("dense"),
    Recipe("one-sided", "2:4", "ste"),
    *(Recipe("transposable", pattern, "ste") for pattern in ("2:4", "8:16", "16:32")),
    Recipe("slope", "2:4"),
)
