"""AdaPrune of weights that a forward multiplies with itself: as of the Linear layers that would do the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import masksolve as ms
from masksolve.torch import adaprune
from masksolve.torch._adaprune.products import Products
from masksolve.torch._adaprune.source import Source, sources_of

WIDTH = 8


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    found.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        found.bias = nn.Parameter(bias.detach().clone())
    return found


class PlainAttention(nn.Module):
    """Attention of one head, by four Linear."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None:
            weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        else:
            weights = list(attention.in_proj_weight.chunk(3))
        biases = attention.in_proj_bias.chunk(3)
        self.inner = nn.ModuleList(map(linear, weights, biases))
        self.outer = linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer, x in zip(self.inner, (query, key, value), strict=True))
        return self.outer((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)  # type: ignore[no-any-return]


class Attends(nn.Module):
    def __init__(self, attention: nn.Module, cross: bool) -> None:
        super().__init__()
        self.before, self.attention, self.after = nn.Linear(WIDTH, WIDTH), attention, nn.Linear(WIDTH, WIDTH)
        self.cross = cross

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        other = x.roll(1, 0)[..., : self.attention.kdim] + 1 if self.cross else x
        found = self.attention(x, other, other)
        return self.after(found[0] if isinstance(found, tuple) else found)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("cross", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"kdim": 4, "vdim": 4}),
    ],
)
@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_an_attention_is_repaired_as_four_linear(cross: bool, options: dict[str, int], pattern: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True, **options)
    nn.init.normal_(attention.in_proj_bias)
    model = Attends(attention, cross)
    other = copy.deepcopy(model)
    other.attention = PlainAttention(attention)
    other.attention.kdim = attention.kdim
    x = torch.randn(40, 5, WIDTH) @ torch.randn(WIDTH, WIDTH) + 0.3
    # Where projections of other widths have one bias, that is not any one weight's.
    correct = not options
    for each in (model, other):
        adaprune(each, x.split(10), pattern, correct_bias=correct)
    plain = [*other.attention.inner, other.attention.outer]
    inner = attention.in_proj_weight
    weights = (
        list(inner.chunk(3))
        if inner is not None
        else [
            attention.q_proj_weight,
            attention.k_proj_weight,
            attention.v_proj_weight,
        ]
    )
    biases = [*attention.in_proj_bias.chunk(3), attention.out_proj.bias]
    n, m = map(int, pattern.split(":"))
    for weight, bias, layer in zip([*weights, attention.out_proj.weight], biases, plain, strict=True):
        torch.testing.assert_close(weight, layer.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(bias, layer.bias, rtol=1e-3, atol=1e-5)
        assert ms.is_valid_mask(weight.detach().numpy() != 0, n, m)
    torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-5)


