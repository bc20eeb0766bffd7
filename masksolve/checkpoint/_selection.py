"""Which tensors of a checkpoint are weight matrices to prune, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from masksolve._kinds import Kind, each_reason_once
from masksolve._pattern import Pattern
from masksolve._tiles import Direction
from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, TensorInfo


@dataclass(frozen=True)
class SkippedTensor:
    """A tensor that is passed through untouched, and the reason."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Globs:
    """Globs of tensor names, one or several: which tensors to prune, and what those of three axes are."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    stack: Sequence[str] = ()
    convolution: Sequence[str] = ()

    def __post_init__(self) -> None:
        for option, globs in list(vars(self).items()):
            if isinstance(globs, str):
                object.__setattr__(self, option, (globs,))

    def check(self, tensors: Sequence[TensorInfo]) -> None:
        """Refuse globs that match no tensor, or none that they can be meant for.

        Raises
        ------
        CheckpointError
            With the glob.
        TypeError
            For globs that are not a sequence of strings.
        """
        for option, globs in vars(self).items():
            if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
                raise TypeError(f"{option} must be a glob or a sequence of globs, such as ['layers.*'], got {globs!r}")
            for glob in globs:
                found = [tensor for tensor in tensors if fnmatchcase(tensor.name, glob)]
                if not found:
                    some = ", ".join(tensor.name for tensor in tensors[:3])
                    raise CheckpointError(
                        f"`{option}` {glob!r} matches none of the {len(tensors)} tensor names ({some}, ...)"
                    )
                if option in ("stack", "convolution") and all(len(tensor.shape) < 3 for tensor in found):
                    raise CheckpointError(
                        f"`{option}` {glob!r} matches no tensor of three or more axes ({found[0].name} has "
                        f"{len(found[0].shape)}); matrices need no such option"
                    )
        for tensor in tensors:
            if matches(tensor, self.stack) and matches(tensor, self.convolution):
                raise CheckpointError(
                    f"tensor {tensor.name!r} cannot be both a stack of matrices and a convolution; name it in one of "
                    "`stack` and `convolution`"
                )


@dataclass(frozen=True)
class Given:
    """An earlier decision: the tensors to take, whether each is a stack, and why not the others."""

    stacks: Mapping[str, bool]
    otherwise: str


def select_tensors(
    tensors: Sequence[TensorInfo],
    pattern: Pattern,
    direction: Direction,
    globs: Globs,
    decided: Mapping[str, Kind] | Given,
) -> tuple[list[TensorInfo], list[SkippedTensor]]:
    """Split tensors into those that are pruned and those that are skipped.

    Pruned are floating-point tensors of two or more dimensions that hold at least one m x m tile (one group of m for
    one-sided masks): a matrix, each matrix of a stack, a convolution (out, in, *kernel) in its axes (out, in).
    `decided` says what each tensor is; by that, embeddings and the like are skipped unless they are included.

    Raises
    ------
    CheckpointError
        If a glob matches no tensor, or no tensor is left to prune.
    TypeError
        For globs that are not a sequence of strings.
    """
    chosen, skipped = split_tensors(tensors, pattern, direction, globs, decided)
    if not chosen:
        raise CheckpointError(no_tensor_fits(pattern, skipped))
    return chosen, skipped


def split_tensors(
    tensors: Sequence[TensorInfo],
    pattern: Pattern,
    direction: Direction,
    globs: Globs,
    decided: Mapping[str, Kind] | Given,
) -> tuple[list[TensorInfo], list[SkippedTensor]]:
    """Split tensors as `select_tensors` does, even if there is none to prune."""
    globs.check(tensors)
    chosen, skipped = [], []
    for each in tensors:
        if isinstance(decided, Given):
            tensor = replace(each, stack=decided.stacks.get(each.name, False))
            reason = None if each.name in decided.stacks else decided.otherwise
            reason = reason or _reason_of_globs(tensor, globs) or _reason_of_shape(tensor, pattern, direction)
        else:
            kind = decided[each.name]
            is_stack = matches(each, globs.stack) or (kind.axes == "stack" and not matches(each, globs.convolution))
            tensor = replace(each, stack=is_stack and len(each.shape) > 2)
            reason = (
                _reason_of_globs(tensor, globs)
                or _reason_of_kind(tensor, pattern, direction, globs, kind)
                or _reason_of_shape(tensor, pattern, direction)
            )
        if reason is None:
            chosen.append(tensor)
        else:
            skipped.append(SkippedTensor(tensor.name, tensor.dtype, tensor.shape, reason))
    return chosen, skipped


def no_tensor_fits(pattern: Pattern, skipped: Sequence[SkippedTensor]) -> str:
    """Return the message for a checkpoint of which all tensors were skipped."""
    # The reasons of matrices say more than those of biases.
    matrices = [tensor for tensor in skipped if len(tensor.shape) > 1] or skipped
    reasons = each_reason_once([(tensor.name, tensor.reason) for tensor in matrices])
    return f"no tensor fits pattern {pattern} ({reasons or 'the file holds no tensor'})"


def matches(tensor: TensorInfo, globs: Sequence[str]) -> bool:
    """Return whether the name of a tensor matches one of several globs."""
    return any(fnmatchcase(tensor.name, glob) for glob in globs)


def _reason_of_globs(tensor: TensorInfo, globs: Globs) -> str | None:
    if globs.include and not matches(tensor, globs.include):
        return "not included"
    for glob in globs.exclude:
        if matches(tensor, [glob]):
            return f"excluded by {glob!r}"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"dtype {tensor.dtype} is not one of {', '.join(WEIGHT_DTYPES)}"
    if len(tensor.shape) < 2:
        return f"{len(tensor.shape)}-D: not a matrix"
    if 0 in tensor.shape:
        return "has no entries"
    return None


def _reason_of_kind(tensor: TensorInfo, pattern: Pattern, direction: Direction, globs: Globs, kind: Kind) -> str | None:
    if matches(tensor, globs.stack) or matches(tensor, globs.convolution):
        return None
    if kind.dense is not None and not globs.include:
        how = "name it in `stack` to prune each of its matrices" if kind.axes == "stack" else "include it to prune it"
        return f"{kind.dense}; {how}"
    # Where no tile fits either way, there is nothing to ask.
    if kind.axes is None and any(
        _fits(rows, columns, pattern, direction) for rows, columns in (tensor.shape[:2], tensor.shape[1:3])
    ):
        return (
            "3-D, either a stack of matrices (count, rows, columns) or the weight of a convolution (out, in, kernel); "
            "say which by `stack` or `convolution`"
        )
    return None


def _reason_of_shape(tensor: TensorInfo, pattern: Pattern, direction: Direction) -> str | None:
    rows, columns = tensor.matrix_shape
    if _fits(rows, columns, pattern, direction):
        return None
    m = pattern.m
    missing = f"{m}x{m} tile" if direction == "both" else f"group of {m} along its {direction}"
    return f"{rows}x{columns} holds no whole {missing}"


def _fits(rows: int, columns: int, pattern: Pattern, direction: Direction) -> bool:
    return (direction == "columns" or columns >= pattern.m) and (direction == "rows" or rows >= pattern.m)
