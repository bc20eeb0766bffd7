"""Random masks: valid, and every valid mask equally likely."""

import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve.diversity import _sample, count
from masksolve.diversity._sample_kernels import switch_rectangles

Masks = NDArray[np.bool_]


def by_switches(n: int, m: int, size: int, seed: int, attempts: int | None = None) -> Masks:
    """Masks of the Markov chain also where counts are available."""
    masks = np.zeros((size, m, m), np.bool_)
    steps = _sample.switch_attempts(n, m) if attempts is None else attempts
    _sample._sample_by_switches(masks, n, np.random.default_rng(seed), steps)
    return masks


def chi_square(observed: NDArray[Any], expected: NDArray[Any] | float) -> float:
    """The statistic in standard deviations from its mean, were `observed` drawn as expected."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(observed) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def counts_of_each(masks: Masks) -> Counter[bytes]:
    return Counter(mask.tobytes() for mask in masks)


def overlaps(masks: Masks) -> NDArray[np.int64]:
    """How many columns the first two rows of each mask have in common."""
    return (masks[:, 0] & masks[:, 1]).sum(axis=-1)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (1, 5), (2, 4), (4, 8), (5, 8), (3, 7), (4, 4), (2, 64), (6, 12)])
def test_masks_are_valid_and_saturated(n: int, m: int) -> None:
    masks = ms.random_mask(n, m, 20, rng=0)
    assert masks.dtype == np.bool_
    ms.check_mask(masks, n, m, saturated=True)


@pytest.mark.parametrize(("n", "m"), [(16, 32), (20, 32), (6, 64)])
def test_masks_beyond_counting_are_valid_and_saturated(n: int, m: int) -> None:
    assert not _sample._is_countable(min(n, m - n), m)
    ms.check_mask(ms.random_mask(n, m, 3, rng=0), n, m, saturated=True)


@pytest.mark.parametrize("sample", [lambda: ms.random_mask(2, 4, 9000, rng=1), lambda: by_switches(2, 4, 9000, 2)])
def test_all_90_masks_of_2_4_are_equally_likely(sample: Any) -> None:
    seen = counts_of_each(sample())
    assert len(seen) == count(2, 4) == 90
    assert abs(chi_square(np.array([*seen.values()]), 100.0)) < 4


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 3), (1, 4), (3, 4), (2, 5)], ids=str)
def test_all_masks_of_small_patterns_are_equally_likely(n: int, m: int) -> None:
    total = count(n, m)
    seen = counts_of_each(ms.random_mask(n, m, 100 * total, rng=3))
    assert len(seen) == total
    assert abs(chi_square(np.array([*seen.values()]), 100.0)) < 4


def test_a_test_of_90_masks_notices_a_biased_sampler() -> None:
    # Too few switches leave the chain near its start.
    seen = counts_of_each(by_switches(2, 4, 9000, 4, attempts=1))
    assert chi_square(np.array([*seen.values()]), 100.0) > 10


def upper_halves_3_6(masks: Masks) -> Counter[tuple[int, ...]]:
    """How the column loads of the first three rows are distributed: the margins of 3:6."""
    return Counter(tuple(np.bincount(loads, minlength=4).tolist()) for loads in masks[:, :3].sum(axis=1))


@pytest.mark.parametrize(
    "sample",
    [lambda: ms.random_mask(3, 6, 6000, rng=5), lambda: by_switches(3, 6, 6000, 6)],
    ids=["exact", "chain"],
)
def test_margins_of_3_6_are_those_of_all_masks(sample: Any) -> None:
    # A brute-force list of all lines, and of all triples of them.
    lines = np.array([[(j >> i) & 1 for i in range(6)] for j in range(64) if j.bit_count() == 3])
    triples = (lines[:, None, None] + lines[:, None] + lines).reshape(-1, 6)
    loads, times = np.unique(triples, axis=0, return_counts=True)
    ways = {tuple(load): int(w) for load, w in zip(loads.tolist(), times, strict=True)}
    expected: Counter[tuple[int, ...]] = Counter()
    for load, w in ways.items():
        expected[tuple(load.count(k) for k in range(4))] += w * ways[tuple(3 - k for k in load)]
    assert expected.total() == count(3, 6)

    seen = upper_halves_3_6(sample())
    assert seen.keys() <= expected.keys()
    shares = np.array([expected[key] for key in expected]) / expected.total()
    assert abs(chi_square(np.array([seen[key] for key in expected]), 6000 * shares)) < 4


@pytest.mark.parametrize(("n", "m"), [(4, 8), (8, 16), (5, 8), (3, 7)], ids=str)
def test_every_entry_is_kept_equally_often(n: int, m: int) -> None:
    size = 6000
    kept = ms.random_mask(n, m, size, rng=7).sum(axis=0)
    deviation = (kept - size * n / m) / math.sqrt(size * n / m * (1 - n / m))
    assert np.abs(deviation).max() < 5
    # The sums of rows and columns are fixed, which leaves (m - 1)^2 of m^2 entries free.
    statistic, freedom = float((deviation**2).sum()) * ((m - 1) / m) ** 2, (m - 1) ** 2
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("n", "m"), [(3, 6), (4, 8), (5, 8)], ids=str)
def test_exact_sampling_and_the_markov_chain_agree_on_pairs_of_rows(n: int, m: int) -> None:
    size = 6000
    exact = np.bincount(overlaps(ms.random_mask(n, m, size, rng=8)), minlength=m)
    chain = np.bincount(overlaps(by_switches(n, m, size, 9)), minlength=m)
    both = exact + chain
    exact, chain = exact[both > 40], chain[both > 40]
    # Two samples of equal size: the difference of each cell has the variance of their sum.
    statistic = float(((exact - chain) ** 2 / (exact + chain)).sum())
    assert statistic < len(exact) + 5 * math.sqrt(2 * len(exact))


def test_the_markov_chain_forgets_its_start_in_the_stated_number_of_steps() -> None:
    attempts = _sample.switch_attempts(16, 32)
    assert attempts == 28_319
    few, stated, many = (overlaps(by_switches(16, 32, 400, 10, attempts=k)) for k in (0, attempts, 4 * attempts))
    # The start is circulant, so that two of its rows have 0 to 15 columns in common, unevenly.
    assert few.std() > 2 * many.std()
    assert stated.std() == pytest.approx(many.std(), rel=0.15)
    assert stated.mean() == pytest.approx(many.mean(), abs=5 * many.std() / math.sqrt(200))


@pytest.mark.parametrize(("n", "m"), [(8, 16), (3, 16), (16, 32)], ids=str)
def test_the_markov_chain_forgets_at_the_stated_rate_or_a_little_faster(n: int, m: int) -> None:
    # Half of the memory of the start, in the number of attempts that the formula predicts.
    density = n / m
    half_life = round(m**2 / (4 * density * (1 - density)) * math.log(2))
    start = by_switches(n, m, 300, 11, attempts=0)
    later = start.copy()
    rng = np.random.default_rng(12)
    for mask in later:
        switch_rectangles(rng, mask, half_life)
    memory = ((start == later).mean() - (density**2 + (1 - density) ** 2)) / (2 * density * (1 - density))
    assert 0.33 < memory < 0.53


def test_a_seed_gives_the_same_masks_again_and_a_generator_moves_on() -> None:
    masks = ms.random_mask(4, 8, 5, rng=13)
    assert (masks == ms.random_mask(4, 8, 5, rng=np.random.default_rng(13))).all()
    assert (masks == ms.random_mask(4, 8, 5, rng=np.int64(13))).all()
    assert (masks != ms.random_mask(4, 8, 5, rng=14)).any()
    generator = np.random.default_rng(13)
    assert (ms.random_mask(4, 8, 5, rng=generator) != ms.random_mask(4, 8, 5, rng=generator)).any()
    assert (ms.random_mask(4, 8, 5) != ms.random_mask(4, 8, 5)).any()


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_any_bit_generator_will_do(bits: Any) -> None:
    masks = ms.random_mask(2, 4, 9000, rng=np.random.Generator(bits(15)))
    assert abs(chi_square(np.array([*counts_of_each(masks).values()]), 100.0)) < 4


@pytest.mark.parametrize(
    ("size", "shape"),
    [(None, (4, 4)), (3, (3, 4, 4)), ((2, 3), (2, 3, 4, 4)), ([2], (2, 4, 4)), ((), (4, 4)), (0, (0, 4, 4))],
)
def test_the_shape_is_what_was_asked_for(size: Any, shape: tuple[int, ...]) -> None:
    assert ms.random_mask(2, 4, size, rng=0).shape == shape


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((5, 4), {}, ValueError, "n=5"),
        ((True, 4), {}, TypeError, "True"),
        ((2, 4, -1), {}, ValueError, "size must be at least 0, got -1"),
        ((2, 4, (2, -3)), {}, ValueError, "size must be at least 0, got -3"),
        ((2, 4, 2.0), {}, TypeError, "2.0"),
        ((2, 4, "22"), {}, TypeError, "'22'"),
        ((2, 4, True), {}, TypeError, "True"),
        ((2, 4, np.array([3])), {}, TypeError, "array"),
        ((2, 4), {"rng": -1}, ValueError, "rng must be at least 0, got -1"),
        ((2, 4), {"rng": "1"}, TypeError, "'1'"),
        ((2, 4), {"rng": True}, TypeError, "True"),
        ((2, 4), {"rng": 1.5}, TypeError, "1.5"),
        ((2, 4), {"rng": np.random}, TypeError, "numpy.random.Generator"),
    ],
)
def test_bad_input_is_refused_by_name(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ms.random_mask(*arguments, **keywords)


@pytest.mark.slow
def test_a_hundred_thousand_masks_of_4_8_take_a_second() -> None:
    ms.random_mask(4, 8, 1)
    start = time.process_time()
    ms.random_mask(4, 8, 100_000)
    assert time.process_time() - start < 1
