"""The kept importance of a real checkpoint as a table: `python -m benchmarks.kept_importance WEIGHTS`.

Needs NumPy, safetensors and masksolve alone, so that it runs where `make demo` runs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

import masksolve as ms
from benchmarks.marks import write_between_marks

_PATTERNS = ((2, 4), (4, 8), (8, 16), (1, 4), (16, 32))
_METHODS = ("exact", "greedy", "two-approx")
_MARK = "kept-importance"


def main() -> None:
    """Print the table, and write it between the marks of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="safetensors file of a transformer, its tensors named encoder.*")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what stands between the marks {_MARK!r}")
    arguments = parser.parse_args()
    text = table(encoder_matrices(arguments.weights))
    print(text)
    if arguments.write:
        write_between_marks(arguments.write, _MARK, text)


def encoder_matrices(path: Path) -> list[NDArray[np.floating]]:
    """Read the 2-D tensors named encoder.*: 36 in MiniLM-L6."""
    with safe_open(path, framework="numpy") as file:
        tensors = (file.get_tensor(name) for name in file.keys() if name.startswith("encoder."))  # noqa: SIM118
        return [tensor for tensor in tensors if tensor.ndim == 2]


def table(matrices: list[NDArray[np.floating]]) -> str:
    """Markdown: per pattern and method the percentage kept, the mean over the matrices."""
    lines = [f"| pattern (kept of) | {' | '.join(_METHODS)} |", "| --- " + "| ---: " * len(_METHODS) + "|"]
    for n, m in _PATTERNS:
        shares = [statistics.fmean(kept(matrix, n, m, method) for matrix in matrices) for method in _METHODS]
        lines.append(f"| {n}:{m} | " + " | ".join(f"{100 * share:.2f} %" for share in shares) + " |")
    return "\n".join(lines)


def kept(matrix: NDArray[np.floating], n: int, m: int, method: str) -> float:
    """Return the share of a matrix's importance, the sum of abs(weights), that a method's mask keeps."""
    importance = np.abs(matrix)
    mask = ms.solve_matrix(matrix, n, m, method=method)
    return float(importance.sum(where=mask, dtype=np.float64) / importance.sum(dtype=np.float64))


if __name__ == "__main__":
    main()
