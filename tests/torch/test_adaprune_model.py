"""AdaPrune of whole models: which layers, from which inputs, and what happens when something is wrong."""

import copy
import dataclasses
import errno
import json
import logging
import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import masksolve as ms
from masksolve.torch import AdaPruneReport, adaprune, patterns_from_zeros
from masksolve.torch._adaprune import adaprune as implementation

REPAIRED = "only Linear, Conv1D, convolution, attention and recurrent layers and stacks of experts are repaired"


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)
    )


def inputs(samples: int = 64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(samples, 8) @ torch.randn(8, 8)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return list(before) == list(now) and all(torch.equal(before[key], now[key]) for key in now)


def pruned(report: AdaPruneReport) -> list[str]:
    return [layer.name for layer in report.layers]


def reasons(report: AdaPruneReport) -> dict[str, str | None]:
    return {line.name: line.reason for line in report.skipped}


def is_sparse(weight: Tensor, n: int, m: int) -> bool:
    return ms.is_valid_mask(weight.detach().numpy() != 0, n, m)


def test_the_first_and_the_last_layer_stay_dense_unless_asked() -> None:
    model = mlp()
    report = adaprune(model, [inputs()], "3:4")
    assert pruned(report) == ["2.weight", "4.weight"]
    assert reasons(report)["0.weight"] == "the first layer; `keep_first_last=False` prunes it"
    assert reasons(report)["6.weight"] == "the last layer; `keep_first_last=False` prunes it"
    assert reasons(report)["2.bias"] == "1-D: not a matrix"
    assert is_sparse(model[2].weight, 3, 4)
    assert not is_sparse(model[0].weight, 3, 4)
    report = adaprune(model, [inputs()], "3:4", keep_first_last=False)
    assert pruned(report) == ["0.weight", "2.weight", "4.weight", "6.weight"]


class Backwards(nn.Module):
    """Calls its layers in another order than it has them in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))  # type: ignore[no-any-return]


def test_layers_are_repaired_in_the_order_of_execution() -> None:
    report = adaprune(Backwards(), [inputs()], "2:4", keep_first_last=False)
    assert pruned(report) == ["first.weight", "middle.weight", "last.weight"]
    assert pruned(adaprune(Backwards(), [inputs()], "2:4")) == ["middle.weight"]


@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_come_from_the_pruned_or_from_the_original_model(sequential: bool) -> None:
    dense, x = mlp(), inputs()
    model = copy.deepcopy(dense)
    adaprune(model, [x], "2:4", sequential=sequential)
    front = (model if sequential else dense)[:4]
    seen = front(x).detach()
    layer = copy.deepcopy(dense[4])
    adaprune(layer, [seen], "2:4", keep_first_last=False)
    torch.testing.assert_close(model[4].weight, layer.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[4].bias, layer.bias, rtol=1e-4, atol=1e-6)


def test_a_pruned_model_is_nearer_to_the_dense_one_after_repair() -> None:
    dense, x = mlp(), inputs(200)
    errors = {}
    for solver in ("none", "lstsq"):
        model = copy.deepcopy(dense)
        adaprune(model, x[:100].split(10), "2:4", solver=solver, correct_bias=solver == "lstsq")  # type: ignore[arg-type]
        errors[solver] = float((model(x[100:]) - dense(x[100:])).square().mean().detach())
    assert errors["lstsq"] < 0.5 * errors["none"]


class Uses(nn.Module):
    """A layer called twice, one never, one whose weight is used without calling it, and query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.bypassed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu())
        x = self.query(x) * self.key(x)
        x = functional.linear(x, self.bypassed.weight)
        return self.up(self.attention(x, x, x)[0].mT)  # type: ignore[no-any-return]


def test_every_weight_that_cannot_be_repaired_says_why() -> None:
    torch.manual_seed(0)
    report = adaprune(Uses(), [inputs().reshape(8, 8, 8)], "2:4", keep_first_last=False)
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert pruned(report) == ["twice.weight", "query.weight", "key.weight", *attention]
    found = reasons(report)
    assert found["never.weight"] == found["bypassed.weight"] == "no calibration batch calls it"
    assert found["up.weight"] == f"up.weight is part of ConvTranspose1d; {REPAIRED}"


