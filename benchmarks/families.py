"""The weights that the benchmarks solve: families of random matrices, and the matrices of a real checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 20240607

Matrix = NDArray[np.float32]


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Draw standard normal weights."""
    return rng.standard_normal(shape, dtype=np.float32)


def student_t3(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Heavy tails: Student's t with three degrees of freedom."""
    return rng.standard_t(3, shape).astype(np.float32)


def int8_valued(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Gaussian weights rounded to the 255 values of a symmetric int8 quantisation, largest at four sigma: many ties."""
    return np.clip(np.rint(gaussian(rng, shape) * (127 / 4)), -127, 127)


def half_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Draw what a pruned checkpoint holds: Gaussian weights, the lighter half of them zero wherever it stands."""
    weights = gaussian(rng, shape)
    weights[np.abs(weights) < 0.6744898] = 0
    return weights


def bfloat16_valued(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Gaussian weights that bfloat16 holds: the lower half of the float32's bits is cut off."""
    return (gaussian(rng, shape).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def int4_valued(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Gaussian weights rounded to the 15 values of a symmetric int4 quantisation, largest at three sigma."""
    return np.clip(np.rint(gaussian(rng, shape) * (7 / 3)), -7, 7)


def int4_scaled(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Those as a checkpoint holds them that was quantised in groups of 32, and made float32 again: a scale for each."""
    rows, columns = shape
    scales = np.repeat(rng.uniform(0.01, 0.02, (rows, -(-columns // 32))).astype(np.float32), 32, axis=1)
    return int4_valued(rng, shape) * scales[:, :columns]


def ternary(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """Gaussian weights rounded to -1, 0 and 1."""
    return np.clip(np.rint(gaussian(rng, shape)), -1, 1)


def constant(rng: np.random.Generator, shape: tuple[int, ...]) -> Matrix:
    """One value everywhere, so that every mask is optimal."""
    return np.ones(shape, np.float32)


RANDOM: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Matrix]] = {
    "gaussian": gaussian,
    "student-t3": student_t3,
    "int8-valued": int8_valued,
    "half-zero": half_zero,
}
MORE_TIES = {"bfloat16-valued": bfloat16_valued, "constant": constant}
FEW_BITS = {"int4-valued": int4_valued, "int4-scaled": int4_scaled, "ternary": ternary}


def random_matrix(family: str, size: int) -> Matrix:
    """Draw a square matrix of a family; the same one in every run."""
    return (RANDOM | MORE_TIES | FEW_BITS)[family](np.random.default_rng(SEED), (size, size))


def encoder_as_one(path: Path) -> Matrix:
    """Stack the encoder's matrices, cut to the width of the narrowest: the tiles stay the same."""
    from benchmarks.kept_importance import encoder_matrices

    matrices = encoder_matrices(path)
    width = min(matrix.shape[1] for matrix in matrices)
    strips = [strip for matrix in matrices for strip in np.hsplit(matrix, matrix.shape[1] // width)]
    return np.concatenate(strips).astype(np.float32, copy=False)
