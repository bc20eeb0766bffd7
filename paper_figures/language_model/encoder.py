"""The second model, an encoder of text: how near its embeddings stay to the dense model's, when it is pruned.

`python -m paper_figures.language_model.encoder`. A result that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Read when the libraries load: every process gets one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from masksolve.torch import adaprune
from paper_figures import _results
from paper_figures._embeddings import closeness
from paper_figures._figure import BLACK, BLUE, GREY, SKY, save
from paper_figures.language_model import text
from paper_figures.language_model.figures import DIRECTIONS
from paper_figures.language_model.study import RECIPES, TIMES, Case, Setting, Study

PAGE = Path(__file__).parent
PATTERNS = ("2:4", "8:16", "16:32")
_LINES = {
    ("magnitude", "both"): BLUE,
    ("magnitude", "rows"): SKY,
    ("magnitude, no repair", "both"): BLACK,
    ("magnitude, no repair", "rows"): GREY,
}
# No perplexity, so many short texts instead: the nearest of few would say little.
FULL = Setting(evaluated=256, evaluation_length=64)
FAST = Setting(calibrated=4, batch=2, evaluated=32, evaluation_length=64)


@dataclass(frozen=True)
class Closeness:
    """The result of one case.

    On the evaluation text: `cosine`, the mean between the dense and the pruned model's embedding of a window, and
    `agreement`, the share of windows whose nearest neighbour is the same. `error` is the mean over the layers of the
    relative squared error of their outputs on the calibration text, `seconds` the time of `adaprune` on one core.
    """

    case: Case
    cosine: float
    agreement: float
    error: float
    seconds: float


def all_cases() -> list[Case]:
    """List them, all of a pattern before the next."""
    return [Case(pattern, direction, recipe) for pattern in PATTERNS for recipe, direction in _LINES]


def run_case(study: Study, case: Case, results: Path) -> str:
    """Prune the model, compare its embeddings and keep the result; what to tell about it."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(study.model, local_files_only=True, dtype=torch.float32).eval()
    expected = embeddings(model, study.evaluation)
    start = time.process_time()
    batches = study.calibration[: len(study.calibration) // TIMES]
    report = adaprune(model, batches, case.pattern, direction=case.direction, **RECIPES[case.recipe])  # type: ignore[arg-type]
    seconds = time.process_time() - start
    cosine, agreement = closeness(embeddings(model, study.evaluation), expected)
    error = sum(layer.error_after for layer in report.layers) / len(report.layers)
    _results.keep(results / f"{case.name}.json", asdict(Closeness(case, cosine, agreement, error, seconds)))
    return f"{case.name}: cosine {cosine:.3f} in {seconds:.0f} s of one core"


@torch.inference_mode()
def embeddings(model: nn.Module, windows: Tensor) -> Tensor:
    """Return a unit vector for each window: the mean over its tokens."""
    return functional.normalize(torch.cat([model(part)[0].mean(1) for part in windows.split(16)]))


def draw(results: Sequence[Closeness], into: Path) -> None:
    """Write the figure as PNG and CSV, and the table on the page if that is there."""
    found = {(each.case.recipe, each.case.direction, each.case.pattern): each for each in results}
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    table = []
    for (recipe, direction), color in _LINES.items():
        row = {"masks": recipe, "direction": DIRECTIONS[direction]}
        mine = {pattern: found.get((recipe, direction, pattern)) for pattern in PATTERNS}
        for pattern, each in mine.items():
            row[pattern] = "-" if each is None else f"{each.cosine:.3f}, {each.agreement:.0%}"
        table.append(row)
        heights = [each.cosine for each in mine.values() if each is not None]
        places = [place for place, each in enumerate(mine.values()) if each is not None]
        axes.plot(places, heights, "o-", color=color, label=f"{recipe}, {DIRECTIONS[direction]}")
    axes.set_xticks(range(len(PATTERNS)), PATTERNS)
    axes.set_ylabel("cosine of embeddings, pruned and dense")
    axes.legend()
    rows = [
        {**asdict(each.case), **{name: value for name, value in asdict(each).items() if name != "case"}}
        for each in results
    ]
    save(figure, rows, "encoder", into, table=table)


def read(folder: Path) -> list[Closeness]:
    """All results of a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [Closeness(**{**record, "case": Case(**record["case"])}) for record in records]


def main() -> None:
    """Parse the arguments, do what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.language_model.encoder", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all of it: half an hour on two cores")
    parser.add_argument("--model", type=Path, required=True, help="its folder (`make language-model-full` has it)")
    parser.add_argument("--text", type=Path, default=text.debian(), help="folder of the sources of Python's documents")
    parser.add_argument("--results", type=Path, help="folder of the results; default: build/encoder/full or fast")
    parser.add_argument("--into", type=Path, help="folder for the PNG and the CSV; default: this one if full")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cases at a time (all cores)")
    arguments = parser.parse_args()
    results = arguments.results or Path("build/encoder") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    setting, cases = (FULL, all_cases()) if arguments.full else (FAST, [Case("2:4", "both", "magnitude")])
    study = setting.study(arguments.model, arguments.text)
    missing = [case for case in cases if not (results / f"{case.name}.json").exists()]
    _results.make(run_case, [(study, case, results) for case in missing], arguments.processes)
    draw(read(results), arguments.into or (PAGE if arguments.full else results))


if __name__ == "__main__":
    main()