@pytest.mark.parametrize("include", [None, "0.weight"])
def test_what_cannot_be_repaired_does_not_ask_to_be_included(include: str | None) -> None:
    model = nn.Sequential(nn.ConvTranspose1d(8, 8, 3), nn.ReLU())
    with pytest.raises(ValueError, match="can be 3:4 sparse") as caught:
        adaprune(model, [torch.randn(3, 8, 4)], "3:4", include=include)
    assert f"0.weight is part of ConvTranspose1d; {REPAIRED}" in str(caught.value)
    assert "include it" not in str(caught.value)


def test_masks_of_torch_prune_have_to_be_removed_first() -> None:
    model = mlp()
    torch.nn.utils.prune.l1_unstructured(model[2], "weight", 0.3)
    report = adaprune(model, [inputs()], "3:4")
    assert pruned(report) == ["4.weight"]
    text = "2.weight_orig is masked by torch.nn.utils.prune; call prune.remove first"
    assert reasons(report)["2.weight_orig"] == text
    torch.nn.utils.prune.remove(model[2], "weight")
    assert pruned(adaprune(model, [inputs()], "3:4", respect_zeros=True)) == ["2.weight", "4.weight"]


class Experts(nn.Module):
    """Rows go to one expert or another by their sign, which may leave one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.nobody = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        side = x[:, 0] > 0
        return torch.cat([self.positive(x[side]), self.negative(x[~side]), self.nobody(x[:0])])


def test_an_expert_that_no_row_reaches_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Experts(), inputs()
    alone = copy.deepcopy(model.negative)
    report = adaprune(model, [x[x[:, 0] > 0], x[x[:, 0] <= 0], x], "2:4", keep_first_last=False)
    assert pruned(report) == ["positive.weight", "negative.weight"]
    assert reasons(report)["nobody.weight"] == "no calibration batch calls it"
    rows = x[x[:, 0] <= 0]
    adaprune(alone, [rows, rows], "2:4", keep_first_last=False)
    torch.testing.assert_close(model.negative.weight, alone.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_is_a_first_layer(embedding: Any) -> None:
    model = nn.Sequential(embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert pruned(adaprune(model, [torch.arange(12).reshape(3, 4)], "2:4")) == ["1.weight"]


class Rerouted(nn.Module):
    """Calls another layer as soon as its first is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dense = self.first.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.one(x) if torch.equal(self.first.weight, self.dense) else self.other(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("solver", ["lstsq", "adam", "absorb", "none"])
def test_a_layer_that_the_pruned_model_calls_no_more_gets_its_mask_alone(solver: Any) -> None:
    torch.manual_seed(0)
    model = Rerouted()
    dense = snapshot(model.one)
    report = adaprune(model, [inputs()], "2:4", solver=solver, iterations=2, keep_first_last=False)
    assert pruned(report) == ["first.weight", "one.weight"]
    assert is_sparse(model.one.weight, 2, 4)
    assert torch.equal(model.one.weight, dense["weight"] * (model.one.weight != 0))
    assert torch.equal(model.one.bias, dense["bias"])


def test_a_layer_that_is_called_twice_is_repaired_once_on_the_inputs_of_both_calls() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), inputs()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    both = torch.cat([x, model[:2](x).detach()])
    alone = copy.deepcopy(layer)
    report = adaprune(model, x.split(10), "2:4", keep_first_last=False)
    adaprune(alone, [both], "2:4", keep_first_last=False)
    assert pruned(report) == ["0.weight"]
    torch.testing.assert_close(layer.weight, alone.weight, rtol=1e-4, atol=1e-6)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("solver", ["lstsq", "adam"])
