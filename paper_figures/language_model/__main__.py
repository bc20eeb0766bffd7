"""Prune in every way, then draw: `python -m paper_figures.language_model`. A result that is there is not made again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read when the libraries load: every process gets one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from paper_figures._results import make
from paper_figures.language_model import figures, text
from paper_figures.language_model.study import (
    APPROXIMATE,
    MORE_TEXT,
    PERMUTED,
    RECIPES,
    Case,
    Setting,
    Study,
    read,
    run_case,
)

PAGE = Path(__file__).parent
PATTERNS = ("16:32", "2:4", "8:16", "4:8")
# Not with all patterns.
APPROXIMATED = ("2:4", "16:32")
EXTENDED = ("16:32",)
REORDERED = ("2:4", "8:16")
FAST = Setting(calibrated=8, batch=4, evaluated=4)


def all_cases() -> list[Case]:
    """List them, those that answer most first."""
    direction_first = [(direction, recipe) for direction in ("both", "rows") for recipe in reversed(RECIPES)]
    grid = [Case(pattern, direction, recipe) for direction, recipe in direction_first for pattern in PATTERNS]
    others = [Case(pattern, "both", recipe) for pattern in APPROXIMATED for recipe in APPROXIMATE]
    others += [Case(pattern, "both", recipe) for pattern in REORDERED for recipe in PERMUTED]
    return [Case("", "both", "dense"), *(Case(pattern, "both", MORE_TEXT) for pattern in EXTENDED), *grid, *others]


def some_cases() -> list[Case]:
    """List what takes a quarter of an hour."""
    return [Case("", "both", "dense"), *(Case("8:16", "both", recipe) for recipe in ("magnitude", "admm, refined"))]


def main() -> None:
    """Parse the arguments, do what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.language_model", description=__doc__)
    parser.add_argument(
        "--full",
        action="store_true",
        help="all of it: about three hours on two cores (estimated), not a quarter of one",
    )
    parser.add_argument("--model", type=Path, required=True, help="its folder (`make language-model` has it)")
    parser.add_argument("--text", type=Path, default=text.debian(), help="folder of the sources of Python's documents")
    parser.add_argument(
        "--results", type=Path, help="folder of the results; default: build/language-model/full or fast"
    )
    parser.add_argument(
        "--into", type=Path, help="folder for the PNG and the CSV; default: this one if full, else that of the results"
    )
    parser.add_argument("--only-draw", action="store_true", help="draw the results that are there, and make none")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cases at a time (all cores)")
    arguments = parser.parse_args()
    results = arguments.results or Path("build/language-model") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    if not arguments.only_draw:
        study = (Setting() if arguments.full else FAST).study(arguments.model, arguments.text)
        run_all(study, all_cases() if arguments.full else some_cases(), results, arguments.processes)
    figures.draw(read(results), arguments.into or (PAGE if arguments.full else results))


def run_all(study: Study, cases: list[Case], results: Path, processes: int) -> None:
    """Do the cases that are missing, each in a process of its own, whose memory is then the case's."""
    missing = [case for case in cases if not (results / f"{case.name}.json").exists()]
    make(run_case, [(study, case, results) for case in missing], processes, alone=True)


if __name__ == "__main__":
    main()
