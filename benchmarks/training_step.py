"""The share of a training step that exact refreshes of all masks cost: `python -m benchmarks.training_step`.

A ResNet50 and a BERT-base encoder, as PyTorch trains them on a CPU: forward, backward, optimizer, masks. Only the input
is random. A refresh is everything that `Sparsifier.refresh` does: solving, copying, the records.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.environment import header, pin_threads
from benchmarks.marks import write_between_marks
from benchmarks.report import markdown, significant
from masksolve._cores import usable_cores

if TYPE_CHECKING:
    from torch import Tensor, nn

_PATTERNS = ("2:4", "4:8", "8:16")
_REPEATS = 3
_MARK = "training-step"
# Steps from one refresh to the next, and the share of the time that they may take.
_GOALS = {1: 0.15, 40: 0.01}


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and what the batch is in words."""

    name: str
    model: nn.Module
    batch: Tensor
    described: str


def main() -> None:
    """Measure, print, and write the table between the marks of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="for PyTorch and masksolve alike (all)")
    parser.add_argument("--images", type=int, default=16, help="batch of the ResNet50, 224x224 pixels each (16)")
    parser.add_argument("--sequences", type=int, default=8, help="batch of the BERT-base, 128 tokens each (8)")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what stands between the marks {_MARK!r}")
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lines = []
    for make, size in ((resnet50, arguments.images), (bert_base, arguments.sequences)):
        lines += rows(make(size))
    columns = ["model", "batch", "pattern", "masked weights", "step, dense", "step, masked", "refresh"]
    columns += [f"share, every {k} step{'s' if k > 1 else ''} (goal)" for k in _GOALS]
    note = (
        f"Medians of {_REPEATS}. A smaller batch makes a shorter step and a larger share. "
        f"Load average of the machine at the end: {os.getloadavg()[0]:.1f}."
    )
    text = f"{markdown(columns, lines)}\n\n{note}\n\n{header(arguments.threads)}"
    print(text)
    if arguments.write:
        write_between_marks(arguments.write, _MARK, text)


def rows(case: Case) -> list[list[str]]:
    """One row per pattern."""
    import torch

    from masksolve.torch import Sparsifier

    def training(model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            model(case.batch).square().mean().backward()
            optimizer.step()

        return step

    step = training(copy.deepcopy(case.model))
    step()
    dense = statistics.median(seconds(step) for _ in range(_REPEATS))
    found = []
    for pattern in _PATTERNS:
        model = copy.deepcopy(case.model)
        sparsifier = Sparsifier(model, pattern, refresh_every=1)
        step = training(model)
        masked, refresh = [], []
        for _ in range(_REPEATS):
            masked.append(seconds(step))
            record = sparsifier.step()
            assert record is not None
            refresh.append(record.seconds)
        weights = sum(math.prod(line.shape) for line in sparsifier.report if line.sparse)
        a_step, a_refresh = statistics.median(masked), statistics.median(refresh)
        times = [f"{significant(value)} s" for value in (dense, a_step, a_refresh)]
        shares = [_share(a_refresh, k * a_step, goal) for k, goal in _GOALS.items()]
        found.append([case.name, case.described, pattern, f"{weights / 1e6:.1f} M", *times, *shares])
    return found


def _share(refresh: float, steps: float, goal: float) -> str:
    share = refresh / (steps + refresh)
    return f"{100 * share:.2g} % (≤ {100 * goal:g} %: {'met' if share <= goal else 'MISSED'})"


def seconds(call: Callable[[], object]) -> float:
    """Time a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resnet50(images: int) -> Case:
    """Bottleneck blocks 3, 4, 6, 3 with batch norm, 224x224 pixels; its 52 inner convolutions and its last layer."""
    import torch
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(inputs, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.BatchNorm2d(4 * width),
            )
            shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            self.shortcut = nn.Identity() if inputs == 4 * width else shortcut

        def forward(self, x: Tensor) -> Tensor:
            return (self.branch(x) + self.shortcut(x)).relu()

    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    inputs = 64
    for depth, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(depth):
            blocks.append(Bottleneck(inputs, width, stride=2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
    return Case("ResNet50", model, torch.randn(images, 3, 224, 224), f"{images} images")


def bert_base(sequences: int, layers: int = 12) -> Case:
    """Build the encoder of BERT-base: 12 layers of width 768 with 12 heads, 128 tokens; or fewer layers."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return Case("BERT-base", model, torch.randn(sequences, 128, 768), f"{sequences} sequences of 128 tokens")


if __name__ == "__main__":
    main()
