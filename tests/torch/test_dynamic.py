"""Dynamic sparse training: its gradients entry by entry, what layers compute, how thresholds move, come and go."""

import copy
import io
import json
import math
import pickle
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import grad as gradient_of
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import masksolve as ms
import masksolve.torch.dynamic
from masksolve import odds
from masksolve.torch import Sparsifier, adaprune, add_adapters, finalize, patterns_from_zeros, permute_model
from masksolve.torch._dynamic.thresholds import long_tail
from masksolve.torch.dynamic import DensityReport, DynamicSparsifier
from tests.torch.test_surroundings import compiling

ALPHA = 0.01


def test_the_public_names_are_these_and_documented() -> None:
    assert masksolve.torch.dynamic.__all__ == ["DensityReport", "DynamicSparsifier", "LayerDensity"]
    assert all(getattr(masksolve.torch.dynamic, name).__doc__ for name in masksolve.torch.dynamic.__all__)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.ReLU(), nn.Linear(24, 8, dtype=dtype))


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def spread(dynamic: DynamicSparsifier, most: float = 0.3) -> None:
    """Give every threshold a value of its own, some below zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in dynamic.thresholds().values():
            values.copy_(torch.rand(values.shape, generator=generator) * (most + 0.05) - 0.05)


def dense(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


def masked(weight: Tensor, thresholds: Tensor) -> Tensor:
    """The oracle of what a layer computes with: row by row."""
    rows = [row * (row.abs() > float(t)) for row, t in zip(weight.detach(), thresholds.detach(), strict=True)]
    return torch.stack(rows)


def slope(x: float) -> float:
    """The oracle of the estimate."""
    if abs(x) <= 0.4:
        return 2 - 4 * abs(x)
    return 0.4 if abs(x) <= 1 else 0.0


def closed_form(weight: Tensor, thresholds: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle of the gradients of weights and thresholds, for that of the masked weights: entry by entry."""
    weight, thresholds, grad = (each.detach().double() for each in (weight, thresholds, grad))
    of_weight, of_thresholds = torch.zeros_like(weight), torch.zeros_like(thresholds)
    for row, threshold in enumerate(thresholds.tolist()):
        values, upstream = weight[row].flatten().tolist(), grad[row].flatten().tolist()
        for j, (value, g) in enumerate(zip(values, upstream, strict=True)):
            excess = abs(value) - threshold
            of_weight[row].view(-1)[j] = g * ((excess > 0) + abs(value) * slope(excess))
            of_thresholds[row] -= g * value * slope(excess)
    return of_weight, of_thresholds


def check_gradients(weight: Tensor, thresholds: Tensor, grad: Tensor) -> None:
    """The gradients that both have are the closed form, to the precision of their dtypes."""
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
    for tensor, expected in zip((weight, thresholds), closed_form(weight, thresholds, grad), strict=True):
        found = cast(Tensor, tensor.grad)
        assert found.dtype == tensor.dtype
        most = tolerance[found.dtype]
        torch.testing.assert_close(found.double(), expected, rtol=most, atol=most)


@pytest.mark.parametrize(
    ("x", "expected"), [(0, 2), (0.1, 1.6), (0.4, 0.4), (0.40001, 0.4), (1, 0.4), (1.0001, 0), (3, 0), (math.inf, 0)]
)
def test_the_estimate_is_two_at_zero_has_a_long_tail_and_ends_at_one(x: float, expected: float) -> None:
    both = torch.tensor([x, -x], dtype=torch.float64)
    torch.testing.assert_close(long_tail(both), torch.full_like(both, expected), rtol=0, atol=1e-12)
    assert slope(x) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 9), (6, 3, 2, 2)], ids=str)
