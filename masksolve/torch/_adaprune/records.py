"""What AdaPrune reports: every layer, its errors before and after, and why the others were left alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from masksolve._pattern import Pattern
from masksolve.torch._layers import ParameterReport


@dataclass(frozen=True)
class Conversion:
    """How far a layer with zeros already was N:M.

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


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer.

    Attributes
    ----------
    name : str
        The weight's.
    shape : tuple of int
    pattern : Pattern
    kept_importance : float
        The share of the importance that its mask keeps; of abs(weight), if the mask was given.
    error_before, error_after : float
        What its output is off by, squared, over the calibration inputs: ‖W X − (S∘W′) X‖² / ‖W X‖², with the bias in
        the numerator. Before and after the repair.
    alternations : tuple of float
        The errors that masks found anew from the repaired weights led to; the last is left aside if it is no lower.
    conversion : Conversion or None
        None where no weight was zero.
    seconds : float
        For the mask and the repair, without the model's own passes.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    kept_importance: float
    error_before: float
    error_after: float
    alternations: tuple[float, ...]
    conversion: Conversion | None
    seconds: float


@dataclass(frozen=True)
class AdaPruneReport:
    """What `adaprune` did.

    Attributes
    ----------
    layers : tuple of PrunedLayer
        In the order of execution.
    skipped : tuple of ParameterReport
        Every other parameter, with the reason.
    batch_norms : tuple of str
        Those whose statistics were re-estimated.
    interrupted : bool
        Whether Ctrl-C came before the end: what `layers` lists is done, the rest as it was.
    seconds : float
        All of it.
    """

    layers: tuple[PrunedLayer, ...]
    skipped: tuple[ParameterReport, ...]
    batch_norms: tuple[str, ...]
    interrupted: bool
    seconds: float

    def to_json(self) -> str:
        """The report as a JSON object."""
        record = asdict(self)
        for entry, layer in zip(record["layers"], self.layers, strict=True):
            entry["pattern"] = str(layer.pattern)
        return json.dumps(record, indent=2) + "\n"
