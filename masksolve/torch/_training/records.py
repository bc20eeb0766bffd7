"""What a trainer watches: kept importance, flip rate and sparse architecture divergence of each layer, and the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from masksolve.torch._dtensor import as_plain, is_sharded


@dataclass(frozen=True)
class LayerRecord:
    """One parameter at one refresh.

    Attributes
    ----------
    name : str
        The parameter's.
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
    kept_importance: float
    sad: int
    flip_rate: float
    solved_on_cpu: int


@dataclass(frozen=True)
class RefreshRecord:
    """One refresh.

    Attributes
    ----------
    step : int
        Optimizer steps done; 0 for the first masks.
    seconds : float
        What the refresh took.
    share : float
        `seconds` as a share of the time since the refresh before, itself included: the part of the training time that
        masks cost. nan for the first masks.
    layers : tuple of LayerRecord
    """

    step: int
    seconds: float
    share: float
    layers: tuple[LayerRecord, ...]

    def scalars(self) -> dict[str, float]:
        """All figures by name, for any logger.

        Examples
        --------
        >>> layer = LayerRecord("fc.weight", kept_importance=0.75, sad=4, flip_rate=0.0625, solved_on_cpu=0)
        >>> RefreshRecord(40, seconds=0.002, share=0.01, layers=(layer,)).scalars()
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
    """How many entries of two masks differ; shards of both lie in the same places."""
    changed = mask ^ before
    return int(as_plain(changed.sum()) if is_sharded(changed) else torch.count_nonzero(changed))
