"""prune_filters: models get smaller, and compute what the larger ones do with the same channels at zero."""

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from masksolve.torch import Sparsifier, add_adapters, filters
from masksolve.torch._filters.sampling import METHODS
from masksolve.torch.dynamic import DynamicSparsifier
from masksolve.torch.filters import FilterReport, prune_filters


class Block(nn.Module):
    """The residual block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.down(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn(self.stem(x))))
        found: Tensor = self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return found


class LeNet(nn.Module):
    """LeNet-5, with the usual view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 3), nn.Conv2d(10, 20, 3)
        self.fc1, self.fc2 = nn.Linear(80, 50), nn.Linear(50, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        found: Tensor = self.fc2(self.fc1(x.view(x.size(0), -1)).relu())
        return found


class Dense(nn.Module):
    """Concatenated channels, some of which come from an input, and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(12, 7, 1)
        self.down, self.up = nn.Linear(16, 6), nn.Linear(6, 16)
        self.norm, self.out = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.cat([y, self.b(torch.cat([x, y], 1))], dim=1)
        gate = self.up(functional.gelu(self.down(y.mean((2, 3))))).sigmoid()
        return self.out(self.norm(y * gate[:, :, None, None])).mean([2, 3])  # type: ignore[no-any-return]


class Shared(nn.Module):
    """A layer that is called twice, and a sum with an input that has one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.first(x) * x[:, :1]
        for _ in range(2):
            x = torch.tanh(self.again(x))
        if shift is not None:
            x = x + shift
        return self.last(x)  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """The channels of a sequence are along the last axis, and in a feed-forward block they are free."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens + self.down(functional.silu(self.up(tokens))))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """Two layers with the same norm, whose outputs are read apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(6, 20), nn.Linear(6, 20), nn.BatchNorm1d(20)
        self.left, self.right = nn.Linear(20, 2), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(self.norm(self.one(x)).relu()), self.right(self.norm(self.two(x)).tanh())


def mlp() -> nn.Module:
    layers = [nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 30), nn.PReLU(30), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(30, 5))


def convnet() -> nn.Module:
    layers = [nn.Conv1d(3, 12, 3), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Conv1d(12, 9, 2, padding=1, dilation=2)]
    return nn.Sequential(*layers, nn.BatchNorm1d(9), nn.Hardtanh(), nn.Flatten(), nn.Linear(45, 6), nn.Linear(6, 2))


def volume() -> nn.Module:
    layers = [nn.Conv3d(1, 6, 2), nn.ReLU(inplace=True), nn.Conv3d(6, 7, 2), nn.AdaptiveMaxPool3d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(7, 3))


# What makes the model, the shape of its input, and the layers that make each group of channels.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, ...]]]] = {
    "mlp": (mlp, (12,), [("0",), ("3",)]),
    "convnet": (convnet, (3, 12), [("0",), ("3",), ("7",)]),
    "volume": (volume, (1, 4, 4, 4), [("0",), ("2",)]),
    "lenet": (LeNet, (1, 14, 14), [("conv1",), ("conv2",), ("fc1",)]),
    "residual": (
        Residual,
        (1, 8, 8),
        [("stem", "blocks.0.conv2"), ("blocks.0.conv1",), ("blocks.1.conv1",), ("blocks.1.conv2", "blocks.1.down.0")],
    ),
    "dense": (Dense, (3, 6, 6), [("a", "up"), ("b", "up"), ("down",)]),
    "shared": (Shared, (6,), [("first", "again")]),
    "normed": (Normed, (6,), [("one", "two")]),
    "tokens": (Tokens, (4, 8), [("up",)]),
}


def made(name: str, points: int = 12) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval(), torch.randn(points, *shape)


def joined(outputs: Any) -> Tensor:
    return torch.cat(outputs, 1) if isinstance(outputs, tuple) else outputs


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def scaled(big: nn.Module, small: nn.Module, report: FilterReport) -> nn.Module:
    """The oracle: the big model, with what its layers read of a channel at zero, or times the channel's factor."""
    found = copy.deepcopy(big)
    for line in report.layers:
        own, new = found.get_submodule(line.name).weight, small.get_submodule(line.name).weight
        with torch.no_grad():
            kept = own[list(line.kept_outputs)][:, list(line.kept_inputs)]  # type: ignore[index]
            # One factor per channel, if none is zero by chance.
            factors = (new / kept).transpose(0, 1).flatten(1).median(1).values  # type: ignore[operator]
            whole = torch.zeros(line.inputs_before)
            whole[list(line.kept_inputs)] = factors
            own.mul_(whole.view(1, -1, *[1] * (own.ndim - 2)))  # type: ignore[operator, union-attr]
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in before)


