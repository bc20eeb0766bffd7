"""What a prune did, tensor by tensor, as records and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from masksolve._pattern import Pattern
from masksolve.checkpoint._selection import SkippedTensor


@dataclass(frozen=True)
class PrunedTensor:
    """A tensor that was pruned.

    Attributes
    ----------
    name, dtype, shape
        As in the checkpoint; dtype in safetensors' words ("F32").
    importance : float
        Sum of abs(weights) before.
    kept : float
        Sum of abs(weights) after.
    gap : float
        How far kept is from the optimum, as `masksolve.certify` bounds it: 0.0 when optimal.
    optimal : bool
        Proven optimal in every tile.
    solve_seconds, certify_seconds : float
        Time spent.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    importance: float
    kept: float
    gap: float
    optimal: bool
    solve_seconds: float
    certify_seconds: float

    @property
    def kept_share(self) -> float:
        """Kept importance as a share of all importance; 1.0 for a tensor of zeros."""
        return self.kept / self.importance if self.importance > 0 else 1.0


@dataclass(frozen=True)
class PruneReport:
    """What `prune_checkpoint` did, with what is needed to do it again."""

    masksolve_version: str
    input: str
    output: str
    pattern: Pattern
    method: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    tensors: tuple[PrunedTensor, ...]
    skipped: tuple[SkippedTensor, ...]

    @property
    def mean_kept_share(self) -> float:
        """Mean over the pruned tensors of their kept importance as a share."""
        return sum(tensor.kept_share for tensor in self.tensors) / len(self.tensors)

    @property
    def optimal(self) -> bool:
        """Whether every tile of every pruned tensor is proven optimal."""
        return all(tensor.optimal for tensor in self.tensors)

    def to_json(self) -> str:
        """The report as a JSON object."""
        record = asdict(self)
        record["pattern"] = str(self.pattern)
        record["mean_kept_share"] = self.mean_kept_share
        record["optimal"] = self.optimal
        for entry, tensor in zip(record["tensors"], self.tensors, strict=True):
            entry["kept_share"] = tensor.kept_share
        return json.dumps(record, indent=2) + "\n"

    def write_json(self, path: Path) -> None:
        """Write the report as a JSON file."""
        path.write_text(self.to_json(), encoding="utf-8")
