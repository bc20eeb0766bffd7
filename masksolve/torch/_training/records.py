"""Records of refreshes: kept importance, flip rate and sparse architecture divergence of each layer, and the time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from masksolve._pattern import Pattern
from masksolve._words import counted
from masksolve.torch._dtensor import as_plain, is_sharded


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerRecord:
    """One parameter at one refresh.

    Attributes
    ----------
    name : str
        The parameter's.
    pattern : Pattern
        That of the new mask.
    kept_importance : float
        The share of the importance that the new mask keeps; 1.0 where all importance is zero.
    sad : int
        Sparse architecture divergence from the masks before (Zhou et al. 2021, arXiv 2102.04010): how many entries of
        the mask changed. 0 for the first mask.
    flip_rate : float
        The same as a share of the parameter's weights (Hu et al. 2024, arXiv 2404.01847).
    solved_on_cpu : int
        Tiles whose masks a GPU could not prove and left to the CPU; those of this process, of a sharded parameter. 0
        for weights on the CPU.
    """

    name: str
    pattern: Pattern
    kept_importance: float
    sad: int
    flip_rate: float
    solved_on_cpu: int

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict, the pattern as "N:M"."""
        return {**asdict(self), "pattern": str(self.pattern)}

    def __repr__(self) -> str:
        on_cpu = f", {counted(self.solved_on_cpu, 'tile')} solved on the CPU" if self.solved_on_cpu else ""
        return (
            f"LayerRecord({self.name!r}, {self.pattern}, kept importance {self.kept_importance:.2%}, flip rate "
            f"{self.flip_rate:.2%}{on_cpu})"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class RefreshRecord:
    """One refresh.

    Attributes
    ----------
    step : int
        Optimizer steps done; 0 for the first masks.
    seconds : float
        Duration of the refresh.
    share : float
        `seconds` as a share of the time since the end of the refresh before: the part of the training time that masks
        cost. nan for the first masks.
    layers : tuple of LayerRecord
    """

    step: int
    seconds: float
    share: float
    layers: tuple[LayerRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict, its layers as dicts too."""
        return {**asdict(self), "layers": tuple(layer.to_dict() for layer in self.layers)}

    def __repr__(self) -> str:
        kept, flips, _ = self.means().values()
        return (
            f"RefreshRecord(step {self.step}, {counted(len(self.layers), 'layer')}, mean kept importance {kept:.2%}, "
            f"mean flip rate {flips:.2%}, {self.seconds:.3g} s)"
        )

    def means(self) -> dict[str, float]:
        """Return the mean kept importance and the mean flip rate of the layers, and the seconds, for any logger.

        Examples
        --------
        >>> layer = LayerRecord(
        ...     name="fc.weight", pattern=Pattern(4, 8), kept_importance=0.75, sad=4, flip_rate=0.0625, solved_on_cpu=0
        ... )
        >>> RefreshRecord(step=40, seconds=0.002, share=0.01, layers=(layer,)).means()
        {'masks/kept_importance': 0.75, 'masks/flip_rate': 0.0625, 'masks/seconds': 0.002}
        """
        count = max(len(self.layers), 1)
        return {
            "masks/kept_importance": sum(layer.kept_importance for layer in self.layers) / count,
            "masks/flip_rate": sum(layer.flip_rate for layer in self.layers) / count,
            "masks/seconds": self.seconds,
        }

    def scalars(self) -> dict[str, float]:
        """Return all figures by name, for any logger.

        Examples
        --------
        >>> layer = LayerRecord(
        ...     name="fc.weight", pattern=Pattern(4, 8), kept_importance=0.75, sad=4, flip_rate=0.0625, solved_on_cpu=0
        ... )
        >>> record = RefreshRecord(step=40, seconds=0.002, share=0.01, layers=(layer,))
        >>> record
        RefreshRecord(step 40, 1 layer, mean kept importance 75.00%, mean flip rate 6.25%, 0.002 s)
        >>> record.scalars()
        {'masks/seconds': 0.002,
         'masks/share': 0.01,
         'masks/kept_importance/fc.weight': 0.75,
         'masks/sad/fc.weight': 4,
         'masks/flip_rate/fc.weight': 0.0625,
         'masks/solved_on_cpu/fc.weight': 0}
        """
        found = {"masks/seconds": self.seconds, "masks/share": self.share}
        for layer in self.layers:
            for figure in ("kept_importance", "sad", "flip_rate", "solved_on_cpu"):
                found[f"masks/{figure}/{layer.name}"] = getattr(layer, figure)
        return found


def count_changes(mask: Tensor, before: Tensor) -> int:
    """Count the entries in which two masks differ; shards of both lie in the same places."""
    changed = mask ^ before
    return int(as_plain(changed.sum()) if is_sharded(changed) else torch.count_nonzero(changed))
