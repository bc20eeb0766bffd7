"""One case in a process of its own, and the settings that all processes get."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from paper_figures.adaprune import convnet, minilm, text
from paper_figures.training import data


@dataclass(frozen=True)
class Setting:
    """How much is done."""

    sentences: int
    evaluated: int
    patterns: tuple[str, ...]
    scores: tuple[str, ...]
    epochs: int
    trained: int
    tested: int
    sparsities: tuple[float, ...]
    images: tuple[int, ...]


@dataclass(frozen=True)
class Sources:
    """Where everything comes from and goes to."""

    results: Path
    model: Path
    images: Path
    calibration: tuple[Path, ...]
    evaluation: tuple[Path, ...]


def run_case(case: minilm.Case | convnet.Case, sources: Sources, setting: Setting) -> str:
    """Do it, keep the result, and return a line about it."""
    torch.set_num_threads(1)
    if isinstance(case, minilm.Case):
        found = minilm_study(sources, setting).run(case)
        minilm.keep(sources.results, found)
        return f"{case.name}: cosine {found.cosine:.4f} in {found.seconds:.0f} s"
    result = convnet_study(sources, setting).run(case)
    convnet.keep(sources.results, result)
    return f"{case.name}: {result.accuracy:.2%} in {result.seconds:.1f} s"


@cache
def minilm_study(sources: Sources, setting: Setting) -> minilm.Study:
    """Make the study of MiniLM."""
    calibration = text.sentences(sources.calibration, setting.sentences)
    return minilm.Study(sources.model, calibration, text.sentences(sources.evaluation, setting.evaluated))


@cache
def convnet_study(sources: Sources, setting: Setting) -> convnet.Study:
    """Make the study of the convnet; train it if that was not done."""
    images = data.load(sources.images).first(setting.trained, setting.tested)
    return convnet.Study(sources.results, images, setting.epochs)
