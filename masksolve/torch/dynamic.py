"""Training of a sparse model without a pattern, by thresholds that are trained with the weights. Needs `torch`."""

from masksolve.torch._dynamic.records import DensityReport, LayerDensity
from masksolve.torch._dynamic.sparsifier import DynamicSparsifier

__all__ = ["DensityReport", "DynamicSparsifier", "LayerDensity"]
