"""Train every recipe, then draw: `python -m paper_figures.training`. A run that is there already is not done again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read when the libraries load: every run gets one thread, in this process and in those that it starts.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from paper_figures._results import make, path_of
from paper_figures.training import data, figures
from paper_figures.training.models import ARCHITECTURES
from paper_figures.training.recipes import RECIPES
from paper_figures.training.train import Setting, run_from_folder

FULL = Setting(seeds=3, epochs=5, images=60_000, tested=10_000)
FAST = Setting(seeds=1, epochs=1, images=6_400, tested=2_000)
PAGE = Path(__file__).parent


def main() -> None:
    """Parse the arguments, train what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.training", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="three seeds on all images: two hours on two cores, not one minute"
    )
    parser.add_argument("--data", type=Path, default=data.DEBIAN, help=f"folder of the four files ({data.DEBIAN})")
    parser.add_argument("--results", type=Path, help="folder of the results; default: build/training/full or fast")
    parser.add_argument(
        "--into",
        type=Path,
        help="folder for the PNG and the CSV; default: this one if full, else that of the results",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (all cores)")
    arguments = parser.parse_args()
    setting = FULL if arguments.full else FAST
    results = arguments.results or Path("build/training") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    # Both complain before anything is started.
    data.load(arguments.data)
    figures.check_epochs(results, setting.epochs)
    train_all(results, setting, arguments.data, arguments.processes)
    figures.draw(results, arguments.into or (PAGE if arguments.full else results))


def train_all(results: Path, setting: Setting, folder: Path, processes: int) -> None:
    """Do the runs that are missing; those that start from dense weights after those that make them."""
    tasks = [(name, recipe, seed) for seed in range(setting.seeds) for name in ARCHITECTURES for recipe in RECIPES]
    for retrains in (False, True):
        missing = [task for task in tasks if task[1].retrains == retrains and not path_of(results, *task).exists()]
        make(run_from_folder, [(results, *task, setting, folder) for task in missing], processes)


if __name__ == "__main__":
    main()
