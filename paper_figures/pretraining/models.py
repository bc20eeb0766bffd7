"""What is trained: a GPT on the bytes of Python's documentation, and the training study's vision transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from paper_figures.language_model import text
from paper_figures.training.data import load
from paper_figures.training.models import ARCHITECTURES

CONTEXT = 128


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    """Bytes (batch, length) in, logits of the next ones (batch, length, 256) out. Embeddings and head stay dense."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # GPT-2's.
                scale = 0.02 / math.sqrt(2 * depth) if "out." in name or "down." in name else 0.02
                nn.init.normal_(parameter, std=scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Say what follows each byte."""
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Problem(Protocol):
    """A model to train, and data to train and test it on."""

    @property
    def include(self) -> tuple[str, ...]:
        """Globs of the parameters that are masked."""

    @property
    def steps(self) -> int:
        """How many batches there are."""

    def model(self) -> nn.Module:
        """Make it, from PyTorch's generator."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make its optimizer."""

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and what the model is to say of them, in an order of their own for each seed."""

    def tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield those that it is tested on."""


@dataclass(frozen=True)
class Text:
    """The next byte of the documentation of Python."""

    folder: Path | None
    width: int
    depth: int
    heads: int
    rate: float
    steps: int
    batch: int
    held_out: int
    include = ("blocks.*",)

    def model(self) -> nn.Module:
        """Make it."""
        return GPT(self.width, self.depth, self.heads)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make its optimizer."""
        return torch.optim.AdamW(model.parameters(), self.rate, betas=(0.9, 0.95), weight_decay=0.1)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets."""
        windows = self._windows(text.CALIBRATION, self.steps * self.batch)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.batch):
            yield windows[rows, :-1], windows[rows, 1:]

    def tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield those held out."""
        for window in self._windows(text.EVALUATION, self.held_out).split(16):
            yield window[:, :-1], window[:, 1:]

    def _windows(self, parts: tuple[str, ...], number: int) -> Tensor:
        return text.windows(_as_bytes, self.folder, parts, number, CONTEXT + 1)


def _as_bytes(written: str) -> dict[str, list[int]]:
    return {"input_ids": list(written.encode())}


@dataclass(frozen=True)
class Images:
    """The labels of Fashion-MNIST."""

    folder: Path
    number: int
    epochs: int
    held_out: int
    include = ARCHITECTURES["vision transformer"].include
    batch = 128

    def model(self) -> nn.Module:
        """Make it."""
        return ARCHITECTURES["vision transformer"].make()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make its optimizer."""
        return ARCHITECTURES["vision transformer"].optimizer(model)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets."""
        data, shuffle = load(self.folder), torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            order = torch.randperm(self.number, generator=shuffle)
            for rows in order[: self.number // self.batch * self.batch].split(self.batch):
                yield data.images[rows], data.labels[rows]

    def tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield those held out."""
        data = load(self.folder).first(0, self.held_out)
        yield from zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)

    @property
    def steps(self) -> int:
        """Whole batches alone."""
        return self.epochs * (self.number // self.batch)