def test_tied_layers_have_one_mask_and_the_repair_that_is_best_for_both(solver: Any) -> None:
    torch.manual_seed(0)
    model, x = Tied(), inputs()
    dense = copy.deepcopy(model).double()
    middle = model.one(x).relu().detach()
    report = adaprune(model, [x], "2:4", solver=solver, iterations=20, damping=1e-10, keep_first_last=False)
    assert pruned(report) == ["one.weight"]
    assert model.two.weight is model.one.weight
    assert is_sparse(model.one.weight, 2, 4)
    if solver == "adam":
        assert report.layers[0].error_after < report.layers[0].error_before
        return
    model.double()
    loss = sum(
        (getattr(model, name)(seen.double()) - getattr(dense, name)(seen.double()).detach()).square().sum()
        for name, seen in (("one", x), ("two", middle))
    )
    loss.backward()  # type: ignore[union-attr]
    slopes = [model.one.weight.grad * (model.one.weight != 0), model.one.bias.grad, model.two.bias.grad]
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3


@pytest.mark.parametrize("solver", ["lstsq", "adam"])
def test_a_bias_that_two_layers_share_stays(solver: Any) -> None:
    """A correction for one of them would be wrong for the other."""
    model = mlp()
    model[4].bias = model[2].bias
    before = model[2].bias.detach().clone()
    report = adaprune(model, [inputs() + 1], "2:4", solver=solver, iterations=10)
    assert all(layer.error_after <= layer.error_before for layer in report.layers)
    assert model[4].bias is model[2].bias
    assert torch.equal(model[2].bias, before)


def test_a_weight_that_is_tied_to_an_embedding_is_left_alone() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.middle(self.embedding(tokens)))  # type: ignore[no-any-return]

    report = adaprune(Language(), [torch.arange(12).reshape(3, 4)], "2:4")
    assert pruned(report) == ["middle.weight"]
    text = f"embedding.weight is part of Embedding; {REPAIRED}"
    assert reasons(report)["head.weight"] == text
    with pytest.raises(ValueError, match=rf"include 'head.weight' matches nothing .*{text}"):
        adaprune(Language(), [torch.arange(12).reshape(3, 4)], "2:4", include=["middle.*t", "head.weight"])


def test_a_frozen_layer_is_pruned_and_stays_frozen() -> None:
    model = mlp().requires_grad_(False)
    assert pruned(adaprune(model, [inputs()], "2:4", solver="adam", iterations=2)) == ["2.weight", "4.weight"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_modes_and_the_hooks_of_a_model_are_as_they_were() -> None:
    model = mlp()
    model[0].eval()
    before = [module.training for module in model.modules()]
    adaprune(model, [inputs()], "2:4")
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 8),
    )
    model(torch.randn(100, 3, 6, 6))
    return model.eval()


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_batch_norms_behind_pruned_layers_follow_their_inputs(offset: float) -> None:
    """Where they had the statistics of their inputs, they have them again; where they were off, they stay off so."""
    model, x = convnet(), torch.randn(50, 3, 6, 6) + 1
    inputs_of = [model[:4](x).detach().transpose(0, 1).flatten(1)]
    model[4].running_mean.copy_(inputs_of[0].mean(1) + offset)
    model[4].running_var.copy_(inputs_of[0].var(1) * (1 + offset))
    before = snapshot(model)
    report = adaprune(model, x.split(7), "2:4", solver="none")
    assert report.batch_norms == ("4",)
    inputs_of.append(model[:4](x).detach().transpose(0, 1).flatten(1))
    assert float((inputs_of[0].mean(1) - inputs_of[1].mean(1)).abs().max()) > 0.1
    torch.testing.assert_close(model[4].running_mean, inputs_of[1].mean(1) + offset, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[4].running_var, inputs_of[1].var(1) * (1 + offset), rtol=1e-4, atol=1e-5)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("count", [1, 99, 1001])
