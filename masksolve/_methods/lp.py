"""Method "lp": the linear relaxation, whose vertices are masks: its matrix is totally unimodular.

Source: Hubara et al. 2021 (arXiv 2102.08124), the integer program; Hoffman & Kruskal for its relaxation. Two
backends: HiGHS' dual simplex through `scipy.optimize.linprog`, and CBC through PuLP. Both are simplex solvers: an
interior-point method would return x = 0.5 on ties.

Their tolerances on reduced costs are absolute (1e-7), so each tile is scaled: to a largest weight of 2**20 for
HiGHS, whose tolerance is set to 1e-10, so that masks are told apart that differ by 1e-14 of the tile's largest
weight; to 2**30 for CBC, which reads 12 digits: 1e-10.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import MethodNotInstalledError
from masksolve._inputs import check_choice
from masksolve._threads import Piece, for_each_chunk, importance_of
from masksolve._tiles import Margins

_HIGHS_LARGEST = 2.0**20
_CBC_LARGEST = 2.0**30


def solve(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    *,
    threads: int | None,
    backend: str = "highs",
) -> None:
    """Fill masks (P, Q, r, c) with optimal masks of tiles (P, Q, r, c); backend "highs" or "pulp"."""
    backends = {"highs": _solve_with_highs, "pulp": _solve_with_pulp}
    solve_tile = backends[check_choice(backend, "backend", backends)]

    def work(piece: Piece) -> None:
        importance = importance_of(tiles[piece])
        chunk = np.empty(importance.shape, np.bool_)
        for index in np.ndindex(importance.shape[:2]):
            values = solve_tile(importance[index], margins)
            chunk[index] = values > 0.5
            if np.abs(values - chunk[index]).max() > 1e-6:
                raise RuntimeError(
                    f"{backend} returned a fractional solution, {values.tolist()}; please report this tile"
                )
        masks[piece] = chunk

    for_each_chunk(work, tiles.shape, threads)


def _scaled(importance: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    # Dividing twice keeps clear of 1 / subnormal.
    top = importance.max()
    return importance / top * largest if top > 0 else importance


def _solve_with_highs(importance: NDArray[np.float64], margins: Margins) -> NDArray[np.float64]:
    from scipy.optimize import linprog

    rows, cols = importance.shape
    exact, at_most = _line_matrices(rows, cols, margins)
    result = linprog(
        -_scaled(importance, _HIGHS_LARGEST).ravel(),
        A_eq=exact,
        b_eq=None if exact is None else np.full(exact.shape[0], margins.kept),
        A_ub=at_most,
        b_ub=None if at_most is None else np.full(at_most.shape[0], margins.kept),
        bounds=(0, 1),
        method="highs-ds",
        options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10},
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS did not solve a {rows}x{cols} tile: {result.message}; please report this tile")
    values: NDArray[np.float64] = result.x.reshape(rows, cols)
    return values


@functools.lru_cache(maxsize=64)
def _line_matrices(rows: int, cols: int, margins: Margins) -> tuple[Any, Any]:
    """Return the sparse matrices of the lines that hold exactly, and at most, N; None where there are none."""
    from scipy.sparse import csr_array

    entry_lines = np.concatenate([np.repeat(np.arange(rows), cols), rows + np.tile(np.arange(cols), rows)])
    entries = np.tile(np.arange(rows * cols), 2)
    lines = csr_array((np.ones(len(entries)), (entry_lines, entries)), shape=(rows + cols, rows * cols))
    is_exact = np.repeat([margins.exact_rows, margins.exact_columns], [rows, cols])
    return lines[is_exact] if is_exact.any() else None, lines[~is_exact] if not is_exact.all() else None


def _solve_with_pulp(importance: NDArray[np.float64], margins: Margins) -> NDArray[np.float64]:
    try:
        import cbcbox
        import pulp
    except ImportError:
        raise MethodNotInstalledError(
            "method 'lp' with backend='pulp' needs PuLP with CBC, which is not installed; pip install 'masksolve[lp]'"
        ) from None
    rows, cols = importance.shape
    weights = _scaled(importance, _CBC_LARGEST)
    program = pulp.LpProblem("tile", pulp.LpMaximize)
    x = [[program.add_variable(f"x_{i}_{j}", 0, 1) for j in range(cols)] for i in range(rows)]
    program += pulp.lpSum(float(weights[i, j]) * x[i][j] for i in range(rows) for j in range(cols))
    for line in x:
        total = pulp.lpSum(line)
        program += total == margins.kept if margins.exact_rows else total <= margins.kept
    for column in zip(*x, strict=True):
        total = pulp.lpSum(column)
        program += total == margins.kept if margins.exact_columns else total <= margins.kept
    solved = program.solve(pulp.COIN_CMD(path=cbcbox.cbc_bin_path(), msg=False))
    # PuLP 4 returns statistics with the status in them, PuLP 3 the number of the status.
    status = solved.status.name if hasattr(solved, "status") else pulp.LpStatus[solved]
    if status != "Optimal":
        raise RuntimeError(f"CBC did not solve a {rows}x{cols} tile: {status}; please report this tile")
    return np.array([[variable.value() for variable in line] for line in x], np.float64)
