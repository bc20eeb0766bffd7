"""Masks found where the weights lie: the Triton kernel, in its interpreter, and the batched version against the CPU."""

from __future__ import annotations

import dataclasses
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import masksolve as ms
from masksolve._tiles import Margins
from masksolve.torch._solver import batched as batched_operations
from masksolve.torch._solver import device as device_solver
from masksolve.torch._solver import direct_4x4
from masksolve.torch._solver.device import solve_on_device
from masksolve.torch._solver.solution import MaskSolution
from tests import oracle, processes
from tests.tables import Pair, name_of, spread, weights_of

pytest.importorskip("triton", reason="Triton is installed on Linux only")
KERNEL = device_solver.triton_module()
# Where Triton is too old for the kernel, its laws hold for what takes its place.
_triton: Any = KERNEL or batched_operations
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="Triton before 3.4, of PyTorch 2.8, cannot compile the kernel")

# NumPy, in the interpreter, says aloud what a GPU does silently.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered in subtract:RuntimeWarning"
)

KERNEL_PATTERNS = [(2, 4), (1, 4), (3, 4), (3, 8), (4, 8), (3, 6), (5, 10), (7, 13), (8, 16), (16, 32)]
# Where ties take the interpreter, or the CPU that solves what remains, many seconds, tests are slow.
TIES = ["int8", "uint8", "half zero", "nearly all zero", "constant", "all zero", "tenths", "negative zero"]
MAGNITUDES = ["tiny", "huge", "subnormal float32", "mixed magnitudes", "largest", "student-t", "near ties"]


VERSIONS = ["batched"] if KERNEL is None else ["triton", "batched"]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, _triton if request.param == "triton" else batched_operations)
    return str(request.param)


