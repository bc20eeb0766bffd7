"""Values made N:M at random: unbiased, and of the least variance, both in exact rationals; and products with them."""

import copy
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from masksolve.torch import Sparsifier, minimum_variance_unbiased
from masksolve.torch._solver.device import triton_module
from masksolve.torch._training.unbiased import BITS, thin_groups
from tests import processes
from tests.tables import PATTERNS, Pair, name_of, spread
from tests.torch.masked import held

Group = Sequence[int | float]
GRID = 1 << BITS
# Groups of 4 of each of the three cases of the closed form of 2:4, and some that are none.
CASES = {"all alike": (2, 3, 4, 5), "the largest much larger": (1, 5, 7, 9), "the largest prevails": (1, 2, 3, 10)}
GROUPS: list[tuple[Group, int]] = [
    *((group, n) for group in CASES.values() for n in (1, 2, 3, 4)),
    ((1, 1, 1, 1), 2),
    ((-1, 2, -3, 4), 2),
    ((0, 2, 0, -3), 2),
    ((0, 0, 5, 0), 2),
    ((0, 0, 0, 0), 1),
    ((7, 0, 1, 1, 0), 2),
    ((100, 50, 1, 1, 1, 1, 1, 1), 3),
    ((1, 2, 3, 4, 5, 6, 7, 8), 4),
    ((0.125, -90, 3, 1, 1, 2**-20, 0, 4, 4, 4, 4, 0.5, -2), 7),
]


def probabilities(group: Group, n: int) -> list[Fraction]:
    """The probability with which each entry is kept: a / t, at most 1, for the t at which they sum to n."""
    sizes = [abs(Fraction(each)) for each in group]
    certain = {k for k, size in enumerate(sizes) if size} if sum(size > 0 for size in sizes) <= n else set[int]()
    while True:
        rest = sum((size for k, size in enumerate(sizes) if k not in certain), Fraction())
        found = [
            Fraction(1) if k in certain else size * (n - len(certain)) / rest if rest else Fraction()
            for k, size in enumerate(sizes)
        ]
        too_many = {k for k, each in enumerate(found) if each >= 1}
        if too_many <= certain:
            return found
        certain |= too_many


def variance(group: Group, chances: Sequence[Fraction]) -> Fraction:
    """The sum of the variances of entries that are kept with these probabilities, and are right in the mean."""
    parts = [Fraction(each) ** 2 * (1 / chance - 1) for each, chance in zip(group, chances, strict=True) if each]
    return sum(parts, Fraction())


def thin(group: Group, n: int, uniform: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """What each number makes of the group: (numbers, m)."""
    values = torch.tensor(group, dtype=dtype)[None, :, None].expand(1, len(group), len(uniform))
    found = torch.empty_like(values, memory_format=torch.contiguous_format)
    thin_groups(values, torch.tensor([uniform]), found, n)
    return found[0].t()


def outcomes(group: Group, n: int, dtype: torch.dtype = torch.float32) -> list[tuple[Fraction, list[Fraction]]]:
    """Every outcome and its probability, exactly: those of all numbers that may be drawn.

    Entries are kept by an interval of numbers each, so that a number between two that give the same gives that too.
    The ends lie next to those of the probabilities, laid end to end.
    """
    grid = GRID if dtype != torch.float64 else 1 << 52
    chances = probabilities(group, n)
    ends = [int(sum(each for each in chances[:k] if each < 1) * grid) % grid for k in range(len(group) + 1)]
    around = {(end + shift) % grid for end in ends for shift in range(-2 * len(group), 2 * len(group) + 1)}
    numbers = sorted(around | {0, grid - 1})
    found = thin(group, n, numbers, dtype).tolist()
    pieces: list[tuple[Fraction, list[Fraction]]] = []
    for (number, values), (after, following) in itertools.pairwise(zip(numbers, found, strict=True)):
        assert after == number + 1 or values == following
        pieces.append((Fraction(after - number, grid), [Fraction(each) for each in values]))
    return [*pieces, (Fraction(1, grid), [Fraction(each) for each in found[-1]])]


def mean(pieces: list[tuple[Fraction, list[Fraction]]]) -> list[Fraction]:
    found = [Fraction()] * len(pieces[0][1])
    for share, values in pieces:
        found = [total + share * value for total, value in zip(found, values, strict=True)]
    return found


def threshold(group: Group, n: int) -> Fraction:
    found = [abs(Fraction(each)) / chance for each, chance in zip(group, probabilities(group, n), strict=True) if each]
    return max(found, default=Fraction())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("group", "n"), GROUPS, ids=str)
