"""Training PyTorch models under transposable N:M masks. Needs the extra `torch`."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("masksolve.torch needs torch, which is not installed; pip install 'masksolve[torch]'") from error

from masksolve.torch._bridge import transposable
from masksolve.torch._layers import ParameterReport
from masksolve.torch._records import LayerRecord, RefreshRecord
from masksolve.torch._removal import finalize
from masksolve.torch._semi_structured import acceleration_reason
from masksolve.torch._sparsifier import Sparsifier

__all__ = [
    "LayerRecord",
    "ParameterReport",
    "RefreshRecord",
    "Sparsifier",
    "acceleration_reason",
    "finalize",
    "transposable",
]