def check_sizes(model: nn.Module, report: FilterReport) -> None:
    """What the report and the modules say of themselves is true."""
    assert report.parameters_after == parameters(model)
    assert report.kept == report.parameters_after / report.parameters_before
    for line in report.layers:
        module: Any = model.get_submodule(line.name)
        assert module.weight.shape[:2] == (line.outputs_after, line.inputs_after)
        assert (len(line.kept_outputs), len(line.kept_inputs)) == (line.outputs_after, line.inputs_after)
        is_linear = isinstance(module, nn.Linear)
        sizes = ("out_features", "in_features") if is_linear else ("out_channels", "in_channels")
        assert tuple(getattr(module, each) for each in sizes) == tuple(module.weight.shape[:2])
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert norm.num_features == len(norm.weight) == len(norm.running_mean)  # type: ignore[arg-type]
    for group in report.groups:
        assert 1 <= group.kept <= group.channels == len(group.scores)
    for line in report.layers:
        own = [group for group in report.groups if line.name in group.layers]
        assert bool(own) == (line.reason is None)
        if own:
            assert sum(group.kept for group in own) == line.outputs_after
            assert sum(group.channels for group in own) == line.outputs_before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_computes_what_the_larger_does_with_channels_at_zero(name: str, method: Any) -> None:
    model, x = made(name)
    big = copy.deepcopy(model)
    report = prune_filters(model, [x], 0.6, method=method)
    check_sizes(model, report)
    assert parameters(model) < parameters(big)
    assert [group.layers for group in report.groups] == MODELS[name][2]
    assert report.layers[0].inputs_after == report.layers[0].inputs_before
    other = torch.randn_like(x)
    oracle = scaled(big, model, report)
    torch.testing.assert_close(joined(model(other)), joined(oracle(other)), rtol=1e-3, atol=1e-4)
    if method == "l1":
        assert not torch.allclose(joined(model(other)), joined(big(other)), atol=1e-3)
    if method not in ("pfp-random", "pfp-top"):
        for line in report.layers:
            own = big.get_submodule(line.name).weight[list(line.kept_outputs)][:, list(line.kept_inputs)]  # type: ignore[index]
            assert torch.equal(model.get_submodule(line.name).weight, own)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_trains(name: str) -> None:
    model, x = made(name)
    prune_filters(model.train(), [x], 0.6)
    assert model.training
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (joined(model(x)) - 0.5).square().mean()
        loss.backward()
        assert all(each.grad is not None and each.grad.shape == each.shape for each in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_to_half_a_percent(method: Any, keep: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    report = prune_filters(model, [torch.rand(64, 60)], keep, method=method)
    check_sizes(model, report)
    # A channel of the first group is .3 % of the parameters, and one of the second .6 %.
    if method in ("pfp", "l1", "l2"):
        assert abs(report.kept - keep) < 0.005 * keep or abs(report.kept - keep) < 0.004
    assert (report.note is None) == (abs(report.kept - keep) < 0.005 * keep)
    assert abs(report.kept - keep) < 0.03


def test_sizes_never_grow_as_less_is_to_be_kept() -> None:
    sizes = []
    for keep in (1.0, 0.9, 0.8, 0.6, 0.5, 0.45, 0.3):
        model, x = made("residual")
        sizes.append(prune_filters(model, [x], keep).parameters_after)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == parameters(made("residual")[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["pfp", "l1", "l2"])
def test_the_best_channels_of_each_group_are_kept(name: str, method: Any) -> None:
    model, x = made(name)
    big = copy.deepcopy(model)
    report = prune_filters(model, [x], 0.6, method=method)
    layers = {line.name: line for line in report.layers}
    for group in report.groups:
        scores = torch.tensor(group.scores, dtype=torch.float64)
        best = sorted(scores.argsort(descending=True, stable=True)[: group.kept].tolist())
        assert list(layers[group.layers[0]].kept_outputs) == best
        if name == "dense":
            # What the gate's filters are scaled by is a part of both groups.
            continue
        if method != "pfp":
            filters = torch.cat([big.get_parameter(f"{each}.weight").flatten(1) for each in group.layers], 1)
            norms = torch.linalg.vector_norm(filters.double(), 1 if method == "l1" else 2, dim=1)
            torch.testing.assert_close(scores, norms)


def test_numbers_of_channels_follow_from_the_error_of_the_report() -> None:
    """By the formulas of the authors' code, from places and from numbers that are read of one channel."""
    model, x = made("lenet")
    report = prune_filters(model, [x], 0.3, delta=1)
    assert report.epsilon is not None
    for group, places, kernel in zip(report.groups, (16, 1, 1), (9, 4, 1), strict=True):
        s = torch.tensor(group.scores).double()
        scale = 6 * math.log(8 * (places + 1) * kernel) * float(s.sum())
        draws = math.ceil(3 * (6 + 2 * report.epsilon) * scale / report.epsilon**2)
        expected = float((1 - (1 - s / s.sum()) ** draws).sum())
        # One more where that comes nearer to the share.
        assert group.kept in (math.ceil(expected), math.ceil(expected) + 1)
    assert all(group.kept < group.channels for group in report.groups)


def test_norms_keep_one_ratio_of_all_groups() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50), nn.Linear(50, 5)]
    report = prune_filters(nn.Sequential(*layers), [torch.rand(2, 20)], 0.4, method="l1")
    ratios = [group.kept / group.channels for group in report.groups]
    assert max(ratios) - min(ratios) <= 1 / 50


def test_a_group_has_the_largest_sensitivity_that_any_reader_gives_it() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(5, 20), nn.Linear(20, 4), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x).relu()
            return self.left(x), self.right(x)

    torch.manual_seed(0)
    model, x = Forked(), torch.randn(30, 5)
    alone = []
    for last in (model.left, model.right):
        chain = copy.deepcopy(nn.Sequential(model.first, nn.ReLU(), last))
        alone.append(prune_filters(chain, [x], 0.9).groups[0].scores)
    report = prune_filters(model, [x], 0.9)
    assert report.groups[0].scores == pytest.approx([max(pair) for pair in zip(*alone, strict=True)])
    assert report.groups[0].readers == ("left", "right")
    assert alone[0] != alone[1]