def test_the_mean_over_the_number_drawn_is_the_group_exactly_but_for_the_grid(
    group: Group, n: int, dtype: torch.dtype
) -> None:
    pieces = outcomes(group, n, dtype)
    assert sum(share for share, _ in pieces) == 1
    allowed = threshold(group, n) / (1 << (BITS if dtype == torch.float32 else 49)) * 2 * n
    for found, value in zip(mean(pieces), group, strict=True):
        assert abs(found - Fraction(value)) <= allowed


@pytest.mark.parametrize(("group", "n"), GROUPS, ids=str)
def test_the_variance_is_the_least(group: Group, n: int) -> None:
    pieces = outcomes(group, n)
    found = Fraction()
    for share, values in pieces:
        found += share * sum((value - Fraction(each)) ** 2 for value, each in zip(values, group, strict=True))
    least = variance(group, probabilities(group, n))
    assert float(found) == pytest.approx(float(least), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("group", "n"), GROUPS, ids=str)
def test_no_other_probabilities_have_a_smaller_variance(group: Group, n: int) -> None:
    """Those of the oracle satisfy the conditions of Karush, Kuhn and Tucker for a problem that is convex."""
    chances = probabilities(group, n)
    assert sum(chances) == min(n, sum(each != 0 for each in group))
    # The variance falls by a²/p² for each bit more of p: alike where p can move both ways, more where it is 1.
    falls = [Fraction(each) ** 2 / chance**2 for each, chance in zip(group, chances, strict=True) if 0 < chance < 1]
    assert len(set(falls)) <= 1
    certain = [Fraction(each) ** 2 for each, chance in zip(group, chances, strict=True) if chance == 1]
    assert not falls or all(each >= falls[0] for each in certain)
    for step in (Fraction(1, 100), Fraction(1, 7)):
        for more, less in itertools.permutations(range(len(group)), 2):
            other = list(chances)
            other[more] += step
            other[less] -= step
            if other[more] <= 1 and other[less] > 0:
                assert variance(group, other) >= variance(group, chances)


def pairs_of_the_closed_form(sizes: Sequence[Fraction], published: bool) -> dict[tuple[int, int], Fraction]:
    """The pairs of 2:4 and their probabilities, for sizes in order; as published, or right."""
    a, b, c, d = sizes
    total = a + b + c + d
    if 2 * a + c > d:
        pairs = {(0, 2): 2 * a + c - d, (0, 3): 2 * a - c + d, (1, 2): 2 * b + c - d, (1, 3): 2 * b - c + d}
        found = {pair: each / (2 * total) for pair, each in pairs.items()}
        return found | {(2, 3): (c + d - a - b) / total}
    if d < a + b + c:
        return {
            (0, 3): 2 * a / total,
            (1, 2): (a + b + c - d) / total,
            (1, 3): (b + d - a - c) / (total * (2 if published else 1)),
            (2, 3): (c + d - a - b) / total,
        }
    return {(k, 3): sizes[k] / (a + b + c) for k in range(3)}


