"""AdaPrune of language models as transformers builds them: the same as of the plain layers that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import adaprune

transformers = pytest.importorskip("transformers")


def gpt2(layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": layers,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def tokens(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 48, (6, 9), generator=generator) for _ in range(batches)]


def with_linear(model: Any) -> Any:
    """The same model with a Linear, of the transposed weight, for each Conv1D."""
    found = copy.deepcopy(model)
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, transformers.Conv1D):
                linear = nn.Linear(child.nx, child.nf)
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = child.bias
                setattr(parent, name, linear)
    return found


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("2:4", {}),
        ("3:8", {"direction": "rows", "importance": "wanda"}),
        ("1:4", {"direction": "columns", "importance": "hessian", "correct_bias": False}),
        ("2:4", {"solver": "absorb", "sequential": False}),
        ("2:4", {"solver": "adam", "iterations": 5}),
        ("2:4", {"alternations": 2}),
    ],
)
def test_a_conv1d_is_pruned_and_repaired_as_the_linear_of_its_transposed_weight(
    pattern: str, options: dict[str, Any]
) -> None:
    model = gpt2()
    other = with_linear(model)
    reports = [adaprune(each, tokens(), pattern, **options) for each in (model, other)]
    names = [f"transformer.h.{block}.{name}.weight" for block in (0, 1) for name in ("attn.c_attn", "attn.c_proj")]
    assert {*names} < {layer.name for layer in reports[0].layers}
    for one, two in zip(*(report.layers for report in reports), strict=True):
        assert one.name == two.name
        assert one.shape == two.shape[::-1]
        assert (one.error_before, one.error_after) == pytest.approx((two.error_before, two.error_after), rel=1e-3)
        weight, expected = model.get_parameter(one.name).detach(), other.get_parameter(one.name).detach().T
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)
        n, m = one.pattern.n, one.pattern.m
        assert ms.is_valid_mask(weight.T.numpy() != 0, n, m, direction=options.get("direction", "both"))
        if options.get("solver", "lstsq") != "absorb":
            assert one.error_after < one.error_before
    torch.testing.assert_close(model(tokens()[0]).logits, other(tokens()[0]).logits, rtol=1e-3, atol=1e-5)


def test_a_conv1d_that_is_sparse_already_has_the_pattern_of_the_linear_that_it_stands_for() -> None:
    model = gpt2()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, transformers.Conv1D):
                layer.weight[torch.arange(layer.nx) % 4 < 2] = 0
    options: dict[str, Any] = {"respect_zeros": True, "direction": "rows"}
    layers = adaprune(model, tokens(), "2:4", **options).layers
    assert all(layer.error_before == 0 for layer in layers)
    assert all(layer.conversion is not None and layer.conversion.fitting == 1 for layer in layers)
