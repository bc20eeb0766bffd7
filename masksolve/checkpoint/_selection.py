"""Which tensors of a checkpoint are weight matrices to prune, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from masksolve._globs import matches, none_of
from masksolve._kinds import Kind, each_reason_once
from masksolve._pattern import Pattern
from masksolve._patterns import Patterns, check_all_have_one
from masksolve._tiles import Direction, across
from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, ChosenTensor, PrunedAs, TensorInfo


@dataclass(frozen=True)
class SkippedTensor:
    """A tensor that is passed through untouched, and the reason."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Globs:
    """Globs of tensor names, one or several: which tensors to prune, and how their axes are read."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    stack: Sequence[str] = ()
    convolution: Sequence[str] = ()
    transposed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for option, globs in list(vars(self).items()):
            if isinstance(globs, str):
                object.__setattr__(self, option, (globs,))

    @property
    def choose(self) -> bool:
        """Whether they say which tensors to prune, or how their axes are read."""
        return bool(self.include or self.stack or self.convolution or self.transposed)

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
                found = [tensor for tensor in tensors if matches(tensor.name, [glob])]
                if not found:
                    names = [tensor.name for tensor in tensors]
                    raise CheckpointError(f"`{option}` {glob!r} matches {none_of(names, 'tensor')}")
                if option in ("stack", "convolution") and all(len(tensor.shape) < 3 for tensor in found):
                    raise CheckpointError(
                        f"`{option}` {glob!r} matches no tensor of three or more axes ({found[0].name} has "
                        f"{len(found[0].shape)}); matrices need no such option"
                    )
        for tensor in tensors:
            if matches(tensor.name, self.stack) and matches(tensor.name, self.convolution):
                raise CheckpointError(
                    f"tensor {tensor.name!r} cannot be both a stack of matrices and a convolution; name it in one of "
                    "`stack` and `convolution`"
                )


@dataclass(frozen=True)
class Asked:
    """A request for patterns and a direction, for the tensors that their kinds say are weights."""

    kinds: Mapping[str, Kind]
    patterns: Patterns
    direction: Direction


@dataclass(frozen=True)
class Given:
    """An earlier decision: what some tensors were pruned to, and why the others are not taken."""

    tensors: Mapping[str, PrunedAs]
    otherwise: str


def select_tensors(
    tensors: Sequence[TensorInfo], globs: Globs, decided: Asked | Given
) -> tuple[list[ChosenTensor], list[SkippedTensor]]:
    """Split tensors into those that are pruned and those that are skipped.

    Pruned are floating-point tensors of two or more dimensions that hold at least one m x m tile (one group of m for
    one-sided masks): a matrix, each matrix of a stack, a convolution (out, in, *kernel) in its axes (out, in).
    Embeddings and the like are skipped unless they are included.

    Raises
    ------
    CheckpointError
        If a glob matches no tensor, a tensor to prune has no pattern, or none is left to prune.
    TypeError
        For globs that are not a sequence of strings.
    """
    chosen, skipped = split_tensors(tensors, globs, decided)
    if not chosen:
        given = [to.pattern for to in decided.tensors.values()] if isinstance(decided, Given) else [decided.patterns]
        raise CheckpointError(no_tensor_fits(f"pattern {', '.join(dict.fromkeys(map(str, given)))}", skipped))
    return chosen, skipped


def split_tensors(
    tensors: Sequence[TensorInfo], globs: Globs, decided: Asked | Given
) -> tuple[list[ChosenTensor], list[SkippedTensor]]:
    """Split tensors as `select_tensors` does, even if there is none to prune."""
    globs.check(tensors)
    chosen: list[ChosenTensor] = []
    skipped: list[SkippedTensor] = []
    without_pattern: list[str] = []
    for tensor in tensors:
        reason = _reason_of_globs(tensor, globs)
        if isinstance(decided, Given):
            to = decided.tensors.get(tensor.name)
            reason = decided.otherwise if to is None else reason
        else:
            reason = reason or _reason_of_kind(tensor, globs, decided)
            to = _pruned_as(tensor, globs, decided)
            if reason is None and to is None:
                without_pattern.append(tensor.name)
        if to is not None:
            one = ChosenTensor.of(tensor, to)
            reason = reason or _reason_of_shape(one)
            if reason is None:
                chosen.append(one)
        if reason is not None:
            skipped.append(SkippedTensor(tensor.name, tensor.dtype, tensor.shape, reason))
    if isinstance(decided, Asked):
        reasons = {each.name: each.reason for each in skipped}
        with as_checkpoint_error():
            decided.patterns.check({tensor.name: reasons.get(tensor.name) for tensor in tensors}, "tensor")
            check_all_have_one(without_pattern)
    return chosen, skipped


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Raise what is wrong with patterns, or with a budget for them, as a `CheckpointError`."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        raise CheckpointError(str(error)) from None


def _pruned_as(tensor: TensorInfo, globs: Globs, asked: Asked) -> PrunedAs | None:
    """Return what a tensor is to be pruned to, or None if no pattern is given for it."""
    kind, pattern = asked.kinds[tensor.name], asked.patterns.of(tensor.name)
    if pattern is None:
        return None
    is_stack = matches(tensor.name, globs.stack) or (
        kind.axes == "stack" and not matches(tensor.name, globs.convolution)
    )
    transposed = kind.transposed or matches(tensor.name, globs.transposed)
    direction = across(asked.direction) if transposed else asked.direction
    return PrunedAs(is_stack and len(tensor.shape) > 2, pattern, direction)


def no_tensor_fits(what: str, skipped: Sequence[SkippedTensor]) -> str:
    """Return the message for a checkpoint of which all tensors were skipped."""
    # The reasons of matrices say more than those of biases.
    matrices = [tensor for tensor in skipped if len(tensor.shape) > 1] or skipped
    reasons = each_reason_once([(tensor.name, tensor.reason) for tensor in matrices])
    return f"no tensor fits {what} ({reasons or 'the file holds no tensor'})"


def _reason_of_globs(tensor: TensorInfo, globs: Globs) -> str | None:
    if globs.include and not matches(tensor.name, globs.include):
        return "not included"
    for glob in globs.exclude:
        if matches(tensor.name, [glob]):
            return f"excluded by {glob!r}"
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"dtype {tensor.dtype} is not one of {', '.join(WEIGHT_DTYPES)}"
    if len(tensor.shape) < 2:
        return f"{len(tensor.shape)}-D: not a matrix"
    if 0 in tensor.shape:
        return "has no entries"
    return None


def _reason_of_kind(tensor: TensorInfo, globs: Globs, asked: Asked) -> str | None:
    kind, pattern = asked.kinds[tensor.name], asked.patterns.of(tensor.name)
    if matches(tensor.name, globs.stack) or matches(tensor.name, globs.convolution):
        return None
    if kind.dense is not None and not globs.include:
        return f"{kind.dense}; include it to prune it"
    # Where no tile fits either way, there is nothing to ask.
    if kind.axes is None and any(
        pattern is None or _fits(rows, columns, pattern, asked.direction)
        for rows, columns in (tensor.shape[:2], tensor.shape[1:3])
    ):
        return (
            "3-D, either a stack of matrices (count, rows, columns) or the weight of a convolution (out, in, kernel); "
            "say which by `stack` or `convolution`"
        )
    is_open = kind.transposed is None and asked.direction != "both"
    if is_open and not globs.include and not matches(tensor.name, globs.transposed):
        return (
            "nothing says along which axis its inputs lie: include it if it is stored (out, in), and name it in "
            "`transposed` too if it is stored (in, out)"
        )
    return None


def _reason_of_shape(tensor: ChosenTensor) -> str | None:
    rows, columns = tensor.matrix_shape
    if _fits(rows, columns, tensor.pattern, tensor.direction):
        return None
    m = tensor.pattern.m
    missing = f"{m}x{m} tile" if tensor.direction == "both" else f"group of {m} along its {tensor.direction}"
    return f"{rows}x{columns} holds no whole {missing}"


def _fits(rows: int, columns: int, pattern: Pattern, direction: Direction) -> bool:
    return (direction == "columns" or columns >= pattern.m) and (direction == "rows" or rows >= pattern.m)
