"""Training of PyTorch models under N:M masks, and pruning of trained ones. Needs the extra `torch`."""

from masksolve._errors import NotInstalledError

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise NotInstalledError(
        f"masksolve.torch needs {error.name}, which is not installed; pip install 'masksolve[torch]'", name=error.name
    ) from error

from masksolve.torch._adaprune.adaprune import adaprune
from masksolve.torch._adaprune.records import AdaPruneReport, Conversion, PrunedLayer, RefinedBlock
from masksolve.torch._adaprune.tasks import patterns_from_zeros
from masksolve.torch._layers import ParameterReport
from masksolve.torch._permute.permute_model import permute_model
from masksolve.torch._permute.records import PermutedAxis, PermuteReport
from masksolve.torch._training.adapters import AdapterReport, add_adapters, merge_adapters
from masksolve.torch._training.decay_search import DecaySearch, find_decay
from masksolve.torch._training.finalize import finalize
from masksolve.torch._training.records import LayerRecord, RefreshRecord
from masksolve.torch._training.schedule import cubic_schedule
from masksolve.torch._training.sparse_linear import acceleration_reason
from masksolve.torch._training.sparse_state import sparse_state_dict
from masksolve.torch._training.sparsifier import Sparsifier
from masksolve.torch._training.torch_prune import semi_structured
from masksolve.torch._training.unbiased import minimum_variance_unbiased

__all__ = [
    "AdaPruneReport",
    "AdapterReport",
    "Conversion",
    "DecaySearch",
    "LayerRecord",
    "ParameterReport",
    "PermuteReport",
    "PermutedAxis",
    "PrunedLayer",
    "RefinedBlock",
    "RefreshRecord",
    "Sparsifier",
    "acceleration_reason",
    "adaprune",
    "add_adapters",
    "cubic_schedule",
    "finalize",
    "find_decay",
    "merge_adapters",
    "minimum_variance_unbiased",
    "patterns_from_zeros",
    "permute_model",
    "semi_structured",
    "sparse_state_dict",
]
