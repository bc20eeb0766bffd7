"""Search every order, then draw: `python -m paper_figures.permutation`. A result that is there is not made again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Read when the libraries load: every process gets one thread.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

from paper_figures._results import make
from paper_figures.permutation import figures
from paper_figures.permutation.study import FREE, PATTERNS, Case, Study, read, run_case

PAGE = Path(__file__).parent
# Seconds for an axis: of every matrix; of those of one block, and Gaussian ones; of those that are free together.
SHORT, LONG, FREE_SECONDS = 1.0, 10.0, 5.0
BLOCKS = {"MiniLM": "encoder.layer.3.", "SmolLM2": "model.layers.15."}


def all_cases(study: Study) -> list[Case]:
    """List them, those that answer most first."""
    cases = [Case("SmolLM2", FREE, pattern, FREE_SECONDS) for pattern in PATTERNS if study.smollm2 is not None]
    named = {source: list(study.matrices(source)) for source in BLOCKS}
    shapes = {shape: None for matrices in named.values() for _, shape in matrices}
    cases += [Case("Gaussian", f"{rows}x{columns}", each, LONG) for each in PATTERNS for rows, columns in shapes]
    for seconds in (LONG, SHORT):
        for source, matrices in named.items():
            chosen = [name for name, _ in matrices if seconds == SHORT or name.startswith(BLOCKS[source])]
            cases += [Case(source, name, pattern, seconds) for name in chosen for pattern in PATTERNS]
    return cases


def some_cases(study: Study) -> list[Case]:
    """List what takes a minute or two."""
    return [
        Case(source, name, pattern, SHORT)
        for source in BLOCKS
        for name, _ in list(study.matrices(source))[:2]
        for pattern in ("2:4", "8:16")
    ]


def main() -> None:
    """Parse the arguments, do what is missing, draw."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.permutation", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all of it: an hour and a quarter on two cores")
    parser.add_argument("--minilm", type=Path, help="its .safetensors file (`make permutation` has it)")
    parser.add_argument("--smollm2", type=Path, help="its folder (`make permutation-full` has it)")
    parser.add_argument("--results", type=Path, help="folder of the results; default: build/permutation/full or fast")
    parser.add_argument("--into", type=Path, help="folder for the PNG and the CSV; default: this one if full")
    parser.add_argument("--only-draw", action="store_true", help="draw the results that are there, and make none")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cases at a time (all cores)")
    arguments = parser.parse_args()
    results = arguments.results or Path("build/permutation") / ("full" if arguments.full else "fast")
    results.mkdir(parents=True, exist_ok=True)
    if not arguments.only_draw:
        study = Study(arguments.minilm, arguments.smollm2)
        run_all(study, (all_cases if arguments.full else some_cases)(study), results, arguments.processes)
    figures.draw(read(results), arguments.into or (PAGE if arguments.full else results))


def run_all(study: Study, cases: list[Case], results: Path, processes: int) -> None:
    """Do the cases that are missing."""
    missing = [case for case in cases if not (results / f"{case.name}.json").exists()]
    make(run_case, [(study, case, results) for case in missing], processes)


if __name__ == "__main__":
    main()
