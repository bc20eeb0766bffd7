"""Threads: the pieces of a matrix that they take, this one among them, and the memory that each keeps."""

import signal
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve._methods import exact
from masksolve._methods.exact import equilibrate, layout
from masksolve._threads import Piece, run_pieces
from tests.tables import PATTERNS, Pair, name_of, weights_of

PIECES: list[Piece] = [(slice(i, i + 1), slice(0, 1)) for i in range(1000)]


@pytest.mark.parametrize("threads", [1, 2, 3, 2000])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_every_piece_is_worked_on_once(threads: int, count: int) -> None:
    done: list[Piece] = []
    run_pieces(done.append, PIECES[:count], threads)
    assert sorted(done, key=lambda piece: piece[0].start) == PIECES[:count]


@pytest.mark.parametrize("in_main", [True, False])
def test_an_error_in_any_thread_is_raised_and_leaves_the_rest_undone(in_main: bool) -> None:
    done: list[Piece] = []

    def work(piece: Piece) -> None:
        if (threading.current_thread() is threading.main_thread()) == in_main:
            raise IndexError("mine")
        time.sleep(0.001)
        done.append(piece)

    with pytest.raises(IndexError, match="mine"):
        run_pieces(work, PIECES, 2)
    assert len(done) < len(PIECES) // 2


@pytest.mark.parametrize("family", ["gaussian float32", "gaussian float64", "int8", "half zero", "constant"])
@pytest.mark.parametrize("pattern", [(n, m) for n, m in PATTERNS if n < m <= 32], ids=name_of)
def test_nothing_is_read_of_what_an_earlier_call_of_the_thread_has_left(
    pattern: Pair, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m = pattern
    weights = weights_of(family, (10 * m, 12 * m))

    def all_solved_after(fill: int) -> list[bytes]:
        def vectors_of(m: int, itemsize: int) -> layout.Vectors:
            vectors = layout.new_vectors(m, itemsize)
            vectors.words[:] = fill
            return vectors

        monkeypatch.setattr(equilibrate, "_vectors_of", vectors_of)
        found = []
        for saturated in (True, False):
            solved = ms.solve_matrix(weights, n, m, saturated=saturated, return_potentials=True)
            found += [array.tobytes() for array in solved]
        return found

    # All bits set are NaN, and integers of -1.
    assert all_solved_after(-1) == all_solved_after(0)


@pytest.mark.parametrize("what", ["solve", "certify"])
@pytest.mark.parametrize("m", [130, 150])
def test_an_interrupt_waits_for_the_few_tiles_in_work_only(what: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("gaussian float32", (10 * m, 10 * m))
    mask = np.eye(10 * m, dtype=bool)
    called: list[int] = []

    def solve_tiles(importance: NDArray[np.float64], *rest: Any) -> Any:
        interrupts = threading.current_thread() is threading.main_thread()
        if interrupts:
            called.clear()  # On a busy machine the other thread may be far ahead by now.
        called.append(importance.shape[0] * importance.shape[1])
        if interrupts:
            signal.raise_signal(signal.SIGINT)
        return exact_solve_tiles(importance, *rest)

    exact_solve_tiles = exact.solve_tiles
    monkeypatch.setattr(exact, "solve_tiles", solve_tiles)
    # In a background job of a shell, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = {
        "solve": lambda: ms.solve_matrix(weights, 1, m, threads=2),
        "certify": lambda: ms.certify(weights, mask, 1, m),
    }
    try:
        with pytest.raises(KeyboardInterrupt):
            calls[what]()
    finally:
        signal.signal(signal.SIGINT, before)
    assert max(called) * m * m <= max(m * m, 1 << 13)
    # Each of the two threads solves and judges the tiles that it has taken: 2**16 weights, or a tile.
    assert sum(called) * m * m <= 4 * (1 << 16)
    assert sum(called) < 100


def test_a_thread_that_has_met_every_m_keeps_half_a_mebibyte_at_most() -> None:
    def meet_every_m() -> None:
        for m in [*range(2, 65), *range(64, 1, -1)]:
            for itemsize in (4, 8):
                vectors = equilibrate._vectors_of(m, itemsize)
                assert vectors.words.nbytes == layout.new_vectors(m, itemsize).words.nbytes
                # The next call gets the same.
                assert equilibrate._vectors_of(m, itemsize) is vectors
        kept.append(tracemalloc.get_traced_memory()[0] - before)

    kept: list[int] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        thread = threading.Thread(target=meet_every_m)
        thread.start()
        thread.join()
    finally:
        tracemalloc.stop()
    assert kept[0] <= 1 << 19
