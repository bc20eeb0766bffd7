"""Train a small residual convnet under transposable 4:8 masks, and a dense one: `python examples/train_resnet.py`.

The images are made here: bars of four orientations in noise, which take no download.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import Sparsifier

CLASSES, SIDE = 4, 24


def images(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw bars of so many orientations, each in a place of its own, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    angles = labels * math.pi / CLASSES
    grid = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    center = torch.rand(number, 2, generator=generator) - 0.5
    dx, dy = x - center[:, 0, None, None], y - center[:, 1, None, None]
    distance = dx * torch.sin(angles)[:, None, None] - dy * torch.cos(angles)[:, None, None]
    bars = torch.exp(-((distance / 0.12) ** 2))
    return (bars + 0.8 * torch.randn(number, SIDE, SIDE, generator=generator)).unsqueeze(1), labels


class Block(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the input what the convolutions make of it."""
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def resnet(width: int = 32) -> nn.Module:
    """Return the net."""
    first = nn.Conv2d(1, width, 5, stride=2, padding=2)
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(first, Block(width), Block(width), *last)


def train(masked: bool, steps: int) -> float:
    """Train, finalize, and return the share of new images that are classified right."""
    torch.manual_seed(0)
    model = resnet()
    sparsifier = Sparsifier(model, "4:8", refresh_every=20, exclude=["0", "5"]) if masked else None
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    inputs, labels = images(32 * steps, seed=1)
    for step, (x, target) in enumerate(zip(inputs.split(32), labels.split(32), strict=True)):
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        record = sparsifier.step() if sparsifier is not None else None
        optimizer.zero_grad()
        if record is not None and step % 40 == 39:
            means = record.means()
            print(f"  step {record.step}: masks keep {means['masks/kept_importance']:.1%} of the sum of |w|")
    if sparsifier is not None:
        sparsifier.finalize()
        for name, weight in model.named_parameters():
            if name.endswith(("conv1.weight", "conv2.weight")):
                # At each kernel position the matrix of outputs and inputs is 4:8, and so is its transpose.
                matrices = (weight != 0).flatten(2).permute(2, 0, 1)
                assert ms.is_valid_mask(matrices, 4, 8)
                assert ms.is_valid_mask(matrices.mT, 4, 8)
    x, target = images(2000, seed=2)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == target).float().mean())


def main() -> None:
    """Train both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of 32 images each")
    steps = parser.parse_args().steps
    for what, masked in (("dense", False), ("transposable 4:8", True)):
        print(what)
        print(f"  {train(masked, steps):.1%} of new images are classified right")


if __name__ == "__main__":
    main()
