"""MiniLM made N:M sparse in every way: how near its embeddings stay to the dense model's, on other text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from masksolve.torch import AdaPruneReport, adaprune
from paper_figures import _results
from paper_figures._embeddings import closeness

LONGEST = 48
INCLUDE = ("encoder.*.dense.weight", "encoder.*.query.weight", "encoder.*.key.weight", "encoder.*.value.weight")

REPAIRS: dict[str, dict[str, Any]] = {
    "no repair": {"solver": "none", "correct_bias": False},
    "mean absorbed": {"solver": "absorb", "correct_bias": False},
    "bias only": {"solver": "none"},
    "adam": {"solver": "adam"},
    "lstsq": {"solver": "lstsq"},
}


@dataclass(frozen=True)
class Case:
    """One way of pruning."""

    pattern: str
    direction: str
    masks: str
    repair: str
    sequential: bool = False
    alternations: int = 0
    sentences: int = 0

    @property
    def name(self) -> str:
        """A file's."""
        words = [self.pattern.replace(":", "-"), self.direction, self.masks, self.repair.replace(" ", "-")]
        words += ["sequential"] * self.sequential + [f"alternated-{self.alternations}"] * bool(self.alternations)
        return "minilm_" + "_".join([*words, str(self.sentences)])


@dataclass(frozen=True)
class Result:
    """The result of one case.

    `error` is the mean over the layers of the relative squared error of their outputs on the calibration text. On the
    evaluation text: `cosine`, the mean between the dense and the pruned model's embedding of a sentence, and
    `agreement`, the share of sentences whose nearest neighbour is the same. `seconds` are those of masks and repairs.
    """

    case: Case
    error: float
    cosine: float
    agreement: float
    seconds: float


class Study:
    """The dense model, its calibration and its evaluation text.

    Parameters
    ----------
    folder : Path
        A Hugging Face folder.
    calibration, evaluation : sequence of str
    """

    def __init__(self, folder: Path, calibration: Sequence[str], evaluation: Sequence[str]) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._dense = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self._calibration = calibration
        self._evaluation = list(self._batches(evaluation))
        self._expected = self._embeddings(self._dense)

    def _batches(self, sentences: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
        """Sentences of one length together: padding would count among the inputs."""
        lengths: dict[int, list[list[int]]] = {}
        for sentence in sentences:
            tokens = self._tokenizer(sentence, truncation=True, max_length=LONGEST)["input_ids"]
            lengths.setdefault(len(tokens), []).append(tokens)
        for length in sorted(lengths):
            yield {"input_ids": torch.tensor(lengths[length])}

    @torch.no_grad()
    def _embeddings(self, model: nn.Module) -> Tensor:
        """Return a unit vector for each sentence: the mean over its tokens."""
        return functional.normalize(torch.cat([model(**batch)[0].mean(1) for batch in self._evaluation]))

    def run(self, case: Case) -> Result:
        """Prune a copy and evaluate it."""
        model = copy.deepcopy(self._dense)
        sentences = self._calibration[: case.sentences or None]
        report: AdaPruneReport = adaprune(
            model,
            self._batches(sentences),
            case.pattern,
            importance=case.masks,  # type: ignore[arg-type]
            direction=case.direction,  # type: ignore[arg-type]
            include=INCLUDE,
            keep_first_last=False,
            sequential=case.sequential,
            alternations=case.alternations,
            **REPAIRS[case.repair],
        )
        cosine, agreement = closeness(self._embeddings(model), self._expected)
        errors = [layer.error_after for layer in report.layers]
        seconds = sum(layer.seconds for layer in report.layers)
        return Result(case, sum(errors) / len(errors), cosine, agreement, seconds)


def keep(folder: Path, result: Result) -> None:
    """Keep a result."""
    _results.keep(folder / f"{result.case.name}.json", asdict(result))


def read(folder: Path) -> list[Result]:
    """All results of a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("minilm_*.json"))]
    return [Result(**{**record, "case": Case(**record["case"])}) for record in records]
