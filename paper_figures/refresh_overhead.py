"""Figure (e), second part: what new 4:8 masks every 40 steps cost a ResNet50-shaped stack of weight matrices.

The cost is that of all masks, over 40 times that of a step's dense matrix products: forward, gradient of the input,
gradient of the weights. Both on one thread of one machine. Nothing else of a training step is counted.
"""

from __future__ import annotations

from _timing import SOLVERS, seconds_per_tile  # isort: skip  (sets the number of threads before NumPy is loaded)

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from _figure import BLACK, BLUE, VERMILION, arguments, save
from matplotlib.figure import Figure

N, M = 4, 8
STEPS = 40
BATCH = 256
# Products are timed with this many images, and a step of BATCH images taken as proportionally longer.
IMAGES = 4
# The paper's overhead against dense training; what it was measured on is not known here.
PAPER = {"integer program (CBC)": 180, "min-cost flow (OR-tools)": 70, "2-approximation": 14}


@dataclass(frozen=True)
class Layer:
    """A convolution lowered to a matrix product: weights (out, in * taps), an image has `positions` columns."""

    out: int
    inputs: int
    taps: int
    positions: int
    pruned: bool = True


def resnet50() -> list[Layer]:
    """Its 54 weight matrices; the first and the last stay dense, as in the paper."""
    layers = [Layer(64, 3, 49, 112**2, pruned=False), Layer(1000, 2048, 1, 1, pruned=False)]
    inputs = 64
    for blocks, width, side in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for block in range(blocks):
            # The stride lies in the 3x3 convolution of a stage's first block.
            side_before = 2 * side if block == 0 and width > 64 else side
            layers += [
                Layer(width, inputs, 1, side_before**2),
                Layer(width, width, 9, side**2),
                Layer(4 * width, width, 1, side**2),
            ]
            if block == 0:
                layers.append(Layer(4 * width, inputs, 1, side**2))
            inputs = 4 * width
    return layers


def seconds_per_image() -> float:
    """Compute the dense matrix products of one image's part of a step."""
    rng = np.random.default_rng(0)
    timed: dict[Layer, float] = {}
    total = 0.0
    for layer in resnet50():
        if layer not in timed:
            weights = rng.standard_normal((layer.out, layer.inputs * layer.taps), np.float32)
            inputs = rng.standard_normal((layer.inputs * layer.taps, IMAGES * layer.positions), np.float32)
            gradient = rng.standard_normal((layer.out, IMAGES * layer.positions), np.float32)
            attempts = []
            for _ in range(3):
                start = time.perf_counter()
                weights @ inputs
                weights.T @ gradient
                gradient @ inputs.T
                attempts.append(time.perf_counter() - start)
            timed[layer] = min(attempts) / IMAGES
        total += timed[layer]
    return total


def rows() -> list[dict[str, Any]]:
    """One row a solver."""
    tiles = sum(layer.out * layer.inputs * layer.taps for layer in resnet50() if layer.pruned) // M**2
    step = BATCH * seconds_per_image()
    found = []
    for solver in SOLVERS:
        refresh = tiles * seconds_per_tile(solver, N, M)
        found.append(
            {
                "solver": solver,
                "all masks, s": refresh,
                f"{STEPS} dense steps of {BATCH} images, s": STEPS * step,
                "overhead, %": 100 * refresh / (STEPS * step),
                "paper's overhead, %": PAPER.get(solver, "not available"),
            }
        )
    return found


def figure_of(found: list[dict[str, Any]]) -> Figure:
    """Draw a disc for what was measured, a diamond for the paper's figure."""
    figure = Figure(figsize=(10, 5))
    axes = figure.subplots()
    for at, row in enumerate(reversed(found)):
        measured, paper = row["overhead, %"], PAPER.get(row["solver"])
        color = BLUE if "exact" in row["solver"] else VERMILION
        axes.plot(measured, at, "o", color=color, markersize=11)
        digits = f"{measured:.0f}" if measured >= 10 else f"{measured:.2g}"
        axes.annotate(f"{digits} %", (measured, at), (0, 9), textcoords="offset points", ha="center")
        if paper:
            axes.plot(paper, at, "D", color=BLACK, markerfacecolor="white", markersize=9, markeredgewidth=2)
            axes.annotate(f"{paper} %", (paper, at), (0, -20), textcoords="offset points", ha="center")
    axes.plot([], [], "o", color=VERMILION, label="measured here")
    axes.plot([], [], "D", color=BLACK, markerfacecolor="white", label="paper, its own hardware")
    axes.set_xscale("log")
    axes.set_xlim(1e-3, 1000)
    axes.set_yticks(range(len(found)), [row["solver"] for row in reversed(found)])
    axes.set_xlabel(f"new 4:8 masks every {STEPS} steps, % of the dense products of {STEPS} steps of {BATCH} images")
    axes.margins(y=0.15)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def main() -> None:
    """Measure, draw and save."""
    options = arguments(__doc__)
    found = rows()
    save(figure_of(found), found, "refresh_overhead", options.into)


if __name__ == "__main__":
    main()