def mean_of_the_closed_form(sizes: Sequence[Fraction], published: bool) -> list[Fraction]:
    pairs = pairs_of_the_closed_form(sizes, published)
    # Drawing by weights that do not sum to 1 divides them by their sum, and nobody notices.
    whole = sum(pairs.values())
    half = sum(sizes) / 2
    largest_stays = sizes[3] >= sum(sizes[:3]) and not published
    values = [sum(sizes[:3])] * 3 + [sizes[3]] if largest_stays else [half] * 4
    chances = [sum((chance for pair, chance in pairs.items() if k in pair), Fraction()) / whole for k in range(4)]
    return [chance * value for chance, value in zip(chances, values, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_the_published_closed_form_of_2_4_is_biased_in_two_of_its_three_cases(case: str) -> None:
    sizes = [Fraction(each) for each in CASES[case]]
    assert mean_of_the_closed_form(sizes, published=False) == sizes
    published = mean_of_the_closed_form(sizes, published=True)
    assert (published == sizes) == (case == "all alike")
    if case == "the largest much larger":
        assert sum(pairs_of_the_closed_form(sizes, published=True).values()) == Fraction(19, 22)


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_of_2_4_keeps_each_entry_as_often(case: str) -> None:
    sizes = [Fraction(each) for each in CASES[case]]
    pairs = pairs_of_the_closed_form(sizes, published=False)
    assert probabilities(CASES[case], 2) == [
        sum(chance for pair, chance in pairs.items() if k in pair) for k in range(4)
    ]


def test_two_draws_without_replacement_have_a_larger_variance() -> None:
    """The estimate of 2:4 that published kernels compute."""
    for group in CASES.values():
        sizes = [Fraction(each) for each in group]
        total = sum(sizes)
        chances = [
            each / total + each * sum(other / (total * (total - other)) for j, other in enumerate(sizes) if j != k)
            for k, each in enumerate(sizes)
        ]
        assert sum(chances) == 2
        assert variance(group, chances) > variance(group, probabilities(group, 2))


@pytest.mark.parametrize(("n", "m"), [each for each in PATTERNS if each[0] > 0], ids=map(name_of, PATTERNS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_exactly_n_are_kept_unless_fewer_are_not_zero(n: int, m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 3 * m).to(dtype)
    values[::2] *= torch.rand(20, 3 * m) < 0.4
    found = minimum_variance_unbiased(values, (n, m))
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    kept, given = (each.unflatten(1, (3, m)) != 0 for each in (found, values))
    assert not bool((kept & ~given).any())
    assert torch.equal(kept.sum(2), given.sum(2).clamp(max=n))
    few = (given.sum(2) <= n)[..., None].expand(given.shape).flatten(1)
    assert torch.equal(found[few], values[few])
    assert torch.equal(found.sign() * (found != 0), values.sign() * (found != 0))


@pytest.mark.parametrize(("group", "n"), GROUPS, ids=str)
def test_a_permutation_of_the_group_permutes_how_often_entries_are_kept(group: Group, n: int) -> None:
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(3)).tolist()
    moved = mean(outcomes([group[k] for k in order], n))
    assert [float(each) for each in moved] == pytest.approx(
        [float(group[k]) for k in order], rel=1e-6, abs=4e-6 * float(threshold(group, n)) + 1e-30
    )


def test_float16_that_underflows_when_it_is_summed_or_squared_is_kept_in_the_mean() -> None:
    least = 2.0**-24
    for group, n in [((least, 2 * least, 3 * least, 6 * least), 2), ((least, least, 0, least), 1)]:
        pieces = outcomes(group, n, torch.float16)
        for found, value in zip(mean(pieces), group, strict=True):
            # What is kept is rounded to the dtype, half of its least number at most.
            assert abs(found - Fraction(value)) <= Fraction(least) / 2
        assert all(sum(value != 0 for value in values) == n for _, values in pieces)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_a_group_that_is_not_finite_is_not_finite_after(bad: float, place: int) -> None:
    """So that a GradScaler sees it, wherever it is and whatever is drawn."""
    values = torch.ones(64, 8)
    values[:, place] = bad
    found = minimum_variance_unbiased(values, "2:4")
    assert bool(found[:, :4].isnan().any(1).all())
    assert bool(((found[:, :4] != 0).sum(1) <= 2).all())
    assert bool(found[:, 4:].isfinite().all())


def test_what_overflows_is_not_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert bool(minimum_variance_unbiased(torch.full((4,), largest), "2:4").isnan().any())
    found = minimum_variance_unbiased(torch.full((9, 4), 60000, dtype=torch.float16), "1:4")
    assert bool(found.isinf().any(1).all())


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_groups_lie_along_any_axis_and_the_last_one_may_be_partial(dim: int) -> None:
    values = torch.randn(7, 10, 13, generator=torch.Generator().manual_seed(0)).transpose(0, 2)
    found = minimum_variance_unbiased(values, "2:5", dim=dim)
    assert found.shape == values.shape
    along, given = found.movedim(dim, 0), values.movedim(dim, 0)
    for start in range(0, len(along), 5):
        part = along[start : start + 5]
        assert bool(((part != 0).sum(0) == min(2, len(part))).all())
        if len(part) <= 2:
            assert torch.equal(part, given[start : start + 5])


def test_shapes_that_hold_nothing_or_one_value() -> None:
    assert minimum_variance_unbiased(torch.ones(0, 4), "2:4").shape == (0, 4)
    assert minimum_variance_unbiased(torch.ones(3, 0), "2:4").shape == (3, 0)
    assert minimum_variance_unbiased(torch.ones(1), "1:4").tolist() == [1]


def test_a_seed_says_what_is_drawn() -> None:
    values = torch.randn(64, 64)

    def draw(seed: int, generator: bool) -> Tensor:
        if generator:
            return minimum_variance_unbiased(values, "2:4", generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        return minimum_variance_unbiased(values, "2:4")

    for generator in (False, True):
        assert torch.equal(draw(5, generator), draw(5, generator))
        assert not torch.equal(draw(5, generator), draw(6, generator))
    before = values.clone()
    draw(5, False)
    assert torch.equal(values, before)


def test_the_gradient_passes_straight_through() -> None:
    values = torch.randn(8, 8, requires_grad=True)
    weights = torch.randn(8, 8)
    (minimum_variance_unbiased(values, "2:4") * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights)


@pytest.mark.parametrize(
    ("values", "options", "error", "words"),
    [
        (torch.ones(4), {"pattern": "0:4"}, ValueError, "pattern='0:4' keeps nothing"),
        (torch.ones(4), {"pattern": "5:4"}, ValueError, "n must lie between 0 and m=4, got n=5"),
        (torch.ones(4), {"pattern": "2-4"}, ValueError, "got '2-4'"),
        (torch.ones(4), {"pattern": "2:4", "dim": 1}, ValueError, r"shape \(4,\) have no dim=1"),
        (torch.tensor(1.0), {"pattern": "2:4"}, ValueError, r"shape \(\) have no dim=-1"),
        (torch.ones(4, dtype=torch.int64), {"pattern": "2:4"}, TypeError, "values have dtype torch.int64; allowed"),
        ([1.0, 2.0], {"pattern": "2:4"}, TypeError, r"values must be a torch\.Tensor, got list"),
        (torch.ones(4), {"pattern": "2:4", "generator": 3}, TypeError, r"generator must be a torch\.Generator, got 3"),
    ],
)
def test_what_cannot_be_thinned_is_refused(
    values: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        minimum_variance_unbiased(values, **options)


KERNEL = triton_module("masksolve.torch._training.unbiased_kernel") if triton_module() else None
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="Triton is not installed, or too old")
KERNEL_PATTERNS = [(1, 1), (1, 2), (1, 4), (2, 4), (3, 4), (2, 5), (3, 8), (4, 8), (7, 13), (8, 16), (16, 32)]


@needs_kernel
# NumPy, in the interpreter, says aloud what a GPU does silently.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        # NumPy takes seconds to run the kernel for large groups.
        pytest.param(*case.values, marks=pytest.mark.slow if case.values[0][1] > 8 else case.marks, id=case.id)
        for case in spread(KERNEL_PATTERNS, [torch.float16, torch.bfloat16, torch.float32], one_in=3)
    ],
)
def test_the_kernel_computes_the_same_bits_from_the_same_numbers(pattern: Pair, dtype: torch.dtype) -> None:
    n, m = pattern
    generator = torch.Generator().manual_seed(m)
    values = torch.randn(2, m, 130, generator=generator)
    # All of one kind in a group: zeros, small integers, many magnitudes, what is not finite.
    values[0, :, ::2] = values[0, :, ::2].round()
    values[0, :, 0] = 0
    values[1] *= torch.randint(-24, 14, (m, 130), generator=generator).float().exp2()
    values[1, 0, 0], values[1, m - 1, 129] = math.inf, math.nan
    values = values.to(dtype)
    uniform = torch.randint(GRID, (2, 130), generator=generator, dtype=torch.int32)
    expected, found = torch.empty_like(values), torch.empty(2 * m, 130)
    thin_groups(values, uniform, expected, n)
    assert KERNEL is not None
    # In float32, as the interpreter rounds to bfloat16 towards zero.
    rows = values.flatten(0, 1)
    KERNEL.thin(rows.t().contiguous().t() if dtype == torch.float16 else rows, uniform, found, n, m)
    torch.testing.assert_close(found.to(dtype).view_as(values), expected, rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_without_inexact_arithmetic() -> None:
    script = """
import torch
from benchmarks.gpu.offline import recorded_launches
from masksolve.torch._training.unbiased_kernel import thin

with recorded_launches() as kernels:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rows = torch.zeros(64, 128, dtype=dtype)
        thin(rows, torch.zeros(16, 128, dtype=torch.int32), torch.empty_like(rows), 2, 4)
for kernel in kernels:
    ptx = kernel.asm["ptx"]
    print("div.rn.f32" in ptx, ".ftz" in ptx, "fma." in ptx, "div.full" in ptx)
"""
    assert processes.run(script, TRITON_INTERPRET="0").splitlines() == ["True False False False"] * 3


def layer(pattern: str = "2:4", **options: object) -> tuple[nn.Sequential, Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    return model, Sparsifier(model, pattern, **options)  # type: ignore[arg-type]


def backward(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    inputs.grad = None
    model(inputs).square().sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert inputs.grad is not None
    return {**found, "inputs": inputs.grad.clone()}


@pytest.mark.parametrize(("thin", "gradient"), spread(["2:4", "3:8", "1:2"], ["ste", "sr-ste", "masked"], one_in=3))
def test_the_mean_gradient_of_the_weights_is_the_dense_one_and_all_others_are_exact(thin: str, gradient: str) -> None:
    inputs = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact = backward(layer(gradient=gradient)[0], inputs)
    model, _ = layer(gradient=gradient, gradient_sparsity=thin)
    count = 200
    draws = [backward(model, inputs) for _ in range(count)]
    for name, expected in exact.items():
        found = torch.stack([each[name] for each in draws])
        if not name.endswith("weight"):
            torch.testing.assert_close(found, expected.expand_as(found))
            continue
        deviation = found.std(0)
        assert float(deviation.max()) > 0
        errors = (found.mean(0) - expected).abs()
        assert bool((errors <= 4.5 * deviation / count**0.5 + 1e-5).all())


def test_the_gradient_of_the_weights_is_the_product_with_thinned_gradients_along_tokens() -> None:
    model = nn.Linear(8, 16)
    Sparsifier(model, "4:8", gradient_sparsity="2:4")
    inputs, gradient = torch.randn(3, 5, 8), torch.randn(3, 5, 16)
    output = model(inputs)
    torch.testing.assert_close(output, functional.linear(inputs, model.weight, model.bias))
    torch.manual_seed(7)
    output.backward(gradient)
    torch.manual_seed(7)
    thinned = minimum_variance_unbiased(gradient.flatten(0, 1), "2:4", dim=0)
    weight = held(model)[0]
    torch.testing.assert_close(weight.grad, thinned.t() @ inputs.flatten(0, 1))


# PyTorch's own, of tracing.
@pytest.mark.filterwarnings("ignore")
def test_transformations_and_recordings_have_exact_gradients() -> None:
    model, plain = (layer(**options)[0] for options in ({"gradient_sparsity": "2:4"}, {}))
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for each in (model, plain):

        def loss(parameters: dict[str, Tensor], inputs: Tensor, each: nn.Module = each) -> Tensor:
            output: Tensor = torch.func.functional_call(each, parameters, (inputs,))
            return output.square().sum()

        gradient = torch.func.grad(loss)
        parameters = dict(each.named_parameters())
        found.append([gradient(parameters, inputs), torch.func.vmap(gradient, (None, 0))(parameters, inputs[:, None])])
    torch.testing.assert_close(*found)
    for run in (torch.jit.trace(model, inputs), torch.export.export(model, (inputs,)).module()):
        torch.testing.assert_close(run(inputs), plain(inputs))
        assert "thin" not in str(run.graph)


def test_without_gradients_nothing_is_drawn() -> None:
    model, _ = layer(gradient_sparsity="2:4")
    state = torch.get_rng_state()
    with torch.no_grad():
        model(torch.ones(4, 8))
    for weight in (held(model[0])[0], held(model[2])[0]):
        weight.requires_grad_(False)
    model(torch.ones(4, 8)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_thinned_in_its_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def thinned(rows: Tensor, *rest: object) -> Tensor:
        seen.append(rows.dtype)
        return rows

    monkeypatch.setattr("masksolve.torch._training.sparse_linear.thinned", thinned)
    found = []
    for options in ({}, {"gradient_sparsity": "2:4"}):
        model, _ = layer(**options)
        with torch.autocast("cpu", dtype):
            output = model(torch.ones(4, 8))
        assert output.dtype == dtype
        output.float().square().sum().backward()
        found.append([each.grad for each in model.parameters()])
    assert seen == [dtype] * 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)
        assert other.dtype == torch.float32


# Compilers warn of themselves.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_graph_it_is_unbiased_too(backend: str) -> None:
    torch._dynamo.reset()
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact = backward(layer()[0], inputs)
    model, _ = layer(gradient_sparsity="2:4")
    run = torch.compile(model, backend=backend, fullgraph=True)
    draws = torch.stack([backward(run, inputs)["_orig_mod.0.weight"] for _ in range(60)])
    deviation = draws.std(0)
    assert float(deviation.max()) > 0
    assert bool(((draws.mean(0) - exact["0.weight"]).abs() <= 4.5 * deviation / 60**0.5 + 1e-5).all())
    torch._dynamo.reset()


def test_a_training_with_a_seed_can_be_repeated_and_learns() -> None:
    losses = []
    for _ in range(2):
        model, sparsifier = layer("1:4", gradient_sparsity="2:4", refresh_every=5)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(1)
        found = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs).square().mean()
            loss.backward()
            optimizer.step()
            sparsifier.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_the_report_says_where_gradients_are_thinned_and_why_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(3, 3))
    sparsifier = Sparsifier(model, "2:4", gradient_sparsity=(1, 2))
    said = {line.name: line.gradient_sparsity for line in sparsifier.report}
    assert (said["0.weight"], said["0.bias"], said["2.weight"]) == ("1:2", None, None)
    assert (
        said["1.weight"]
        == "dense: only the forward of nn.Linear is known, this Conv1d has its own, or one that calls it"
    )
    assert str(sparsifier.gradient_sparsity) == "1:2"
    assert repr(sparsifier.report[0]) == "ParameterReport('0.weight', 8x8, sparse, gradients 1:2)"
    sparsifier.finalize()
    without = Sparsifier(model, "2:4")
    assert without.gradient_sparsity is None
    assert all(line.gradient_sparsity is None for line in without.report)


def test_a_layer_whose_forward_was_replaced_has_the_exact_gradient_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[0].forward = model[0].forward  # type: ignore[method-assign]  # as a hook of accelerate does
    sparsifier = Sparsifier(model, "3:8", gradient_sparsity="1:4")
    said = {line.name: line.gradient_sparsity for line in sparsifier.report}
    assert said["0.weight"] == "dense: this Linear has a forward of its own, as hooks of accelerate are"
    assert said["1.weight"] == "1:4"
    inputs = torch.randn(16, 8)
    model[0](inputs).sum().backward()
    torch.testing.assert_close(held(model[0])[0].grad, torch.ones(8, 16) @ inputs)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("0:4", ValueError, "gradient_sparsity='0:4' keeps nothing"),
        ("4:2", ValueError, "n must lie between 0 and m=2, got n=4"),
        ("half", ValueError, "got 'half'"),
        (0.5, TypeError, "got 0.5"),
    ],
)
def test_what_is_no_gradient_sparsity_is_refused(given: object, error: type[Exception], words: str) -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(error, match=words):
        Sparsifier(model, "2:4", gradient_sparsity=given)  # type: ignore[arg-type]
    assert type(model) is nn.Linear


def test_a_model_without_a_linear_layer_is_refused() -> None:
    model = nn.Conv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"nothing to thin in this Conv2d \(weight: only the forward of nn.Linear"):
        Sparsifier(model, "2:4", gradient_sparsity="2:4")
    assert type(model) is nn.Conv2d


def test_copies_thin_and_finalized_models_do_not() -> None:
    model, sparsifier = layer(gradient_sparsity="1:4")
    inputs = torch.randn(16, 8, requires_grad=True)
    twin = copy.deepcopy(model)
    torch.manual_seed(4)
    expected = backward(model, inputs)
    torch.manual_seed(4)
    found = backward(twin, inputs)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    sparsifier.finalize()
    state = torch.get_rng_state()
    backward(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
