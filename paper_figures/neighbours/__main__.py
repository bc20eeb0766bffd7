"""Train by every recipe, then draw: `python -m paper_figures.neighbours`. A run that is there is not done again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read when the libraries load: every run gets one thread, in this process and in those that it starts.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from paper_figures._results import make, path_of
from paper_figures.neighbours import figures
from paper_figures.neighbours.models import MODELS
from paper_figures.neighbours.recipes import RECIPES, Recipe
from paper_figures.neighbours.run import read, run_from_folder
from paper_figures.training import data
from paper_figures.training.train import Setting

PAGE = Path(__file__).parent
FULL = Setting(seeds=3, epochs=3, images=30_000, tested=10_000)
FAST = Setting(seeds=1, epochs=1, images=640, tested=500)
Task = tuple[str, Recipe, int]


def tasks(seeds: int) -> list[Task]:
    """List the runs, all of a seed before the next."""
    return [(name, recipe, seed) for seed in range(seeds) for name in MODELS for recipe in RECIPES]


def main() -> None:
    """Parse the arguments, train what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.neighbours", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all epochs and three seeds, not a miniature of a minute")
    parser.add_argument("--data", type=Path, default=data.DEBIAN, help=f"folder of Fashion-MNIST ({data.DEBIAN})")
    parser.add_argument("--results", type=Path, help="folder of the results; default: build/neighbours/full or fast")
    parser.add_argument("--into", type=Path, help="folder for the PNG and the CSV; default: this one if full")
    parser.add_argument("--only-draw", action="store_true", help="draw the results that are there, and make none")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (all cores)")
    arguments = parser.parse_args()
    results = arguments.results or Path("build/neighbours") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    setting = FULL if arguments.full else FAST
    if not arguments.only_draw:
        train_all(results, tasks(setting.seeds), setting, arguments.data, arguments.processes)
    found = read(results)
    if not found:
        parser.error(f"there are no results in {results}: leave out --only-draw to make them")
    figures.draw(found, arguments.into or (PAGE if arguments.full else results))


def train_all(results: Path, wanted: list[Task], setting: Setting, folder: Path, processes: int) -> None:
    """Do the runs that are missing, the dense ones first."""
    data.load(folder)  # complains before anything is started
    missing = [task for task in wanted if not path_of(results, *task).exists()]
    for is_dense in (True, False):
        part = [task for task in missing if (task[1].kind == "dense") == is_dense]
        make(run_from_folder, [(results, *task, setting, folder) for task in part], processes)


if __name__ == "__main__":
    main()
