"""Prune in every way, then draw: `python -m paper_figures.adaprune`. A result that is there is not made again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read when the libraries load: every process gets one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from paper_figures._results import make
from paper_figures.adaprune import convnet, figures, minilm, text
from paper_figures.adaprune.runs import Setting, Sources, convnet_study, minilm_study, run_case
from paper_figures.training import data

PAGE = Path(__file__).parent
PATTERNS = ("4:8", "2:4", "8:16", "2:8", "16:32")
SCORES = ("magnitude", "wanda", "hessian")
DIRECTIONS = ("both", "rows")


FULL = Setting(128, 256, PATTERNS, SCORES, 3, 60_000, 10_000, (0.0, 0.5, 0.6, 0.7, 0.8), (1, 10, 100, 1000))
FAST = Setting(32, 64, ("4:8",), ("magnitude",), 1, 6_400, 2_000, (0.0, 0.7), (10, 100))


def minilm_cases(setting: Setting) -> list[minilm.Case]:
    """List the grid, and what varies one thing at a time at 4:8."""
    grid = [
        minilm.Case(pattern, direction, score, repair, sentences=setting.sentences)
        for pattern in setting.patterns
        for score in setting.scores
        for direction in DIRECTIONS
        for repair in minilm.REPAIRS
    ]
    varied = [
        minilm.Case("4:8", "both", score, "lstsq", **change, sentences=setting.sentences)  # type: ignore[arg-type]
        for score in setting.scores
        for change in ({"sequential": True}, {"alternations": 5})
    ]
    fewer = [
        minilm.Case("4:8", "both", "magnitude", "lstsq", sentences=count)
        for count in (1, 4, 16, 64)
        if count < setting.sentences
    ]
    return sorted([*grid, *varied, *fewer], key=lambda case: (case.pattern != "4:8", case.repair == "adam"))


def convnet_cases(setting: Setting) -> list[convnet.Case]:
    """Every start, with every number of images."""
    found = []
    for sparsity in setting.sparsities:
        found.append(convnet.Case(sparsity, "both", "masks alone", 1))
        found += [convnet.Case(sparsity, "both", "lstsq", images) for images in setting.images]
    for images in setting.images:
        found += [
            convnet.Case(0.0, "both", repair, images) for repair in ("lstsq, batch norm as it was", "batch norm only")
        ]
    found += [convnet.Case(0.0, "rows", *how) for how in (("masks alone", 1), ("lstsq", 100))]
    found.append(convnet.Case(0.0, "both", "adam", 100))
    return found


def main() -> None:
    """Parse the arguments, do what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.adaprune", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all of it: an hour on two cores, not four minutes")
    parser.add_argument("--model", type=Path, required=True, help="folder of MiniLM (`make adaprune` has it)")
    parser.add_argument("--data", type=Path, default=data.DEBIAN, help=f"folder of Fashion-MNIST ({data.DEBIAN})")
    parser.add_argument("--calibration", type=Path, nargs="+", default=text.CALIBRATION, help="text files")
    parser.add_argument("--evaluation", type=Path, nargs="+", default=text.EVALUATION, help="other text files")
    parser.add_argument("--results", type=Path, help="folder of the results; default: build/adaprune/full or fast")
    parser.add_argument(
        "--into", type=Path, help="folder for the PNG and the CSV; default: this one if full, else that of the results"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cases at a time (all cores)")
    arguments = parser.parse_args()
    setting = FULL if arguments.full else FAST
    results = arguments.results or Path("build/adaprune") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    sources = Sources(
        results, arguments.model, arguments.data, tuple(arguments.calibration), tuple(arguments.evaluation)
    )
    # Both complain, and the convnet is trained, before any process is started.
    convnet_study(sources, setting)
    minilm_study(sources, setting)
    run_all(sources, setting, arguments.processes)
    figures.draw(results, arguments.into or (PAGE if arguments.full else results))


def run_all(sources: Sources, setting: Setting, processes: int) -> None:
    """Do the cases that are missing."""
    cases = [*convnet_cases(setting), *minilm_cases(setting)]
    missing = [case for case in cases if not (sources.results / f"{case.name}.json").exists()]
    make(run_case, [(case, sources, setting) for case in missing], processes)


if __name__ == "__main__":
    main()
