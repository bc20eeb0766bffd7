"""A training step of a GPT-2-medium-shaped block under 2:4 masks: dense, masked dense, accelerated; a refresh's share.

`python -m benchmarks.gpu.training`, where a CUDA device is at hand. The block's four linear layers, a normalisation
before each pair and attention between the first two; bfloat16 weights, plain gradient descent.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import masksolve as ms
from benchmarks.environment import OUTPUT
from benchmarks.gpu.timing import milliseconds
from benchmarks.report import aligned, significant
from masksolve.torch import Sparsifier, acceleration_reason
from masksolve.torch._solver.device import solve_on_device
from masksolve.torch._training.sparse_linear import masked_linear, pack

_DEVICE = "cuda"
_PATTERN = ms.Pattern(2, 4)
_BATCH, _TOKENS, _WIDTH, _HEADS = 8, 1024, 1024, 16


def main() -> None:
    """Refuse to start without a device, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for gpu_training.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"benchmarks.gpu.training needs a CUDA device, and torch {torch.__version__} finds none here")
    rows = measure(_BATCH, _TOKENS, _WIDTH, _HEADS)
    columns = ("what", "ms", "of the dense step")
    print(f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(aligned(columns, rows))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "gpu_training.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def measure(batch: int, tokens: int, width: int, heads: int) -> list[tuple[str, str, str]]:
    """Return rows of names, milliseconds and shares of the dense step."""
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    weights = [torch.randn(shape, device=_DEVICE).mul_(0.02).bfloat16().requires_grad_() for shape in shapes]
    inputs = torch.randn(batch, tokens, width, device=_DEVICE, dtype=torch.bfloat16)
    solutions = [solve_on_device(weight, _PATTERN) for weight in weights]
    reasons = {_reason(shape) for shape in shapes}

    def step(masked: bool, packed: bool) -> None:
        leaves = [weight.detach().requires_grad_() for weight in weights]
        used = [w * s.masks for w, s in zip(leaves, solutions, strict=True)] if masked else leaves
        _block(inputs, used, masked_linear if packed else functional.linear, heads).square().mean().backward()
        with torch.no_grad():
            for weight, leaf in zip(weights, leaves, strict=True):
                assert leaf.grad is not None
                weight -= 1e-6 * leaf.grad

    def refresh() -> None:
        for weight in weights:
            solve_on_device(weight, _PATTERN)

    times = {"step, dense": milliseconds(lambda: step(False, False))}
    times["step, masked dense"] = milliseconds(lambda: step(True, False))
    if reasons == {"accelerated"}:
        times["step, accelerated"] = milliseconds(lambda: step(True, True))
        products = [weight.detach() * solution.masks for weight, solution in zip(weights, solutions, strict=True)]
        times["packing alone"] = milliseconds(lambda: [pack(form) for each in products for form in (each, each.t())])
    times["refresh of the masks"] = milliseconds(refresh)
    dense = times["step, dense"]
    rows = [(what, significant(time), significant(time / dense)) for what, time in times.items()]
    return rows if "step, accelerated" in times else [*rows, ("step, accelerated", "-", "; ".join(sorted(reasons)))]


def _reason(shape: tuple[int, int]) -> str:
    layer = nn.Linear(shape[1], shape[0], bias=False, device=_DEVICE, dtype=torch.bfloat16)
    Sparsifier(layer, _PATTERN, accelerate=True)
    return acceleration_reason(layer)


def _block(inputs: Tensor, weights: list[Tensor], linear: Callable[[Tensor, Tensor], Tensor], heads: int) -> Tensor:
    width = inputs.shape[-1]
    qkv = linear(functional.layer_norm(inputs, (width,)), weights[0])
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    hidden = inputs + linear(attended.transpose(1, 2).flatten(2), weights[1])
    wide = functional.gelu(linear(functional.layer_norm(hidden, (width,)), weights[2]))
    return hidden + linear(wide, weights[3])


if __name__ == "__main__":
    main()
