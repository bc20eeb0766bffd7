"""Train by every recipe, then draw: `python -m paper_figures.pretraining`. A run that is there is not done again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

# Read when the libraries load: every run gets one thread, in this process and in those that it starts.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from paper_figures._results import make, path_of
from paper_figures.language_model import text
from paper_figures.pretraining import figures
from paper_figures.pretraining.models import Images, Problem, Text
from paper_figures.pretraining.recipes import FEW, RECIPES, WITHOUT_RIVALS, Recipe
from paper_figures.pretraining.run import read, run
from paper_figures.training import data

PAGE = Path(__file__).parent
SEEDS = 3
Task = tuple[str, Recipe, int]


def full(texts: Path | None, images: Path) -> Mapping[str, Problem]:
    """Return the problems of the study: the GPT of 10.6 million masked weights, one of 0.8, and a transformer."""
    return {
        "gpt 0.8M": Text(texts, 128, 4, 4, 2e-3, 500, 16, 128),
        "vision transformer": Images(images, 60_000, 2, 10_000),
        "gpt 10.6M": Text(texts, 384, 6, 6, 1e-3, 400, 16, 128),
    }


def fast(texts: Path | None, images: Path) -> Mapping[str, Problem]:
    """Return the same in a minute."""
    return {
        "gpt 0.8M": Text(texts, 64, 1, 2, 2e-3, 20, 8, 16),
        "vision transformer": Images(images, 1280, 1, 1000),
        "gpt 10.6M": Text(texts, 64, 2, 2, 1e-3, 20, 8, 16),
    }


def tasks(seeds: int) -> list[Task]:
    """List the runs: all of a seed before the next, the large model last."""
    few = [("gpt 10.6M", recipe, 0) for recipe in FEW]
    many = {"gpt 0.8M": RECIPES, "vision transformer": WITHOUT_RIVALS}
    return [(name, recipe, seed) for seed in range(seeds) for name in many for recipe in many[name]] + few


def main() -> None:
    """Parse the arguments, train what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.pretraining", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all steps and three seeds, not a miniature of a minute")
    parser.add_argument("--text", type=Path, default=text.debian(), help="folder of the sources of Python's documents")
    parser.add_argument("--images", type=Path, default=data.DEBIAN, help=f"folder of Fashion-MNIST ({data.DEBIAN})")
    parser.add_argument("--results", type=Path, help="folder of the results; default: build/pretraining/full or fast")
    parser.add_argument(
        "--into", type=Path, help="folder for the PNG and the CSV; default: this one if full, else that of the results"
    )
    parser.add_argument("--only-draw", action="store_true", help="draw the results that are there, and make none")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (all cores)")
    arguments = parser.parse_args()
    results = arguments.results or Path("build/pretraining") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    if not arguments.only_draw:
        problems = (full if arguments.full else fast)(arguments.text, arguments.images)
        train_all(results, problems, tasks(SEEDS if arguments.full else 1), arguments.processes)
    found = read(results)
    if not found:
        parser.error(f"there are no results in {results}: leave out --only-draw to make them")
    figures.draw(found, arguments.into or (PAGE if arguments.full else results))


def train_all(results: Path, problems: Mapping[str, Problem], wanted: list[Task], processes: int) -> None:
    """Do the runs that are missing."""
    # Both complain before anything is started.
    for problem in problems.values():
        next(problem.tested())
    missing = [task for task in wanted if not path_of(results, *task).exists()]
    make(run, [(results, problems, *task) for task in missing], processes)


if __name__ == "__main__":
    main()