def test_gradients_are_the_closed_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of Gaussian weights, which meet every piece of the estimate on both sides of the threshold."""
    layer = (nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 2)).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(data(*shape, dtype=torch.float64))
    values = DynamicSparsifier(layer, alpha=ALPHA).thresholds()["weight"]
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        values.copy_(torch.linspace(-0.5, 1.5, len(values)))
    weight, grad = dense(layer, "weight"), torch.randn(shape).to(dtype)
    excess = weight.detach().abs() - values.detach().view(-1, *[1] * (len(shape) - 1))
    for low, high in pairwise([-math.inf, -1, -0.4, 0, 0.4, 1, math.inf]):
        assert bool(((low < excess) & (excess < high)).any())
    (layer.weight * grad).sum().backward()
    check_gradients(weight, values, grad)


def test_the_gradient_of_a_pruned_weight_is_not_the_straight_through_one() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.25, -3.0]]))
    values = DynamicSparsifier(layer, alpha=0).thresholds()["weight"]
    values.data.fill_(0.5)
    layer(torch.ones(1, 2)).sum().backward()
    # |Q| = .25 has slope 1; Q = 2.5 has none.
    assert torch.equal(cast(Tensor, dense(layer, "weight").grad), torch.tensor([[0.25, 1.0]]))
    assert torch.equal(cast(Tensor, values.grad), torch.tensor([-0.25]))


def test_thresholds_of_zero_keep_what_is_not_zero_and_low_ones_all() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1, 2] = 0
    dynamic, x = DynamicSparsifier(layer, alpha=0), data(5, 4)
    expected = functional.linear(x, dense(layer, "weight"), layer.bias)
    assert torch.equal(layer(x), expected)
    assert (dynamic.report().kept, dynamic.report().density) == (11, 11 / 12)
    dynamic.thresholds()["weight"].data.fill_(-5)
    assert torch.equal(layer(x), expected)
    assert dynamic.report().density == 1


def test_a_weight_that_equals_its_threshold_is_pruned() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        dense(layer, "weight").copy_(torch.tensor([[0.5, -0.5, -0.5625]]))
    dynamic = DynamicSparsifier(layer, alpha=ALPHA)
    dynamic.thresholds()["weight"].data.fill_(0.5)
    assert layer(torch.ones(1, 3)).tolist() == [[-0.5625]]
    assert dynamic.report().kept == 1


@pytest.mark.parametrize(("kept", "size", "guard"), [(0, 200, 0.0), (2, 200, 0.01), (29, 2900, 0.01), (3, 12, 0.25)])
def test_the_guard_restarts_a_layer_at_its_density_and_not_above(kept: int, size: int, guard: float) -> None:
    for more in (0, 1):
        layer = nn.Linear(size, 1, bias=False)
        with torch.no_grad():
            layer.weight.fill_(0.5)
            layer.weight[0, : kept + more] = -20
        dynamic, x = DynamicSparsifier(layer, alpha=ALPHA, guard=guard), torch.ones(1, size)
        values = dynamic.thresholds()["weight"]
        values.data.fill_(10)
        layer.eval()
        assert float(layer(x).detach()) == -20 * (kept + more)
        assert float(values.detach()) == 10
        layer.train()
        assert float(layer(x).detach()) == -20 * (kept + more) + (0 if more else 0.5 * (size - kept))
        assert float(values.detach()) == (10 if more else 0)


def test_without_a_guard_and_in_recurrent_layers_an_empty_layer_stays_empty() -> None:
    for model in (nn.Linear(4, 4), nn.LSTM(4, 4), nn.LSTMCell(4, 4)):
        dynamic = DynamicSparsifier(model, alpha=ALPHA, guard=None if isinstance(model, nn.Linear) else 0.01)
        for values in dynamic.thresholds().values():
            values.data.fill_(10)
        model(torch.ones(1, 4))
        assert dynamic.report().kept == 0


def test_a_guard_between_a_forward_and_its_backward_changes_no_gradient_of_it() -> None:
    layer = nn.Linear(8, 4)
    dynamic = DynamicSparsifier(layer, alpha=ALPHA)
    values, weight = dynamic.thresholds()["weight"], dense(layer, "weight")
    values.data.fill_(0.5)
    output = layer.eval()(torch.ones(1, 8)).sum()
    layer.train()(torch.ones(1, 8))
    assert int(values.count_nonzero()) == 0
    output.backward()
    values.data.fill_(0.5)
    check_gradients(weight, values, torch.ones_like(weight))


def test_the_penalty_is_the_sum_over_all_layers_and_thresholds_grow_by_it_alone() -> None:
    model = mlp()
    dynamic = DynamicSparsifier(model, alpha=0.5)
    spread(dynamic)
    before = {name: values.detach().clone() for name, values in dynamic.thresholds().items()}
    penalty = dynamic.penalty()
    assert float(penalty.detach()) == pytest.approx(
        0.5 * sum(math.exp(-t) for each in before.values() for t in each.tolist())
    )
    penalty.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, values in dynamic.thresholds().items():
        torch.testing.assert_close(values.detach(), before[name] + 0.1 * 0.5 * torch.exp(-before[name]))
    dynamic.alpha = 0
    assert float(dynamic.penalty().detach()) == 0


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (2, 3), stride=2, bias=False),
    nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
    nn.Conv2d(4, 8, 3, groups=4),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_a_convolution_is_a_matrix_product_of_its_unfolded_input(layer: nn.Conv2d) -> None:
    layer = copy.deepcopy(layer).double()
    dynamic, x = DynamicSparsifier(layer, alpha=ALPHA), data(2, 4, 7, 6, dtype=torch.float64)
    spread(dynamic)
    assert 0.1 < dynamic.report().density < 0.9
    matrix = masked(dense(layer, "weight"), dynamic.thresholds()["weight"]).flatten(1)
    sizes: Any = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    windows = [functional.unfold(part, *sizes) for part in x.chunk(layer.groups, dim=1)]
    products = [rows @ each for rows, each in zip(matrix.chunk(layer.groups), windows, strict=True)]
    output = layer(x)
    expected = torch.cat(products, dim=1).view(output.shape)
    torch.testing.assert_close(output, expected + (0 if layer.bias is None else layer.bias[:, None, None]))


def test_convolutions_of_other_dimensions_have_a_threshold_for_each_filter() -> None:
    layers: list[Any] = [nn.Conv1d(3, 5, 2), nn.Conv3d(2, 4, 2), nn.Conv2d(2, 4, 2)]
    layers[2].to(memory_format=torch.channels_last)
    model = nn.ModuleList(layers)
    dynamic = DynamicSparsifier(model, alpha=ALPHA)
    spread(dynamic)
    for layer, (name, values) in zip(layers, dynamic.thresholds().items(), strict=True):
        assert len(values) == layer.out_channels
        assert torch.equal(layer.weight, masked(dense(model, name), values))
    assert layers[2].weight.is_contiguous(memory_format=torch.channels_last)


class HandWritten:
    """An LSTM of one layer or several, each gate of each with two matrices, as leaves whose gradients are read."""

    def __init__(self, layer: nn.LSTM, thresholds: dict[str, nn.Parameter]) -> None:
        self.hidden, self.gates, self.bias = layer.hidden_size, [], []
        for level in range(layer.num_layers):
            names = [f"weight_{kind}_l{level}" for kind in ("ih", "hh")]
            self.gates.append(
                {
                    name: [
                        # A threshold vector of length hidden for each gate and matrix.
                        masked(w, t).requires_grad_()
                        for w, t in zip(dense(layer, name).chunk(4), thresholds[name].chunk(4), strict=True)
                    ]
                    for name in names
                }
            )
            self.bias.append((dense(layer, f"bias_ih_l{level}") + dense(layer, f"bias_hh_l{level}")).detach().chunk(4))

    def __call__(self, x: Tensor) -> Tensor:
        steps = list(x)
        for gates, bias in zip(self.gates, self.bias, strict=True):
            of_input, of_hidden = gates.values()
            h = c = torch.zeros(x.shape[1], self.hidden, dtype=x.dtype)
            for time, value in enumerate(steps):
                i, f, g, o = (value @ u.T + h @ v.T + b for u, v, b in zip(of_input, of_hidden, bias, strict=True))
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                steps[time] = h
        return torch.stack(steps)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_lstm_and_its_gradients_are_the_hand_written_ones(layers: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(5, 6, layers).double(), data(7, 3, 5, dtype=torch.float64)
    dynamic = DynamicSparsifier(layer, alpha=ALPHA)
    spread(dynamic)
    assert 0.3 < dynamic.report().density < 0.9
    thresholds = dynamic.thresholds()
    assert {name: len(values) for name, values in thresholds.items()} == {
        f"weight_{kind}_l{level}": 24 for level in range(layers) for kind in ("ih", "hh")
    }
    by_hand = HandWritten(layer, thresholds)
    for output in (layer(x)[0], expected := by_hand(x)):
        output.square().sum().backward()
    torch.testing.assert_close(layer(x)[0], expected)
    for gates in by_hand.gates:
        for name, leaves in gates.items():
            grad = torch.cat([cast(Tensor, leaf.grad) for leaf in leaves])
            check_gradients(dense(layer, name), thresholds[name], grad)


def test_an_lstm_sees_every_change_of_weights_and_thresholds() -> None:
    """Its kernels get a list of weights that it keeps."""
    layer, x = nn.LSTM(5, 6), data(4, 2, 5)
    dynamic = DynamicSparsifier(layer, alpha=ALPHA)
    spread(dynamic)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    outputs = [layer(x)[0]]
    for _ in range(2):
        optimizer.zero_grad()
        (outputs[-1].square().sum() + dynamic.penalty()).backward()
        optimizer.step()
        outputs.append(layer(x)[0])
        torch.testing.assert_close(outputs[-1], HandWritten(layer, dynamic.thresholds())(x))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    torch.testing.assert_close(layer.double()(x.double())[0].float(), outputs[-1])
    layer.float()
    dynamic.finalize()
    dense(layer, "weight_ih_l0").data.zero_()
    assert not torch.allclose(layer(x)[0], outputs[-1])


def test_an_lstm_takes_sequences_of_several_lengths() -> None:
    layer, x = nn.LSTM(5, 6), data(4, 2, 5)
    spread(DynamicSparsifier(layer, alpha=ALPHA))
    _, (last, _) = layer(nn.utils.rnn.pack_padded_sequence(x, [4, 2]))
    torch.testing.assert_close(last[0], torch.stack([layer(x)[0][3, 0], layer(x)[0][1, 1]]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x).relu()))


class Stacked(nn.Module):
    """A recurrent layer that returns its outputs alone."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x)[0])


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for each in x:
            state = self.cell(each, state)
        return cast(Tensor, cast(Any, state)[0])


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Conv2d(4, 8, 1, groups=2), nn.Flatten(), nn.Linear(72, 3))


