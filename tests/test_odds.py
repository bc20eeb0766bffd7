"""The odds that pruned weights fit a pattern: the paper's values, brute force, simulation, and the choice from them."""

import itertools
import math
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest

import masksolve as ms
from masksolve import Pattern
from masksolve import odds as module
from masksolve.odds import (
    choose_pattern,
    choose_patterns,
    group_odds,
    row_odds,
    share_of_groups,
    share_of_rows,
    share_of_tiles,
    tile_odds,
)

# P(at least m - n zeros of m) at these sparsities, to four digits.
KNOWN = {
    0.5: {(2, 4): "0.6875", (4, 8): "0.6367", (8, 16): "0.5982"},
    0.7: {(2, 4): "0.9163", (4, 8): "0.9420", (8, 16): "0.9743"},
    0.8: {(2, 4): "0.9728", (4, 8): "0.9896", (8, 16): "0.9985"},
    0.9: {(2, 4): "0.9963", (4, 8): "0.9996", (8, 16): "1.0000"},
}


@cache
def fitting(shape: tuple[int, int], n: int) -> list[int]:
    """Entry j: how many tiles with j ones keep no more than n in any row or column, by looking at every tile."""
    entries = np.array(list(itertools.product((0, 1), repeat=math.prod(shape))), np.int8)
    tiles = entries.reshape(-1, *shape)
    fits = (tiles.sum(axis=1) <= n).all(axis=1) & (tiles.sum(axis=2) <= n).all(axis=1)
    return np.bincount(entries[fits].sum(axis=1), minlength=math.prod(shape) + 1).tolist()


def brute_force(sparsity: Fraction, shape: tuple[int, int], n: int) -> Fraction:
    """The probability that no row and no column of a tile keeps more than n."""
    size = math.prod(shape)
    return sum(
        (count * sparsity ** (size - ones) * (1 - sparsity) ** ones for ones, count in enumerate(fitting(shape, n))),
        start=Fraction(0),
    )


def zeroed(shape: tuple[int, ...], sparsity: float) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape) * (rng.random(shape) >= sparsity)


@pytest.mark.parametrize("sparsity", KNOWN)
def test_group_odds_are_those_of_the_paper(sparsity: float) -> None:
    assert {pair: f"{group_odds(sparsity, *pair):.4f}" for pair in KNOWN[sparsity]} == KNOWN[sparsity]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 2), (1, 4), (3, 5), (2, 2)], ids=str)
def test_group_and_row_odds_are_those_of_brute_force(n: int, m: int, sparsity: float) -> None:
    exact = Fraction(sparsity)
    # A tile of one row: its columns, of one entry each, exceed n only where n = 0, as the row then does.
    whole, partial = brute_force(exact, (1, m), n), brute_force(exact, (1, m - 1), n)
    assert group_odds(sparsity, n, m) == pytest.approx(float(whole), rel=1e-13)
    assert row_odds(sparsity, n, m, 3 * m) == pytest.approx(float(whole**3), rel=1e-13)
    assert row_odds(sparsity, n, m, 2 * m - 1) == pytest.approx(float(whole * partial), rel=1e-13)


