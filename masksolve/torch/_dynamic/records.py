"""What `DynamicSparsifier` reports: how many weights each layer keeps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from masksolve._words import counted
from masksolve.torch._layers import ParameterReport


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerDensity:
    """One weight under thresholds.

    Attributes
    ----------
    name : str
        The weight's.
    shape : tuple of int
    kept : int
        How many of its entries are above their thresholds.
    density : float
        The same as a share.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    density: float

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"LayerDensity({self.name!r}, {shape}, {self.kept:,} kept, density {self.density:.2%})"


@dataclass(frozen=True, kw_only=True, repr=False)
class DensityReport:
    """All weights under thresholds at one moment.

    Attributes
    ----------
    step : int or None
        What `record` was called with; None for what `report` returns.
    layers : tuple of LayerDensity
        A tied weight once.
    skipped : tuple of ParameterReport
        The parameters that stay dense, and why.
    """

    step: int | None
    layers: tuple[LayerDensity, ...]
    skipped: tuple[ParameterReport, ...]

    @property
    def kept(self) -> int:
        """How many entries all layers keep together."""
        return sum(layer.kept for layer in self.layers)

    @property
    def density(self) -> float:
        """The same as a share of all entries of the layers; skipped parameters do not count."""
        return self.kept / sum(math.prod(layer.shape) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict, its lines as dicts too, with `kept` and `density`."""
        return {
            "step": self.step,
            "kept": self.kept,
            "density": self.density,
            "layers": tuple(layer.to_dict() for layer in self.layers),
            "skipped": tuple(line.to_dict() for line in self.skipped),
        }

    def scalars(self) -> dict[str, float]:
        """Return all densities by name, for any logger.

        Examples
        --------
        >>> layer = LayerDensity(name="fc.weight", shape=(4, 8), kept=8, density=0.25)
        >>> DensityReport(step=40, layers=(layer,), skipped=()).scalars()
        {'masks/density': 0.25, 'masks/density/fc.weight': 0.25}
        """
        return {"masks/density": self.density} | {f"masks/density/{each.name}": each.density for each in self.layers}

    def __repr__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        return (
            f"DensityReport({step}{counted(len(self.layers), 'layer')}, {self.kept:,} kept, density {self.density:.2%})"
        )
