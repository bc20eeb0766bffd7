"""Figure (d): how far greedy and the paper's 2-approximation fall short: usual, worst found, and the tight example.

Greedy keeps at least half of the optimum; the 2-approximation prunes at most twice the weight that the optimum
prunes. The optimum is that of at most N ones per line, as in the paper's definition, under which both bounds hold.
Beside them, the best of 1000 uniformly random masks against the optimum of exactly N, which they have too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _figure import BLUE, ORANGE, PURPLE, VERMILION, arguments, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import masksolve as ms

PATTERNS = {(2, 4): BLUE, (4, 8): ORANGE, (8, 16): PURPLE}
TILES = 4000
RANDOM_MASKS = 1000
SEARCH_STEPS = 2000
# How far the tight example stays from the ties that make it tight.
MARGIN = 0.01

Tiles = NDArray[np.float64]
Ratio = Callable[[Tiles, int, int], Tiles]


def _kept(tiles: Tiles, masks: NDArray[np.bool_]) -> Tiles:
    kept: Tiles = (tiles * masks).sum(axis=(1, 2))
    return kept


def greedy(tiles: Tiles, n: int, m: int) -> Tiles:
    """Kept by greedy / kept by the optimum."""
    best = ms.solve_blocks(tiles, n, m, saturated=False)
    return _kept(tiles, ms.solve_blocks(tiles, n, m, method="greedy")) / _kept(tiles, best)


def two_approx(tiles: Tiles, n: int, m: int) -> Tiles:
    """Pruned by the 2-approximation / pruned by the optimum."""
    best = ms.solve_blocks(tiles, n, m, saturated=False)
    return _kept(tiles, ~ms.solve_blocks(tiles, n, m, method="two-approx")) / _kept(tiles, ~best)


def best_random(tiles: Tiles, n: int, m: int) -> Tiles:
    """Kept by the best of 1000 random masks / kept by the optimum."""
    best = _kept(tiles, ms.solve_blocks(tiles, n, m))
    masks = ms.random_mask(n, m, RANDOM_MASKS, rng=1).reshape(RANDOM_MASKS, -1)
    return (tiles.reshape(len(tiles), -1) @ masks.T).max(axis=1) / best


def worst_found(ratio: Ratio, n: int, m: int, sign: int) -> float:
    """Return the largest sign * ratio that hill climbing finds: of 64 random changes the best one, again and again."""
    rng = np.random.default_rng(2)
    tile = np.abs(rng.standard_normal((m, m)))
    worst = sign * float(ratio(tile[np.newaxis], n, m)[0])
    for _ in range(SEARCH_STEPS):
        changed = np.repeat(tile[np.newaxis], 64, axis=0)
        where = rng.random(changed.shape) < rng.choice([1.5, 4, 12], (64, 1, 1)) / m**2
        other = rng.choice(tile.ravel(), changed.shape) * rng.choice([0.97, 1, 1.03], changed.shape)
        changed[where] = np.maximum(other[where], 1e-3)
        ratios = sign * ratio(changed, n, m)
        if ratios.max() >= worst:
            worst, tile = float(ratios.max()), changed[ratios.argmax()]
    return sign * worst


def tight(n: int, m: int, heavy: float, light: float) -> Tiles:
    """Blocks [[heavy, 1], [1, light]]: the optimum takes the ones, an algorithm that looks entry by entry does not."""
    tile = np.ones((m, m))
    tile[:n, :n] = heavy
    tile[n:, n:] = light
    return tile


METHODS: dict[str, tuple[Ratio, int, Tiles | None]] = {
    "greedy, kept / best": (greedy, -1, tight(4, 8, 1 + MARGIN, 0)),
    "2-approximation, pruned / least": (two_approx, 1, tight(4, 8, 0, 1 + MARGIN)),
    "best of 1000 random masks, kept / best": (best_random, -1, None),
}


def rows() -> tuple[list[dict[str, Any]], dict[tuple[str, int], Tiles]]:
    """One row a method and pattern; and the ratios of all tiles."""
    found, ratios = [], {}
    for method, (ratio, sign, example) in METHODS.items():
        for n, m in PATTERNS:
            tiles = np.abs(np.random.default_rng(0).standard_normal((TILES, m, m)))
            values = ratio(tiles, n, m)
            ratios[method, m] = values
            is_tight = example is not None and example.shape == (m, m)
            found.append(
                {
                    "ratio": method,
                    "pattern": f"{n}:{m}",
                    "mean": float(values.mean()),
                    "worst of the Gaussian tiles": float(sign * (sign * values).max()),
                    "worst found by search": worst_found(ratio, n, m, sign) if example is not None and m <= 8 else "",
                    "tight example": float(ratio(example[np.newaxis], n, m)[0]) if is_tight else "",
                }
            )
    return found, ratios


def draw_ratios(axes: Axes, method: str, ratios: dict[tuple[str, int], Tiles], found: list[dict[str, Any]]) -> None:
    """Cumulative distributions of one method, and the worst found as triangles."""
    for (n, m), color in PATTERNS.items():
        axes.ecdf(ratios[method, m], color=color, label=f"{n}:{m}, Gaussian tiles")
    worst = {row["pattern"]: row["worst found by search"] for row in found if row["ratio"] == method}
    for at, ((n, m), color) in enumerate(PATTERNS.items()):
        if worst[f"{n}:{m}"]:
            axes.plot(worst[f"{n}:{m}"], 0.06 + 0.1 * at, "^", color=color, label=f"{n}:{m}, worst found")
    axes.set_ylabel("share of tiles with this ratio or less")


def draw_tile(axes: Axes, tile: Tiles, own: NDArray[np.bool_], best: NDArray[np.bool_], verb: str, name: str) -> None:
    """Draw the entries, a square around what the optimum takes, a disc on what the method takes."""
    size = len(tile)
    for (i, j), value in np.ndenumerate(tile):
        axes.text(j, i, f"{value:.2f}".rstrip("0").rstrip("."), ha="center", va="center", fontsize=11, zorder=4)
    for marker, chosen, color, area, label in (
        ("o", own, ORANGE, 620, f"{verb} by {name}"),
        ("s", best, BLUE, 900, f"{verb} by the optimum"),
    ):
        i, j = np.nonzero(chosen)
        fill = color if marker == "o" else "none"
        axes.scatter(j, i, s=area, marker=marker, facecolor=fill, edgecolor=color, linewidth=2.5, label=label)
    axes.set_xlim(-0.6, size - 0.4)
    axes.set_ylim(size - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=1, markerscale=0.5)


def main() -> None:
    """Compute, draw and save."""
    options = arguments(__doc__)
    found, ratios = rows()
    figure = Figure(figsize=(13, 12.5))
    top, bottom = figure.subplots(2, 2, height_ratios=[4, 5])
    left, right = list(METHODS)[:2]
    draw_ratios(top[0], left, ratios, found)
    top[0].axvline(0.5, color=VERMILION, ls="--", label="proven bound")
    top[0].set_xlabel("importance kept / most possible")
    top[0].set_title("greedy")
    top[0].legend(loc="center left", bbox_to_anchor=(0.05, 0.6))
    draw_ratios(top[1], right, ratios, found)
    top[1].axvline(2, color=VERMILION, ls="--", label="bound")
    top[1].set_xlabel("weight pruned / least possible")
    top[1].set_title("the paper's 2-approximation")
    for axes, label in zip(bottom, (left, right), strict=True):
        ratio, _, tile = METHODS[label]
        assert tile is not None
        best = ms.solve_block(tile, 4, 8, saturated=False)
        if ratio is greedy:
            draw_tile(axes, tile, ms.solve_block(tile, 4, 8, method="greedy"), best, "kept", "greedy")
        else:
            own = ~ms.solve_block(tile, 4, 8, method="two-approx")
            draw_tile(axes, tile, own, ~best, "pruned", "the 2-approximation")
        value = float(ratio(tile[np.newaxis], 4, 8)[0])
        axes.set_title(f"4:8, tight: ratio {value:.3f}")
    figure.suptitle("The bounds are tight, and Gaussian tiles stay far from them", fontsize=15)
    save(figure, found, "approximation_ratio", options.into)


if __name__ == "__main__":
    main()
