"""AdaPrune's blocks: layers that are trained together lose less, keep their masks, and change only where that is so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masksolve.torch import AdaPruneReport, adaprune
from masksolve.torch._adaprune import adaprune as implementation
from masksolve.torch._adaprune import blocks
from tests.torch.test_adaprune_replay import made, whole_runs

OPTIONS: dict[str, Any] = {"refine": "block", "keep_first_last": False}


class Sum(nn.Module):
    """Two matrices of one input: their best weights under masks are those of one least squares problem."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return scale * (self.first(x) + self.second(x.tanh())), "another output"


class Sums(nn.Module):
    def __init__(self, number: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Sum() for _ in range(number)])
        self.between = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(block(x, scale=2.0)[0])
        return x


def sums(number: int = 2) -> tuple[Sums, list[Tensor]]:
    torch.manual_seed(0)
    return Sums(number), list((torch.randn(640, 6) @ torch.randn(6, 16)).split(32))


def errors(report: AdaPruneReport) -> list[tuple[float, float]]:
    return [(block.error_before, block.error_after) for block in report.blocks]


def test_a_block_nears_the_least_squares_of_all_its_layers() -> None:
    model, batches = sums(1)
    dense = copy.deepcopy(model.blocks[0])
    report = adaprune(model, batches, "2:4", include="blocks.*", correct_bias=False, **OPTIONS)
    first, second, x = model.blocks[0].first, model.blocks[0].second, torch.cat(batches[7::8])
    target = (dense(x, 2.0)[0] - 2 * dense.first.bias).detach()
    best = 0.0
    for row in range(8):
        inputs = torch.cat([x[:, first.weight[row] != 0], x.tanh()[:, second.weight[row] != 0]], 1)
        fitted = torch.linalg.lstsq(inputs.double(), target[:, row : row + 1].double(), driver="gelsd")
        best += float((inputs.double() @ fitted.solution - target[:, row : row + 1]).square().sum())
    best /= float(dense(x, 2.0)[0].detach().square().sum())
    ((before, after),) = errors(report)
    assert best < after < before - 0.5 * (before - best)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ResNet", "encoder", "Llama", "BERT", "T5", "GPT-2", "Mixtral"])
def test_running_what_follows_refines_what_running_the_whole_model_refines(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = made(name)
    # The one that is held out is among the others too: there is something to learn.
    batches *= 3
    obvious, dense = copy.deepcopy(model), copy.deepcopy(model)
    report = adaprune(model, batches, "3:4", importance="wanda", **OPTIONS)
    with whole_runs(monkeypatch):
        expected = adaprune(obvious, batches, "3:4", importance="wanda", **OPTIONS)
    assert [block.name for block in report.blocks] == [block.name for block in expected.blocks]
    assert any(block.error_after < block.error_before for block in report.blocks)
    pruned = {layer.name for layer in report.layers}
    for (key, value), other in zip(model.state_dict().items(), obvious.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=key)
        assert torch.equal(value == 0, other == 0), key
        if key not in pruned and "bias" not in key and "running" not in key:
            assert torch.equal(value, dense.state_dict()[key]), key
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_masks_and_all_that_is_not_pruned_stay() -> None:
    model, batches = sums()
    alone, dense = copy.deepcopy(model), copy.deepcopy(model)
    report = adaprune(model, batches, "1:4", include="blocks.*", **OPTIONS)
    adaprune(alone, batches, "1:4", include="blocks.*", keep_first_last=False)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, dense.get_parameter(name))}
    assert changed == {
        f"blocks.{index}.{name}" for index in (0, 1) for name in ("first.weight", "first.bias", "second.weight")
    }
    # Of the first block, as the second one has other inputs then.
    for name in ("first", "second"):
        weight = model.get_parameter(f"blocks.0.{name}.weight")
        assert torch.equal(weight == 0, alone.get_parameter(f"blocks.0.{name}.weight") == 0)
    assert len(report.layers) == 4
    assert all(after < before for before, after in errors(report))
    assert [block.to_dict()["name"] for block in report.blocks] == ["blocks.0", "blocks.1"]


def test_what_serves_held_out_batches_no_better_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = sums()
    alone = copy.deepcopy(model)
    monkeypatch.setattr(blocks, "_RATES", (1e3,))
    report = adaprune(model, batches, "2:4", **OPTIONS)
    adaprune(alone, batches, "2:4", keep_first_last=False)
    assert all(after == before for before, after in errors(report))
    assert [len(block.passes) for block in report.blocks] == [3, 3]
    for value, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(value, other)


