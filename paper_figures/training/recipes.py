"""Recipes to compare: the kind of masks, when they change, and which gradient the dense weights get."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.diversity import bits_per_weight
from masksolve.diversity._paper_formula import paper_formula
from masksolve.torch import Sparsifier

PATTERNS = ("2:4", "4:8", "8:16")
_REFRESH_EVERY = {"dynamic": 40, "continuous": 1, "static": None}


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    `structure` is "dense", "unstructured", "rows" (one-sided N:M along the inputs) or "both" (transposable). Masks
    change every 40 steps ("dynamic"), at each ("continuous") or never ("static"); with `retrains`, training starts from
    the weights of the dense run.
    """

    structure: str
    pattern: str = "-"
    masks: str = "-"
    gradient: str = "-"
    method: str = "-"
    retrains: bool = False

    @property
    def name(self) -> str:
        """The name in the table."""
        kind = {"both": "transposable", "rows": "one-sided"}.get(self.structure, self.structure)
        words = [kind, self.pattern, self.masks, self.gradient, self.method, "retrained" if self.retrains else "-"]
        return " ".join(word for word in words if word not in ("-", "exact"))

    def sparsifier(self, model: nn.Module, include: tuple[str, ...], seed: int) -> Sparsifier | None:
        """Return what masks the model, if anything does."""
        if self.structure == "dense":
            return None
        options: dict[str, Any] = {
            "include": include,
            "refresh_every": _REFRESH_EVERY[self.masks],
            "gradient": self.gradient,
            "direction": "rows" if self.structure == "rows" else "both",
        }
        return Sparsifier(model, "1:2" if self.pattern == "-" else self.pattern, method=self._method(seed), **options)

    def _method(self, seed: int) -> str | Callable[[Tensor, ms.Pattern], Tensor]:
        if self.structure == "unstructured":
            return larger_half
        return random(seed) if self.method == "random" else self.method

    def bits(self) -> tuple[float, float]:
        """Return the exact mask diversity in bits per weight, and what the paper's formula says."""
        if self.structure in ("dense", "unstructured"):
            return 1.0, 1.0
        pattern = ms.Pattern.parse(self.pattern)
        exact = bits_per_weight(pattern.n, pattern.m, direction=self.structure)
        formula = math.log2(paper_formula(pattern.n, pattern.m)) / pattern.m**2
        return exact, exact if self.structure == "rows" else formula


def larger_half(scores: Tensor, pattern: ms.Pattern) -> Tensor:
    """Keep the larger half of all weights of a tensor."""
    return scores.abs() > scores.abs().median()


def random(seed: int) -> Callable[[Tensor, ms.Pattern], Tensor]:
    """Masks drawn uniformly from all transposable ones, whatever the weights."""
    generator = np.random.default_rng(seed)

    def draw(scores: Tensor, pattern: ms.Pattern) -> Tensor:
        *lead, rows, columns = scores.shape
        n, m = pattern.n, pattern.m
        tiles = ms.random_mask(n, m, size=(*lead, rows // m, columns // m), rng=generator)
        return torch.from_numpy(tiles).transpose(-3, -2).reshape(scores.shape)

    return draw


RECIPES = (
    Recipe("dense"),
    Recipe("unstructured", "-", "dynamic", "ste"),
    *(Recipe("rows", pattern, "dynamic", "ste", "exact") for pattern in ("2:4", "4:8")),
    *(Recipe("both", pattern, "dynamic", "ste", "exact") for pattern in PATTERNS),
    *(Recipe("both", pattern, "dynamic", "sr-ste", "exact") for pattern in PATTERNS),
    Recipe("both", "4:8", "dynamic", "ste", "greedy"),
    Recipe("both", "4:8", "static", "ste", "random"),
    Recipe("dense", retrains=True),
    *(Recipe("both", pattern, "static", "ste", "exact", retrains=True) for pattern in PATTERNS),
)
