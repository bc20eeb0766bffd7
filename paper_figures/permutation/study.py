"""One case: a matrix whose rows, columns or both are reordered, or a model of which the free axes are."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import masksolve as ms
from masksolve.permute import search
from paper_figures._results import keep

PATTERNS = ("2:4", "4:8", "8:16", "16:32")
AXES = ("rows", "columns", "both")
# All axes of a language model that may be reordered together, in place of those of one matrix.
FREE = "free"
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Gain:
    """What one matrix keeps, as shares of its importance, before and after a search of so many seconds.

    `bound` is more than any order of these axes can keep, `one_sided` what one-sided masks keep in the order as it is,
    `unstructured` what the largest weights make up.
    """

    source: str
    matrix: str
    rows: int
    columns: int
    pattern: str
    axes: str
    before: float
    after: float
    bound: float
    one_sided: float
    unstructured: float
    seconds: float


@dataclass(frozen=True)
class Case:
    """A matrix of a source, "Gaussian 384x384" or a parameter's name, or FREE; and the seconds for each axis."""

    source: str
    matrix: str
    pattern: str
    seconds: float

    @property
    def name(self) -> str:
        """A file's."""
        words = [self.source, self.matrix, self.pattern.replace(":", "-"), f"{self.seconds:g}"]
        return "_".join(words).replace(" ", "_")


@dataclass(frozen=True)
class Study:
    """The file of MiniLM's weights and the folder of SmolLM2, where they are."""

    minilm: Path | None
    smollm2: Path | None

    def matrices(self, source: str) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the names and shapes of a source's matrices in its blocks."""
        from safetensors import safe_open

        path = self._file(source)
        if path is not None:
            with safe_open(path, framework="numpy") as file:
                for name in sorted(file.keys()):
                    shape = tuple(file.get_slice(name).get_shape())
                    if len(shape) == 2 and ("encoder." in name or ".layers." in name):
                        yield name, shape

    def run(self, case: Case) -> list[Gain]:
        """Search."""
        if case.matrix == FREE:
            return list(self._free(case))
        return [_gain(case, self._weights(case), axes) for axes in AXES]

    def _file(self, source: str) -> Path | None:
        return (
            self.minilm if source == "MiniLM" else None if self.smollm2 is None else self.smollm2 / "model.safetensors"
        )

    def _weights(self, case: Case) -> Matrix:
        if case.source == "Gaussian":
            rows, columns = map(int, case.matrix.split("x"))
            return np.random.default_rng(0).standard_normal((rows, columns), np.float32)
        from safetensors import safe_open

        with safe_open(self._file(case.source), framework="numpy") as file:
            weights: Matrix = file.get_tensor(case.matrix)
        return weights

    def _free(self, case: Case) -> Iterator[Gain]:
        """Reorder all axes of SmolLM2 that its blocks leave free."""
        import torch
        from transformers import AutoModelForCausalLM

        from masksolve.torch import permute_model

        model = AutoModelForCausalLM.from_pretrained(self.smollm2, local_files_only=True, dtype=torch.float32).eval()
        model.config.use_cache = False
        weights = {
            name: each.detach() for name, each in model.named_parameters() if ".layers." in name and each.ndim == 2
        }
        before = {name: np.abs(each.numpy().copy()) for name, each in weights.items()}
        tokens = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
        report = permute_model(model, case.pattern, tokens, time_limit=case.seconds)
        seconds = {name: axis.seconds for axis in report.axes for name in axis.weights}
        for name, old in before.items():
            new = np.abs(weights[name].numpy())
            yield _line(case, old, new, FREE, seconds.get(name, 0.0), matrix=name)


def _gain(case: Case, weights: Matrix, axes: Any) -> Gain:
    start = time.perf_counter()
    limit = case.seconds * (2 if axes == "both" else 1)
    found = search(weights, case.pattern, axes=axes, time_limit=limit, threads=1)
    return _line(case, np.abs(weights), np.abs(found.apply(weights)), axes, time.perf_counter() - start)


def _line(case: Case, old: Matrix, new: Matrix, axes: str, seconds: float, matrix: str | None = None) -> Gain:
    n, m = map(int, case.pattern.split(":"))
    total = float(old.sum(dtype=np.float64))
    kept = {
        direction: _kept(old, ms.solve_matrix(old, n, m, direction=direction))  # type: ignore[arg-type]
        for direction in ("both", "rows", "columns")
    }
    return Gain(
        source=case.source,
        matrix=case.matrix if matrix is None else matrix,
        rows=old.shape[0],
        columns=old.shape[1],
        pattern=case.pattern,
        axes=axes,
        before=kept["both"] / total,
        after=_kept(new, ms.solve_matrix(new, n, m)) / total,
        bound=bound(old, n, m, axes) / total,
        one_sided=max(kept["rows"], kept["columns"]) / total,
        unstructured=_largest(old.reshape(1, -1), n, m) / total,
        seconds=seconds,
    )


def bound(importance: Matrix, n: int, m: int, axes: str) -> float:
    """Return more than the best transposable mask keeps in any order of these axes, of whole tiles.

    A mask keeps N/M of every row and column of the matrix, wherever its lines lie; and where only rows move, N of every
    M consecutive columns of a row.
    """
    by_rows, by_columns = _largest(importance, n, m), _largest(importance.T, n, m)
    if axes == "rows":
        by_rows = _kept(importance, ms.solve_matrix(importance, n, m, direction="rows"))
    if axes == "columns":
        by_columns = _kept(importance, ms.solve_matrix(importance, n, m, direction="columns"))
    return min(by_rows, by_columns)


def _kept(importance: Matrix, mask: NDArray[np.bool_]) -> float:
    return float(importance.sum(dtype=np.float64, where=mask))


def _largest(lines: Matrix, n: int, m: int) -> float:
    """Return the sum of the largest N/M of every line."""
    number = lines.shape[1] * n // m
    return float(-np.partition(-lines, number - 1, axis=1)[:, :number].sum(dtype=np.float64))


def run_case(study: Study, case: Case, results: Path) -> str:
    """Do it and keep the result; what to tell about it."""
    gains = study.run(case)
    keep(results / f"{case.name}.json", {"case": asdict(case), "gains": [asdict(each) for each in gains]})
    best = max(each.after - each.before for each in gains)
    return f"{case.name}: {100 * best:.2f} points"


def read(folder: Path) -> list[tuple[Case, list[Gain]]]:
    """All results of a folder."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [(Case(**record["case"]), [Gain(**line) for line in record["gains"]]) for record in records]