# What makes the model, and the shape that it takes.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5, 16)),
    "tied": (Tied, (5, 16)),
    "convolutions": (convolutions, (5, 1, 4, 4)),
    "lstm": (lambda: Stacked(nn.LSTM(6, 8, 2, bidirectional=True)), (4, 3, 6)),
    "projected lstm": (lambda: Stacked(nn.LSTM(6, 8, proj_size=4)), (4, 3, 6)),
    "gru": (lambda: Stacked(nn.GRU(6, 8, bias=False)), (4, 3, 6)),
    "cell": (Cell, (4, 3, 6)),
}


def made(name: str) -> tuple[nn.Module, DynamicSparsifier, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    dynamic = DynamicSparsifier(model, alpha=ALPHA)
    spread(dynamic)
    assert 0.1 < dynamic.report().density < 0.95
    return model, dynamic, data(*shape)


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("name", MODELS)
def test_finalize_leaves_a_plain_model_that_computes_the_same(name: str) -> None:
    model, dynamic, x = made(name)
    plain = MODELS[name][0]()
    masks = {each: masked(dense(model, each), t) for each, t in dynamic.thresholds().items()}
    expected, report = model(x), dynamic.report()
    dynamic.finalize()
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [set(vars(each)) for each in model.modules()] == [set(vars(each)) for each in plain.modules()]
    for each, weight in masks.items():
        assert torch.equal(dense(model, each), weight)
        assert not bool(torch.signbit(dense(model, each)[weight == 0]).any())
    for layer in (each for each in model.modules() if isinstance(each, nn.RNNBase)):
        assert all(
            each is layer._parameters[key]
            for key, each in zip(layer._flat_weights_names, layer._flat_weights, strict=True)
        )
    assert torch.equal(model(x), expected)
    assert report.kept == sum(int(weight.count_nonzero()) for weight in masks.values())


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_compute_the_same_and_go_their_own_way(name: str) -> None:
    model, dynamic, x = made(name)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    before = copy.deepcopy(model.state_dict())
    for twin in twins:
        assert torch.equal(twin(x), expected)
        twin(x).square().sum().backward()
        torch.optim.SGD(twin.parameters(), 0.5).step()
        assert not torch.equal(twin(x), expected)
        moved, own = twin(x), copy.deepcopy(twin.state_dict())
        dynamic.finalize(twin)
        torch.testing.assert_close(twin(x), moved)
        assert set(own) - set(twin.state_dict()) == {key for key in own if key.endswith("_thresholds")}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_of_the_model_resumes_bit_for_bit(name: str) -> None:
    def train(model: nn.Module, dynamic: DynamicSparsifier, optimizer: Any, x: Tensor) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            (model(x).square().mean() + dynamic.penalty()).backward()
            optimizer.step()

    model, dynamic, x = made(name)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, dynamic, optimizer, x)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert {key for key in saved[0] if key.endswith("_thresholds")} == {
        f"{each}_thresholds" for each in dynamic.thresholds()
    }
    train(model, dynamic, optimizer, x)

    other = MODELS[name][0]()
    resumed = DynamicSparsifier(other, alpha=ALPHA)
    other.load_state_dict(saved[0])
    second = torch.optim.Adam(other.parameters(), 0.01)
    second.load_state_dict(saved[1])
    train(other, resumed, second, x)
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_steps_move_weights_and_all_thresholds(name: str, optimizer: Any) -> None:
    model, dynamic, x = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = optimizer(model.parameters(), lr=0.01)
    (model(x).square().mean() + dynamic.penalty()).backward()
    chosen.step()
    for key, value in model.state_dict().items():
        moved = value != before[key]
        assert bool(moved.all() if key.endswith("_thresholds") else moved.any()), key


