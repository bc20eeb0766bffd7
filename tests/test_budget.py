"""Budgets: brute force is the oracle, of the choice and of the figures that it is made from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masksolve import Pattern, certify, solve_matrix
from masksolve import _knapsack as knapsack
from masksolve._globs import GlobTable, escaped, matches
from masksolve._patterns import as_patterns, globs_of_names
from masksolve.budget import Budget, choose_patterns, kept_by_n, spend
from tests.extras import need
from tests.tables import spread, weights_of

# Of one m, which is not a power of two in half of them.
GROUPS = [1, 2, 3, 4, 5]
AIMS = ["importance", "error", "anything"]


def random_values(rng: np.random.Generator, aim: str, m: int) -> np.ndarray:
    """Return what a layer is worth at n = 0 ... m: whole numbers, whose sums are exact."""
    if aim == "importance":  # concave, as that of exact masks is
        return np.cumsum([0, *np.sort(rng.integers(0, 12, m))[::-1]])
    if aim == "error":
        return -np.cumsum([0, *rng.integers(0, 12, m)])[::-1]
    return rng.integers(-9, 10, m + 1)


def best_by_brute_force(
    values: Mapping[str, np.ndarray], sizes: Mapping[str, int], density: Fraction, least: int, most: int
) -> tuple[float, int] | None:
    """The largest value within the density and the fewest weights kept with it, or None if nothing is within."""
    m = len(next(iter(values.values()))) - 1
    found = []
    for choice in itertools.product(range(least, most + 1), repeat=len(values)):
        kept = sum(math.ceil(Fraction(n * sizes[name], m)) for name, n in zip(values, choice, strict=True))
        if Fraction(kept, sum(sizes.values())) <= density:
            found.append((float(sum(values[name][n] for name, n in zip(values, choice, strict=True))), -kept))
    return (max(found)[0], -max(found)[1]) if found else None


def share_kept(sizes: Mapping[str, int], n: int, m: int) -> Fraction:
    return Fraction(sum(math.ceil(Fraction(n * size, m)) for size in sizes.values()), sum(sizes.values()))


def kept_weights(result: Budget) -> int:
    return sum(layer.counts[layer.pattern.n - result.least] for layer in result.layers)


@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize("m", GROUPS)
@pytest.mark.parametrize("of_one_size", [True, False])
def test_the_choice_is_that_of_brute_force(aim: str, m: int, of_one_size: bool) -> None:
    rng = np.random.default_rng(m)
    for _ in range(30):
        names = [f"layers.{index}.weight" for index in range(rng.integers(1, 5))]
        values = {name: random_values(rng, aim, m) for name in names}
        sizes = {name: 6 * m if of_one_size else int(rng.integers(1, 40)) for name in names}
        least = int(rng.integers(0, m + 1))
        most = int(rng.integers(least, m + 1))
        density = Fraction(int(rng.integers(1, 21)), 20)
        best = best_by_brute_force(values, sizes, density, least, most)
        lowest, highest = (share_kept(sizes, n, m) for n in (least, most))
        if density < lowest or (density > highest and most < m):
            with pytest.raises(ValueError, match=r"cannot be met: .*, it is at least .* and at most"):
                spend(values, sizes, float(density), least=least, most=most)
            continue
        found = spend(values, sizes, float(density), least=least, most=most)
        assert (found.value, kept_weights(found)) == best
        assert found.density == kept_weights(found) / sum(sizes.values()) <= float(density)
        assert all(least <= pattern.n <= most and pattern.m == m for pattern in found.patterns.values())
        same = [best_by_brute_force(values, sizes, density, n, n) for n in range(least, most + 1)]
        uniform = next((n for n in range(most, least - 1, -1) if same[n - least] is not None), None)
        assert found.uniform == (None if uniform is None else Pattern(uniform, m))
        if uniform is not None:
            assert found.uniform_value == same[uniform - least][0] <= found.value


@given(st.data())
def test_the_knapsack_is_that_of_brute_force(data: st.DataObject) -> None:
    options = st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 30)), min_size=1, max_size=5)
    # Some may be worth more than all others by far: sums are whole numbers below 2**53 nevertheless.
    drawn = data.draw(st.lists(st.tuples(options, st.sampled_from([1, 1, 8, 2**40])), min_size=1, max_size=5))
    items = [[(value * unit, cost) for value, cost in item] for item, unit in drawn]
    values = [np.array([value for value, _ in item], np.float64) for item in items]
    costs = [np.array([cost for _, cost in item], np.int64) for item in items]
    cheapest = sum(int(each.min()) for each in costs)
    room = cheapest + data.draw(st.integers(0, 60))
    sums = (tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*items))
    best = max((value, -cost) for value, cost in sums if cost <= room)
    chosen = knapsack.solve(values, costs, room)
    assert tuple(map(sum, zip(*map(list.__getitem__, items, chosen), strict=True))) == (best[0], -best[1])


def test_many_layers_of_sizes_without_a_common_divisor_are_no_harder() -> None:
    # The table of the textbook's programme would have 210 times 10^10 entries.
    rng = np.random.default_rng(0)
    values, sizes = {}, {}
    for index in range(210):
        name = f"layers.{index}.weight"
        sizes[name] = int(rng.integers(10**6, 10**8)) | 1
        gains = np.sort(np.abs(rng.standard_normal((500, 32))), axis=1)[:, ::-1].mean(axis=0)
        values[name] = np.concatenate([[0], np.cumsum(gains)]) * sizes[name] * rng.uniform(0.5, 2)
    found = spend(values, sizes, 0.5)
    # No choice is worth more than this, at any price.
    costs = {name: np.array([-(-n * sizes[name] // 32) for n in range(33)]) for name in sizes}
    room = sum(sizes.values()) // 2

    def bound(price: float) -> float:
        return price * room + sum(float((values[name] - price * costs[name])[1:].max()) for name in sizes)

    low, high = 0.0, 200.0
    for _ in range(60):  # it is convex
        one, other = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, other) if bound(one) < bound(other) else (one, high)
    least = bound(low)
    assert 0.5 - 1e-6 < found.density <= 0.5
    assert least * (1 - 1e-6) < found.value <= least * (1 + 1e-12)
    assert found.uniform == Pattern(15, 32)


def test_what_cannot_be_told_apart_in_bounded_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_MOST_SUMS", 1000)
    sizes = {f"layers.{index}.weight": 10**6 + index**3 * 2 + 1 for index in range(60)}
    values = {name: np.arange(9) * size for name, size in sizes.items()}
    with pytest.raises(ArithmeticError, match="too many choices for the 60 layers are nearly as good as the best"):
        spend(values, sizes, 0.37)


@pytest.mark.parametrize("scale", [2.0**-1060, 2.0**1000], ids=["tiny", "huge"])
def test_values_of_any_magnitude_are_compared(scale: float) -> None:
    values = {"a.weight": [0, 5, 6], "b.weight": [0, 4, 8], "c.weight": [0, 1, 7]}
    sizes = dict.fromkeys(values, 10)
    plain = spend(values, sizes, 0.5, least=0)
    scaled = spend({name: np.array(each) * scale for name, each in values.items()}, sizes, 0.5, least=0)
    assert scaled.patterns == plain.patterns
    assert scaled.value == plain.value * scale


@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 10), (7, 10), (2, 7)])
def test_a_density_as_a_float_is_the_fraction_that_it_stands_for(n: int, m: int) -> None:
    for size in (m, 10 * m, 10**9 * m):
        found = spend({"w.weight": np.arange(m + 1)}, {"w.weight": size}, n / m)
        assert found.patterns == {"w.weight": Pattern(n, m)}
        assert found.density == n / m


FAMILIES = ["gaussian float32", "gaussian float16", "gaussian bfloat16", "int8", "half zero", "all zero"]


@pytest.mark.parametrize(
    ("family", "direction", "shape"),
    spread(FAMILIES, ["both", "rows", "columns"], [(8, 12), (7, 9), (2, 8, 8)], one_in=3),
)
def test_figures_are_what_certified_masks_keep(family: str, direction: str, shape: tuple[int, ...]) -> None:
    weights = weights_of(family, shape)
    kept = kept_by_n(weights, 4, direction=direction)
    importance = np.abs(weights.astype(np.float64))
    assert kept[0] == 0
    assert kept[4] == pytest.approx(importance.sum())
    for n in (1, 2, 3):
        mask = solve_matrix(weights, n, 4, direction=direction)
        assert certify(weights, mask, n, 4, direction=direction).optimal
        assert kept[n] == pytest.approx(importance.sum(where=mask), rel=1e-12)
    # Concave where there are whole tiles alone: what one more entry of each group is worth never grows.
    if shape[-2] % 4 == shape[-1] % 4 == 0:
        assert (np.diff(kept, 2) <= 1e-9 * kept[4]).all()


def test_figures_of_a_tile_are_those_of_every_mask_listed() -> None:
    weights = np.random.default_rng(0).integers(0, 50, (4, 4))
    kept = kept_by_n(weights, 4)
    masks = [np.array(bits).reshape(4, 4) for bits in itertools.product([0, 1], repeat=16)]
    for n in range(5):
        valid = [mask for mask in masks if (mask.sum(0) == n).all() and (mask.sum(1) == n).all()]
        assert kept[n] == max(int((weights * mask).sum()) for mask in valid)


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_patterns_of_weights_keep_the_most_that_any_do(direction: str) -> None:
    rng = np.random.default_rng(1)
    weights = {
        "layers.0.weight": rng.standard_normal((8, 12)),
        "layers.1.weight": 2 * rng.standard_normal((16, 4)),
        "layers.2.weight": rng.integers(-3, 4, (9, 7)),  # ragged: a partial group keeps a larger share
    }
    found = choose_patterns(weights, 4, 0.45, direction=direction)
    masks = {
        name: [solve_matrix(each, n, 4, direction=direction) for n in range(1, 5)] for name, each in weights.items()
    }
    size = sum(each.size for each in weights.values())
    best = max(
        math.fsum(float(np.abs(weights[name])[masks[name][n]].sum()) for name, n in zip(weights, choice, strict=True))
        for choice in itertools.product(range(4), repeat=3)
        if sum(int(masks[name][n].sum()) for name, n in zip(weights, choice, strict=True)) <= 0.45 * size
    )
    assert found.value == pytest.approx(best, rel=1e-12)
    chosen = {name: masks[name][pattern.n - 1] for name, pattern in found.patterns.items()}
    assert found.density == sum(int(mask.sum()) for mask in chosen.values()) / size <= 0.45
    assert [layer.name for layer in found.layers] == list(weights)
    assert [layer.size for layer in found.layers] == [96, 64, 63]


NAMES = ["layers.0.weight", "layers.*.weight", "layers.[0].weight", "a?.b", "[", "w", "x.w", "[w]", "x.[w]", "]", "!w"]


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_each_name_gets_its_own_pattern_whatever_it_holds(names: list[str]) -> None:
    patterns = {name: Pattern(1, number + 1) for number, name in enumerate(names)}
    by_glob = as_patterns(globs_of_names(patterns))
    assert {name: by_glob.of(name) for name in names} == patterns
    others = ["layers.1.weight", "layers.x.weight", "ab.b", "layers.0.weight.x"]
    assert [by_glob.of(other) for other in others] == [None] * len(others)
    by_glob.check(dict.fromkeys(names), "name")


@given(st.lists(st.text("a.[]*?!-", min_size=1, max_size=5), min_size=1, max_size=6, unique=True))
def test_names_of_any_characters_get_their_own_patterns(names: list[str]) -> None:
    patterns = {name: Pattern(1, number + 1) for number, name in enumerate(names)}
    globs = globs_of_names(patterns)
    assert {name: as_patterns(globs).of(name) for name in names} == patterns
    for name in names:
        if "." in name:
            assert sum(matches(name, [glob]) for glob in globs if "." in glob) == 1


@given(
    st.lists(st.text("ab.[]*?!-", min_size=1, max_size=5), max_size=6, unique=True),
    st.text("ab.[]*?!-", min_size=1, max_size=7),
)
def test_globs_that_are_looked_up_match_as_those_that_are_tried(globs: list[str], name: str) -> None:
    globs = list(dict.fromkeys([*globs, *map(escaped, globs), *name.split("."), escaped(name)]))
    assert GlobTable(globs).matching(name) == [index for index, glob in enumerate(globs) if matches(name, [glob])]


def test_a_budget_is_frozen_prints_as_one_line_and_becomes_json() -> None:
    found = spend({"a.weight": [0, 4, 5], "b.weight": [0, 1, 2]}, {"a.weight": 100, "b.weight": 60}, 0.9)
    assert repr(found) == "<Budget of 2 layers, 1 to 2 of 2: density 0.6875 (asked for 0.9), value 6, 5 at 1:2 for all>"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.m = 3  # type: ignore[misc]
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["patterns"] == {"a.weight": "1:2", "b.weight": "2:2"}
    assert plain["layers"][0] == {
        "name": "a.weight",
        "size": 100,
        "pattern": "1:2",
        "values": [4.0, 5.0],
        "counts": [50, 100],
    }
    assert {"m", "asked", "least", "most", "density", "value", "uniform", "uniform_value"} <= plain.keys()


W = np.ones((8, 8))


def test_a_model_takes_the_patterns() -> None:
    need("torch")
    import torch

    from masksolve.torch import Sparsifier

    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    with torch.no_grad():
        model[2].weight *= 3
    weights = {name: value.numpy() for name, value in model.state_dict().items() if value.ndim > 1}
    found = choose_patterns(weights, 4, 0.4)
    assert len(set(found.patterns.values())) == 2
    Sparsifier(model, found.patterns).finalize()
    pruned = [value for value in model.state_dict().values() if value.ndim > 1]
    assert sum(int((value != 0).sum()) for value in pruned) == kept_weights(found)
    assert sum(float(value.abs().sum()) for value in pruned) == pytest.approx(found.value, rel=1e-5)


BAD: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no mapping": (choose_patterns, ([W], 4, 0.5), {}, TypeError, "weights must map names of layers .*, got list"),
    "an empty mapping": (choose_patterns, ({}, 4, 0.5), {}, ValueError, "weights is an empty mapping; give at least"),
    "a name": (choose_patterns, ({3: W}, 4, 0.5), {}, TypeError, "got the name 3"),
    "m": (choose_patterns, ({"a": W}, 0, 0.5), {}, ValueError, "m must be at least 1, got m=0"),
    "a large m": (
        choose_patterns,
        ({"a": W}, 16, 0.5),
        {},
        ValueError,
        "layer 'a': 8x8 weights hold no whole 16x16 tile; leave it out, or take a smaller m",
    ),
    "a short row": (
        choose_patterns,
        ({"a": W.T[:3].T}, 4, 0.5),
        {"direction": "rows"},
        ValueError,
        "8x3 weights hold no whole group of 4 along its rows",
    ),
    "a direction": (choose_patterns, ({"a": W}, 4, 0.5), {"direction": "row"}, ValueError, "did you mean 'rows'"),
    "NaN": (choose_patterns, ({"a": W * np.nan}, 4, 0.5), {}, ValueError, r"layer 'a': weights\[0, 0\] is nan"),
    "a vector": (choose_patterns, ({"a": W[0]}, 4, 0.5), {}, ValueError, r"layer 'a': weights have shape \(8,\)"),
    "an overflow": (choose_patterns, ({"a": W * 1e308}, 4, 0.5), {}, ValueError, "layer 'a': .* is beyond float64"),
    "density 0": (choose_patterns, ({"a": W}, 4, 0), {}, ValueError, "more than 0 and at most 1, got 0; it is the"),
    "density 2": (spend, ({"a": [0, 1]}, {"a": 1}, 2.0), {}, ValueError, "more than 0 and at most 1, got 2.0"),
    "density NaN": (spend, ({"a": [0, 1]}, {"a": 1}, math.nan), {}, ValueError, "got nan"),
    "density in words": (spend, ({"a": [0, 1]}, {"a": 1}, "half"), {}, TypeError, "density must be a number, got 'ha"),
    "too small a density": (
        choose_patterns,
        ({"a": W}, 4, 0.2),
        {},
        ValueError,
        "a density of 0.2 cannot be met: with 1 to 4 of every 4 kept, it is at least 0.25 and at most 1; ask for",
    ),
    "too large a density": (
        choose_patterns,
        ({"a": W}, 4, 0.6),
        {"most": 2},
        ValueError,
        "a density of 0.6 cannot be met: with 1 to 2 of every 4 kept, it is at least 0.25 and at most 0.5",
    ),
    "bounds": (
        choose_patterns,
        ({"a": W}, 4, 0.5),
        {"least": 3, "most": 2},
        ValueError,
        "0 <= least <= most <= m=4, got least=3 and most=2",
    ),
    "most": (choose_patterns, ({"a": W}, 4, 0.5), {"most": 5}, ValueError, "got least=1 and most=5"),
    "least": (choose_patterns, ({"a": W}, 4, 0.5), {"least": -1}, ValueError, "least must be at least 0, got -1"),
    "values": (spend, ({"a": [0, np.inf]}, {"a": 1}, 0.5), {}, ValueError, "layer 'a' has the values .*; give m . 1 f"),
    "values in words": (spend, ({"a": "much"}, {"a": 1}, 0.5), {}, ValueError, "layer 'a' has the values 'much'"),
    "two m": (spend, ({"a": [0, 1], "b": [0, 1, 2]}, {"a": 1, "b": 1}, 0.5), {}, ValueError, "'b' for n = 0 ... 2"),
    "no size": (
        spend,
        ({"a": [0, 1], "b": [0, 1]}, {"a": 1}, 0.5),
        {},
        ValueError,
        "'b' is in values but not in sizes",
    ),
    "no values": (spend, ({"a": [0, 1]}, {"a": 1, "b": 2}, 0.5), {}, ValueError, "'b' is in sizes but not in values"),
    "a size": (spend, ({"a": [0, 1]}, {"a": 0}, 0.5), {}, ValueError, "size of layer 'a' must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    function, arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function(*arguments, **options)
