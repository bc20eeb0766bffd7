"""AdaPrune of language models as transformers builds them: the same as of the plain layers that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import adaprune
from masksolve.torch._adaprune.calibration import Moments
from tests.torch.transformer_models import build

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


class PlainExperts(nn.Module):
    """Two Linear for each expert, called one after the other with the tokens that are sent there."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.of = type(experts).__name__
        # Not a child: its parameters are not the model's any more.
        object.__setattr__(self, "stacked", experts)
        is_transposed = self.of in ("GptOssExperts", "Llama4TextExperts")
        for name in ("gate_up_proj", "down_proj"):
            weights, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None)
            linears = nn.ModuleList()
            for expert, weight in enumerate(weights.detach()):
                rows = weight.T if is_transposed else weight
                linear = nn.Linear(rows.shape[1], rows.shape[0], bias=biases is not None)
                linear.weight = nn.Parameter(rows.clone())
                if biases is not None:
                    linear.bias = nn.Parameter(biases[expert].detach().clone())
                linears.append(linear)
            setattr(self, name, linears)

    def expert(self, expert: int, x: Tensor) -> Tensor:
        both = self.gate_up_proj[expert](x)
        return self.down_proj[expert](self.stacked._apply_gate(both))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, chosen: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        if chosen is None or shares is None:
            # Llama 4: every expert has a copy of the tokens, weighted beforehand.
            copies = x.view(len(self.gate_up_proj), -1, x.shape[-1])
            found = torch.zeros_like(copies)
            for expert, copy_ in enumerate(copies):
                reached = copy_.any(1)
                gate, up = self.gate_up_proj[expert](copy_[reached]).chunk(2, dim=-1)
                found[expert, reached] = self.down_proj[expert](up * self.stacked.act_fn(gate))
            return found.view(x.shape)
        found = torch.zeros_like(x)
        for expert in range(len(self.gate_up_proj)):
            token, place = torch.where(chosen == expert)
            found.index_add_(0, token, self.expert(expert, x[token]) * shares[token, place, None])
        return found


def mixture(name: str) -> Any:
    if name == "Llama 4":
        torch.manual_seed(0)
        config = transformers.Llama4TextConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=16,
            intermediate_size_mlp=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=3,
            pad_token_id=0,
        )
        model = transformers.Llama4ForCausalLM(config)
    else:
        model = build(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases of experts are zero, and routers send every token to the same ones, unless this is done.
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def with_plain_experts(model: Any) -> Any:
    found = copy.deepcopy(model)
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("Experts") and not isinstance(child, PlainExperts):
                setattr(parent, name, PlainExperts(child))
    return found


def stacks_of(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


def few_tokens(batches: int = 4) -> list[Tensor]:
    return [batch % 40 for batch in tokens(batches)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("Mixtral", "grouped_mm"),
        ("Mixtral", "batched_mm"),
        ("Qwen3-MoE", "eager"),
        ("GPT-OSS", "grouped_mm"),
        ("Llama 4", "eager"),
    ],
)
def test_a_stack_of_experts_is_repaired_as_one_linear_for_each_expert(name: str, implementation: str) -> None:
    model = mixture(name)
    model.config._experts_implementation = implementation
    other = with_plain_experts(model)
    options: dict[str, Any] = {"keep_first_last": False, "exclude": "lm_head.weight"}
    reports = [adaprune(each, few_tokens(), "2:4", **options) for each in (model, other)]
    assert model.config._experts_implementation == implementation
    stacks = stacks_of(model)
    assert len(stacks) in (2, 4)
    repaired = {layer.name: layer for layer in reports[0].layers}
    assert {*stacks} <= repaired.keys()
    for stack in stacks:
        experts = model.get_parameter(stack).detach()
        is_transposed = name in ("GPT-OSS", "Llama 4")
        for expert, weight in enumerate(experts.mT if is_transposed else experts):
            plain = other.get_submodule(stack)[expert]
            torch.testing.assert_close(weight, plain.weight.detach(), rtol=1e-3, atol=1e-4)
            assert ms.is_valid_mask(weight.numpy() != 0, 2, 4)
            if plain.bias is not None:
                biases = model.get_parameter(f"{stack}_bias")
                torch.testing.assert_close(biases[expert], plain.bias, rtol=1e-3, atol=1e-4)
        assert repaired[stack].error_after < 0.9 * repaired[stack].error_before
    batch = few_tokens()[0]
    torch.testing.assert_close(model(batch).logits, other(batch).logits, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mixtral", {"importance": "wanda"}),
        ("GPT-OSS", {"importance": "hessian", "alternations": 2, "direction": "rows"}),
        ("Qwen3-MoE", {"importance": lambda name, weight: weight.abs(), "sequential": False}),
        ("GPT-OSS", {"respect_zeros": True}),
    ],
)
def test_it_does_not_matter_how_many_experts_memory_holds_at_once(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    of = Moments.of

    def counted(source: Any, matrices: range | None = None) -> Moments:
        found = of(source, matrices)
        held.append(len(found.count))
        return found

    monkeypatch.setattr(Moments, "of", counted)
    models = [mixture(name), mixture(name)]
    if "respect_zeros" in options:
        for model in models:
            with torch.no_grad():
                for stack in stacks_of(model):
                    # Not of all experts.
                    model.get_parameter(stack)[2:5, ::3] = 0
    reports = []
    for model, memory in zip(models, (1024, 0), strict=True):
        held.clear()
        reports.append(adaprune(model, few_tokens(), "1:4", include="*experts*proj", memory_mib=memory, **options))
        assert max(held) == (8 if memory else 1)
    for one, two in zip(*(report.layers for report in reports), strict=True):
        assert (one.name, one.shape, one.tokens) == (two.name, two.shape, two.tokens)
        weight, other = (model.get_parameter(one.name).detach() for model in models)
        if "alternations" not in options:
            # Those stop for each expert by itself, or for all of them.
            assert torch.equal(weight != 0, other != 0)
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)
            assert one.error_after == pytest.approx(two.error_after, rel=1e-4)
        assert len(two.alternations) <= options.get("alternations", 0)
        assert one.error_before == pytest.approx(two.error_before, rel=1e-4)
        assert one.kept_importance == pytest.approx(two.kept_importance, rel=1e-6)
        assert (one.conversion is None) == (two.conversion is None)
        if one.conversion is not None and two.conversion is not None:
            assert two.conversion.to_dict() == pytest.approx(one.conversion.to_dict())
    if "alternations" not in options:
        batch = few_tokens()[0]
        torch.testing.assert_close(models[0](batch).logits, models[1](batch).logits, rtol=1e-3, atol=1e-4)
