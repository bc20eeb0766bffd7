"""Filters cut out of a model, so that it is smaller and dense: Provable Filter Pruning, and norms. Needs `torch`."""

from masksolve.torch._filters.bound import enough_draws
from masksolve.torch._filters.prune import prune_filters
from masksolve.torch._filters.records import ChannelGroup, FilteredLayer, FilterReport

__all__ = ["ChannelGroup", "FilterReport", "FilteredLayer", "enough_draws", "prune_filters"]
