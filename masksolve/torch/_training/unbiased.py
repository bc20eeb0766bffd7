"""Tensors made N:M at random: what is kept grows, so that the mean stays, and the variance is the least there is.

An entry of magnitude a that is kept with probability p has to become a / p. The sum of the variances a² (1/p - 1) is
least, among probabilities of at most 1 that sum to N, for p = min(1, a / t): entries from the threshold t on keep their
value, and all others that are kept become t. One uniform number per group draws exactly N entries with any such
probabilities: laid end to end, each entry as long as its probability, those are kept on which a comb of N teeth falls
that stand 1 apart (systematic sampling).

Source: Chmiel, Hubara, Banner, Soudry 2023 (arXiv 2203.10991), for the neural gradients of training, 1:2 and 2:4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksolve._pattern import Pattern, PatternLike, as_pattern
from masksolve.torch._solver.device import triton_module

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Probabilities are multiples of 2 to the minus this: what the sums of a group are exact to.
BITS = 24
_BITS_OF_DOUBLE = 52
# So few teeth can be counted in 32 bits.
_FEW = 127
# Entries of a part that stays in a core's cache.
_CACHED = 1 << 16


def minimum_variance_unbiased(
    values: Tensor, pattern: PatternLike, *, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """Zero all but N of every M values at random, so that the mean is `values` and the variance the least possible.

    Parameters
    ----------
    values : Tensor
        float16, bfloat16, float32 or float64; any shape, any device.
    pattern : str, (int, int) or Pattern
        N **kept** of every M, N at least 1.
    dim : int
        The axis along which groups of M lie. If its length is not a multiple of M, the last group is filled up with
        zeros, and keeps at most N too.
    generator : torch.Generator, optional
        Of the device of `values`; by default PyTorch's own, which `torch.manual_seed` seeds.

    Returns
    -------
    Tensor
        Like `values`. Groups of at most N values that are not zero are kept as they are, and zeros are never kept in
        place of others. A group that holds NaN or an infinity, or whose sum overflows, is NaN once and zero elsewhere.

    Raises
    ------
    TypeError
        For another dtype, and for what is no Tensor or no Generator.
    ValueError
        For a pattern that keeps nothing, and a `dim` that is not there.

    Notes
    -----
    Unbiased up to rounding: that of the kept values to their dtype, and 2**-24 of a group's threshold (float64:
    2**-52), the grid of the probabilities. In float16 a kept value may overflow, as sums of gradients do.

    The gradient passes straight through, as it is right in the mean.

    Source: Chmiel et al. 2023 (arXiv 2203.10991).

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> minimum_variance_unbiased(torch.tensor([1.0, -2.0, 3.0, 10.0]), "2:4")
    tensor([ 0., -6.,  0., 10.])
    >>> draws = minimum_variance_unbiased(torch.tensor([[1.0, -2.0, 3.0, 10.0]]).expand(9999, 4), "2:4")
    >>> draws.mean(0).round()
    tensor([ 1., -2.,  3., 10.])
    """
    found = as_keeping(pattern, "pattern")
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor, got {type(values).__name__}; torch.as_tensor makes one")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}; make one of the values' device, and seed it: "
            "torch.Generator(values.device).manual_seed(seed)"
        )
    if values.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"values have dtype {values.dtype}; allowed are {allowed}; convert them with .to() first")
    if not -values.ndim <= dim < values.ndim:
        raise ValueError(f"values of shape {tuple(values.shape)} have no dim={dim} along which groups could lie")
    rows = values.movedim(dim, 0)
    matrix = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    return thinned(matrix, found, generator).reshape(rows.shape).movedim(0, dim)


def as_keeping(pattern: PatternLike, name: str) -> Pattern:
    """Return the pattern, and refuse one that keeps nothing."""
    found = as_pattern(pattern)
    if found.n == 0:
        raise ValueError(
            f"{name}={str(found)!r} keeps nothing, which has no unbiased values; keep at least 1 of every {found.m}"
        )
    return found


def thinned(rows: Tensor, pattern: Pattern, generator: torch.Generator | None = None) -> Tensor:
    """Return a matrix (rows, columns), N:M along its columns; one uniform number is drawn for each group."""
    n, m = pattern.n, pattern.m
    length, columns = rows.shape
    groups = -(-length // m)
    filled = rows if groups * m == length else torch.nn.functional.pad(rows, (0, 0, 0, groups * m - length))
    is_double = rows.dtype == torch.float64
    uniform = torch.randint(
        1 << (_BITS_OF_DOUBLE if is_double else BITS),
        (groups, columns),
        generator=generator,
        dtype=torch.int64 if is_double else torch.int32,
        device=rows.device,
    )
    found: Tensor = _thin(filled, uniform, n, m)
    return found[:length]


# One operator, so that compilers need not know how it is computed.
@torch.library.custom_op("masksolve::thin", mutates_args=())
def _thin(rows: Tensor, uniform: Tensor, n: int, m: int) -> Tensor:
    found = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kernel = triton_module("masksolve.torch._training.unbiased_kernel") if rows.is_cuda else None
    if kernel is not None and m <= kernel.LARGEST_M and rows.dtype != torch.float64:
        kernel.thin(rows, uniform, found, n, m)
        return found
    at_once = max(1, _CACHED // max(1, m * rows.shape[1])) if rows.device.type == "cpu" else max(1, len(uniform))
    parts = (each.unflatten(0, (-1, m)).split(at_once) for each in (rows, found))
    for source, target, part in zip(*parts, uniform.split(at_once), strict=True):
        thin_groups(source, part, target, n)
    return found


@_thin.register_fake
def _(rows: Tensor, uniform: Tensor, n: int, m: int) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


_thin.register_autograd(lambda ctx, grad: (grad, None, None, None))


def thin_groups(values: Tensor, uniform: Tensor, found: Tensor, n: int) -> None:
    """Fill `found` (groups, m, columns) with n of every m values each; the Triton kernel computes the same bits.

    Parameters
    ----------
    uniform : Tensor of int, shape (groups, columns)
        From 0 to 2**BITS - 1; for float64, to 2**52 - 1.
    """
    is_double = values.dtype == torch.float64
    bits = _BITS_OF_DOUBLE if is_double else BITS
    entries = [each.double() if is_double else each.float() for each in values.unbind(1)]
    sizes = [each.abs() for each in entries]
    # In this order in both versions, as sums of floats depend on it.
    total = sum(sizes[1:], sizes[0])
    some = torch.zeros_like(total)
    for size in sizes:
        some += size > 0
    # All of few: nothing is below it.
    threshold = torch.where(some <= n, 0, total / n)
    for _ in range(n - 1):
        free, below = _below(sizes, threshold, n)
        # Nothing may be left for what is too small to change a sum: it is never drawn.
        lower = torch.where(free > 0, below / free, threshold)
        if torch.equal(lower, threshold):
            break
        threshold = lower
    free, below = _below(sizes, threshold, n)
    # Where nothing is below, nothing is drawn.
    value = torch.where(free > 0, below / free, 0)
    teeth, whole = free * (1 << bits), torch.where(below > 0, below, 1)
    # What counts teeth has to hold n << bits.
    counts = torch.int64 if is_double or n >= _FEW else torch.int32
    first = (1 << bits) - 1 - uniform.to(counts)
    end, counted = torch.zeros_like(total), torch.zeros_like(first)
    for k, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
        is_below = size < threshold
        end = torch.where(is_below, end + size, end)
        count = ((end / whole * teeth).to(counts) + first) >> bits
        found[:, k] = torch.where(is_below, value.copysign(entry) * (count > counted), entry)
        counted = count
    if not bool((is_finite := total.isfinite()).all()):
        found.masked_fill_(~is_finite[:, None], 0)
        found[:, 0].masked_fill_(~is_finite, torch.nan)


def _below(sizes: list[Tensor], threshold: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return how many are still to be drawn below a threshold, and the sum of what is."""
    free, below = torch.full_like(threshold, n), torch.zeros_like(threshold)
    for size in sizes:
        is_below = size < threshold
        below = torch.where(is_below, below + size, below)
        free = torch.where(is_below, free, free - 1)
    return free.clamp_(min=0), below