class PlainRecurrence(nn.Module):
    """An LSTM, a GRU or a plain recurrence in both directions of several layers, by a Linear for each matrix."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.depth, self.hidden = recurrent.mode, recurrent.num_layers, recurrent.hidden_size
        self.sides = ["", "_reverse"] if recurrent.bidirectional else [""]
        self.linears = nn.ModuleDict(
            {
                name: linear(parameter, getattr(recurrent, name.replace("weight", "bias"), None))
                for name, parameter in recurrent.named_parameters()
                if name.startswith("weight")
            }
        )

    def step(self, at: str, before: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        inner = self.linears[f"weight_hh_{at}"](h)
        if self.mode == "LSTM":
            i, f, g, o = (before + inner).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (self.linears[f"weight_hr_{at}"](h) if f"weight_hr_{at}" in self.linears else h), c
        if self.mode == "GRU":
            reset, update, new = before.chunk(3, -1)
            inner_reset, inner_update, inner_new = inner.chunk(3, -1)
            gate = (update + inner_update).sigmoid()
            candidate = (new + (reset + inner_reset).sigmoid() * inner_new).tanh()
            return candidate + gate * (h - candidate), c
        return (before + inner).tanh(), c

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for depth in range(self.depth):
            sides = []
            for side in self.sides:
                at = f"l{depth}{side}"
                befores = self.linears[f"weight_ih_{at}"](x).unbind(1)
                h = x.new_zeros(len(x), self.linears[f"weight_hh_{at}"].in_features)
                state, found = (h, x.new_zeros(len(x), self.hidden)), []
                for before in befores[::-1] if side else befores:
                    state = self.step(at, before, state)
                    found.append(state[0])
                sides.append(torch.stack(found[::-1] if side else found, 1))
            x = torch.cat(sides, -1)
        return x, None


class Recurs(nn.Module):
    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.recurrent, self.after = nn.Linear(WIDTH, WIDTH), recurrent, nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.recurrent(self.before(x))[0])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: nn.LSTM(WIDTH, 16, num_layers=2, batch_first=True), 16),
        (lambda: nn.LSTM(WIDTH, 16, proj_size=8, bidirectional=True, batch_first=True), 16),
        (lambda: nn.GRU(WIDTH, 12, bidirectional=True, num_layers=2, batch_first=True), 24),
        (lambda: nn.RNN(WIDTH, 16, batch_first=True, bias=False), 16),
    ],
)
def test_a_recurrent_layer_is_repaired_as_a_linear_for_each_matrix(make: Callable[[], nn.RNNBase], width: int) -> None:
    torch.manual_seed(0)
    model = Recurs(make(), width)
    other = copy.deepcopy(model)
    other.recurrent = PlainRecurrence(model.recurrent)  # type: ignore[arg-type]
    x = torch.randn(40, 5, WIDTH) @ torch.randn(WIDTH, WIDTH) + 0.3
    was = torch.backends.mkldnn.enabled
    reports = [adaprune(each, x.split(10), "2:4") for each in (model, other)]
    assert torch.backends.mkldnn.enabled == was
    # Weights of both directions that get the very same inputs come one after the other, which changes nothing.
    assert sorted(layer.name for layer in reports[0].layers) == sorted(
        layer.name.replace("linears.", "").removesuffix(".weight") for layer in reports[1].layers
    )
    assert all(layer.error_after < 0.9 * layer.error_before for layer in reports[0].layers)
    for name, layer in other.recurrent.linears.items():
        weight = model.recurrent.get_parameter(name)
        torch.testing.assert_close(weight, layer.weight, rtol=1e-3, atol=1e-5)
        if layer.bias is not None:
            bias = model.recurrent.get_parameter(name.replace("weight", "bias"))
            torch.testing.assert_close(bias, layer.bias, rtol=1e-3, atol=1e-5)
        for gate in weight.detach().split(model.recurrent.hidden_size):  # type: ignore[arg-type]
            assert ms.is_valid_mask(gate.numpy() != 0, 2, 4)
    torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-4)


class MixtralExperts(nn.Module):
    """A stack as transformers has them, multiplied with in whatever way is asked for."""

    __module__ = "transformers.models.made_up"

    def __init__(self, experts: int, outputs: int, inputs: int, is_transposed: bool, forward: Any) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (experts, inputs, outputs) if is_transposed else (experts, outputs, inputs)
        self.stack = nn.Parameter(torch.randn(shape))
        self.multiply = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self, x)  # type: ignore[no-any-return]

    def rows(self) -> Tensor:
        """As (expert, out, in)."""
        return self.stack.mT if self.is_transposed else self.stack


def by_linear(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.stack([functional.linear(part, self.rows()[expert]) for expert, part in enumerate(x)])


def by_matmul(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.stack([part @ weight.mT for part, weight in zip(x, self.rows().unbind(0), strict=True)])


def by_left_product(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.stack([(weight @ part.mT).mT for part, weight in zip(x, self.rows(), strict=True)])


def by_bmm(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.bmm(x, self.rows().mT)


def by_einsum(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.einsum("eni,eoi->eno", x, self.rows())


def by_vector(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([weight @ row for row in part]) for part, weight in zip(x, self.rows(), strict=True)]
    )


def by_halves(self: MixtralExperts, x: Tensor) -> Tensor:
    first, second = self.rows().mT[:2], self.rows().mT[2:]
    return torch.cat([x[:2] @ first, x[2:] @ second])


WAYS = [by_linear, by_matmul, by_left_product, by_bmm, by_einsum, by_vector, by_halves]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_shown_with_the_matrix_that_it_is_multiplied_with(
    way: Any, is_transposed: bool, inference: bool
) -> None:
    torch.manual_seed(0)
    module, x = MixtralExperts(5, 6, 8, is_transposed, way), torch.randn(5, 7, 8)
    expected = torch.einsum("eni,eoi->eno", x, module.rows())
    (source,) = sources_of(module).values()
    seen: dict[int, list[Tensor]] = {}
    hidden: dict[Source, str] = {}

    def see(source: Source, rows: Tensor, groups: range) -> None:
        for group in groups:
            seen.setdefault(group, []).append(rows)

    with torch.inference_mode(inference), torch.no_grad(), Products([source], see, hidden):
        found = module(x)
    torch.testing.assert_close(found, expected.detach())
    assert not hidden
    assert list(seen) == list(range(5))
    for group, rows in seen.items():
        torch.testing.assert_close(torch.cat(rows), x[group])


def by_copy(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.bmm(x, self.rows().mT.double().float())


def by_scaled(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.bmm(x, self.rows().mT * 2)


def by_half_of_its_rows(self: MixtralExperts, x: Tensor) -> Tensor:
    return torch.cat([x @ self.rows().mT[..., :4], x @ self.rows().mT[..., 4:]], -1)


@pytest.mark.parametrize(
    ("way", "operation"), [(by_copy, "aten._to_copy"), (by_scaled, "aten.mul"), (by_half_of_its_rows, "aten.bmm")]
)
def test_a_weight_whose_inputs_are_not_all_seen_is_left_alone_and_says_why(way: Any, operation: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "experts": MixtralExperts(3, 8, 8, False, way)})
    model.forward = lambda x: model["experts"](model["first"](x))  # type: ignore[method-assign]
    before = model["experts"].stack.detach().clone()
    report = adaprune(model, [torch.randn(3, 20, 8)], "2:4", keep_first_last=False)
    assert [layer.name for layer in report.layers] == ["first.weight"]
    reasons = {line.name: line.reason for line in report.skipped}
    text = f"MixtralExperts reads it by {operation}, which does not show its inputs"
    assert reasons["experts.stack"] == text
    assert torch.equal(model["experts"].stack, before)


@pytest.mark.parametrize("solver", ["lstsq", "adam", "absorb", "none"])
@pytest.mark.parametrize("sequential", [True, False])
def test_any_solver_repairs_a_stack(solver: Any, sequential: bool) -> None:
    torch.manual_seed(0)
    model = MixtralExperts(3, 8, 8, True, by_bmm)
    x = torch.randn(3, 50, 4) @ torch.randn(3, 4, 8)
    (layer,) = adaprune(
        model, [x], "2:4", solver=solver, sequential=sequential, iterations=300, keep_first_last=False
    ).layers
    assert ms.is_valid_mask(model.stack.detach().numpy() != 0, 2, 4)
    if solver == "lstsq":
        assert layer.error_after < 0.1 * layer.error_before
    elif solver == "adam":
        assert layer.error_after < 0.9 * layer.error_before


def test_the_modules_are_as_they_were_even_after_an_error() -> None:
    torch.manual_seed(0)
    for attention, fails in itertools.product((True, False), (True, False)):
        inner = nn.MultiheadAttention(WIDTH, 1, batch_first=True) if attention else nn.LSTM(WIDTH, WIDTH)
        model = Attends(inner, False) if attention else Recurs(inner, WIDTH)
        x = torch.randn(4, 5, WIDTH)
        if fails:
            x[0, 0, 0] = torch.nan
            with pytest.raises(ValueError, match="holds NaN"):
                adaprune(model, [x], "2:4")
        else:
            adaprune(model, [x], "2:4")
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.backends.mkldnn.enabled
        assert torch.backends.mha.get_fastpath_enabled()


COUNTS = [0, 1, 4, 9, 40]


class RoutedExperts(MixtralExperts):
    """Sends each expert as many rows of its input as it is told to, and adds a bias."""

    __module__ = "transformers.models.made_up"

    def __init__(self) -> None:
        super().__init__(len(COUNTS), 8, 8, False, None)
        self.stack_bias = nn.Parameter(torch.randn(len(COUNTS), 8))

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.split(COUNTS), self.stack, self.stack_bias, strict=True)
        return torch.cat([functional.linear(*part) for part in parts if len(part[0])])


@pytest.mark.parametrize("solver", ["lstsq", "adam", "absorb"])
@pytest.mark.parametrize("min_tokens", [0, 1, 5, 100])
def test_an_expert_that_few_tokens_reach_keeps_its_mask_alone_and_is_named(
    solver: Any, min_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    dense, x = RoutedExperts(), torch.randn(sum(COUNTS), 8) @ torch.randn(8, 8) + 1
    options: dict[str, Any] = {"solver": solver, "iterations": 20, "keep_first_last": False}
    model, all_fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    adaprune(all_fitted, [x], "2:4", **options)
    caplog.clear()
    (layer,) = adaprune(model, [x], "2:4", min_tokens=min_tokens, **options).layers
    assert layer.tokens == tuple(COUNTS)
    error = (model.double()(x.double()) - dense.double()(x.double())).square().sum()
    energy = sum(
        (part @ weight.mT).square().sum() for part, weight in zip(x.double().split(COUNTS), dense.stack, strict=True)
    )
    assert layer.error_after == pytest.approx(float((error / energy).detach()), rel=1e-5)
    for expert, count in enumerate(COUNTS):
        mask = model.stack[expert] != 0
        assert ms.is_valid_mask(mask.numpy(), 2, 4)
        if count < max(min_tokens, 1):
            assert torch.equal(model.stack[expert], dense.stack[expert] * mask)
            assert torch.equal(model.stack_bias[expert], dense.stack_bias[expert])
        elif solver != "adam":
            # Fewer others make no difference to it.
            assert torch.equal(model.stack[expert], all_fitted.stack[expert].double())
            assert torch.equal(model.stack_bias[expert], all_fitted.stack_bias[expert].double())
            assert not torch.equal(model.stack_bias[expert], dense.stack_bias[expert])
    named = ["0 reach stack[0]", "1 reaches stack[1]", "4 reach stack[2]"]
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(text in message for text in named)
    # The others get more than they are wide, and are named only where they are not repaired.
    assert ("9 reach stack[3]" in message) == ("40 reach stack[4]" in message) == (min_tokens == 100)
    assert f"fewer than min_tokens={max(min_tokens, 1)} keep their masks without repair" in message


@pytest.mark.parametrize("importance", ["wanda", "hessian"])
def test_an_expert_that_no_token_reaches_keeps_its_largest_weights(importance: Any) -> None:
    torch.manual_seed(0)
    model, x = RoutedExperts(), torch.randn(sum(COUNTS), 8)
    weight = model.stack[0].detach().clone()
    adaprune(model, [x], "2:4", importance=importance, keep_first_last=False)
    scores = weight.abs() if importance == "wanda" else weight.square()
    assert (model.stack[0] != 0).tolist() == ms.solve_matrix(scores.numpy(), 2, 4).tolist()


def test_only_so_many_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    adaprune(MixtralExperts(12, 8, 8, False, by_bmm), [torch.randn(12, 3, 8)], "2:4", keep_first_last=False)
    assert "3 reach stack[7] and 4 more; of these" in caplog.text


def test_a_linear_too_keeps_its_mask_alone_if_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(8, 8)
    for min_tokens, repairs in ((3, True), (4, False)):
        layer = copy.deepcopy(dense)
        (found,) = adaprune(layer, [torch.randn(3, 8)], "2:4", min_tokens=min_tokens, keep_first_last=False).layers
        assert found.tokens == (3,)
        assert (found.error_after < found.error_before) == repairs
        assert torch.equal(layer.bias, dense.bias) != repairs
        assert ("3 reach weight; of these" in caplog.text) != repairs