def test_the_variance_of_a_channel_that_calibration_does_not_change_stays(count: int) -> None:
    """Rounding makes of it a little or nothing, before and after: their ratio is anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64)).eval()
    x = (torch.randn(1, 8) + 3).repeat(count, 1)
    report = adaprune(model, [x], "2:4", solver="none", correct_bias=False, keep_first_last=False)
    assert report.batch_norms == ("1",)
    assert torch.equal(model[1].running_var, torch.ones(64))


def test_a_batch_norm_behind_any_call_of_a_tied_weight_follows() -> None:
    class Late(nn.Module):
        """Has the layer first that it calls last."""

        def __init__(self) -> None:
            super().__init__()
            self.late, self.early, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.late.weight = self.early.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.norm(self.early(x)))  # type: ignore[no-any-return]

    assert adaprune(Late(), [inputs()], "2:4", keep_first_last=False).batch_norms == ("norm",)


def test_a_batch_norm_that_the_pruned_model_calls_no_more_stays() -> None:
    torch.manual_seed(0)
    model = Rerouted()
    model.one = nn.BatchNorm1d(8)  # type: ignore[assignment]
    before = snapshot(model.one)
    report = adaprune(model, [inputs()], "2:4", include="first.weight", keep_first_last=False)
    assert report.batch_norms == ()
    assert same(before, model.one)


def test_batch_norms_stay_as_they_are_if_asked() -> None:
    model = convnet()
    before = snapshot(model)
    assert adaprune(model, [torch.randn(50, 3, 6, 6)], "2:4", batch_norm=False).batch_norms == ()
    assert torch.equal(model[4].running_mean, before["4.running_mean"])
    assert torch.equal(model[4].running_var, before["4.running_var"])


@pytest.mark.parametrize("make", [list, tuple, lambda x: {"input": x[0]}, lambda x: UserDict({"input": x[0]})])
def test_batches_are_arguments_of_any_kind(make: Callable[[Any], Any]) -> None:
    models = [mlp(), mlp()]
    adaprune(models[0], [inputs()], "2:4")
    adaprune(models[1], (make([part]) for part in inputs().split(16)), "2:4")
    torch.testing.assert_close(models[1][2].weight, models[0][2].weight, rtol=1e-4, atol=1e-6)


def with_nan_weight() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 7] = float("nan")
    return model


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.layers[4:](self.layers[:4](x) / 0)  # type: ignore[no-any-return]
        except Exception:
            return x


X = inputs()
REFUSED: list[tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]] = [
    (mlp, [], {}, ValueError, "calibration holds no batch"),
    (mlp, X, {}, TypeError, r"calibration is a tensor of shape \(64, 8\); give an iterable of batches"),
    (mlp, None, {}, TypeError, "calibration is a NoneType; give an iterable of batches, such as"),
    (mlp, [X[:5]], {"damping": 1e-300}, ValueError, "'2.weight': in float64 .* damping=1e-300; raise that"),
    (mlp, [X[:5]], {"damping": 1e-300, "importance": "hessian"}, ValueError, "no positive definite X Xᵀ with damping"),
    (mlp, [X], {"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
    (
        mlp,
        [X, X[:, :5]],
        {},
        ValueError,
        r"calibration batch 1, a tensor of shape \(64, 5\), does not run .*Runtime",
    ),
    (mlp, [[X, X]], {}, ValueError, r"calibration batch 0, \[a tensor of shape \(64, 8\), .* without labels"),
    (mlp, [{"x": X}], {}, ValueError, r"calibration batch 0, \{x: a tensor of shape \(64, 8\)\}, does not run"),
    (mlp, [X, X * float("nan")], {}, ValueError, "calibration batch 1: an input of '0' holds NaN or infinities"),
    (Overflows, [X], {}, ValueError, "an input of 'layers.4' holds NaN or infinities; nothing was changed"),
    (with_nan_weight, [X], {}, ValueError, "parameter '2.weight' holds NaN or infinities"),
    (lambda: "model", [X], {}, TypeError, "model must be a torch.nn.Module, got str"),  # type: ignore[return-value,list-item]
    (mlp, [X], {"importance": "wanda2"}, ValueError, "unknown importance 'wanda2'; .* did you mean 'wanda'"),
    (mlp, [X], {"direction": "column"}, ValueError, "unknown direction 'column'; .*did you mean 'columns'"),
    (
        mlp,
        [X],
        {"importance": None},
        TypeError,
        "importance must be one of 'magnitude', 'wanda', 'ria', 'hessian', 'sparsegpt', 'admm', or",
    ),
    (mlp, [X], {"masks": "wanda"}, TypeError, "masks must be a mapping of names to bool tensors, got 'wanda'"),
    (
        mlp,
        [X],
        {"importance": lambda name, w: w.abs(), "alternations": 2},
        ValueError,
        "alternations=2 scores weights that are not the model's, which a callable .* use one of 'magnitude'",
    ),
    (mlp, [X], {"importance": lambda name, w: w[0]}, ValueError, "importance returned .* for parameter '2.weight'"),
    (mlp, [X], {"solver": "sgd"}, ValueError, "unknown solver 'sgd'"),
    *((mlp, [X], {"damping": bad}, ValueError, f"damping must be .* finite, got {bad}") for bad in (0.0, math.inf)),
    *(
        (mlp, [X], {"damping": bad}, TypeError, f"damping must be a number, got {bad!r}")
        for bad in ("1e-2", None, True)
    ),
    *(
        (mlp, [X], {flag: "no"}, TypeError, f"{flag} must be True or False, got 'no'")
        for flag in ("keep_first_last", "sequential", "correct_bias", "batch_norm", "respect_zeros", "progress")
    ),
    (mlp, [X], {"iterations": 0}, ValueError, "iterations"),
    (mlp, [X], {"min_tokens": -1}, ValueError, "min_tokens must be at least 0, got -1"),
    (mlp, [X], {"min_tokens": 1.5}, TypeError, "min_tokens must be an integer, got 1.5"),
    (mlp, [X], {"pattern": {}}, ValueError, "pattern is an empty mapping"),
    (mlp, [X], {"pattern": {"2.weight": "2:4"}}, ValueError, r"no pattern is given for 4.weight \(1 of the weights"),
    (mlp, [X], {"pattern": {"3.weight": "2:4"}}, ValueError, r"'3.weight' = 2:4 matches none of the 8 parameter names"),
    (mlp, [X], {"pattern": {"2.bias": "2:4"}}, ValueError, r"is for nothing that can be pruned \(2.bias: 1-D: not a"),
    (mlp, [X], {"include": "0.*"}, ValueError, r"no layer is left to prune \(0.weight: the first layer;"),
    (mlp, [X], {"pattern": "4:4"}, ValueError, r"no layer is left to prune \(.*2.weight: 4:4 keeps everything"),
    (mlp, [X], {"masks": {"1.weight": X}}, ValueError, r"masks has '1.weight', which is none of the 8 parameter names"),
    (mlp, [X], {"masks": {"2.weight": None}}, ValueError, r"the mask of '2.weight' is None; give a bool tensor of sha"),
    (
        mlp,
        [X],
        {"masks": {"2.weight": torch.ones(16, 16, dtype=torch.bool, device="meta")}},
        ValueError,
        r"the mask of '2.weight' is torch.bool of shape \(16, 16\) on the meta device; give a bool tensor",
    ),
    (mlp, [X], {"masks": {"2.weight": X}}, ValueError, r"the mask of '2.weight' is torch.float32 of shape \(64, 8\)"),
    (
        mlp,
        [X],
        {"masks": {"2.weight": torch.ones(16, 16, dtype=torch.bool)}},
        ms.InvalidMaskError,
        r"the mask of '2.weight': mask\[0, 0:4\] keeps 4 of 4 entries; 2:4 along rows allows at most 2",
    ),
    (
        mlp,
        [X],
        {"masks": {"2.weight": torch.eye(16, dtype=torch.bool)}, "importance": lambda name, w: w.abs() * math.nan},
        ValueError,
        "importance of parameter '2.weight' holds NaN or infinities, .*nothing was changed",
    ),
    (mlp, [X], {"masks": {"2.weight": X}, "alternations": 1}, ValueError, "alternations=1 finds masks again, but mas"),
]


@pytest.mark.parametrize(("make", "calibration", "options", "kind", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_and_the_model_is_unharmed(
    make: Callable[[], nn.Module], calibration: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind, match=message):
        adaprune(model, calibration, **{"pattern": "2:4", **options})
    if isinstance(model, nn.Module) and make is not with_nan_weight:
        assert same(before, model)
        assert model.training
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_halfway_is_unharmed() -> None:
    """The second layer's inputs are finite in the dense model, and not once the first is pruned."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()
            self.dense = self.layers[2].weight.detach().clone()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[:4](x)
            return self.layers[4:](x if torch.equal(self.layers[2].weight, self.dense) else x / 0)  # type: ignore[no-any-return]

    model = Fragile()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"an input of 'layers.4' holds NaN"):
        adaprune(model, [inputs()], "2:4")
    assert same(before, model)