@pytest.mark.parametrize("method", ["pfp", "pfp-random", "pfp-top"])
def test_channels_that_never_fire_go_first_and_only_then_others(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 10))
    silent = [3, 4, 17, 30, 31]
    with torch.no_grad():
        model[0].bias[silent] = -1e3
    x = torch.randn(50, 10)
    for keep, gone in ((1.0, 0), (0.95, 2), (0.85, 6)):
        report = prune_filters(smaller := copy.deepcopy(model), [x], keep, method=method)
        lost = set(range(40)) - set(report.layers[0].kept_outputs)
        if method == "pfp" or keep > 0.9:
            assert len(lost) == gone
        assert lost <= set(silent) or set(silent) <= lost
        assert [report.groups[0].scores[each] for each in silent] == [0] * 5
        if gone <= 5:
            torch.testing.assert_close(smaller(x), model(x))


def test_pruned_and_trained_again_it_gets_smaller_each_time() -> None:
    model, x = made("lenet", 64)
    target, before = torch.randint(5, (64,)), parameters(model)
    for step in range(1, 4):
        report = prune_filters(model, [x], 0.7)
        check_sizes(model, report)
        assert report.kept == pytest.approx(0.7, abs=0.02)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert parameters(model) == pytest.approx(0.7**step * before, rel=0.05)


def test_the_same_seed_draws_the_same_channels() -> None:
    kept = []
    for seed in (3, 3, 4):
        model, x = made("lenet")
        report = prune_filters(model, [x], 0.5, method="pfp-random", seed=seed)
        kept.append((report, snapshot(model)))
    assert kept[0][0] == kept[1][0]
    assert all(torch.equal(kept[0][1][name], kept[1][1][name]) for name in kept[0][1])
    assert [line.kept_outputs for line in kept[0][0].layers] != [line.kept_outputs for line in kept[2][0].layers]


def test_what_is_drawn_counts_by_how_often_it_was_and_how_often_that_was_expected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    big = copy.deepcopy(model)
    report = prune_filters(model, [torch.randn(9, 8).double()], 0.6, method="pfp-random")
    kept, (group,) = list(report.layers[0].kept_outputs), report.groups
    assert group.draws is not None
    factors = (model[2].weight / big[2].weight[:, kept]).detach()
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    scores = torch.tensor(group.scores).double()
    counts = factors[0] * group.draws * (scores / scores.sum())[kept]
    torch.testing.assert_close(counts, counts.round())
    assert int(counts.round().sum()) == group.draws
    torch.testing.assert_close(model[0].weight, big[0].weight[kept])


