"""Which tensors of a checkpoint are weight matrices to prune, and why the others are not."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from masksolve._pattern import Pattern
from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, TensorInfo


@dataclass(frozen=True)
class SkippedTensor:
    """A tensor that is passed through untouched, and the reason."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


def select_tensors(
    tensors: Sequence[TensorInfo],
    pattern: Pattern,
    include: Sequence[str],
    exclude: Sequence[str],
    only: Container[str] | None = None,
) -> tuple[list[TensorInfo], list[SkippedTensor]]:
    """Split tensors into those that are pruned and those that are skipped.

    Pruned are floating-point tensors of two or more dimensions that hold at least one m x m tile, a convolution
    (out, in, *kernel) in its axes (out, in). With `include`, only names that match one of its globs; with `only`, only
    these names; without both, embeddings are left alone.

    Raises
    ------
    CheckpointError
        If a glob matches no tensor, or no tensor is left to prune.
    TypeError
        For a pattern, or globs, that are a mere string.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"the pattern must be a masksolve.Pattern, got {pattern!r}; Pattern.parse makes one of '4:8'")
    for option, globs in (("--include", include), ("--exclude", exclude)):
        if isinstance(globs, str):
            raise TypeError(f"{option[2:]} must be a sequence of globs, got the string {globs!r}; put it in a list")
        for glob in globs:
            if not any(fnmatchcase(tensor.name, glob) for tensor in tensors):
                some = ", ".join(tensor.name for tensor in tensors[:3])
                raise CheckpointError(
                    f"{option} {glob!r} matches none of the {len(tensors)} tensor names ({some}, ...)"
                )
    chosen, skipped = [], []
    for tensor in tensors:
        reason = reason_to_skip(tensor, pattern, include, exclude, only)
        if reason is None:
            chosen.append(tensor)
        else:
            skipped.append(SkippedTensor(tensor.name, tensor.dtype, tensor.shape, reason))
    if not chosen:
        reasons = "; ".join(f"{tensor.name}: {tensor.reason}" for tensor in skipped[:3]) or "the file holds no tensor"
        raise CheckpointError(f"no tensor fits pattern {pattern} ({reasons}{'; ...' if len(skipped) > 3 else ''})")
    return chosen, skipped


def reason_to_skip(
    tensor: TensorInfo,
    pattern: Pattern,
    include: Sequence[str],
    exclude: Sequence[str],
    only: Container[str] | None = None,
) -> str | None:
    """Why a tensor is not pruned, or None if it is."""
    if only is not None and tensor.name not in only:
        return "has no mask"
    if include and not any(fnmatchcase(tensor.name, glob) for glob in include):
        return "not included"
    for glob in exclude:
        if fnmatchcase(tensor.name, glob):
            return f"excluded by {glob!r}"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"dtype {tensor.dtype} is not one of {', '.join(WEIGHT_DTYPES)}"
    if len(tensor.shape) < 2:
        return f"{len(tensor.shape)}-D: not a matrix"
    if not include and only is None and "embed" in tensor.name.lower():
        return "an embedding; --include it to prune it"
    if 0 in tensor.shape:
        return "has no entries"
    if min(tensor.shape[:2]) < pattern.m:
        rows, columns = tensor.shape[:2]
        return f"{rows}x{columns} holds no whole {pattern.m}x{pattern.m} tile"
    return None
