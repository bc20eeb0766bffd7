"""Masked weights that are shrunk by the prices of their masks: which prices, that they are continuous, and training."""

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import Sparsifier, finalize, sparse_state_dict
from masksolve.torch._training.masking import MaskedWeight, masked_parameter
from masksolve.torch._training.prices import prices, thresholds
from tests.tables import Pair, name_of, spread, weights_of
from tests.torch.masked import held

PATTERNS = [(2, 4), (1, 4), (3, 4), (2, 5), (3, 8), (4, 8)]
FAMILIES = ["gaussian float32", "int8", "half zero", "constant", "student-t", "tenths"]


def tiles_of(family: str, count: int, m: int) -> Tensor:
    array = weights_of(family, (count, m, m)).astype(np.float64)
    return torch.from_numpy(array / max(1.0, float(np.abs(array).max())))


def masks_of(tiles: Tensor, n: int) -> Tensor:
    return torch.from_numpy(ms.solve_blocks(tiles.numpy(), n, tiles.shape[-1]))


def prices_of(tiles: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Of tiles (count, m, m): (count, m) each."""
    u, v = prices(*(each.permute(1, 2, 0).contiguous() for each in (tiles.abs(), masks)))
    return u.t(), v.t()


def sums_of(tiles: Tensor, masks: Tensor) -> Tensor:
    u, v = prices_of(tiles, masks)
    return u[:, :, None] + v[:, None]


def soft(tiles: Tensor, n: int) -> Tensor:
    m = tiles.shape[-1]
    shrunk = tiles.abs() - thresholds(tiles, masks_of(tiles, n), ms.Pattern(n, m))
    return tiles.sign() * shrunk.clamp(min=0)


def oracle_of_sums(tile: Tensor, mask: Tensor) -> list[list[float]]:
    """The mean over all anchors of the cheapest prices, by following every inequality until nothing changes."""
    m = len(tile)
    sizes = [[abs(Fraction(each)) for each in row] for row in tile.tolist()]
    # y[q] <= y[p] + bound, for the rows' prices and the columns' with the other sign.
    bounds = [(m + j, i, sizes[i][j]) if mask[i, j] else (i, m + j, -sizes[i][j]) for i in range(m) for j in range(m)]

    def highest(anchor: int, arcs: list[tuple[int, int, Fraction]]) -> list[Fraction]:
        found: dict[int, Fraction] = {anchor: Fraction()}
        for _ in range(2 * m):
            for p, q, bound in arcs:
                if p in found and (q not in found or found[q] > found[p] + bound):
                    found[q] = found[p] + bound
        return [found[node] for node in range(2 * m)]

    backwards = [(q, p, bound) for p, q, bound in bounds]
    solutions = [highest(row, bounds) for row in range(m)]
    solutions += [[-each for each in highest(m + column, backwards)] for column in range(m)]
    for solution in solutions:
        assert all(solution[q] <= solution[p] + bound for p, q, bound in bounds)
    return [[float(sum(y[i] - y[m + j] for y in solutions) / len(solutions)) for j in range(m)] for i in range(m)]


@pytest.mark.parametrize(("pattern", "family"), spread(PATTERNS, FAMILIES, one_in=3))
def test_prices_are_the_mean_of_the_cheapest_ones_of_every_row_and_column(pattern: Pair, family: str) -> None:
    n, m = pattern
    tiles = tiles_of(family, 3, m)
    masks = masks_of(tiles, n)
    for tile, mask, found in zip(tiles, masks, sums_of(tiles, masks), strict=True):
        torch.testing.assert_close(found, torch.tensor(oracle_of_sums(tile, mask), dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=map(name_of, PATTERNS))
def test_sums_of_prices_are_at_most_what_is_kept_and_at_least_what_is_not(n: int, m: int, family: str) -> None:
    tiles = tiles_of(family, 50, m)
    masks = masks_of(tiles, n)
    margin = tiles.abs() - sums_of(tiles, masks)
    assert float(margin[masks].min()) >= -1e-12
    assert float(margin[~masks].max()) <= 1e-12
    value = soft(tiles, n)
    assert float(value[~masks].abs().max()) <= 1e-12
    assert bool((value.abs() <= tiles.abs()).all())
    assert bool((value * tiles >= 0).all())


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=map(name_of, PATTERNS))
def test_prices_do_not_depend_on_which_optimal_mask_is_given(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(-2, 3, (40, m, m), generator=generator).double()
    masks = masks_of(tiles, n)
    others = 0
    for _ in range(4):
        rows, columns = torch.randperm(m, generator=generator), torch.randperm(m, generator=generator)
        moved = tiles[:, rows][:, :, columns]
        other = masks_of(moved, n)[:, rows.argsort()][:, :, columns.argsort()]
        others += int((other != masks).any())
        torch.testing.assert_close(sums_of(tiles, other), sums_of(tiles, masks), rtol=0, atol=1e-12)
    assert others


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=map(name_of, PATTERNS))
def test_prices_follow_permutations_transposition_and_scale(n: int, m: int) -> None:
    tiles = tiles_of("gaussian float32", 20, m)
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(m, generator=generator)
    found = sums_of(tiles, masks_of(tiles, n))
    for move in (lambda each: each[:, rows][:, :, columns], lambda each: each.mT.contiguous(), lambda each: 8 * each):
        torch.testing.assert_close(sums_of(move(tiles), masks_of(move(tiles), n)), move(found))


def jumps(path: Callable[[float], Tensor], n: int, steps: int) -> tuple[float, float, int]:
    """The largest jump of the soft weights along a path, that of the masked ones, and how many masks change."""
    largest, of_masked, changes = 0.0, 0.0, 0
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for step in range(steps + 1):
        tiles = path(step / steps)
        masks = masks_of(tiles, n)
        now = soft(tiles, n), tiles * masks, masks
        if before is not None:
            largest = max(largest, float((now[0] - before[0]).abs().max()))
            of_masked = max(of_masked, float((now[1] - before[1]).abs().max()))
            changes += int((now[2] != before[2]).flatten(1).any(1).sum())
        before = now
    return largest, of_masked, changes


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (4, 8)], ids=str)
def test_along_a_path_of_weights_jumps_shrink_with_the_steps_as_those_of_masked_weights_do_not(
    n: int, m: int, ties: bool
) -> None:
    """Through changes of masks, and of signs, and from many equal weights to many others."""
    generator = torch.Generator().manual_seed(m)
    ends = torch.randn(2, 30, m, m, generator=generator, dtype=torch.float64)
    if ties:
        ends = (2 * ends).round() / 2

    def path(share: float) -> Tensor:
        return (1 - share) * ends[0] + share * ends[1]

    coarse, of_masked, changes = jumps(path, n, 40)
    fine, of_masked_in_small_steps, _ = jumps(path, n, 200)
    assert changes > 20
    assert fine < coarse / 3
    assert of_masked_in_small_steps > of_masked / 3
    # Never faster than a few times the fastest weight.
    assert fine * 200 < 8 * float((ends[1] - ends[0]).abs().max())


def test_prices_may_be_negative_and_then_nothing_is_shrunk_nor_grows() -> None:
    """The last row has to keep one of its zeros, at whatever price."""
    tile = torch.tensor([[[3.0, 3.0, 0.0], [3.0, 3.0, 0.0], [1.0, 1.0, 0.01]]], dtype=torch.float64)
    masks = masks_of(tile, 2)
    assert float(sums_of(tile, masks)[0].min()) < 0
    for sign in (1, -1):
        tile[0, 2, 2] = sign * 0.01
        value = soft(tile, 2)[0, 2, 2]
        assert abs(float(value)) <= 0.01


def masked(layer: nn.Module) -> MaskedWeight:
    found = masked_parameter(layer, "weight")
    assert found is not None
    return found.masked


def expected_of(layer: nn.Module, n: int, m: int, scale: float) -> Tensor:
    weight = held(layer)[0].detach()
    matrices = weight.movedim((0, 1), (-2, -1)).double()
    masks = torch.from_numpy(ms.solve_matrix(matrices.float().numpy(), n, m))
    shrunk = (matrices.abs() - thresholds(matrices, masks, ms.Pattern(n, m))).clamp(min=0) * masks
    return (scale * matrices.sign() * shrunk).movedim((-2, -1), (0, 1)).to(weight.dtype)


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(16, 24), lambda: nn.Conv2d(16, 8, 3).to(memory_format=torch.channels_last)]
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8)], ids=str)
def test_the_masked_weight_is_the_soft_one_times_a_scale_that_is_chosen_once(
    n: int, m: int, make: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    layer = make()
    sparsifier = Sparsifier(layer, (n, m), gradient="soft", refresh_every=1)
    dense = held(layer)[0].detach()
    left = expected_of(layer, n, m, 1)
    scale = float((dense * left).sum() / left.square().sum())
    assert scale > 1
    torch.testing.assert_close(layer.weight, expected_of(layer, n, m, scale))
    with torch.no_grad():
        held(layer)[0].mul_(3).add_(torch.randn_like(dense))
    sparsifier.refresh()
    torch.testing.assert_close(layer.weight, expected_of(layer, n, m, scale), rtol=1e-4, atol=1e-5)
    assert bool((layer.weight[~held(layer)[1]] == 0).all())


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 8, dtype=dtype))


def trained(model: nn.Sequential, sparsifier: Sparsifier, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in steps:
        inputs = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).to(model[0].bias.dtype)
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_training_learns_and_finalize_writes_what_it_trained_with(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    sparsifier = Sparsifier(model, "2:4", gradient="soft", refresh_every=1)
    losses = trained(model, sparsifier, range(40))
    assert sum(losses[-5:]) < sum(losses[:5])
    inputs = torch.randn(4, 16).to(dtype)
    output, copied, saved = model(inputs), copy.deepcopy(model), sparse_state_dict(model)
    sparsifier.finalize()
    finalize(copied)
    for each in (model, copied):
        assert torch.equal(each(inputs), output)
        assert list(each.state_dict()) == list(mlp().state_dict())
        assert ms.is_valid_mask((each[0].weight != 0).numpy(), 2, 4)
        assert all(torch.equal(value, saved[name]) for name, value in each.state_dict().items())


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_state_dict_resumes_bit_for_bit(is_sparse: bool) -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "4:8", gradient="soft", refresh_every=3)
    trained(model, sparsifier, range(4))
    weights = sparse_state_dict(model) if is_sparse else model.state_dict()
    state = copy.deepcopy((weights, sparsifier.state_dict(pruned=is_sparse)))
    assert ("0.weight_mask_factor" in state[0]) is not is_sparse
    expected = trained(model, sparsifier, range(4, 9))
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    resumed = Sparsifier(other, "4:8", gradient="soft", refresh_every=3)
    other.load_state_dict(state[0], strict=not is_sparse)
    resumed.load_state_dict(state[1])
    assert trained(other, resumed, range(4, 9)) == expected


def test_the_gradient_passes_straight_through() -> None:
    model = nn.Linear(8, 8, bias=False)
    Sparsifier(model, "1:4", gradient="soft")
    model(torch.ones(1, 8)).sum().backward()
    assert torch.equal(held(model)[0].grad, torch.ones(8, 8))


@pytest.mark.parametrize(("pattern", "factor"), [("4:4", 1.0), ("0:4", 0.0)])
def test_masks_that_keep_all_or_nothing_shrink_nothing(pattern: str, factor: float) -> None:
    model = nn.Linear(8, 8)
    Sparsifier(model, pattern, gradient="soft")
    torch.testing.assert_close(model.weight, factor * held(model)[0])


def test_weights_that_are_all_zero_or_alike_have_finite_values() -> None:
    for value in (0.0, 0.5):
        model = nn.Linear(8, 8)
        nn.init.constant_(model.weight, value)
        sparsifier = Sparsifier(model, "2:4", gradient="soft")
        assert bool((model.weight == 0).all())
        assert masked(model).mask.sum() == 32
        sparsifier.refresh()
        assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"until": 5}, "until=5"),
        ({"hysteresis": 0.1}, "hysteresis=0.1"),
        ({"masks": {}, "refresh_every": None}, r"masks=\{\}"),
        ({"sparsity_schedule": len}, "sparsity_schedule=<built-in"),
        ({"method": "greedy"}, "method='greedy'"),
        ({"direction": "rows"}, "direction='rows'"),
        ({"saturated": False}, "saturated=False"),
        ({"importance": lambda name, parameter: parameter.abs()}, "importance=<function"),
    ],
)
def test_what_has_no_prices_is_refused(options: dict[str, Any], words: str) -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=f"gradient='soft' .* does not go with {words}"):
        Sparsifier(model, "2:4", gradient="soft", **options)
    assert type(model) is nn.Linear


def test_partial_tiles_a_dense_end_and_states_without_factors_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(
        ValueError, match=r"whole tiles, and '1.weight' is 10x8, not a multiple of 4 both ways; exclude"
    ):
        Sparsifier(model, "2:4", gradient="soft")
    assert type(model[0]) is nn.Linear
    sparsifier = Sparsifier(model, "2:4", gradient="soft", ragged="skip")
    with pytest.raises(ValueError, match="does not go with until=3"):
        sparsifier.until = 3
    with pytest.raises(ValueError, match=r"does not go with hysteresis=0\.1"):
        sparsifier.hysteresis = 0.1
    state = sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"no factor of shape \(8, 8\) for '0.weight', which gradient='soft' needs"):
        sparsifier.load_state_dict({**state, "soft": {}})