def use(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setattr(device_solver, "_solver", lambda tiles: module)


def gaussian(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def of_family(family: str, shape: tuple[int, ...]) -> Tensor:
    array = weights_of(family, shape)
    return torch.from_numpy(array if array.dtype.kind == "f" else array.astype(np.float32))


def as_array(weights: Tensor) -> NDArray[Any]:
    """The same numbers, which float32 and float64 hold exactly."""
    return (weights if weights.dtype == torch.float64 else weights.float()).numpy()


def assert_optimal(weights: Tensor, solution: MaskSolution, n: int, m: int, saturated: bool = True) -> None:
    assert solution.masks.shape == weights.shape
    assert solution.masks.dtype == torch.bool
    assert ms.certify(as_array(weights), solution.masks.numpy(), n, m, saturated=saturated).optimal


def solve_with_both(
    monkeypatch: pytest.MonkeyPatch, weights: Tensor, pattern: ms.Pattern, **options: Any
) -> tuple[MaskSolution, MaskSolution]:
    solutions = []
    for module in (_triton, batched_operations):
        use(monkeypatch, module)
        solutions.append(solve_on_device(weights, pattern, **options))
    return solutions[0], solutions[1]


def assert_same(a: MaskSolution, b: MaskSolution) -> None:
    assert torch.equal(a.masks, b.masks)
    assert (a.potentials is None) == (b.potentials is None)
    if a.potentials is not None and b.potentials is not None:
        assert torch.equal(a.potentials, b.potentials)
    assert a.solved_on_cpu == b.solved_on_cpu


@pytest.mark.parametrize(
    ("n", "m"),
    [
        # NumPy takes seconds to run the kernel for large tiles.
        pytest.param(n, m, marks=[] if (n, m) in [(1, 4), (2, 4), (3, 8), (7, 13)] else pytest.mark.slow)
        for n, m in KERNEL_PATTERNS
    ],
    ids=map(name_of, KERNEL_PATTERNS),
)
def test_the_kernel_finds_the_optimum_and_the_batched_version_the_same_bits(
    n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = gaussian((2, m, m) if m > 8 else (2, m, 2 * m), torch.bfloat16 if m < 32 else torch.float32)
    kernel, batched = solve_with_both(monkeypatch, weights, ms.Pattern(n, m))
    assert_optimal(weights, kernel, n, m)
    assert_same(kernel, batched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_both_versions_agree_for_every_dtype_and_both_readings(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = gaussian((8, 24), dtype)
    for saturated in (True, False):
        kernel, batched = solve_with_both(monkeypatch, weights, ms.Pattern(3, 8), saturated=saturated)
        assert_optimal(weights, kernel, 3, 8, saturated)
        assert_same(kernel, batched)


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (9, 1), (3, 4), (5, 6)])
def test_ragged_edges_and_tiny_matrices_are_optimal(
    rows: int, columns: int, saturated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = gaussian((rows, columns), torch.float32)
    kernel, batched = solve_with_both(monkeypatch, weights, ms.Pattern(2, 4), saturated=saturated)
    assert oracle.is_optimal(weights.numpy(), kernel.masks.numpy(), 2, 4, saturated)
    assert_same(kernel, batched)


@pytest.mark.parametrize(("version", "family"), spread(VERSIONS, TIES + MAGNITUDES, one_in=2), indirect=["version"])
def test_ties_and_every_magnitude_are_optimal(family: str, version: str) -> None:
    weights = of_family(family, (2, 4, 8))
    solution = solve_on_device(weights, ms.Pattern(2, 4))
    assert oracle.is_optimal(as_array(weights), solution.masks.numpy(), 2, 4)


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize(
    ("pattern", "family"),
    spread(
        [(1, 2), (2, 5), (5, 8), (7, 13)],
        ["gaussian bfloat16", "int8", "half zero", "constant", "tenths", "student-t"],
        one_in=2,
    ),
)
def test_the_batched_version_is_optimal(pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    weights = of_family(family.replace(" bfloat16", " float32"), (2 * m + 1, 3 * m - 1))
    if "bfloat16" in family:
        weights = weights.bfloat16()
    assert_optimal(weights, solve_on_device(weights, ms.Pattern(n, m), saturated=saturated), n, m, saturated)


@pytest.mark.slow
@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("family", ["gaussian bfloat16", "int8", "half zero", "constant", "tenths", "student-t"])
@pytest.mark.parametrize("pattern", [(8, 16), (16, 32), (5, 64)], ids=name_of)
def test_the_batched_version_is_optimal_where_large_tiles_tie(pattern: Pair, family: str, saturated: bool) -> None:
    test_the_batched_version_is_optimal(pattern, family, saturated)


@pytest.mark.slow
@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("family", ["int8", "half zero", "uint8", "constant", "mixed magnitudes"])
@pytest.mark.parametrize(("n", "m"), [(2, 8), (4, 8), (7, 13), (8, 16), (16, 32)], ids=str)
def test_the_kernel_is_optimal_where_large_tiles_tie(
    n: int, m: int, family: str, saturated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = of_family(family, (3 * m, 2 * m + 3))
    kernel, batched = solve_with_both(monkeypatch, weights, ms.Pattern(n, m), saturated=saturated)
    assert_optimal(weights, kernel, n, m, saturated)
    assert_same(kernel, batched)


@pytest.mark.parametrize(("n", "m"), [(8, 16), (16, 32), pytest.param(5, 64, marks=pytest.mark.slow)])
def test_the_batched_version_is_optimal_on_large_tiles(n: int, m: int) -> None:
    weights = gaussian((m + 1, 2 * m - 1), torch.float32)
    assert_optimal(weights, solve_on_device(weights, ms.Pattern(n, m)), n, m)


@pytest.mark.parametrize(
    "family", ["gaussian float32", "student-t", "int8", "half zero", "uint8", "constant", "all zero", "nearly all zero"]
)
def test_few_tiles_are_left_to_the_cpu(family: str) -> None:
    weights = of_family(family, (128, 128))
    if family != "half zero":
        weights = weights.bfloat16()
    for n, m in [(2, 4), (3, 8), (4, 8)]:
        assert solve_on_device(weights, ms.Pattern(n, m)).solved_on_cpu <= 0.01 * (128 // m) ** 2


def test_what_every_stage_leaves_is_solved_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stages_for = device_solver.stages_for
    monkeypatch.setattr(
        device_solver,
        "stages_for",
        lambda *tile: tuple(dataclasses.replace(stage, last=-1) for stage in stages_for(*tile)),
    )
    weights = gaussian((2, 17, 20), torch.float32)
    kernel, batched = solve_with_both(monkeypatch, weights, ms.Pattern(3, 8))
    for solution in (kernel, batched):
        assert solution.solved_on_cpu == 2 * 3 * 3
        assert_optimal(weights, solution, 3, 8)
        assert solution.potentials is not None
        assert torch.isfinite(solution.potentials).all()


def of_one_value(dtype: torch.dtype, value: float) -> Tensor:
    return torch.full((4, 4), value, dtype=dtype)


def solve_directly(module: ModuleType, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Masks of a matrix of whole tiles, right or not, and which tiles remained (rows / 4, columns / 4)."""
    (region,) = device_solver.regions(*weights.shape, ms.Pattern(n, 4), "both", True)
    masks = torch.empty(weights.shape, dtype=torch.bool)
    tiles = device_solver._tiles(weights, region)
    remaining = module.solve_directly(tiles, device_solver._tiles(masks, region), direct_4x4.halves(n))
    return masks, remaining.view(tiles.shape[1:3])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_direct_masks_are_optimal_and_tiles_are_left_where_sums_would_round(n: int, dtype: torch.dtype) -> None:
    # Sums of 4n large entries, of which some are small, are multiples of this, or rounded.
    unit = 2.0 ** ((4 * n - 1).bit_length() - (52 if dtype == torch.float32 else 23))
    rng = np.random.default_rng(n)
    small = rng.integers(1, 5, (24, 32)) * 0.5
    is_large = rng.random((24, 32)) < 0.85
    is_large[::8] = False
    weights = torch.from_numpy(np.where(is_large, 255 / 128, small * unit)).to(dtype)
    masks, remaining = solve_directly(_triton, weights, n)
    assert torch.equal(remaining, solve_directly(batched_operations, weights, n)[1])
    wrong = 0
    for (i, j), is_left in np.ndenumerate(remaining.numpy()):
        where = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        is_optimal = oracle.is_optimal_tile(as_array(weights)[where], masks.numpy()[where], n)
        assert is_left or is_optimal
        assert is_left == (~is_large & (small % 1 != 0))[where].any()
        wrong += not is_optimal
    assert wrong > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_coarse_and_subnormal_weights_are_all_solved_directly_and_the_largest_left(
    dtype: torch.dtype, version: str
) -> None:
    module = _triton if version == "triton" else batched_operations
    limits = torch.finfo(dtype)
    for value in (0, 1, -3, limits.tiny, limits.smallest_normal / 2):
        assert not solve_directly(module, of_one_value(dtype, value), 2)[1]
    grid = torch.arange(256).sub(128).view(16, 16).to(dtype)
    for n in (1, 2, 3):
        assert not solve_directly(module, grid, n)[1].any()
    assert bool(solve_directly(module, of_one_value(dtype, limits.max), 2)[1]) == (dtype != torch.float16)


def test_tiles_are_solved_directly_where_their_sums_have_a_type() -> None:
    full, loose = (Margins(2, exact_rows=exact, exact_columns=True) for exact in (True, False))
    of_16_bits = [torch.bfloat16, torch.float16]
    for device, dtypes in (("cuda", [*of_16_bits, torch.float32]), ("mps", of_16_bits)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            weights: Any = SimpleNamespace(dtype=dtype, device=torch.device(device))
            assert direct_4x4.is_direct((4, 4), full, weights) == (dtype in dtypes)
            assert not direct_4x4.is_direct((4, 4), loose, weights)
            assert not direct_4x4.is_direct((4, 3), full, weights)


def test_tiles_that_are_solved_directly_have_no_potentials(version: str) -> None:
    weights = gaussian((8, 12), torch.float32)
    given = torch.full((2, 3, 4), float("nan"))
    assert solve_on_device(weights, ms.Pattern(3, 4), potentials=given).potentials is None
    assert solve_on_device(weights, ms.Pattern(3, 4), saturated=False, potentials=given).potentials is not None
    assert solve_on_device(weights.double(), ms.Pattern(3, 4)).potentials is not None


@needs_kernel
@pytest.mark.parametrize(("pattern", "shape"), [("3:8", (2, 8, 72)), ("2:4", (4, 4 * 130))])
def test_the_strips_of_tiles_that_a_gpu_is_given_cover_the_matrix(
    pattern: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = gaussian(shape, torch.float32)
    expected = solve_on_device(weights, ms.Pattern.parse(pattern))
    monkeypatch.setattr(_triton, "_FEW_PROGRAMS", False)
    use(monkeypatch, _triton)
    assert_same(solve_on_device(weights, ms.Pattern.parse(pattern)), expected)


@needs_kernel
@pytest.mark.parametrize(
    ("case", "count"),
    [
        pytest.param("2:4 bfloat16", 3, marks=pytest.mark.slow),
        ("4:8 bfloat16", 4),
        pytest.param("2:4 float32", 3, marks=pytest.mark.slow),
        pytest.param("7:13 float32", 12, marks=pytest.mark.slow),
        pytest.param("16:32 float64", 12, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_for_a_gpu_without_spills_or_inexact_arithmetic(case: str, count: int) -> None:
    pattern, dtype = case.split()
    script = f"""
import torch
import masksolve as ms
from benchmarks.gpu.offline import compile_variants

options = [dict(every_stage=True)]
if {count} > 3:
    options += [dict(saturated=False, every_stage=True)]
if {count} > 4:
    options += [dict(ragged=True), dict(saturated=False, ragged=True)]
for each in options:
    for kernel in compile_variants(ms.Pattern.parse("{pattern}"), torch.{dtype}, **each):
        # Flushed subnormals would pass for zeros.
        assert ".ftz" not in kernel.ptx and "fma." not in kernel.ptx, kernel.name
        if "directly" in kernel.name:
            # A thread reads and writes whole rows of its tile, and needs no other thread.
            assert ("ld.global.v" in kernel.ptx, kernel.shared_bytes) == (True, 0)
        print(kernel.name, kernel.spilled_bytes)
"""
    lines = processes.run(script, TRITON_INTERPRET="0").splitlines()
    assert len(lines) == count
    assert all(line.endswith(" 0") for line in lines if "float64" not in line)
    assert any("directly" in line for line in lines) == pattern.endswith(":4")


def test_where_triton_is_too_old_for_the_kernel_batched_operations_take_its_place_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import triton

    if KERNEL is not None:
        monkeypatch.setattr(triton, "__version__", "3.2.0")
    monkeypatch.setattr(device_solver, "triton_module", device_solver.triton_module.__wrapped__)
    weights: Any = torch.zeros(1, 2, 2, 4, 4)
    on_gpu: Any = SimpleNamespace(is_cuda=True, shape=weights.shape, stride=weights.stride)
    with caplog.at_level("WARNING", "masksolve"):
        assert device_solver._solver(on_gpu) is batched_operations
    assert f"Triton {triton.__version__} is too old" in caplog.text
    assert "need 3.4 or newer (PyTorch 2.8)" in caplog.text


LAYOUTS = {
    "transposed": lambda w: w.mT.contiguous().mT,
    "every second": lambda w: w.repeat_interleave(2, -1).repeat_interleave(3, -2)[..., ::3, ::2],
    "flipped batch": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda w: w[:1, :1].expand_as(w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str, version: str) -> None:
    weights = gaussian((2, 2, 5, 8), torch.float32)
    view = LAYOUTS[layout](weights)
    before = view.clone()
    found, expected = (solve_on_device(each, ms.Pattern(2, 4)) for each in (view, view.contiguous()))
    assert_same(found, expected)
    assert torch.equal(view, before)


def test_a_tile_gets_the_same_mask_in_any_company(version: str) -> None:
    weights = torch.cat([gaussian((8, 16)), of_family("uint8", (8, 16)).bfloat16()])
    together = solve_on_device(weights, ms.Pattern(3, 8))
    for row in (0, 8):
        alone = solve_on_device(weights[row : row + 8, 8:], ms.Pattern(3, 8))
        assert torch.equal(alone.masks, together.masks[row : row + 8, 8:])


def test_a_warm_start_never_changes_how_much_is_kept(version: str) -> None:
    weights = gaussian((2, 8, 16), torch.float32)
    cold = solve_on_device(weights, ms.Pattern(4, 8))
    assert cold.potentials is not None
    assert cold.potentials.shape == (2, 1, 2, 8)
    warm = solve_on_device(weights, ms.Pattern(4, 8), potentials=cold.potentials)
    assert torch.equal(warm.masks, cold.masks)
    moved = weights + 0.01 * gaussian(weights.shape, torch.float32, seed=1)
    assert_optimal(moved, solve_on_device(moved, ms.Pattern(4, 8), potentials=cold.potentials), 4, 8)
    nonsense = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0, 1, -1]).expand(2, 1, 2, 8)
    for saturated in (True, False):
        solution = solve_on_device(weights, ms.Pattern(4, 8), saturated=saturated, potentials=nonsense)
        assert_optimal(weights, solution, 4, 8, saturated)


def test_a_warm_start_of_unchanged_weights_takes_no_rounds(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = gaussian((16, 16), torch.float32)
    cold = solve_on_device(weights, ms.Pattern(4, 8))
    stages_for = device_solver.stages_for
    monkeypatch.setattr(device_solver, "stages_for", lambda *tile: (dataclasses.replace(stages_for(*tile)[0], last=0),))
    assert solve_on_device(weights, ms.Pattern(4, 8), potentials=cold.potentials).solved_on_cpu == 0
    assert solve_on_device(weights, ms.Pattern(4, 8)).solved_on_cpu == 4


def test_potentials_agree_with_the_bound_of_the_cpu() -> None:
    weights = gaussian((24, 24), torch.float32)
    solution = solve_on_device(weights, ms.Pattern(3, 8))
    c = weights.abs().double().view(3, 8, 3, 8).transpose(1, 2)
    assert solution.potentials is not None
    v = solution.potentials.double()
    bound = (c - v[:, :, None]).topk(3, dim=-1).values.sum() + 3 * v.sum()
    assert abs(bound - weights.abs().double()[solution.masks].sum()) < 1e-6 * bound


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4)])
def test_patterns_that_keep_nothing_or_everything(n: int, m: int) -> None:
    solution = solve_on_device(gaussian((8, 12)), ms.Pattern(n, m))
    assert (solution.masks == (n == m)).all()
    assert solution.solved_on_cpu == 0
    assert solution.potentials is not None
    assert solution.potentials.shape == (2, 3, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", ["2:4", "4:4"])
def test_weights_that_are_not_finite_are_refused_by_position_as_on_the_cpu(
    value: float, pattern: str, version: str
) -> None:
    weights = gaussian((2, 9, 8), torch.float32)
    weights[1, 5, 3] = value
    n, m = ms.Pattern.parse(pattern).n, ms.Pattern.parse(pattern).m
    with pytest.raises(ValueError, match="weights") as expected:
        ms.solve_matrix(weights.numpy(), n, m)
    with pytest.raises(ValueError, match=r"weights\[1, 5, 3\]") as refused:
        solve_on_device(weights, ms.Pattern.parse(pattern))
    assert str(refused.value) == str(expected.value)


def test_bad_input_is_refused_with_what_was_given_and_what_is_allowed() -> None:
    pattern = ms.Pattern(2, 4)
    with pytest.raises(TypeError, match=r"torch.int64.*float16, bfloat16, float32, float64"):
        solve_on_device(torch.ones(4, 4, dtype=torch.int64), pattern)
    with pytest.raises(ValueError, match=r"\(4,\).*two dimensions"):
        solve_on_device(torch.ones(4), pattern)
    with pytest.raises(ValueError, match=r"\(0, 4\).*empty"):
        solve_on_device(torch.ones(0, 4), pattern)
    with pytest.raises(ValueError, match=r"potentials have shape \(4,\).*need floats of shape \(1, 2, 4\)"):
        solve_on_device(torch.ones(4, 8), pattern, potentials=torch.zeros(4))


def test_parameters_that_require_gradients_are_taken() -> None:
    weights = torch.nn.Parameter(gaussian((8, 8), torch.float32))
    for pattern in (ms.Pattern(2, 4), ms.Pattern(4, 8)):
        solution = solve_on_device(weights, pattern)
        assert_optimal(weights.detach(), solution, pattern.n, pattern.m)
