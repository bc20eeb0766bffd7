"""The report of a prune, tensor by tensor; and how reports become JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from masksolve._pattern import Pattern
from masksolve._tiles import Direction
from masksolve._words import counted, one_sided
from masksolve.checkpoint._file import ChosenTensor
from masksolve.checkpoint._quality import BandRecord, TileRecord
from masksolve.checkpoint._selection import SkippedTensor


@dataclass(frozen=True)
class PrunedTensor:
    """A tensor that was pruned.

    Attributes
    ----------
    name, dtype, shape
        As in the checkpoint; dtype in safetensors' words ("F32").
    stack : bool
        Whether it was pruned as a stack of matrices (..., rows, columns).
    pattern : Pattern
    direction : {"both", "rows", "columns"}
        That of its groups as it is stored: of a weight (in, out), "columns" where "rows" was asked for.
    importance : float
        Sum of abs(weights) before.
    kept : float
        Sum of abs(weights) after.
    gap : float
        How far kept is from the optimum, as `masksolve.certify` bounds it: 0.0 when optimal.
    optimal : bool
        Proven optimal in every tile.
    tile_gaps : tuple of int
        How many tiles (groups, for one-sided masks) have a gap of 0, of at most 1e-4, 1e-3, 1e-2, 0.1, and a larger
        one.
    worst_tiles : tuple of TileRecord
        Those with the largest gaps; among equals, those that lose the largest share of their importance.
    solve_seconds, certify_seconds : float
        Time spent, by all workers together.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stack: bool
    pattern: Pattern
    direction: Direction
    importance: float
    kept: float
    gap: float
    optimal: bool
    tile_gaps: tuple[int, ...]
    worst_tiles: tuple[TileRecord, ...]
    solve_seconds: float
    certify_seconds: float

    @classmethod
    def of(cls, tensor: ChosenTensor, band: BandRecord) -> PrunedTensor:
        """Return the record of a tensor, given that of all its bands."""
        return cls(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            stack=tensor.stack,
            pattern=tensor.pattern,
            direction=tensor.direction,
            importance=band.importance,
            kept=band.kept,
            gap=band.gap,
            optimal=band.optimal,
            tile_gaps=band.gaps,
            worst_tiles=band.worst,
            solve_seconds=band.solve_seconds,
            certify_seconds=band.certify_seconds,
        )

    @property
    def kept_importance(self) -> float:
        """Kept importance as a share of all importance; 1.0 for a tensor of zeros."""
        return self.kept / self.importance if self.importance > 0 else 1.0


@dataclass(frozen=True)
class WorstTile:
    """One of the worst tiles of a checkpoint, with its weights.

    Attributes
    ----------
    tensor : str
        The name of the tensor that it is in.
    tile : TileRecord
    weights : tuple of tuple of float
        A row of numbers for each row of the tile.
    """

    tensor: str
    tile: TileRecord
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, repr=False)
class PruneReport:
    """The result of `prune_checkpoint` or `apply_masks`, with what is needed to do it again.

    Attributes
    ----------
    versions : dict of str to str
        Of masksolve, Python and the libraries.
    input : str
    input_hash : str
        The xxh3_128 of the hashes of the input's units.
    output, masks : str or None
        What was written.
    applied : str or None
        The file of masks that was applied.
    other_weights : bool
        Whether it might have been made for other weights.
    pattern : Pattern or dict of str to Pattern
        One for all tensors, or one for each glob, and for each name where masks of several were applied.
    direction : {"both", "rows", "columns"} or None
        None where masks of several were applied.
    method : str or None
        None where masks were applied.
    include, exclude, stack, convolution, transposed : tuple of str
        The globs.
    identified_by : str
        What distinguishes weights from embeddings and the like: the model's config, or the names of tensors.
    tensors : tuple of PrunedTensor
    skipped : tuple of SkippedTensor
        The others, with the reason.
    worst_tiles : tuple of WorstTile
        The worst of all tensors.
    seconds : float
        The time that this run took.
    """

    versions: dict[str, str]
    input: str
    input_hash: str
    output: str | None
    masks: str | None
    applied: str | None
    other_weights: bool
    pattern: Pattern | dict[str, Pattern]
    direction: Direction | None
    method: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    stack: tuple[str, ...]
    convolution: tuple[str, ...]
    transposed: tuple[str, ...]
    identified_by: str
    tensors: tuple[PrunedTensor, ...]
    skipped: tuple[SkippedTensor, ...]
    worst_tiles: tuple[WorstTile, ...]
    seconds: float

    @property
    def mean_kept_importance(self) -> float:
        """Mean over the pruned tensors of their kept importance as a share."""
        return sum(tensor.kept_importance for tensor in self.tensors) / len(self.tensors)

    @property
    def optimal(self) -> bool:
        """Whether every tile of every pruned tensor is proven optimal."""
        return all(tensor.optimal for tensor in self.tensors)

    @property
    def goals(self) -> tuple[tuple[Pattern, Direction], ...]:
        """The patterns and directions that there are among the tensors."""
        return tuple(dict.fromkeys((tensor.pattern, tensor.direction) for tensor in self.tensors))

    @property
    def command(self) -> str:
        """The command that does the same again."""
        words = ["masksolve", "apply" if self.applied else "prune", self.input]
        patterns = self.pattern.items() if isinstance(self.pattern, dict) else [("", self.pattern)]
        options = [
            ("--masks", self.applied or self.masks),
            *(("--pattern", f"{glob}={each}" if glob else str(each)) for glob, each in patterns if not self.applied),
            ("--direction", None if self.applied or self.direction == "both" else self.direction),
            ("--method", self.method),
            ("--output", self.output),
        ]
        for option, value in options:
            words += [option, value] if value is not None else []
        words += ["--other-weights"] if self.other_weights else []
        for option in ("include", "exclude", "stack", "convolution", "transposed"):
            for glob in getattr(self, option):
                words += [f"--{option}", glob]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it: the fields and properties of this class and of `PrunedTensor`."""
        return as_plain(  # type: ignore[no-any-return]
            {
                **as_plain(self),
                "masksolve_version": self.versions["masksolve"],
                "mean_kept_importance": self.mean_kept_importance,
                "optimal": self.optimal,
                "command": self.command,
                "tensors": [{**as_plain(each), "kept_importance": each.kept_importance} for each in self.tensors],
            }
        )

    def __repr__(self) -> str:
        proof = "every tile proven optimal" if self.optimal else "not every tile optimal"
        goals = " and ".join(f"{pattern}{one_sided(direction)}" for pattern, direction in self.goals)
        return (
            f"<PruneReport of {self.output or self.masks}: {counted(len(self.tensors), 'tensor')} pruned to "
            f"{goals}, {len(self.skipped)} skipped, mean kept importance "
            f"{self.mean_kept_importance:.2%}, {proof}>"
        )


def as_plain(value: Any) -> Any:
    """Return a report, or a part of one, as JSON has it: dicts, lists, a Pattern as "N:M", and None for an infinity."""
    if isinstance(value, Pattern):
        return str(value)
    if is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no infinity.
        return None
    return value
