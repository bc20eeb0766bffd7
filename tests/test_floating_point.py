"""Proofs do not depend on the floating-point mode of the thread, nor on what NumPy does about overflow."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve import _threads
from masksolve._floating_point import IeeeArithmetic
from tests import floating_point, oracle
from tests.extras import library
from tests.tables import APPROXIMATE_METHODS, EXACT_METHODS, FAMILIES, Method, Pair, name_of, spread, weights_of

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
SOME_PATTERNS = pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8), (8, 16)], ids=name_of)
DTYPES = pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])


def subnormal(dtype: type, shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    """Weights of which most are subnormal, and some are ten times the smallest normal number."""
    rng = np.random.default_rng(seed)
    unit = float(np.finfo(dtype).smallest_normal)
    weights = rng.random(shape) * unit * np.where(rng.random(shape) < 0.2, 10.0, 1.0)
    return weights.astype(dtype)


@READINGS
@DTYPES
@SOME_PATTERNS
@pytest.mark.parametrize("mode", floating_point.MODES)
def test_masks_of_subnormal_weights_are_optimal_in_every_mode(
    mode: str, pattern: Pair, dtype: type, saturated: bool
) -> None:
    n, m = pattern
    weights = subnormal(dtype, (3 * m + 1, 2 * m))
    with floating_point.mode(mode):
        mask = ms.solve_matrix(weights, n, m, saturated=saturated)
        certificate = ms.certify(weights, mask, n, m, saturated=saturated)
    assert oracle.is_optimal(weights, mask, n, m, saturated)
    assert certificate.optimal


@pytest.mark.parametrize("method", EXACT_METHODS, ids=str)
def test_every_exact_method_finds_the_optimum_of_subnormal_weights_in_every_mode(method: Method) -> None:
    weights = subnormal(np.float64, (4, 4))
    with floating_point.mode("both"):
        mask = ms.solve_block(weights, 1, 4, method=method.name, **method.options)
    assert oracle.is_optimal_tile(weights, mask, 1)


@DTYPES
@SOME_PATTERNS
@pytest.mark.parametrize("mode", floating_point.MODES)
def test_a_mask_that_is_not_optimal_is_never_certified_in_any_mode(pattern: Pair, dtype: type, mode: str) -> None:
    n, m = pattern
    weights = subnormal(dtype, (m, m))
    mask = ms.solve_block(weights, n, m)[::-1]
    assert not oracle.is_optimal_tile(weights, mask, n)
    with floating_point.mode(mode):
        assert not ms.certify(weights, mask, n, m).optimal


@DTYPES
def test_worker_threads_in_another_mode_prove_as_well(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Flushing(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            super().__init__(workers, initializer=self.flush)

        @staticmethod
        def flush() -> None:
            floating_point.set_mode("both")
            started.append(True)

    monkeypatch.setattr(_threads, "ThreadPoolExecutor", Flushing)
    # More than one piece for each of the threads, and ragged edges.
    weights = subnormal(dtype, (900, 1001))
    with floating_point.mode("both"):
        mask = ms.solve_matrix(weights, 3, 8, threads=3)
        certificate = ms.certify(weights, mask, 3, 8)
    assert started
    assert (mask == ms.solve_matrix(weights, 3, 8, threads=1)).all()
    assert certificate.optimal


def test_masks_of_torch_weights_are_optimal_when_torch_flushes_subnormal_numbers() -> None:
    torch = library("torch")
    import masksolve.torch

    weights = subnormal(np.float32, (8, 16))
    layer = torch.nn.Linear(16, 8)
    layer.weight.data = torch.from_numpy(weights)
    assert torch.set_flush_denormal(True)
    try:
        masksolve.torch.semi_structured(layer, "weight", "1:4")
    finally:
        torch.set_flush_denormal(False)
    assert oracle.is_optimal(weights, layer.weight_mask.bool().numpy(), 1, 4)


def test_a_platform_on_which_the_mode_cannot_be_changed_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masksolve._floating_point._set_default", lambda: None)
    monkeypatch.setattr("masksolve._floating_point._restore", lambda saved: None)
    with (
        floating_point.mode("both"),
        pytest.raises(RuntimeError, match=r"flushes subnormal numbers.*set_flush_denormal"),
        IeeeArithmetic(),
    ):
        pass


@READINGS
@pytest.mark.parametrize(("pattern", "family"), spread([(2, 4), (3, 8), (8, 16), (33, 66)], FAMILIES, one_in=3))
def test_numpy_may_raise_at_whatever_it_likes(pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    weights = weights_of(family, (m + 1, 2 * m))
    with np.errstate(all="raise"):
        mask, potentials = ms.solve_matrix(weights, n, m, saturated=saturated, return_potentials=True)
        again = ms.solve_matrix(weights, n, m, saturated=saturated, potentials=potentials)
        certificate = ms.certify(weights, mask, n, m, saturated=saturated)
        for method in APPROXIMATE_METHODS:
            ms.solve_matrix(weights, n, m, method=method.name, saturated=saturated, **method.options)
    assert certificate.optimal
    assert oracle.is_optimal(weights[:m, :m], again[:m, :m], n, m, saturated)
