"""The models: two LeNets and the training study's residual convnet."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from paper_figures.training.models import convnet


def lenet_300_100() -> nn.Module:
    """Build 784-300-100-10."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def lenet_5() -> nn.Module:
    """Build the one of Caffe: 20 and 50 filters of 5x5, 500 hidden units."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LeNet-300-100": lenet_300_100,
    "LeNet-5": lenet_5,
    "residual convnet": convnet,
}