def test_a_full_disk_is_not_the_fault_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(OSError, match="No space left"):
        adaprune(model, [inputs()], "2:4", solver="adam", memory_mib=0)
    assert same(before, model)
    assert not list(tmp_path.iterdir())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("sequential", [True, False])
def test_an_interrupt_keeps_what_is_finished(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet()
    model.append(nn.Linear(8, 8)).append(nn.Linear(8, 8))
    before = snapshot(model)
    repair = implementation.repair_layer
    names: list[str] = []

    def interrupted(task: Any, *rest: Any) -> Any:
        if names:
            raise KeyboardInterrupt
        names.append(task.name)
        return repair(task, *rest)

    monkeypatch.setattr(implementation, "repair_layer", interrupted)
    report = adaprune(model, [torch.randn(20, 3, 6, 6)], "2:4", sequential=sequential)
    assert report.interrupted
    assert pruned(report) == ["3.weight"]
    assert report.batch_norms == ()
    assert reasons(report)["7.weight"] == reasons(report)["8.weight"] == "interrupted before its repair"
    after = snapshot(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["3.weight"]
    assert ms.is_valid_mask(model[3].weight.detach().permute(2, 3, 0, 1).numpy() != 0, 2, 4)


def test_an_interrupt_between_two_writes_leaves_no_half_written_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = snapshot(model)
    repair = implementation.repair_layer

    class Interrupting:
        """As the value of a bias: the weight is written already when it is asked for."""

        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

        @classmethod
        def __torch_function__(cls, *rest: Any) -> Any:
            raise KeyboardInterrupt

    def broken(*given: Any) -> Any:
        found = repair(*given)
        found.values[1] = Interrupting()  # type: ignore[call-overload]
        return found

    monkeypatch.setattr(implementation, "repair_layer", broken)
    report = adaprune(model, [inputs()], "2:4")
    assert report.interrupted
    assert report.layers == ()
    assert same(before, model)


def test_an_interrupt_among_the_batch_norms_leaves_none_half_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet()
    before = snapshot(model)

    def half(norm: nn.BatchNorm2d, *rest: Any) -> None:
        norm.running_mean.add_(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(implementation, "follow", half)
    report = adaprune(model, [torch.randn(20, 3, 6, 6)], "2:4")
    assert report.interrupted
    assert (pruned(report), report.batch_norms) == (["3.weight"], ())
    assert torch.equal(model[4].running_mean, before["4.running_mean"])


def test_all_of_a_transformer_encoder_is_repaired() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.inference_mode():
        x = torch.randn(10, 4, 8)
    report = adaprune(model, [x], "2:4", keep_first_last=False)
    parts = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert pruned(report) == [f"layers.{index}.{part}" for index in (0, 1) for part in parts]
    assert all(layer.error_after < layer.error_before for layer in report.layers)


def test_a_layer_without_any_weight_left_stays_so() -> None:
    model = mlp()
    nn.init.zeros_(model[2].weight)
    patterns = patterns_from_zeros(model, 4, include="2.weight")
    assert str(patterns["2.weight"]) == "0:4"
    (layer,) = adaprune(model, [inputs()], patterns, respect_zeros=True, include="2.weight").layers
    assert (layer.error_before, layer.error_after) == (0.0, 0.0)
    assert not bool(model[2].weight.any())


def test_given_masks_are_taken_as_they_are() -> None:
    model = mlp()
    mask = torch.from_numpy(ms.solve_matrix(torch.rand(16, 16).numpy(), 1, 4))
    report = adaprune(model, [inputs()], "2:4", masks={"4.weight": mask})
    assert pruned(report) == ["4.weight"]
    assert reasons(report)["2.weight"] == "no mask was given for it"
    assert torch.equal(model[4].weight != 0, mask)


def test_patterns_follow_the_zeros_of_each_layer() -> None:
    model = mlp()
    with torch.no_grad():
        for layer, share in ((model[2], 0.5), (model[4], 0.9)):
            layer.weight.masked_fill_(torch.rand(16, 16) < share, 0)
    patterns = patterns_from_zeros(model, 8, include=["2.*", "4.weight"], exclude="*bias")
    shares = {name: float((model.get_parameter(name) == 0).float().mean()) for name in patterns}
    assert patterns == {name: ms.odds.choose_pattern(share, 8) for name, share in shares.items()}
    report = adaprune(model, [inputs()], patterns, respect_zeros=True)
    assert {layer.name: layer.pattern for layer in report.layers} == patterns
    assert reasons(report)["0.weight"] == "no pattern is given for it"
    for layer in report.layers:
        assert is_sparse(model.get_parameter(layer.name), layer.pattern.n, 8)


def test_a_layer_whose_pattern_keeps_everything_is_left_alone() -> None:
    model = mlp()
    report = adaprune(model, [inputs()], {"2.weight": "8:8", "4.weight": "3:8"})
    assert pruned(report) == ["4.weight"]
    assert reasons(report)["2.weight"] == "8:8 keeps everything"


def test_the_report_is_json_too() -> None:
    report = adaprune(mlp(), [inputs()], "2:4", alternations=1)
    record = json.loads(json.dumps(report.to_dict()))
    assert record["layers"][0] == json.loads(json.dumps(report.layers[0].to_dict()))
    assert record["skipped"] == json.loads(json.dumps([line.to_dict() for line in report.skipped]))
    assert [layer["pattern"] for layer in record["layers"]] == ["2:4", "2:4"]
    assert record["layers"][0]["error_after"] == report.layers[0].error_after
    assert record["interrupted"] is False
    assert record["direction"] == report.direction == "both"
    assert report.seconds > sum(layer.seconds for layer in report.layers)


def test_reports_can_be_read_and_cannot_be_changed() -> None:
    report = adaprune(mlp(), [inputs()], "2:4")
    layer, line = report.layers[0], report.skipped[0]
    errors = f"error {layer.error_before:.2%} -> {layer.error_after:.2%}"
    assert repr(layer) == f"PrunedLayer('2.weight', 16x16, 2:4, kept importance {layer.kept_importance:.2%}, {errors})"
    assert repr(line) == (
        "ParameterReport('0.weight', 16x8, skipped: the first layer; `keep_first_last=False` prunes it)"
    )
    assert repr(report).startswith("AdaPruneReport(2 layers pruned, 6 parameters skipped, mean error ")
    one_sided = adaprune(mlp(), [inputs()], "2:4", direction="rows")
    assert repr(one_sided).startswith("AdaPruneReport(2 layers pruned along rows only, 6 parameters skipped, mean ")
    assert one_sided.to_dict()["direction"] == "rows"
    for each in (report, layer, line):
        with pytest.raises(dataclasses.FrozenInstanceError):
            each.name = "another"  # type: ignore[union-attr, misc]


def test_nothing_is_printed_but_a_bar_that_was_asked_for(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "masksolve"):
        adaprune(mlp(), [inputs()], "2:4")
    assert capfd.readouterr() == ("", "")
    assert "2.weight: error" in caplog.text
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    adaprune(mlp(), [inputs()], "2:4", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "4.weight: error" in err


def test_a_bar_without_rich_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ImportError, match=r"progress=True needs rich.*masksolve\[cli\]"):
        adaprune(model, [inputs()], "2:4", progress=True)
    assert same(before, model)