def test_a_lower_rate_is_tried_where_one_serves_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = sums()
    monkeypatch.setattr(blocks, "_RATES", (1e3, 1e-2))
    report = adaprune(model, batches, "2:4", **OPTIONS)
    assert all(after < before for before, after in errors(report))


@pytest.mark.filterwarnings("ignore")
def test_a_cache_of_keys_and_values_changes_nothing() -> None:
    found = []
    for use_cache in (True, False):
        model, batches = made("Llama")
        adaprune(model, [{**batch, "use_cache": use_cache} for batch in batches], "2:4", **OPTIONS)
        found.append(model.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("surroundings", ["no_grad", "inference_mode", "bfloat16"])
def test_gradients_and_halves_are_no_hindrance(surroundings: str) -> None:
    model, batches = sums()
    if surroundings == "bfloat16":
        report = adaprune(model.bfloat16(), [batch.bfloat16() for batch in batches], "2:4", **OPTIONS)
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    else:
        with getattr(torch, surroundings)():
            report = adaprune(model, batches, "2:4", **OPTIONS)
    assert all(after < before for before, after in errors(report))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_keeps_refined_blocks_and_repaired_layers(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = sums()
    before, expected = copy.deepcopy(model), copy.deepcopy(model)
    adaprune(expected, batches, "2:4", **OPTIONS)
    refine = implementation.refine_block

    def fails(block: blocks.Block, *rest: Any, **options: Any) -> Any:
        if block.name == "blocks.1":
            raise error
        return refine(block, *rest, **options)

    monkeypatch.setattr(implementation, "refine_block", fails)
    if error is RuntimeError:
        with pytest.raises(RuntimeError):
            adaprune(model, batches, "2:4", **OPTIONS)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
        return
    report = adaprune(model, batches, "2:4", **OPTIONS)
    assert report.interrupted
    assert [block.name for block in report.blocks] == ["blocks.0"]
    assert len([layer for layer in report.layers if layer.name.startswith("blocks.1")]) == 2
    assert torch.equal(model.blocks[0].first.weight, expected.blocks[0].first.weight)  # type: ignore[union-attr]


class Counting(Sum):
    """Returns something else each time."""

    calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        self.calls += 1
        return super().forward(x, scale * self.calls)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another word": ({"refine": "layer"}, "unknown refine 'layer'; allowed are 'block'"),
    "not a word": ({"refine": True}, "refine.*True"),
    "inputs of the dense model": ({"sequential": False}, "needs the inputs of the model as pruned so far"),
    "one batch": ({"calibration": [torch.zeros(8, 16)]}, "only one; give smaller batches"),
    "no block": ({"include": "between.*"}, "finds no block"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_refined_is_refused(case: str) -> None:
    model, batches = sums()
    before = copy.deepcopy(model)
    options, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        adaprune(model, **{"calibration": batches, "pattern": "2:4", **OPTIONS, **options})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


class Remembering(Sum):
    """Returns what depends on an earlier call, by a graph that is gone."""

    seen: Tensor | None = None

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        x, _ = super().forward(x, scale)
        before, self.seen = (0.0 if self.seen is None else 0.0 * self.seen.mean()), x
        return x + before, ""


def test_a_block_that_cannot_be_trained_by_itself_is_named() -> None:
    model, batches = sums()
    model.blocks[1] = Remembering()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"block 'blocks\.1' cannot be trained by itself"):
        adaprune(model, batches, "2:4", **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_block_that_does_not_return_the_same_again_is_named() -> None:
    model, batches = sums()
    model.blocks[1] = Counting()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"block 'blocks\.1' does not return the same"):
        adaprune(model, batches, "2:4", **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


class Named(Sum):
    """Returns no tensor first."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return tuple(reversed(super().forward(x, scale)))


def test_a_block_that_does_not_return_a_tensor_first_is_refused() -> None:
    model, batches = sums()
    model.blocks[1] = Named()
    model.forward = lambda x: model.blocks[1](model.between(model.blocks[0](x)[0]))[1]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a block returns tuple that does not begin with a tensor"):
        adaprune(model, batches, "2:4", **OPTIONS)
