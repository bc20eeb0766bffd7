"""What a prune did, tensor by tensor, as records and as JSON."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass

from masksolve._pattern import Pattern
from masksolve.checkpoint._file import TensorInfo
from masksolve.checkpoint._selection import SkippedTensor
from masksolve.checkpoint._work import BandRecord, TileRecord


@dataclass(frozen=True)
class PrunedTensor:
    """A tensor that was pruned.

    Attributes
    ----------
    name, dtype, shape
        As in the checkpoint; dtype in safetensors' words ("F32").
    stack : bool
        Whether it was pruned as a stack of matrices (..., rows, columns).
    importance : float
        Sum of abs(weights) before.
    kept : float
        Sum of abs(weights) after.
    gap : float
        How far kept is from the optimum, as `masksolve.certify` bounds it: 0.0 when optimal.
    optimal : bool
        Proven optimal in every tile.
    tile_gaps : tuple of int
        How many tiles have a gap of 0, of at most 1e-4, 1e-3, 1e-2, 0.1, and a larger one.
    worst_tiles : tuple of TileRecord
        Those with the largest gaps; among equals, those that lose the largest share of their importance.
    solve_seconds, certify_seconds : float
        Time spent, by all workers together.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stack: bool
    importance: float
    kept: float
    gap: float
    optimal: bool
    tile_gaps: tuple[int, ...]
    worst_tiles: tuple[TileRecord, ...]
    solve_seconds: float
    certify_seconds: float

    @classmethod
    def of(cls, tensor: TensorInfo, band: BandRecord) -> PrunedTensor:
        """The record of a tensor from that of all its bands."""
        return cls(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            stack=tensor.stack,
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
    """One of the worst tiles of a checkpoint, with its weights, rows of numbers."""

    tensor: str
    tile: TileRecord
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PruneReport:
    """What `prune_checkpoint` or `apply_masks` did, with what is needed to do it again.

    `output` and `masks` are None where they were not written; `applied` is the file of masks that was applied, and
    `other_weights` whether it might be one that was made for others; `identified_by` says in words what tells weights
    from embeddings and the like, the model's config or the names of tensors; `input_hash` is the xxh3_128 of the hashes
    of the input's units; `seconds` is the time that this run took.
    """

    versions: dict[str, str]
    input: str
    input_hash: str
    output: str | None
    masks: str | None
    applied: str | None
    other_weights: bool
    pattern: Pattern
    method: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    stack: tuple[str, ...]
    convolution: tuple[str, ...]
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
    def command(self) -> str:
        """The command that does the same again."""
        words = ["masksolve", "apply" if self.applied else "prune", self.input]
        options = {
            "--masks": self.applied or self.masks,
            "--pattern": None if self.applied else str(self.pattern),
            "--method": self.method,
            "--output": self.output,
        }
        for option, value in options.items():
            words += [option, value] if value is not None else []
        words += ["--other-weights"] if self.other_weights else []
        for option in ("include", "exclude", "stack", "convolution"):
            for glob in getattr(self, option):
                words += [f"--{option}", glob]
        return shlex.join(words)

    def to_json(self) -> str:
        """The report as a JSON object."""
        record = asdict(self)
        record["masksolve_version"] = self.versions["masksolve"]
        record["pattern"] = str(self.pattern)
        record["mean_kept_importance"] = self.mean_kept_importance
        record["optimal"] = self.optimal
        record["command"] = self.command
        for entry, tensor in zip(record["tensors"], self.tensors, strict=True):
            entry["kept_importance"] = tensor.kept_importance
        return json.dumps(record, indent=2) + "\n"
