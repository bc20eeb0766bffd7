"""Pieces of a matrix that several threads take, this one among them."""

import threading
import time

import pytest

from masksolve._methods._chunks import Piece, run_pieces

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