def test_tied_weights_have_one_mask_and_the_gradients_of_both_uses() -> None:
    model = Tied().double()
    dynamic, x = DynamicSparsifier(model, alpha=ALPHA), data(5, 16, dtype=torch.float64)
    spread(dynamic)
    assert list(dynamic.thresholds()) == ["first.weight"]
    assert [each.reason for each in dynamic.report().skipped] == ["1-D: not a matrix"] * 2
    leaf = masked(dense(model, "first.weight"), dynamic.thresholds()["first.weight"]).requires_grad_()
    hidden = functional.linear(x, leaf, model.first.bias).relu()
    functional.linear(hidden, leaf, model.second.bias).square().sum().backward()
    model(x).square().sum().backward()
    check_gradients(dense(model, "first.weight"), dynamic.thresholds()["first.weight"], cast(Tensor, leaf.grad))
    dynamic.finalize()
    assert model.first.weight is model.second.weight


def train_student(alpha: float, seed: int = 0) -> tuple[nn.Sequential, DynamicSparsifier, Callable[[], float], Tensor]:
    """A classifier whose label half of its inputs tell; its first layer has most to lose."""
    torch.manual_seed(seed)
    x = torch.randn(1024, 32)
    y = (x[:, :8] + x[:, 8:16]).argmax(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    dynamic = DynamicSparsifier(model, alpha=alpha)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(200):
        chosen = torch.randint(len(x), (64,))
        loss = functional.cross_entropy(model(x[chosen]), y[chosen]) + dynamic.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            dynamic.record(step + 1)
    return model, dynamic, lambda: float((model(x).argmax(1) == y).float().mean()), x


def test_a_larger_alpha_leaves_less_and_the_first_layer_is_the_sparsest() -> None:
    found = [train_student(alpha)[1] for alpha in (0.0, 3e-3, 1e-2)]
    densities = [dynamic.report().density for dynamic in found]
    assert densities[0] > 0.9 > 0.7 > densities[1] > densities[2] + 0.1
    for dynamic in found[1:]:
        first, middle, last = (layer.density for layer in dynamic.report().layers)
        assert first < middle < last
        assert [record.step for record in dynamic.records] == [50, 100, 150, 200]
        of_steps = [record.density for record in dynamic.records]
        assert of_steps == sorted(of_steps, reverse=True)


def test_a_model_that_was_trained_sparse_becomes_transposable() -> None:
    model, dynamic, accuracy, x = train_student(1e-2)
    trained = accuracy()
    dynamic.finalize()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    patterns = patterns_from_zeros(model, 8)
    densities = {layer.name: layer.density for layer in dynamic.records[-1].layers}
    assert patterns == {name: odds.choose_pattern(1 - density, 8) for name, density in densities.items()}
    report = adaprune(model, x[:256].split(64), patterns, respect_zeros=True, keep_first_last=False)
    assert [layer.name for layer in report.layers] == [name for name, each in patterns.items() if each.zeros]
    assert len(report.layers) >= 2
    for layer in report.layers:
        weight = dense(model, layer.name)
        assert ms.is_valid_mask(weight.detach().numpy() != 0, layer.pattern.n, layer.pattern.m)
        assert bool((weight[before[layer.name] == 0] == 0).all())
        assert layer.conversion is not None
        assert layer.conversion.sparsity == pytest.approx(1 - densities[layer.name])
    assert trained > 0.85
    assert accuracy() > trained - 0.1


def test_reports_say_what_is_kept_and_why_others_stay_dense() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 2), nn.LayerNorm(4)
            self.up, self.attention = nn.ConvTranspose1d(4, 4, 2), nn.MultiheadAttention(4, 2, bias=False)
            self.embedding, self.table = nn.Embedding(5, 4), nn.Parameter(torch.randn(4, 4))
            self.left_out = nn.Linear(4, 4, bias=False)

    model = Model()
    dynamic = DynamicSparsifier(model, alpha=ALPHA, exclude="left_out")
    with torch.no_grad():
        dense(model, "layer.weight").copy_(torch.tensor([[1.0, 2, 3, 4], [1, -2, 3, -4]]))
        dynamic.thresholds()["layer.weight"].copy_(torch.tensor([2.0, 3.5]))
    report = dynamic.report()
    only = "only Linear, convolution and recurrent layers get thresholds"
    assert {line.name: line.reason for line in report.skipped} == {
        "table": f"part of Model; {only}",
        "layer.bias": "1-D: not a matrix",
        "norm.weight": "1-D: not a matrix",
        "norm.bias": "1-D: not a matrix",
        "up.weight": f"part of ConvTranspose1d; {only}",
        "up.bias": "1-D: not a matrix",
        "attention.in_proj_weight": f"part of MultiheadAttention; {only}",
        "attention.out_proj.weight": f"part of MultiheadAttention; {only}",
        "embedding.weight": f"part of Embedding; {only}",
        "left_out.weight": "excluded by 'left_out'",
    }
    assert (report.step, report.kept, report.density) == (None, 3, 3 / 8)
    assert repr(report) == "DensityReport(1 layer, 3 kept, density 37.50%)"
    assert repr(report.layers[0]) == "LayerDensity('layer.weight', 2x4, 3 kept, density 37.50%)"
    record = dynamic.record(7)
    assert dynamic.records == (record,)
    assert repr(record) == "DensityReport(step 7, 1 layer, 3 kept, density 37.50%)"
    assert json.loads(json.dumps(record.to_dict()))["layers"] == [
        {"name": "layer.weight", "shape": [2, 4], "kept": 3, "density": 0.375}
    ]
    assert record.scalars() == {"masks/density": 0.375, "masks/density/layer.weight": 0.375}
    dynamic.finalize()
    assert isinstance(dynamic.records[0], DensityReport)


