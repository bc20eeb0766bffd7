"""The report of AdaPrune: every layer, its errors before and after, and why the others were skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from masksolve._pattern import Pattern
from masksolve._tiles import Direction
from masksolve._words import counted, one_sided
from masksolve.torch._layers import ParameterReport


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The extent to which a layer that had zeros was N:M already.

    Attributes
    ----------
    sparsity : float
        The share of its weights that was zero.
    fitting : float
        The share of its tiles (of its groups, one-sided) that already kept at most n, and so had nothing pruned.
    odds : float
        What `masksolve.odds` predicts for that from the sparsity: `tile_odds` or `group_odds`.
    touched : int
        How many of its weights were not zero, and are pruned now.
    """

    sparsity: float
    fitting: float
    odds: float
    touched: int

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class PrunedLayer:
    """One layer: its mask, and its error before and after the repair.

    Attributes
    ----------
    name : str
        The weight's.
    shape : tuple of int
    pattern : Pattern
    kept_importance : float
        The share of the importance that its mask keeps.
    tokens : tuple of int
        How many inputs each of its matrices gets: one number for a Linear, one for each expert of a stack. Of a
        convolution, windows are counted.
    error_before, error_after : float
        The relative squared error of its output over the calibration inputs: ‖W X − (S∘W′) X‖² / ‖W X‖², with the bias
        in the numerator. Before and after the repair, and before its block is refined.
    alternations : tuple of float
        The errors with masks found again from the repaired weights; the last is discarded if it is not lower.
    conversion : Conversion or None
        None where no weight was zero.
    seconds : float
        For the mask and the repair, without the model's own passes.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    kept_importance: float
    tokens: tuple[int, ...]
    error_before: float
    error_after: float
    alternations: tuple[float, ...]
    conversion: Conversion | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict that `json.dumps` takes: the pattern as "N:M", the conversion as a dict."""
        return {**asdict(self), "pattern": str(self.pattern)}

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return (
            f"PrunedLayer({self.name!r}, {shape}, {self.pattern}, kept importance {self.kept_importance:.2%}, "
            f"error {self.error_before:.2%} -> {self.error_after:.2%})"
        )


@dataclass(frozen=True, repr=False)
class RefinedBlock:
    """A block whose layers were trained together, once each was repaired by itself.

    Attributes
    ----------
    name : str
        The module's.
    error_before, error_after : float
        The relative squared error of its output, against that of the dense model's block, over the calibration batches
        that were held out; what earlier blocks lose is in it. Equal where training served those batches no better: the
        block stays as it was.
    passes : tuple of float
        That error after each pass over the other batches.
    seconds : float
    """

    name: str
    error_before: float
    error_after: float
    passes: tuple[float, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"RefinedBlock({self.name!r}, error {self.error_before:.2%} -> {self.error_after:.2%})"


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaPruneReport:
    """The layers that `adaprune` pruned, and why it skipped the others.

    Attributes
    ----------
    direction : {"both", "rows", "columns"}
        "both": transposable masks.
    layers : tuple of PrunedLayer
        In the order of execution.
    blocks : tuple of RefinedBlock
        In the order of execution; none without refine="block".
    skipped : tuple of ParameterReport
        Every other parameter, with the reason.
    batch_norms : tuple of str
        Names of those whose statistics were re-estimated.
    interrupted : bool
        Whether Ctrl-C came before the end: what `layers` lists is done, the rest as it was.
    seconds : float
        Duration of the whole call.
    """

    direction: Direction
    layers: tuple[PrunedLayer, ...]
    blocks: tuple[RefinedBlock, ...]
    skipped: tuple[ParameterReport, ...]
    batch_norms: tuple[str, ...]
    interrupted: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict that `json.dumps` takes, layers and skipped parameters as dicts too."""
        return {**asdict(self), "layers": tuple(layer.to_dict() for layer in self.layers)}

    def __repr__(self) -> str:
        before, after = (
            sum(getattr(layer, error) for layer in self.layers) / max(len(self.layers), 1)
            for error in ("error_before", "error_after")
        )
        return (
            f"AdaPruneReport({counted(len(self.layers), 'layer')} pruned{one_sided(self.direction)}, "
            f"{counted(len(self.skipped), 'parameter')} skipped, mean error "
            f"{before:.2%} -> {after:.2%}, {self.seconds:.3g} s{', interrupted' if self.interrupted else ''})"
        )
