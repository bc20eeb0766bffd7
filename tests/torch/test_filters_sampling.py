"""Sensitivities, numbers of channels, draws and their bound, each held against its definition or a simulation."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from masksolve.torch._filters.allocation import (
    OneError,
    OneRatio,
    distinct,
    draws_for,
    log_factor,
    probabilities_of,
    search,
)
from masksolve.torch._filters.bound import proven_error
from masksolve.torch._filters.channels import Layer
from masksolve.torch._filters.sampling import choose, least_draws
from masksolve.torch._filters.sensitivity import PARTS, Part, Sensitivity
from masksolve.torch.filters import enough_draws

Floats = NDArray[np.float64]

# A layer, the shape of one point of its input, and how many columns in a row are one channel.
READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,), 1),
    "flattened": (lambda: nn.Linear(12, 4), (12,), 3),
    "sequence": (lambda: nn.Linear(6, 4), (3, 6), 1),
    "conv": (lambda: nn.Conv2d(5, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 5, 4), 1),
    "dilated": (lambda: nn.Conv1d(4, 3, 2, dilation=2, padding=2, padding_mode="circular"), (4, 7), 1),
}


def reader(name: str) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    make, shape, repeat = READERS[name]
    module = make()
    channels = module.weight.shape[1] // repeat  # type: ignore[operator, union-attr]
    outputs, inputs = np.arange(len(module.weight)) + channels, np.repeat(np.arange(channels), repeat)  # type: ignore[arg-type]
    return Layer(name, module, outputs, inputs, 1, 1), torch.randn(3, *shape)


def terms(layer: Layer, x: Tensor) -> Floats:
    """The oracle: w a of every sum, (points, places, outputs, channels, elements of one), weights and inputs signed.

    A column of the weight alone, in a layer of one output, is asked what it makes of the input.
    """
    weight = layer.weight.detach()
    channels = int(layer.inputs.max()) + 1
    found = []
    for output in range(len(weight)):
        columns = []
        for place in itertools.product(*map(range, weight.shape[1:])):
            alone = torch.zeros_like(weight)
            alone[(output, *place)] = weight[(output, *place)]
            with torch.no_grad():
                params = {"weight": alone, "bias": torch.zeros(len(weight))}
                y = torch.func.functional_call(layer.module, params, (x,))
            if layer.is_convolution:
                y = y.flatten(2).mT
            columns.append(y.reshape(len(x), -1, len(weight))[..., output])
        found.append(torch.stack(columns, -1).unflatten(-1, (channels, -1)))
    return torch.stack(found, 2).double().numpy()


def sensitivities(layer: Layer, x: Tensor, part: Part) -> Floats:
    """By definition, in four sums: of both signs of weights and of inputs."""
    signed = terms(layer, x)
    weights = layer.weight.detach().flatten(1).unflatten(1, (signed.shape[3], -1)).numpy()
    best = np.zeros(signed.shape[3])
    for positive_weight in (True, False):
        for positive_input in (True, False):
            own = (weights > 0) == positive_weight
            of_sum = own & ((signed * np.sign(weights) > 0) == positive_input)
            values = np.where(of_sum, np.abs(signed), 0)
            total = values.sum((3, 4), keepdims=True)
            shares = np.divide(values, total, out=np.zeros_like(values), where=total > 1e-7)
            of_channel = shares.max(4) if part == "element" else shares.sum(4)
            best = np.maximum(best, of_channel.max((0, 1, 2)))
    return best


def found_by(layer: Layer, *batches: Tensor, part: Part) -> Sensitivity:
    found = Sensitivity(layer, part)
    for batch in batches:
        found.add(batch)
    return found


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", READERS)
def test_sensitivities_are_the_largest_parts_of_any_sum(name: str, part: Part) -> None:
    layer, x = reader(name)
    assert found_by(layer, x, part=part).result() == pytest.approx(sensitivities(layer, x, part), abs=1e-5)
    # Batches say what all points together do, and positive inputs have no second sum.
    assert found_by(layer, x[:1], x[1:], part=part).result() == pytest.approx(sensitivities(layer, x, part), abs=1e-5)
    assert found_by(layer, x.abs(), part=part).result() == pytest.approx(sensitivities(layer, x.abs(), part), abs=1e-5)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", READERS)
def test_a_constant_times_weights_or_inputs_changes_no_sensitivity(name: str, part: Part) -> None:
    layer, x = reader(name)
    expected = found_by(layer, x, part=part).result()
    assert found_by(layer, 40 * x, part=part).result() == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        layer.weight.mul_(-0.3)
    assert found_by(layer, x, part=part).result() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", READERS)
def test_a_share_lies_between_the_largest_element_and_their_number_times_it(name: str) -> None:
    layer, x = reader(name)
    with torch.no_grad():
        layer.weight.abs_()
    element, share = (found_by(layer, x.abs(), part=part).result() for part in PARTS)
    elements = layer.weight[0].numel() // len(share)
    assert (share <= elements * element + 1e-6).all()
    assert (share > element + 1e-3).all() if elements > 1 else np.allclose(share, element, atol=1e-6)


def test_a_channel_that_never_fires_has_no_sensitivity() -> None:
    layer, x = reader("conv")
    x[:, 2] = 0
    for part in PARTS:
        found = found_by(layer, x, part=part).result()
        assert found[2] == 0
        assert (np.delete(found, 2) > 0).all()


@pytest.mark.parametrize("channels", [2, 3, 10, 57])
@pytest.mark.parametrize("draws", [1, 2, 5, 30])
def test_among_equals_numbers_have_a_closed_form(channels: int, draws: int) -> None:
    p = probabilities_of(np.full(channels, 0.3))
    assert p == pytest.approx(np.full(channels, 1 / channels))
    expected = channels * (1 - (1 - 1 / channels) ** draws)
    assert distinct(p, draws) == math.ceil(expected - 1e-9)
    for count in range(1, channels):
        closed = math.ceil(math.log(channels / (channels - count)) / math.log(channels / (channels - 1)) - 1e-9)
        assert least_draws(p, count) == max(1, closed)


def test_the_least_number_of_draws_is_the_least() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = probabilities_of(rng.random(8) ** 4 + 1e-3)
        for count in range(1, 8):
            draws = least_draws(p, count)
            expected = [float((1 - (1 - p) ** m).sum()) for m in (draws - 1, draws)]
            assert expected[0] < count - 1e-9 <= expected[1]


def test_numbers_never_grow_with_the_error_and_reach_all_and_one() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.random(30), rng.random(5) ** 8, np.zeros(4), np.r_[rng.random(3), np.zeros(6)]]
    weights = [max(each.sum(), 1e-300) * log_factor(10, 9, 1e-16) for each in scores]
    allocation = OneError([probabilities_of(each) for each in scores], weights)
    grid = np.linspace(allocation.low, allocation.high, 3000)
    counts = np.array([allocation.counts(at) for at in grid])
    assert (np.diff(counts, axis=0) <= 0).all()
    assert counts[0].tolist() == [30, 5, 4, 9]
    assert counts[-1].tolist() == [1, 1, 1, 1]
    # As long as all that fire are not there, none that never fires is.
    assert not ((counts[:, 3] > 3) & (counts[:, 0] < 30)).any()


def test_the_number_of_draws_is_the_formula() -> None:
    assert draws_for(0.5, 7.0) == math.ceil(3 * (6 + 2 * 0.5) * 7.0 / 0.5**2)
    assert draws_for(1e9, 1e-3) == 1
    assert log_factor(4, 9, 1e-16) == pytest.approx(2 * 3 * math.log(8 * 5 * 9 / 1e-16))


def test_a_search_ends_as_near_to_the_target_as_single_channels_allow() -> None:
    costs = [7, 7, 50]
    allocation = OneRatio([20, 20, 10])

    def size(counts: object) -> int:
        return int(np.dot(counts, costs))  # type: ignore[call-overload]

    for target in range(64, 780, 5):
        at, counts = search(size, allocation, [20, 20, 10], target)
        # Ratios alone step by both small groups at once, and no ratio adds a channel of one group only.
        grid = [allocation.counts(k / 400) for k in range(401)]
        assert abs(size(counts) - target) <= min(abs(size(each) - target) for each in grid)
        assert np.abs(np.subtract(counts, allocation.counts(at))).max() <= 1
    # Half of each group, and one of the others: no ratio does that.
    assert search(size, allocation, [20, 20, 10], size([10, 10, 5]) + 7)[1] in ([11, 10, 5], [10, 11, 5])
    assert search(size, allocation, [20, 20, 10], 5000)[1] == [20, 20, 10]
    assert search(size, allocation, [20, 20, 10], 1)[1] == [1, 1, 1]


@pytest.mark.parametrize("method", ["pfp-random", "pfp-top"])
def test_factors_have_a_mean_of_one(method: str) -> None:
    scores = np.array([0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02])
    draws = [choose(scores, 4, method, np.random.default_rng(seed)) for seed in range(4000)]  # type: ignore[arg-type]
    factors = np.array([each.factors for each in draws])
    error = factors.std(0) / math.sqrt(len(draws))
    assert (np.abs(factors.mean(0) - 1) <= 4.5 * error + 1e-12).all()
    kept = np.array([each.kept for each in draws])
    assert ((factors > 0) == kept).all()
    # Rounded up to a whole number of draws, more channels are expected than asked for, but not one more.
    assert 4 - 0.05 < kept.sum(1).mean() < 5
    if method == "pfp-top":
        p = scores / scores.sum()
        certain = p >= 1 / least_draws(p, 4)
        assert 0 < certain.sum() < 4
        assert (factors[:, certain] == 1).all()
        assert not kept[:, ~certain].all(0).any()


def test_equal_channels_are_drawn_equally_often() -> None:
    draws = [choose(np.ones(6), 3, "pfp-random", np.random.default_rng(seed)).kept for seed in range(3000)]
    share = np.mean(draws, axis=0)
    assert share == pytest.approx(np.full(6, share.mean()), abs=4.5 * math.sqrt(0.25 / 3000))


@pytest.mark.parametrize("method", ["pfp", "pfp-random", "pfp-top"])
def test_none_is_drawn_where_all_that_fire_are_to_be_kept(method: str) -> None:
    choice = choose(np.array([0.0, 0.4, 0.0, 0.1]), 3, method, np.random.default_rng(0))  # type: ignore[arg-type]
    assert choice.kept.tolist() == [True, True, False, True]
    assert choice.factors.tolist() == [1, 1, 0, 1]
    assert choice.draws is None


def failures(values: Floats, p: Floats, draws: int, epsilon: float, times: int = 10_000) -> Floats:
    """How often estimates of the sums of some rows of values are off by ε of the sum, as a share."""
    counts = np.random.default_rng(0).multinomial(draws, p, size=times)
    estimates = (counts / (draws * p)) @ values.T
    return np.asarray((np.abs(estimates - values.sum(1)) >= epsilon * values.sum(1)).mean(0))


@pytest.mark.parametrize("epsilon", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("failure", [0.2, 0.02])
@pytest.mark.parametrize("name", ["linear", "flattened", "conv"])
def test_with_enough_draws_no_sum_is_off_more_often_than_is_allowed(name: str, failure: float, epsilon: float) -> None:
    layer, x = reader(name)
    x = x.abs()
    s = found_by(layer, x, part="share").result()
    draws = enough_draws(float(s.sum()), epsilon, failure)
    signed = terms(layer, x).sum(4)
    weights = terms(layer, x)
    for sign in (1, -1):
        values = np.maximum(sign * weights, 0).sum(4).reshape(-1, signed.shape[3])
        values = values[values.sum(1) > 1e-6]
        assert (values <= s * values.sum(1, keepdims=True) * (1 + 1e-5)).all()
        assert failures(values, s / s.sum(), draws, epsilon).max() <= failure


def test_a_quarter_of_the_draws_is_not_enough() -> None:
    """Ten channels, each of which is all of one sum."""
    s, values = np.ones(10), np.eye(10)
    draws = enough_draws(10.0, 0.5, 0.02)
    assert failures(values, s / 10, draws, 0.5).max() <= 0.02
    assert failures(values, s / 10, draws // 4, 0.5).max() > 0.02


def test_the_largest_element_is_not_enough_for_the_bound() -> None:
    """Sixteen equal elements per channel, in one channel the whole sum: sixteen times too few draws."""
    values = np.array([[1.0, *[0.0] * 15]])
    share, element = np.array([1.0, *[1e-3] * 15]), np.array([1 / 16, *[1e-3] * 15])
    epsilon, failure = 0.3, 0.02
    for s, holds in ((share, True), (element, False)):
        draws = enough_draws(float(s.sum()), epsilon, failure)
        # Other sums draw the probabilities of the other channels up to what sensitivities say.
        assert (failures(values, s / s.sum(), draws, epsilon).max() <= failure) == holds


def test_the_error_that_is_proven_is_that_for_which_draws_are_enough() -> None:
    for total, epsilon, failure in itertools.product([0.5, 8.0], [0.1, 1.0, 5.0], [0.1, 1e-12]):
        draws = enough_draws(total, epsilon, failure)
        assert proven_error(draws, total, failure) <= epsilon * (1 + 1e-9)
        assert draws == 1 or proven_error(draws - 1, total, failure) > epsilon


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 0.5, 0.1), ValueError, r"total must be positive and finite, got 0\.0"),
        ((1.0, -1, 0.1), ValueError, r"epsilon must be positive and finite, got -1"),
        ((1.0, 0.5, 1.0), ValueError, r"failure must be positive and below 1, got 1\.0"),
        ((1.0, 0.5, float("nan")), ValueError, r"failure must be positive and below 1, got nan"),
        ((1.0, "0.5", 0.1), TypeError, r"epsilon must be a number, got '0\.5'"),
    ],
)
def test_bad_numbers_are_named(arguments: tuple[float, float, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        enough_draws(*arguments)
