"""Permutations: what they keep is what masks keep in the new order, and what they say of it is true."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve import permute
from masksolve.permute import Permutation, search
from tests.tables import Pair, name_of

PATTERNS: list[Pair] = [(2, 4), (1, 4), (3, 4), (2, 5), (3, 8), (4, 8)]
DIRECTIONS = ("both", "rows", "columns")
Matrix = NDArray[Any]


def normal(rows: int, columns: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def kept(weights: Matrix, pattern: Pair, direction: Any = "both") -> float:
    """The oracle: the share of the importance that the best mask of a matrix keeps."""
    importance = np.abs(weights)
    return float(importance[ms.solve_matrix(weights, *pattern, direction=direction)].sum() / importance.sum())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_the_new_order_keeps_what_is_said_and_more_than_the_old_one(pattern: Pair, direction: Any) -> None:
    weights = normal(29, 26)
    found = search(weights, pattern, direction=direction)
    assert found.kept_before == pytest.approx(kept(weights, pattern, direction))
    assert found.kept_after == pytest.approx(kept(found.apply(weights), pattern, direction))
    assert found.kept_after > found.kept_before
    assert list(found.trace) == sorted(set(found.trace))
    assert found.trace[-1] == found.kept_after


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_every_stripe_is_scored_with_every_line_exactly(pattern: Pair, direction: Any) -> None:
    n, m = pattern
    now = np.abs(normal(5 * m, 21)).astype(np.float32)
    rng = np.random.default_rng(1)
    stripes, places = np.array([3, 0, 4]), rng.integers(m, size=3)
    # Lines are rows here; under direction="rows", where columns count, the matrix comes transposed.
    engine = permute._Search([now], ms.Pattern(n, m), direction, 1, 1, rng, np.inf)
    found = engine._kept_with(now, stripes, places)
    for receiver, giver in itertools.product(range(3), repeat=2):
        trial = now[stripes[receiver] * m :][:m].copy()
        trial[places[receiver]] = now[stripes[giver] * m + places[giver]]
        groups = "columns" if direction != "both" else "both"
        mask = ms.solve_matrix(trial, n, m, direction=groups)
        assert found[receiver, giver] == pytest.approx(trial[mask].sum(dtype=float), rel=1e-6)


@pytest.mark.parametrize("pattern", [(3, 8), (4, 8), (8, 16)], ids=name_of)
def test_prices_bound_what_a_stripe_keeps_with_other_lines_and_are_exact_with_its_own(pattern: Pair) -> None:
    n, m = pattern
    now = np.abs(normal(3 * m, 2 * m + 3)).astype(np.float32)
    engine = permute._Search([now], ms.Pattern(n, m), "both", 1, 1, np.random.default_rng(1), np.inf)
    kept, (prices,) = engine._priced([now])
    mask = ms.solve_matrix(now, n, m)
    assert kept == pytest.approx([(now * mask)[stripe * m :][:m].sum(dtype=float) for stripe in range(3)])
    worth = engine._worth(now, prices)
    profit = now[None, :, : 2 * m].reshape(1, 3 * m, 2, m) - prices[:, None]
    expected = np.sort(profit)[..., -n:].sum((2, 3))
    # An amount for each stripe is added to all.
    assert worth - worth[:, :1] == pytest.approx(expected - expected[:, :1], abs=1e-4)
    for receiver, giver in itertools.product(range(3), repeat=2):
        trial = now[receiver * m :, : 2 * m][:m].copy()
        before = trial[ms.solve_matrix(trial, n, m)].sum(dtype=float)
        trial[1] = now[giver * m, : 2 * m]
        after = trial[ms.solve_matrix(trial, n, m)].sum(dtype=float)
        bound = worth[receiver, giver * m] - worth[receiver, receiver * m + 1]
        assert after - before <= bound + 1e-4


@pytest.mark.parametrize(
    ("axes", "moved"), [("rows", [True, False]), ("columns", [False, True]), ("both", [True, True])]
)
def test_only_the_lines_of_the_axes_move_and_undo_restores(axes: Any, moved: list[bool]) -> None:
    weights = normal(24, 16)
    found = search(weights, "2:4", axes=axes)
    orders = found.rows, found.columns
    assert [not np.array_equal(order, np.arange(len(order))) for order in orders] == moved
    assert [sorted(order) for order in orders] == [list(range(24)), list(range(16))]
    assert np.array_equal(found.apply(weights), weights[found.rows][:, found.columns])
    stack = normal(48, 16).reshape(2, 24, 16)
    assert np.array_equal(found.undo(found.apply(stack)), stack)
    with pytest.raises(ValueError, match=r"is of 24x16 matrices, got shape \(16, 24\)"):
        found.apply(weights.T)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_best_of_all_orders_of_a_tiny_matrix_is_found(direction: Any) -> None:
    for seed in range(12):
        weights = normal(6, 6, seed)
        axes = [
            itertools.permutations(range(6)) if direction in ("both", axis) else [range(6)]
            for axis in ("columns", "rows")
        ]
        # Of the orders that differ in stripes, one each.
        rows, columns = (sorted({_canonical(order) for order in orders}) for orders in axes)
        best = max(kept(weights[np.ix_(r, c)], (1, 2), direction) for r in rows for c in columns)
        assert search(weights, "1:2", direction=direction, escapes=40, rng=seed).kept_after == pytest.approx(best)


def _canonical(order: Any) -> tuple[int, ...]:
    return tuple(itertools.chain(*sorted(tuple(sorted(order[start : start + 2])) for start in (0, 2, 4))))


def test_a_planted_order_that_loses_nothing_is_found() -> None:
    rng = np.random.default_rng(0)
    for pattern in ((1, 2), (2, 4)):
        tiles = ms.random_mask(*pattern, size=(6, 4), rng=1)
        mask = tiles.swapaxes(1, 2).reshape(6 * pattern[1], 4 * pattern[1])
        planted = np.where(mask, rng.uniform(1, 2, mask.shape), 0)
        shuffled = planted[:, rng.permutation(planted.shape[1])]
        assert kept(shuffled, pattern) < 0.9
        assert search(shuffled, pattern, axes="columns", escapes=30).kept_after == 1


def test_lines_stay_within_their_groups_and_partial_stripes_where_they_are() -> None:
    found = search(normal(24, 10), "2:4", axes="rows", groups=3)
    assert [sorted(part) for part in np.split(found.rows, 3)] == [list(range(k, k + 8)) for k in (0, 8, 16)]
    assert found.kept_after > found.kept_before
    found = search(normal(26, 15), "2:4")
    assert found.rows[24:].tolist() == [24, 25]
    assert found.columns[12:].tolist() == [12, 13, 14]


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_matrices_that_share_rows_get_one_order_for_all(pattern: Pair) -> None:
    up, gate, down = normal(40, 18, 1), normal(40, 18, 2), normal(11, 40, 3)
    found = search([up, gate, down.T], pattern, axes="rows")
    assert len(found.columns) == 18 + 18 + 11
    matrices, weights = [up, gate, down.T], [np.abs(each).sum() for each in (up, gate, down)]

    def mean(order: Any) -> float:
        shares = [kept(each[order], pattern) for each in matrices]
        return float(np.average(shares, weights=weights))

    assert found.kept_before == pytest.approx(mean(np.arange(40)))
    assert found.kept_after == pytest.approx(mean(found.rows))
    assert found.kept_after > found.kept_before


def test_matrices_narrower_than_a_tile_are_ordered_by_what_they_keep() -> None:
    weights = normal(40, 6)
    found = search(weights, "4:8", axes="rows")
    assert found.kept_after == pytest.approx(kept(found.apply(weights), (4, 8)))
    assert found.kept_after > found.kept_before


def test_scores_decide_in_place_of_magnitudes() -> None:
    weights, scores = normal(16, 16, 1), np.abs(normal(16, 16, 2))
    found = search(weights, "2:4", scores=scores)
    assert found.kept_after == pytest.approx(kept(found.apply(scores), (2, 4)))
    assert np.array_equal(found.rows, search(scores, "2:4").rows)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    found, scaled = search(normal(16, 16), "2:4"), search(normal(16, 16) * scale, "2:4")
    assert np.array_equal(found.columns, scaled.columns)
    assert found.kept_after == pytest.approx(scaled.kept_after, rel=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weights", [np.zeros((8, 8)), np.ones((8, 8)), np.eye(1), normal(3, 3)])
def test_where_nothing_gains_the_order_stays(weights: Matrix, direction: Any) -> None:
    found = search(weights, "2:4", direction=direction, escapes=2)
    assert found.rows.tolist() == list(range(len(weights)))
    assert found.columns.tolist() == list(range(weights.shape[1]))
    assert found.kept_after == found.kept_before
    assert found.trace == ()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n", [0, 4])
def test_masks_of_nothing_and_of_everything_have_no_order(n: int, direction: Any) -> None:
    found = search(normal(8, 8), (n, 4), direction=direction)
    assert (found.kept_before, found.kept_after, found.trace) == (n / 4, n / 4, ())


def test_the_same_seed_gives_the_same_order_on_any_number_of_threads() -> None:
    one, two = (search(normal(32, 32), "4:8", escapes=2, rng=7, threads=threads) for threads in (1, 2))
    assert np.array_equal(one.rows, two.rows)
    assert np.array_equal(one.columns, two.columns)
    assert not np.array_equal(one.rows, search(normal(32, 32), "4:8", rng=8).rows)


def test_escapes_never_lose_what_was_found_and_gain_on_the_whole() -> None:
    without = [search(normal(24, 24, seed), "2:4", rng=0).kept_after for seed in range(5)]
    beyond = [search(normal(24, 24, seed), "2:4", rng=0, escapes=6).kept_after for seed in range(5)]
    assert all(more >= less for more, less in zip(beyond, without, strict=True))
    assert sum(beyond) > sum(without)


def test_axes_of_many_stripes_are_assigned_in_random_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permute, "_MOST_TILES", 40)
    monkeypatch.setattr(permute, "_AT_ONCE", 64)
    for direction in DIRECTIONS:
        weights = normal(40, 44)
        found = search(weights, "2:4", direction=direction)  # type: ignore[arg-type]
        assert found.kept_after == pytest.approx(kept(found.apply(weights), (2, 4), direction))
        assert found.kept_after > found.kept_before + 0.005


def test_an_interrupted_search_has_told_of_the_best_so_far() -> None:
    seen: list[Permutation] = []

    def stop(found: Permutation) -> None:
        seen.append(found)
        if len(seen) == 3:
            raise KeyboardInterrupt

    weights = normal(32, 32)
    with pytest.raises(KeyboardInterrupt):
        search(weights, "2:4", on_progress=stop)
    assert [len(each.trace) for each in seen] == [1, 2, 3]
    assert seen[-1].kept_after == pytest.approx(kept(seen[-1].apply(weights), (2, 4)))


def test_no_assignment_begins_after_the_time_limit() -> None:
    found = search(normal(32, 32), "2:4", time_limit=1e-9)
    assert found.trace == ()
    assert repr(found).startswith("Permutation(32x32, kept importance 70.")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axes": "cols"}, ValueError, "axes"),
        ({"direction": "up"}, ValueError, "direction"),
        ({"direction": "rows", "axes": "rows"}, ValueError, "in every order of the rows; pass axes='columns'"),
        ({"direction": "columns", "axes": "columns"}, ValueError, "pass axes='rows'"),
        ({"groups": 2}, ValueError, "groups=2 are of the lines of one axis; pass axes='rows' or 'columns'"),
        ({"groups": 3, "axes": "rows"}, ValueError, "8 rows do not make groups=3 of whole stripes of 4"),
        ({"groups": 4, "axes": "columns"}, ValueError, "12 columns do not make groups=4 of whole stripes of 4"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"escapes": -1}, ValueError, "escapes must be at least 0"),
        ({"time_limit": 0}, ValueError, "time_limit must be positive, in seconds, got 0"),
        ({"threads": 0}, ValueError, "threads"),
        ({"rng": "seed"}, TypeError, "rng"),
        ({"scores": np.ones((8, 8))}, ValueError, r"scores of shape \(8, 8\) for weights of shape \(8, 12\)"),
        ({"scores": -np.ones((8, 12))}, ValueError, "scores must not be negative"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(normal(8, 12), "2:4", **options)


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("got shapes (8, 8), (12, 8); transpose those that share columns")):
        search([normal(8, 8), normal(12, 8)], "2:4", axes="rows")
    with pytest.raises(ValueError, match="several matrices share their rows, got axes='both'; pass axes='rows'"):
        search([normal(8, 8), normal(8, 8)], "2:4")
    with pytest.raises(ValueError, match="scores must be a sequence of 2 matrices"):
        search([normal(8, 8), normal(8, 8)], "2:4", axes="rows", scores=np.ones((8, 8)))
    with pytest.raises(ValueError, match="nan"):
        search(np.full((8, 8), np.nan), "2:4")
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        search(np.ones((1, 8, 8)), "2:4")
    with pytest.raises(ValueError, match="which is empty"):
        search(np.ones((0, 8)), "2:4")
