"""The small residual convnet on Fashion-MNIST: accuracy against the number of images that a repair gets."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from masksolve import Pattern
from masksolve.torch import adaprune, patterns_from_zeros
from paper_figures import _results
from paper_figures._results import path_of
from paper_figures.training.data import Data
from paper_figures.training.models import ARCHITECTURES
from paper_figures.training.recipes import Recipe
from paper_figures.training.train import run, test

NAME = "residual convnet"
INCLUDE = tuple(glob if glob.endswith("weight") else f"{glob}weight" for glob in ARCHITECTURES[NAME].include)

REPAIRS: dict[str, dict[str, Any]] = {
    "masks alone": {"solver": "none", "batch_norm": False},
    "batch norm only": {"solver": "none"},
    "lstsq, batch norm as it was": {"batch_norm": False},
    "adam": {"solver": "adam"},
    "lstsq": {},
}


@dataclass(frozen=True)
class Case:
    """One way of pruning: `sparsity` is that of the start, all weights together by magnitude; 0 is dense, to 4:8."""

    sparsity: float
    direction: str
    repair: str
    images: int

    @property
    def name(self) -> str:
        """A file's."""
        repair = self.repair.replace(",", "").replace(" ", "-")
        return f"convnet_{self.sparsity:.1f}_{self.direction}_{repair}_{self.images}"


@dataclass(frozen=True)
class Layer:
    """The outcome for one layer that had zeros."""

    name: str
    pattern: str
    sparsity: float
    fitting: float
    odds: float
    weights: int
    touched: int


@dataclass(frozen=True)
class Result:
    """The result: the accuracy before and after on the test images, and the layers that had zeros."""

    case: Case
    start: float
    accuracy: float
    error: float
    seconds: float
    layers: list[Layer]


class Study:
    """The trained model and the data. It is trained once, and kept in the folder."""

    def __init__(self, folder: Path, data: Data, epochs: int) -> None:
        path = path_of(folder, NAME, Recipe("dense"), 0).with_suffix(".pt")
        if not path.exists():
            run(folder, NAME, Recipe("dense"), 0, epochs, data)
        self._dense = ARCHITECTURES[NAME].make()
        self._dense.load_state_dict(torch.load(path, weights_only=True))
        self._data = data
        self._starts: dict[float, tuple[nn.Module, float]] = {}

    def _start(self, sparsity: float) -> tuple[nn.Module, float]:
        """Return the model with this share of zeros, and its accuracy."""
        if sparsity not in self._starts:
            model = copy.deepcopy(self._dense)
            if sparsity > 0:
                layers = [
                    (model.get_submodule(name.removesuffix(".weight")), "weight")
                    for name in patterns_from_zeros(model, 8, include=INCLUDE)
                ]
                prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
                for module, name in layers:
                    prune.remove(module, name)
            self._starts[sparsity] = model, test(model, self._data.test_images, self._data.test_labels)[0]
        return self._starts[sparsity]

    def run(self, case: Case) -> Result:
        """Prune a copy and test it."""
        start, before = self._start(case.sparsity)
        model = copy.deepcopy(start)
        pattern: str | Mapping[str, Pattern] = "4:8"
        if case.sparsity > 0:
            pattern = patterns_from_zeros(model, 8, include=INCLUDE)
        report = adaprune(
            model,
            self._data.images[: case.images].split(100),
            pattern,
            direction=case.direction,  # type: ignore[arg-type]
            include=INCLUDE,
            respect_zeros=case.sparsity > 0,
            keep_first_last=False,
            **REPAIRS[case.repair],
        )
        errors = [layer.error_after for layer in report.layers]
        return Result(
            case,
            before,
            test(model, self._data.test_images, self._data.test_labels)[0],
            sum(errors) / len(errors),
            sum(layer.seconds for layer in report.layers),
            [
                Layer(
                    layer.name,
                    str(layer.pattern),
                    layer.conversion.sparsity,
                    layer.conversion.fitting,
                    layer.conversion.odds,
                    torch.Size(layer.shape).numel(),
                    layer.conversion.touched,
                )
                for layer in report.layers
                if layer.conversion is not None
            ],
        )


def keep(folder: Path, result: Result) -> None:
    """Keep a result."""
    _results.keep(folder / f"{result.case.name}.json", asdict(result))


def read(folder: Path) -> list[Result]:
    """All results of a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("convnet_*.json"))]
    return [
        Result(**{**each, "case": Case(**each["case"]), "layers": [Layer(**layer) for layer in each["layers"]]})
        for each in records
    ]
