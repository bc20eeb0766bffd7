"""Train a small GPT under transposable masks, stop, and go on from a checkpoint: `python examples/train_gpt.py`.

The text is the source code of Python's own library, byte by byte. Attention gets 2:4 masks, the rest 4:8.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import tempfile
import typing
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from masksolve.torch import Sparsifier

LENGTH = 64


class Block(nn.Module):
    """Attention and a feed-forward block, each added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let every byte look at those before it."""
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, logits of the next ones out."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Say what follows each byte."""
        head: Tensor = self.head(self.blocks(self.bytes(tokens) + self.places.weight[: tokens.shape[1]]))
        return head


def windows() -> Tensor:
    """Return windows of text, one byte longer than the model reads."""
    modules = (argparse, inspect, json, logging, tempfile, typing)
    text = "".join(inspect.getsource(module) for module in modules).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


def begin() -> tuple[GPT, Sparsifier, torch.optim.Optimizer]:
    """Make everything, always alike."""
    torch.manual_seed(0)
    model = GPT()
    patterns = {"qkv": "2:4", "out": "2:4", "*": "4:8"}
    sparsifier = Sparsifier(model, patterns, refresh_every=20, hysteresis=0.01, exclude="head")
    return model, sparsifier, torch.optim.AdamW(model.parameters(), 3e-3)


def train(model: GPT, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, text: Tensor, steps: range) -> float:
    """Train for these steps, whose batches depend on their number alone; return the last losses' mean."""
    losses = []
    for step in steps:
        batch = text[torch.randint(len(text), (16,), generator=torch.Generator().manual_seed(step))]
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> None:
    """Train, stop half way, go on from the file, and compare with a run that was not stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    text = windows()
    straight, sparsifier, optimizer = begin()
    loss = train(straight, sparsifier, optimizer, text, range(steps))
    print(f"not stopped: loss {loss:.3f} after {steps} steps")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        model, first, optimizer = begin()
        train(model, first, optimizer, text, range(steps // 2))
        state = {"model": model.state_dict(), "sparsifier": first.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, path)
        model, second, optimizer = begin()
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        second.load_state_dict(state["sparsifier"])
        optimizer.load_state_dict(state["optimizer"])
        loss = train(model, second, optimizer, text, range(steps // 2, steps))
    print(f"stopped and resumed: loss {loss:.3f} after {second.steps} steps")
    sparsifier.finalize()
    second.finalize()
    same = all(torch.equal(a, b) for a, b in zip(straight.parameters(), model.parameters(), strict=True))
    print("both have the same weights" if same else "the weights differ")
    kept = {name: float((each != 0).float().mean()) for name, each in model.named_parameters() if "blocks.0." in name}
    print("kept:", {name: share for name, share in kept.items() if name.endswith("weight") and "norm" not in name})
    assert same


if __name__ == "__main__":
    main()