@pytest.mark.parametrize("sparsity", [0.0, 0.0625, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("n", "m"), [(0, 2), (1, 3), (2, 3), (1, 4), (2, 4), (4, 4)], ids=str)
def test_tile_odds_are_those_of_brute_force(n: int, m: int, sparsity: float) -> None:
    found = tile_odds(sparsity, n, m)
    assert found.exact
    assert found.value == pytest.approx(float(brute_force(Fraction(sparsity), (m, m), n)), rel=1e-12)
    assert found.low == found.value == found.high


@pytest.mark.parametrize(("n", "m"), [(4, 8), (3, 12), (12, 12)], ids=str)
def test_exact_tile_odds_lie_in_the_interval_of_random_tiles(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = tile_odds(0.8, n, m)
    monkeypatch.setattr(module, "_LARGEST_COUNTED", 0)
    sampled = tile_odds(0.8, n, m, samples=20_000, rng=1)
    assert exact.exact
    assert sampled.exact == (n == m)
    assert sampled.low <= exact.value <= sampled.high
    assert sampled.high - sampled.low < 0.015


@pytest.mark.parametrize("truth", [0.02, 0.5, 0.97])
def test_the_interval_covers_the_truth_as_often_as_it_says(truth: float) -> None:
    # Wilson's interval, against the normal one, does not collapse near 0 or 1.
    rng = np.random.default_rng(2)
    intervals = [module._wilson_interval(int(hits), 200) for hits in rng.binomial(200, truth, 4000)]
    assert 0.93 < np.mean([low <= truth <= high for low, high in intervals]) < 0.985


def test_no_hit_leaves_an_upper_bound_and_only_hits_a_lower_one() -> None:
    none, every = tile_odds(0.3, 8, 16, samples=500, rng=0), tile_odds(0.99, 8, 16, samples=500, rng=0)
    assert (none.value, none.low) == (0.0, 0.0)
    assert (every.value, every.high) == (1.0, 1.0)
    assert none.high == pytest.approx(1 - every.low)
    assert 0 < none.high < 0.01


def test_a_seed_gives_the_same_estimate_again() -> None:
    assert tile_odds(0.8, 8, 16, samples=1000, rng=3) == tile_odds(0.8, 8, 16, samples=1000, rng=3)
    assert tile_odds(0.8, 8, 16, samples=1000, rng=3) != tile_odds(0.8, 8, 16, samples=1000, rng=4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (8, 16)], ids=str)
def test_the_share_of_a_random_tensor_is_what_the_odds_predict(n: int, m: int) -> None:
    weights = zeroed((1024, 1024), 0.7)

    def close(share: float, odds: float, among: int) -> bool:
        return abs(share - odds) < 4.5 * math.sqrt(odds * (1 - odds) / among) + 1e-3

    for direction in ("rows", "columns"):
        assert close(share_of_groups(weights, n, m, direction=direction), group_odds(0.7, n, m), 1024 * 1024 // m)
    assert close(share_of_rows(weights[:, :40], n, m), row_odds(0.7, n, m, 40), 1024)
    assert close(share_of_tiles(weights, n, m), tile_odds(0.7, n, m, rng=0).value, (1024 // m) ** 2)


@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (3, 7, 9), (1, 3)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 5)], ids=str)
def test_shares_are_those_that_check_mask_finds_group_by_group(shape: tuple[int, ...], n: int, m: int) -> None:
    weights = zeroed(shape, 0.6)
    matrices = weights.reshape(-1, *shape[-2:]) != 0
    groups, rows, tiles = [], [], []
    for matrix in matrices:
        for row in matrix:
            parts = [row[at : at + m] for at in range(0, len(row), m)]
            groups += [part.sum() <= n for part in parts]
            rows.append(all(part.sum() <= n for part in parts))
        for top, left in itertools.product(range(0, matrix.shape[0], m), range(0, matrix.shape[1], m)):
            tiles.append(ms.is_valid_mask(matrix[top : top + m, left : left + m], n, m))
    assert share_of_groups(weights, n, m) == pytest.approx(np.mean(groups))
    assert share_of_rows(weights, n, m) == pytest.approx(np.mean(rows))
    assert share_of_tiles(weights, n, m) == pytest.approx(np.mean(tiles))
    transposed = weights.swapaxes(-1, -2)
    assert share_of_groups(transposed, n, m, direction="columns") == share_of_groups(weights, n, m)
    assert share_of_rows(transposed, n, m, direction="columns") == share_of_rows(weights, n, m)
    assert share_of_tiles(transposed, n, m) == share_of_tiles(weights, n, m)


def test_odds_and_shares_of_masks_of_the_solver() -> None:
    weights = np.random.default_rng(0).standard_normal((32, 32))
    pruned = weights * ms.solve_matrix(weights, 3, 8)
    assert share_of_tiles(pruned, 3, 8) == share_of_rows(pruned, 3, 8) == 1
    assert share_of_groups(pruned, 2, 8) == 0
    assert share_of_tiles(pruned != 0, 3, 8) == 1


@pytest.mark.parametrize("m", [4, 8, 16])
@pytest.mark.parametrize("confidence", [0.95, 0.1])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_the_choice_is_the_sparsest_pattern_that_is_likely_enough(m: int, confidence: float, sparsity: float) -> None:
    chosen = choose_pattern(sparsity, m, confidence=confidence)
    assert group_odds(sparsity, chosen.n, m) >= confidence
    assert chosen.n == 0 or group_odds(sparsity, chosen.n - 1, m) < confidence


def test_dense_weights_stay_dense_and_empty_ones_need_none() -> None:
    assert choose_pattern(0.0, 8) == Pattern(8, 8)
    assert choose_pattern(1.0, 8) == Pattern(0, 8)


def test_each_layer_gets_the_pattern_of_its_own_sparsity() -> None:
    layers = {"thin": zeroed((64, 64), 0.95), "thick": zeroed((8, 4, 3, 3), 0.5), "dense": np.ones(10)}
    chosen = choose_patterns(layers, 8)
    assert list(chosen) == list(layers)
    for name, weights in layers.items():
        assert chosen[name] == choose_pattern((weights == 0).mean(), 8)
    assert chosen["thin"].n < chosen["thick"].n < chosen["dense"].n == 8


@pytest.mark.parametrize("pattern", [(1000, 2000), (2, 5000)], ids=str)
def test_large_groups_neither_overflow_nor_lose_the_answer(pattern: tuple[int, int]) -> None:
    n, m = pattern
    # The median of a binomial with a whole mean is its mean.
    odds = group_odds(1 - n / m, n, m)
    assert 0.5 < odds < 0.7
    assert odds == pytest.approx(1 - group_odds(n / m, m - n - 1, m), rel=1e-9)


BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (group_odds, (1.5, 2, 4), {}, ValueError, "sparsity must lie between 0 and 1, got 1.5"),
    (group_odds, (-0.1, 2, 4), {}, ValueError, "got -0.1"),
    (group_odds, (math.nan, 2, 4), {}, ValueError, "got nan"),
    (group_odds, ("0.5", 2, 4), {}, TypeError, "'0.5'"),
    (group_odds, (True, 2, 4), {}, TypeError, "True"),
    (group_odds, (0.5, 5, 4), {}, ValueError, "n=5"),
    (row_odds, (0.5, 2, 4, 0), {}, ValueError, "length must be at least 1, got 0"),
    (row_odds, (0.5, 2, 4, 8.0), {}, TypeError, "8.0"),
    (tile_odds, (2, 2, 4), {}, ValueError, "got 2"),
    (tile_odds, (0.5, 8, 16), {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
    (tile_odds, (0.5, 8, 16), {"rng": "seed"}, TypeError, "'seed'"),
    (share_of_groups, ([1, 2], 1, 2), {}, ValueError, r"\(2,\)"),
    (share_of_groups, (np.ones((0, 4)), 1, 2), {}, ValueError, r"\(0, 4\)"),
    (share_of_groups, ([["a", "b"]], 1, 2), {}, TypeError, "dtype <U1"),
    (share_of_groups, (np.eye(4), 1, 2), {"direction": "both"}, ValueError, "share_of_tiles"),
    (share_of_rows, (np.eye(4), 1, 2), {"direction": "row"}, ValueError, "did you mean 'rows'"),
    (share_of_tiles, (np.eye(4), 3, 2), {}, ValueError, "n=3"),
    (choose_pattern, (0.5, 0), {}, ValueError, "m=0"),
    (choose_pattern, (0.5, 8), {"confidence": 95}, ValueError, "confidence must lie between 0 and 1, got 95"),
    (choose_patterns, ([1, 2], 8), {}, TypeError, "got list"),
    *((choose_patterns, ({"a": bad}, 8), {}, TypeError, "layer 'a' has dtype") for bad in (None, "text", [b"0", b"1"])),
    (choose_patterns, ({"a": []}, 8), {}, ValueError, "'a'.*empty"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "keywords", "error", "message"),
    BAD,
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_bad_input_is_refused_by_name(
    function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arguments, **keywords)
