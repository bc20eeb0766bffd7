"""One case: the model pruned in one way, its perplexity on text that it was not calibrated on, time and memory."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import masksolve as ms
from benchmarks import tiling
from benchmarks.peers import tsenor
from masksolve.torch import AdaPruneReport, adaprune, permute_model
from paper_figures import _results
from paper_figures.language_model import text

# What `adaprune` gets. Least squares wherever nothing else is said.
RECIPES: dict[str, dict[str, Any]] = {
    "magnitude, no repair": {"solver": "none"},
    "magnitude": {},
    "wanda": {"importance": "wanda"},
    "ria": {"importance": "ria"},
    "second order": {"importance": "hessian"},
    "sparsegpt": {"importance": "sparsegpt"},
    "admm": {"importance": "admm"},
    "admm, refined": {"importance": "admm", "refine": "block"},
}
# Calibrated on all the text, of which the others see the first part: one in so many batches.
MORE_TEXT, TIMES = "admm, refined, 4x text", 4


def _greedy(scores: NDArray[np.float32], n: int, m: int) -> NDArray[np.bool_]:
    return ms.solve_matrix(scores, n, m, method="greedy")


def _tsenor(scores: NDArray[np.float32], n: int, m: int) -> NDArray[np.bool_]:
    rows, columns = scores.shape
    masks = tsenor.solve(tiling.to_tiles(scores, m), n)
    return masks.reshape(rows // m, columns // m, m, m).swapaxes(1, 2).reshape(rows, columns)


# The model's free axes in another order first, in which magnitude masks keep more; so many seconds for each of 60.
PERMUTED, SECONDS = {f"{recipe}, permuted": recipe for recipe in ("magnitude", "admm, refined")}, 10.0

# In place of exact masks, on the same scores as "magnitude".
APPROXIMATE: dict[str, Callable[[NDArray[np.float32], int, int], NDArray[np.bool_]]] = {
    "greedy": _greedy,
    "tsenor": _tsenor,
}


@dataclass(frozen=True)
class Setting:
    """How much text is read: windows and their lengths, and how many of them make a batch; `MORE_TEXT` sees more."""

    calibrated: int = 64
    calibration_length: int = 128
    batch: int = 8
    evaluated: int = 20
    evaluation_length: int = 512

    def study(self, model: Path, texts: Path | None) -> Study:
        """Read the text, as tokens of a model."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        calibration = text.windows(tokenizer, texts, text.CALIBRATION, TIMES * self.calibrated, self.calibration_length)
        evaluation = text.windows(tokenizer, texts, text.EVALUATION, self.evaluated, self.evaluation_length)
        return Study(model, calibration.split(self.batch), evaluation)


@dataclass(frozen=True)
class Case:
    """One way of pruning; pattern "" is the dense model."""

    pattern: str
    direction: str
    recipe: str

    @property
    def name(self) -> str:
        """A file's."""
        words = [self.pattern.replace(":", "-") or "dense", self.direction, *self.recipe.replace(",", "").split()]
        return "_".join(words)


@dataclass(frozen=True)
class Result:
    """The result of one case.

    `error` is the mean over the layers of the relative squared error of their outputs on the calibration text,
    `seconds` is the time that `adaprune` takes on one core, in which the model runs too, `mebibytes` the most memory
    that the process has held.
    """

    case: Case
    perplexity: float
    error: float
    seconds: float
    mebibytes: int


@dataclass(frozen=True)
class Study:
    """A model on disk, batches of windows of tokens to calibrate on, and windows to evaluate on."""

    model: Path
    calibration: Sequence[Tensor]
    evaluation: Tensor

    def run(self, case: Case) -> Result:
        """Prune the model and evaluate it."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, local_files_only=True, dtype=torch.float32).eval()
        model.config.use_cache = False
        if case.recipe in PERMUTED:
            permute_model(model, case.pattern, self.calibration[0][:1], time_limit=SECONDS)
        start = time.process_time()
        report = self._prune(model, case) if case.pattern else None
        seconds = time.process_time() - start
        errors = [layer.error_after for layer in report.layers] if report is not None else [0.0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return Result(case, self._perplexity(model), sum(errors) / len(errors), seconds, peak)

    def _prune(self, model: nn.Module, case: Case) -> AdaPruneReport:
        options: dict[str, Any] = {"direction": case.direction}
        if case.recipe in APPROXIMATE:
            options["masks"] = _masks(model, case)
        else:
            recipe = "admm, refined" if case.recipe == MORE_TEXT else PERMUTED.get(case.recipe, case.recipe)
            options.update(RECIPES[recipe])
        batches = len(self.calibration) // (1 if case.recipe == MORE_TEXT else TIMES)
        return adaprune(model, self.calibration[:batches], case.pattern, **options)

    @torch.inference_mode()
    def _perplexity(self, model: nn.Module) -> float:
        """Return e to the mean loss of a token given those before it in its window."""
        losses = []
        for window in self.evaluation:
            logits = model(window.unsqueeze(0)).logits[0, :-1]
            losses.append(float(functional.cross_entropy(logits.float(), window[1:])))
        return math.exp(sum(losses) / len(losses))


def _masks(model: nn.Module, case: Case) -> Mapping[str, Tensor]:
    """Return approximate masks of the weights that `adaprune` prunes."""
    n, m = map(int, case.pattern.split(":"))
    find = APPROXIMATE[case.recipe]
    return {
        name: torch.from_numpy(find(np.abs(weight.detach().numpy()), n, m))
        for name, weight in model.named_parameters()
        if ".layers." in name and weight.ndim == 2
    }


def run_case(study: Study, case: Case, results: Path) -> str:
    """Do it and keep the result; what to tell about it."""
    found = study.run(case)
    keep(results, found)
    return f"{case.name}: perplexity {found.perplexity:.4g} in {found.seconds:.0f} s of one core"


def keep(folder: Path, result: Result) -> None:
    """Keep a result."""
    _results.keep(folder / f"{result.case.name}.json", asdict(result))


def read(folder: Path) -> list[Result]:
    """All results of a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [Result(**{**record, "case": Case(**record["case"])}) for record in records]