def test_an_error_is_proven_of_shares_that_are_drawn() -> None:
    errors = []
    for keep in (0.8, 0.5):
        for part, is_proven in (("share", True), ("element", False)):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 8))
            report = prune_filters(model, [torch.randn(9, 8)], keep, method="pfp-random", sensitivity=part, delta=1e-3)  # type: ignore[arg-type]
            assert all(group.draws is not None for group in report.groups)
            found = [group.proven_error for group in report.groups]
            assert [error is not None for error in found] == [is_proven] * 2
            errors += found if is_proven else []
    assert all(few > many > 0 for many, few in zip(errors[:2], errors[2:], strict=True))  # type: ignore[operator]


def folded(bias: float, *, padding: int = 0, relu: bool = True, takes: bool = True) -> tuple[nn.Module, Tensor]:
    """Of the first convolution's six filters, two have lost all weights."""
    torch.manual_seed(0)
    last = nn.Conv2d(6, 4, 3, padding=padding, bias=takes)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU() if relu else nn.Identity(), last, nn.Flatten(), nn.LazyLinear(3)
    )
    x = torch.randn(5, 2, 8, 8)
    model(x)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = bias
    return model, x


@pytest.mark.parametrize(
    ("options", "emptied"),
    [
        ({"bias": 0.7}, 2),
        ({"bias": -0.7}, 2),
        ({"bias": -0.7, "padding": 1}, 2),
        ({"bias": -0.7, "takes": False}, 2),
        ({"bias": 0.0, "padding": 1, "relu": False}, 2),
        # Constants that no bias can take: of zeros around them, of a layer without one.
        ({"bias": 0.7, "padding": 1}, 0),
        ({"bias": -0.7, "padding": 1, "relu": False}, 0),
        ({"bias": 0.7, "takes": False}, 0),
    ],
)
def test_filters_without_weights_go_where_a_bias_can_take_their_constant(options: Any, emptied: int) -> None:
    model, x = folded(**options)
    x, expected = torch.randn_like(x), model(x)
    calibration = torch.randn_like(x)
    expected = model(x)
    report = prune_filters(model, [calibration], 1.0)
    torch.testing.assert_close(model(x), expected)
    assert [group.emptied for group in report.groups] == [emptied, 0]
    assert set(range(6)) - set(report.layers[0].kept_outputs) == ({1, 4} if emptied else set())


def test_one_empty_filter_empties_those_that_read_or_fed_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2)
    )
    model.eval()
    with torch.no_grad():
        # Filter 1 is constant; only it feeds filter 2 of the next layer, which alone feeds filter 3 of the third.
        model[0].weight[1] = 0
        model[0].bias[1] = 2
        model[2].weight[2] = 0
        model[2].weight[2, 1] = 1
        model[4].weight[3] = 0
        model[4].weight[3, 2] = 1
        # Nothing reads filter 5 of the third, and nothing else reads filter 4 of the second.
        model[5].weight[:, 5] = 0
        model[4].weight[:, 4] = 0
        model[4].weight[5, 4] = 1
        model[3].running_mean.normal_()  # type: ignore[union-attr, operator]
    x = torch.randn(7, 4)
    expected = model(x)
    report = prune_filters(model, [torch.randn(3, 4)], 1.0)
    torch.testing.assert_close(model(x), expected)
    lost = [set(range(6)) - set(line.kept_outputs) for line in report.layers[:3]]
    assert lost == [{1}, {2, 4}, {3, 5}]
    assert report.note == "empty filters were more than what was to go"


class Twice(nn.Module):
    """What two layers make goes through the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.one(x).relu()) + self.last(self.two(x).relu())
        return found


class Scaled(nn.Module):
    """Every channel is multiplied by an input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x).relu() * x[:, :1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Twice, Scaled])
@pytest.mark.parametrize("bias", [0.5, -0.5])
def test_what_is_not_known_to_be_one_constant_stays(make: Callable[[], nn.Module], bias: float) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(6, 5)
    with torch.no_grad():
        for name in ("one", "two") if isinstance(model, Twice) else ("one",):
            model.get_parameter(f"{name}.weight")[3] = 0
            model.get_parameter(f"{name}.bias")[3] = bias
            bias *= 2
    expected = model(x)
    report = prune_filters(model, [x[:1]], 1.0)
    torch.testing.assert_close(model(x), expected)
    assert report.groups[0].kept == 8


