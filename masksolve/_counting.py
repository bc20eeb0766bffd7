"""How many masks a tile has, as an exact integer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from masksolve._tiles import LineSums


@lru_cache(maxsize=256)
def count_masks(rows: int, cols: int, line_sums: LineSums, max_states: int = 20_000) -> int | None:
    """The number of 0/1 matrices (rows, cols) that `line_sums` allow; None if that takes over `max_states` states.

    Dynamic program, row by row: what later rows may do depends only on how many columns hold 0, 1, ..., N ones already.

    >>> count_masks(8, 8, LineSums(4, True, True))
    116963796250
    """
    kept = line_sums.kept
    states = {(cols, *[0] * kept): 1}
    for left in reversed(range(rows)):
        following: Counter[tuple[int, ...]] = Counter()
        for state, ways in states.items():
            for chosen in _choices(state, kept, line_sums.exact_rows):
                after = list(state)
                factor = ways
                for load, columns in enumerate(chosen):
                    factor *= math.comb(state[load], columns)
                    after[load] -= columns
                    after[load + 1] += columns
                # A column that the rows left cannot fill any more is a dead end.
                if not line_sums.exact_columns or not any(after[: max(0, kept - left)]):
                    following[tuple(after)] += factor
            if len(following) > max_states:
                return None
        states = following
    return sum(states.values())


def _choices(state: tuple[int, ...], kept: int, exact: bool) -> Iterator[tuple[int, ...]]:
    """How many columns of each load below `kept` a row may take: `kept` in all if `exact`, else at most."""

    def extend(load: int, room: int) -> Iterator[tuple[int, ...]]:
        if load == kept:
            if room == 0 or not exact:
                yield ()
            return
        for columns in range(min(room, state[load]) + 1):
            for rest in extend(load + 1, room - columns):
                yield (columns, *rest)

    return extend(0, kept)
