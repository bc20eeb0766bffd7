"""The two models: a small residual convnet and a small vision transformer. First and last layers stay dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


def convnet() -> nn.Module:
    """Build a stem of stride 2 and three residual blocks of width 16, 32 and 64."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _Block(16, 16, 1),
        _Block(16, 32, 2),
        _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class _Transformer(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(dim=1))


@dataclass(frozen=True)
class Architecture:
    """How a model is made and trained, and which of its parameters may be masked."""

    make: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    include: tuple[str, ...]


ARCHITECTURES = {
    "residual convnet": Architecture(
        convnet,
        lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4),
        ("*.branch.*", "*.shortcut.weight"),
    ),
    "vision transformer": Architecture(
        _Transformer,
        lambda model: torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05),
        ("encoder.layers.*",),
    ),
}