def test_what_changes_a_weight_that_was_read_changes_the_dense_one() -> None:
    layer = nn.Linear(4, 2)
    values = DynamicSparsifier(layer, alpha=ALPHA).thresholds()["weight"]
    nn.init.constant_(layer.weight, 2.0)
    values.data.copy_(torch.tensor([1.0, 3.0]))
    assert torch.equal(dense(layer, "weight"), torch.full((2, 4), 2.0))
    assert torch.equal(layer.weight, torch.tensor([[2.0] * 4, [0.0] * 4]))
    with torch.no_grad():
        layer.weight.add_(2)
    assert torch.equal(layer.weight, torch.full((2, 4), 4.0))
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad is dense(layer, "weight").grad is not None


def test_the_surroundings_of_a_loop_give_the_same_gradients() -> None:
    """Activation checkpoints, functional calls and vmap."""
    model, _, x = made("mlp")
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(model, given, (x,))).square().sum()

    def grads(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        run(x).square().sum().backward()
        return [cast(Tensor, each.grad).clone() for each in model.parameters()]

    expected = grads(model)
    assert all(bool(each.any()) for each in expected)
    torch.testing.assert_close(grads(lambda x: cast(Tensor, checkpoint(model, x, use_reentrant=False))), expected)
    torch.testing.assert_close(list(gradient_of(loss)(parameters, x).values()), expected)
    each = vmap(gradient_of(loss), (None, 0))(parameters, x[:, None])
    torch.testing.assert_close([values.sum(0) for values in each.values()], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_the_same(backend: str) -> None:
    found = []
    for compiled in (False, True):
        model, dynamic, x = made("mlp")
        with compiling():
            run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                (run(x).square().mean() + dynamic.penalty()).backward()
                optimizer.step()
        found.append([each.detach() for each in model.parameters()])
    torch.testing.assert_close(*found)


def test_an_average_of_the_model_can_be_finalized() -> None:
    model, dynamic, x = made("mlp")
    average = AveragedModel(model)
    average.update_parameters(model)
    expected = average(x)
    dynamic.finalize(average)
    assert torch.equal(average(x), expected)
    assert torch.equal(model(x), expected)
    assert list(average.module.state_dict()) == list(mlp().state_dict())


def masked_by_a_sparsifier() -> nn.Module:
    model = mlp()
    Sparsifier(model, "2:4")
    return model


def with_thresholds() -> nn.Module:
    model = mlp()
    DynamicSparsifier(model, alpha=ALPHA)
    return model


def with_that_name() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight_thresholds = nn.Parameter(torch.ones(4))
    return model


def without_rows() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.empty(0, 4))
    return model


def parametrized() -> nn.Module:
    return cast(nn.Module, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (nn.ReLU, {}, ValueError, r"no parameter of this ReLU can be thresholded \(it has no parameters\)"),
    (lambda: nn.Embedding(3, 4), {}, ValueError, "no parameter of this Embedding .*weight: part of Embedding; only"),
    (without_rows, {}, ValueError, "weight: 0x4 holds no whole 1x1 tile"),
    (lambda: torch.ones(2), {}, TypeError, "model must be a torch.nn.Module, got Tensor"),
    (lambda: mlp().to("meta"), {}, ValueError, "'0.weight' is on the meta device"),
    (parametrized, {}, ValueError, "already parametrized by _WeightNorm"),
    (masked_by_a_sparsifier, {}, ValueError, "parameter '0.weight' is masked by a Sparsifier; finalize it first"),
    (with_thresholds, {}, ValueError, "parameter '0.weight' has trainable thresholds already; finalize its Dynamic"),
    (with_that_name, {}, ValueError, "thresholds of parameter 'weight' are to have the name 'weight_thresholds', but"),
    (mlp, {"include": "3"}, ValueError, "include '3' matches none of the 4 parameter names"),
    (mlp, {"include": "0.bias"}, ValueError, "include '0.bias' matches nothing that can be thresholded"),
    (mlp, {"exclude": 5}, TypeError, "include and exclude take globs"),
    (mlp, {"alpha": -1}, ValueError, "alpha must be finite and not negative, got -1"),
    (mlp, {"alpha": math.nan}, ValueError, "alpha must be finite and not negative, got nan"),
    (mlp, {"alpha": "1e-4"}, TypeError, "alpha must be a number, got '1e-4'"),
    (mlp, {"guard": 1}, ValueError, "guard is a density, at least 0 and below 1, or None, got 1"),
    (mlp, {"guard": True}, TypeError, "guard must be a number, got True"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED)
def test_bad_input_is_refused_and_changes_nothing(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = [(type(each), list(vars(each).get("_parameters", ()))) for each in getattr(model, "modules", list)()]
    with pytest.raises(error, match=message):
        DynamicSparsifier(model, **{"alpha": ALPHA, **options})
    assert before == [(type(each), list(each._parameters)) for each in getattr(model, "modules", list)()]


@pytest.mark.filterwarnings("ignore:DTensor random operators may not")
def test_sharded_and_wrapped_models_are_refused() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            with pytest.raises(ValueError, match="DistributedDataParallel would not see thresholds that come later"):
                DynamicSparsifier(DistributedDataParallel(mlp()), alpha=ALPHA)
            model: Any = mlp()
            model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), init_device_mesh("cpu", (1,))))
            with pytest.raises(
                ValueError, match=r"parameter '2.weight' is sharded; dynamic sparse training needs whole"
            ):
                DynamicSparsifier(model, alpha=ALPHA)
            model, dynamic, x = cast("tuple[Any, DynamicSparsifier, Tensor]", made("mlp"))
            expected = model(x)
            wrapped = DistributedDataParallel(model)
            (wrapped(x).square().sum() + dynamic.penalty()).backward()
            assert all(bool(values.grad.any()) for values in dynamic.thresholds().values() if values.grad is not None)
            dynamic.finalize(wrapped)
            assert torch.equal(model(x), expected)
            model, dynamic, _ = made("mlp")
            weight = dense(model, "2.weight").detach()
            model[2].weight = nn.Parameter(distribute_tensor(weight, init_device_mesh("cpu", (1,))))
            with pytest.raises(
                RuntimeError, match=r"parameter '2.weight' is sharded by fully_shard, which holds on to i"
            ):
                dynamic.finalize()
            assert len(dynamic.thresholds()) == 2
        finally:
            distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model: Sparsifier(model, "2:4"), "0.weight: has trainable thresholds; finalize its DynamicSparsifier"),
        (lambda model: add_adapters(model, 2), "0.weight: has trainable thresholds; finalize its DynamicSparsifier"),
        (lambda model: adaprune(model, [data(4, 16)], "2:4"), "0.weight: has trainable thresholds; finalize its Dyn"),
        (lambda model: permute_model(model, "2:4", data(4, 16)), "'weight' of a ThresholdedLinear has trainable thr"),
        (finalize, "no masked parameter"),
    ],
)
def test_what_masks_or_reorders_weights_refuses_those_with_thresholds(use: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(with_thresholds())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_a_weight_with_thresholds_can_be_neither_taken_away_nor_scripted() -> None:
    model = cast(Any, with_thresholds())
    model[0].weight = nn.Parameter(torch.ones(24, 16))
    assert torch.equal(model[0](torch.ones(1, 16)), 16 + model[0].bias[None])
    with pytest.raises(RuntimeError, match="'weight' of this Linear has trainable thresholds: it can be neither delet"):
        nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(RuntimeError, match="script cannot compile this Linear while its weight has trainable thresh"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match="DataParallel replicates no thresholds; use DistributedDataParallel"):
        model[0]._replicate_for_data_parallel().weight = torch.ones(24, 16)
    del model[0]._parameters["weight"]
    with pytest.raises(RuntimeError, match="parameter 'weight' has trainable thresholds and was taken away from its m"):
        model[0].weight = torch.ones(24, 16)
    with pytest.raises(RuntimeError, match="the masked parameter 'weight' cannot be read: KeyError"):
        model(data(5, 16))


def test_a_module_that_was_given_another_class_is_not_finalized() -> None:
    model, dynamic, x = made("mlp")
    layer = cast(nn.Sequential, model)[0]
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    before = model(x)
    with pytest.raises(
        RuntimeError, match=r"parameter '0.weight' was given the class ParametrizedThresholdedLinear aft"
    ):
        dynamic.finalize()
    assert torch.equal(model(x), before)
    nn.utils.parametrize.remove_parametrizations(layer, "bias")
    dynamic.finalize()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("use", ["penalty", "thresholds", "report", "record", "finalize"])
def test_after_finalize_everything_says_so(use: str) -> None:
    dynamic = DynamicSparsifier(mlp(), alpha=ALPHA)
    dynamic.finalize()
    with pytest.raises(RuntimeError, match="this DynamicSparsifier is finalized: the model is a plain one again; make"):
        getattr(dynamic, use)(*[1] * (use == "record"))


def test_other_mistakes_are_named() -> None:
    model, dynamic, _ = made("mlp")
    for step, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="step"):
            dynamic.record(step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter of this Sequential has thresholds; there is nothing to finali"):
        dynamic.finalize(mlp())
    with pytest.raises(
        ValueError, match="this ThresholdedLinear shares weights with the DynamicSparsifier's own model"
    ):
        dynamic.finalize(cast(nn.Sequential, model)[0])
    cast(Any, model)[0] = nn.Linear(16, 24)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' has no thresholds any more: its module was removed"):
        dynamic.penalty()