def test_the_last_channel_of_a_group_stays_though_it_is_empty() -> None:
    torch.manual_seed(0)
    model, x = sequential(), torch.randn(4, 16)
    with torch.no_grad():
        model[0].weight.zero_()
    expected = model(x)
    report = prune_filters(model, [x], 1.0)
    assert (report.groups[0].kept, report.groups[0].emptied) == (1, 23)
    torch.testing.assert_close(model(x), expected)


def test_what_cutting_leaves_empty_goes_too_and_counts() -> None:
    """Every filter of the second layer reads one of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 4))
    with torch.no_grad():
        model[2].weight.copy_(torch.diag(torch.rand(30) + 0.5))
    big = copy.deepcopy(model)
    report = prune_filters(model, [torch.randn(20, 8)], 0.5)
    assert report.groups[1].emptied > 0
    assert report.kept == pytest.approx(0.5, abs=0.05)
    x = torch.randn(6, 8)
    with torch.no_grad():
        big[2].weight[:, [k for k in range(30) if k not in report.layers[1].kept_inputs]] = 0
        # Those that were chosen include those that were empty then.
        group = report.groups[1]
        ranking = torch.tensor(group.scores).argsort(descending=True)
        big[4].weight[:, ranking[group.kept + group.emptied :]] = 0
    torch.testing.assert_close(model(x), big(x), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Whatever `forward` makes of two layers."""

    def __init__(self, forward: Callable[["Odd", Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.extra = nn.ModuleDict(layers)
        self.odd = forward

    def forward(self, x: Tensor) -> Any:
        return self.odd(self, x)


def viewed(self: Odd, x: Tensor) -> Any:
    y = self.first(x).mean((2, 3)).view(-1, 6)
    return self.last(y[:, :, None, None])


# Channels that have to stay, and the reason that is given for them.
HELD: dict[str, tuple[Callable[[], Odd], str, str]] = {
    "output": (lambda: Odd(lambda self, x: self.last(self.first(x))), "last", "an output of the model"),
    "input": (
        lambda: Odd(lambda self, x: self.last(self.first(x) + x.repeat(1, 3, 1, 1))),
        "first",
        "what meets, in add, what comes out of repeat, which may mix channels",
    ),
    "chunk": (
        lambda: Odd(lambda self, x: self.last(torch.cat([self.first(x).chunk(2, 1)[i] for i in range(2)], 1))),
        "first",
        "what goes into chunk, which may mix channels",
    ),
    "view": (lambda: Odd(viewed), "first", "what goes into view, whose sizes [-1, 6] the code fixes; write flatten(1)"),
    "depthwise": (
        lambda: Odd(lambda self, x: self.last(self.extra["wise"](self.first(x))), wise=nn.Conv2d(6, 6, 3, groups=6)),
        "first",
        "what goes into extra.wise, a convolution of 6 groups",
    ),
    "norm": (
        lambda: Odd(lambda self, x: self.last(self.extra["norm"](self.first(x))), norm=nn.GroupNorm(2, 6)),
        "first",
        "what goes into extra.norm, a GroupNorm",
    ),
    "transposed": (
        lambda: Odd(lambda self, x: self.last(self.extra["up"](self.first(x))), up=nn.ConvTranspose2d(6, 6, 2)),
        "first",
        "what goes into extra.up, a ConvTranspose2d",
    ),
    "other axis": (
        lambda: Odd(
            lambda self, x: (self.extra["wide"](self.first(x)), self.last(self.first(x))), wide=nn.Linear(5, 3)
        ),
        "first",
        "what extra.wide reads along another axis",
    ),
    "tied": (
        lambda: Odd(lambda self, x: self.last(self.first(x) + self.extra["skip"](x)[:, :1]), skip=nn.Conv2d(2, 6, 1)),
        "extra.skip",
        "what goes into getitem, which may mix channels",
    ),
    "own tensor": (
        lambda: Odd(lambda self, x: self.last(self.first(x)) + self.first.bias[:4, None, None]),
        "first",
        "the model reads first.bias by itself",
    ),
    "squeezed": (
        lambda: Odd(lambda self, x: self.last(self.first(x).mean((2, 3)).squeeze()[:, :, None, None])),
        "first",
        "what goes into squeeze, which may mix channels",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_what_cannot_be_cut_apart_is_named_and_left(name: str) -> None:
    make, layer, reason = HELD[name]
    torch.manual_seed(0)
    # Something has to be left that can be cut.
    layers = {"up": nn.Conv2d(3, 9, 1), "relu": nn.ReLU(), "down": nn.Conv2d(9, 2, 1), "odd": make()}
    model = nn.Sequential(OrderedDict(layers))
    x = torch.randn(3, 3, 5, 5)
    before = copy.deepcopy(model)
    report = prune_filters(model, [x], 0.8)
    lines = {line.name: line for line in report.layers}
    assert lines[f"odd.{layer}"].reason == reason.replace("extra.", "odd.extra.").replace("first.", "odd.first.")
    assert torch.equal(model.odd.last.bias, before.odd.last.bias)  # type: ignore[union-attr, arg-type]
    assert lines[f"odd.{layer}"].outputs_before == lines[f"odd.{layer}"].outputs_after
    assert lines["up"].outputs_after < 9
    model(x)


def test_layers_that_are_no_part_of_it_are_named() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.wise, self.last = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 1, groups=2), nn.Conv1d(6, 8, 1)
            self.own = type("Own", (nn.Linear,), {})(8, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.up, self.down, self.unused = nn.Linear(8, 30), nn.Linear(30, 8), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(self.own(self.last(self.wise(self.first(x))).mT))
            return self.down(self.up(y).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    report = prune_filters(Many().eval(), [torch.randn(4, 2, 5)], 0.9)
    untouched = dict(report.untouched)
    assert untouched["wise"] == "a convolution of 2 groups, which is left whole"
    assert untouched["own"] == "a Own, which is left whole"
    assert untouched["unused"] == untouched["block.linear1"] == "the traced model does not call it by itself"
    assert [group.layers for group in report.groups] == [("up",)]


def test_layers_that_share_a_parameter_are_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 20), nn.Linear(20, 6))
    model[2].weight = model[0].weight
    report = prune_filters(model, [torch.randn(4, 6)], 0.9)
    assert report.layers[0].reason == "it shares a parameter with 2.weight"
    assert report.layers[1].reason == "it shares a parameter with 0.weight"
    assert [group.layers for group in report.groups] == [("4",)]
    assert model[2].weight is model[0].weight


def test_globs_choose_whose_filters_go() -> None:
    for options, groups in (
        ({"include": "conv*"}, [("conv1",), ("conv2",)]),
        ({"exclude": ["conv2", "fc1.weight"]}, [("conv1",)]),
        ({"include": ["conv1", "fc1"], "exclude": "conv1"}, [("fc1",)]),
    ):
        model, x = made("lenet")
        report = prune_filters(model, [x], 0.95, **options)  # type: ignore[arg-type]
        assert [group.layers for group in report.groups] == groups
    reasons = {line.name: line.reason for line in report.layers}
    assert reasons == {
        "conv1": "excluded by 'conv1'",
        "conv2": "not included",
        "fc1": None,
        "fc2": "an output of the model",
    }
    model, x = made("residual")
    report = prune_filters(model, [x], 0.9, exclude="stem")
    reasons = {line.name: line.reason for line in report.layers}
    assert reasons["blocks.0.conv2"] == "its channels are those of stem: excluded by 'stem'"


@pytest.mark.parametrize("batch", ["tensor", "sequence", "mapping"])
def test_batches_are_what_the_model_is_called_with(batch: str) -> None:
    reports = []
    for given in (True, False):
        model, x = made("shared")
        kinds: dict[str, Any] = {"tensor": x, "sequence": (x,), "mapping": {"x": x}}
        if given and batch != "tensor":
            shift = torch.zeros(12, 1)
            kinds = {"sequence": [x, shift], "mapping": {"shift": shift, "x": x}}
        reports.append(prune_filters(model, [kinds[batch], kinds[batch]], 0.7))
        model(x)
    assert all(report.points == 24 for report in reports)
    assert reports[0].groups == reports[1].groups


class Optioned(nn.Module):
    """Arguments that are no tensors decide what it does; a tensor of its own is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(
        self, x: Tensor, raw: bool = False, *more: Tensor, sizes: tuple[int, int] = (1, 2), mode: str = "a", **rest: Any
    ) -> dict[str, Tensor]:
        y = self.first(x).relu() * torch.full((1,), 2.0)
        for each in more:
            y = y * each
        if raw:
            return {"raw": y}
        return {"out": self.last(y) * (sizes[0] if mode == "a" else 0) + rest.get("shift", 0)}


@pytest.mark.parametrize(
    "options",
    [[False], [False, torch.rand(4, 1), torch.rand(4, 1)], {"sizes": (2, 1), "shift": torch.rand(3)}, {"mode": "a"}],
)
def test_only_tensors_are_traced_and_the_model_gets_no_attributes(options: Any) -> None:
    torch.manual_seed(0)
    model, x = Optioned(), torch.randn(4, 6)
    names = set(vars(model))
    report = prune_filters(model, [{"x": x, **options} if isinstance(options, dict) else [x, *options]], 0.5)
    assert [group.layers for group in report.groups] == [("first",)]
    assert set(vars(model)) == names
    with pytest.raises(ValueError, match=r"can be cut \(first: an output of the model"):
        prune_filters(model, [(x, True)], 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_floats_keep_their_dtype(dtype: torch.dtype) -> None:
    model, x = made("lenet")
    model.to(dtype)
    report = prune_filters(model, [x.to(dtype)], 0.5)
    assert {each.dtype for each in model.parameters()} == {dtype}
    assert report.deviation < (0.1 if dtype == torch.bfloat16 else 1e-12)


def test_parameters_stay_the_same_objects_and_frozen_ones_stay_frozen() -> None:
    model, x = made("lenet")
    model.get_parameter("conv2.weight").requires_grad_(False)
    before = dict(model.named_parameters())
    model(x).sum().backward()
    prune_filters(model, [x], 0.5)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert not model.get_parameter("conv2.weight").requires_grad
    assert all(each.grad is None or each.grad.shape == each.shape for each in model.parameters())


def test_an_optimizer_from_before_trains_or_fails_aloud() -> None:
    for momentum in (0.0, 0.9):
        model, x = made("lenet")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        # The graph of the step before is held while the model is cut.
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        optimizer.step()
        prune_filters(model, [x], 0.5)
        before = snapshot(model)
        model(x).square().mean().backward()
        if momentum:
            with pytest.raises(RuntimeError, match="must match the size"):
                optimizer.step()
        else:
            optimizer.step()
            assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert float(loss.detach()) > 0


def test_the_report_becomes_a_dictionary_and_prints_on_a_line() -> None:
    model, x = made("residual")
    report = prune_filters(model, [x], 0.7, method="pfp-random", sensitivity="share")
    assert json.loads(json.dumps(report.to_dict()))["parameters_after"] == parameters(model)
    for each in (report, report.layers[0], report.layers[-1], report.groups[0]):
        assert "\n" not in repr(each)
        assert each.to_dict()
    assert "conv2" in repr(report.groups[0])


def test_points_and_the_points_of_the_paper_are_counted() -> None:
    model, x = made("mlp", 12)
    report = prune_filters(model, [x, x[:5]], 0.7, delta=1e-9)
    assert report.points == 17
    # Outputs: 40, 30 and 5.
    assert report.points_asked == int(3 * torch.log(torch.tensor(8 * 75 * 40 / 1e-9, dtype=torch.float64))) + 1


def test_a_smaller_model_is_then_pruned_to_a_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    prune_filters(model, [torch.randn(32, 16)], 0.5)
    Sparsifier(model, "2:4").finalize()
    assert int((model[0].weight[:32] != 0).sum()) == 32 * 8


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def noisy() -> nn.Module:
    model = sequential()
    model.forward = lambda x: nn.Sequential.forward(model, x) * torch.rand(1)  # type: ignore[method-assign]
    return model


class Counting(nn.Module):
    """Channels are counted, which no operation on them shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y / y.size(1))  # type: ignore[no-any-return]


def replaced() -> nn.Module:
    """A forward of its own, which is not its class's."""
    model = sequential()
    model.forward = lambda x: nn.Sequential.forward(model, x) * 2  # type: ignore[method-assign]
    return model


def thresholded() -> nn.Module:
    model = sequential()
    DynamicSparsifier(model, alpha=0.1)
    return model


def masked() -> nn.Module:
    model = sequential()
    Sparsifier(model, "2:4")
    return model


def adapted() -> nn.Module:
    model = sequential()
    Sparsifier(model, "2:4").finalize()
    add_adapters(model, rank=2)
    return model


X = torch.ones(2, 16)
REFUSED: list[tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]] = [
    (nn.ReLU, [X], {}, ValueError, r"no filters of this ReLU can be cut: it has no Linear and no convolution"),
    (
        lambda: nn.Linear(16, 3),
        [X],
        {},
        ValueError,
        r"no filters of this Linear can be cut \(itself: the traced model does not call it by itself\)",
    ),
    (Branching, [X], {}, ValueError, r"this Branching cannot be traced by torch\.fx \(TraceError: .*Prune a part"),
    (noisy, [X], {}, ValueError, r"returns something else when it is called again.*make it deterministic"),
    (
        replaced,
        [X],
        {},
        ValueError,
        r"of this Sequential, from the forward of its classes, computes something else \(outp",
    ),
    (Counting, [X], {}, ValueError, r"computes something else than the larger one with these channels at zero \(out"),
    (masked, [X], {}, ValueError, r"'weight' of '0' is masked by a Sparsifier; prune filters before, or finalize"),
    (thresholded, [X], {}, ValueError, r"'weight' of '0' has trainable thresholds; finalize its DynamicSparsifier"),
    (adapted, [X], {}, ValueError, r"of '0' has an adapter; merge_adapters first"),
    (lambda: sequential().to("meta"), [X], {}, ValueError, r"parameter '0.weight' is on the meta device"),
    (
        sequential,
        [X],
        {"keep": 0.05},
        ValueError,
        r"keep=0.05 of 608 parameters cannot be met: with one channel of each group 33 remain \(5.43%\). "
        r"Filters that stay: 2: an output of the model",
    ),
    (sequential, [X], {"keep": 0}, ValueError, r"keep must be above 0 and at most 1, got 0"),
    (sequential, [X], {"keep": 1.5}, ValueError, r"keep must be above 0 and at most 1, got 1.5"),
    (sequential, [X], {"keep": "half"}, TypeError, r"keep must be a number, got 'half'"),
    (sequential, [X], {"delta": 0}, ValueError, r"delta must be above 0 and at most 1, got 0"),
    (sequential, [X], {"seed": -1}, ValueError, r"seed must be at least 0, got -1"),
    (sequential, [X], {"method": "l3"}, ValueError, r"unknown method 'l3'; allowed are 'pfp'"),
    (sequential, [X], {"sensitivity": "sum"}, ValueError, r"unknown sensitivity 'sum'; allowed are 'element', 'share'"),
    (sequential, [X], {"include": 3}, TypeError, r"include and exclude take globs"),
    (
        sequential,
        [X],
        {"exclude": "conv"},
        ValueError,
        r"exclude 'conv' matches none of the 2 weight names \(0.weight, 2",
    ),
    (sequential, [X], {"exclude": "0"}, ValueError, r"no filters .* \(0: excluded by '0'; 2: an output of the model\)"),
    (sequential, X, {}, TypeError, r"calibration is a tensor of shape \(2, 16\); give an iterable of batches"),
    (sequential, [], {}, ValueError, r"calibration holds no batch"),
    (
        sequential,
        [torch.ones(2, 15)],
        {},
        ValueError,
        r"calibration batch 0, a tensor of shape \(2, 15\), does not run through this Sequential \(RuntimeError: .*mat",
    ),
    (sequential, [X, torch.ones(2, 15)], {}, ValueError, r"calibration batch 1, a tensor of shape \(2, 15\), does not"),
    (sequential, [X * float("nan")], {}, ValueError, r"returns something else when it is called again, or NaN"),
    (sequential, [X, X / 0], {}, ValueError, r"an input of '2' holds NaN or infinities; nothing was changed"),
]


@pytest.mark.parametrize(("make", "calibration", "options", "error", "message"), REFUSED, ids=lambda value: None)
def test_what_is_refused_is_named_and_the_model_is_as_it_was(
    make: Callable[[], nn.Module], calibration: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    model.train()
    is_meta = any(each.is_meta for each in model.parameters())
    before, shapes = {} if is_meta else snapshot(model), repr(model)
    with pytest.raises(error, match=message):
        prune_filters(model, calibration, **{"keep": 0.5, **options})
    assert repr(model) == shapes
    assert model.training
    if not is_meta:
        check_unchanged(model, before)


def test_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        prune_filters("model", [X], 0.5)  # type: ignore[arg-type]


def test_an_interrupted_model_is_as_it_was() -> None:
    model, x = made("residual")
    before, text = snapshot(model), repr(model)
    runs = []

    def stop(module: nn.Module, args: Any) -> None:
        # Not before the smaller model is compared.
        runs.append(model.get_parameter("fc.weight").shape)
        if runs[-1] != runs[0]:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prune_filters(model, [x], 0.5)
    handle.remove()
    check_unchanged(model, before)
    assert repr(model) == text


def test_the_public_face_is_these_names() -> None:
    assert filters.__all__ == ["ChannelGroup", "FilterReport", "FilteredLayer", "enough_draws", "prune_filters"]
    assert all(getattr(filters, name).__doc__ for name in filters.__all__)


def iterate(values: list[Tensor]) -> Iterator[Tensor]:
    yield from values


def test_calibration_may_be_an_iterator() -> None:
    model, x = made("mlp")
    assert prune_filters(model, iterate([x, x]), 0.8).points == 24
