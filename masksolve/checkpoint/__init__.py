"""Safetensors checkpoints in, safetensors checkpoints out, of any size. Needs the extra `cli`.

`adaprune_checkpoint`, with its `CheckpointAdaPruneReport` and `NoStackError`, and `permute_checkpoint` need the extra
`transformers` too. PyTorch is imported when one of these names is first used, so `import *` leaves them out.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from masksolve._errors import NotInstalledError

try:
    import filelock  # noqa: F401
    import ml_dtypes  # noqa: F401
    import safetensors  # noqa: F401
    import xxhash  # noqa: F401
except ModuleNotFoundError as error:
    raise NotInstalledError(
        f"masksolve.checkpoint needs {error.name}, which is not installed; pip install 'masksolve[cli]'",
        name=error.name,
    ) from error

from masksolve.checkpoint._budget import CheckpointBudget, budget_checkpoint
from masksolve.checkpoint._check import CheckReport, TensorCheck, check_checkpoint
from masksolve.checkpoint._compare import Comparison, TensorComparison, compare_checkpoints
from masksolve.checkpoint._executors import WorkerLostError, dask_executor
from masksolve.checkpoint._file import CheckpointError, ChosenTensor, PrunedAs, TensorInfo
from masksolve.checkpoint._masks import read_masks
from masksolve.checkpoint._pack import PackedTensor, PackReport, pack_checkpoint, unpack_checkpoint
from masksolve.checkpoint._pages import page
from masksolve.checkpoint._plan import CheckpointPlan, PatternPlan, plan_checkpoint
from masksolve.checkpoint._prune import apply_masks, prune_checkpoint
from masksolve.checkpoint._quality import TileRecord
from masksolve.checkpoint._report import PrunedTensor, PruneReport, WorstTile
from masksolve.checkpoint._selection import SkippedTensor
from masksolve.checkpoint._workspace import AnotherRunError

if TYPE_CHECKING:
    from masksolve.checkpoint._adaprune import CheckpointAdaPruneReport as CheckpointAdaPruneReport
    from masksolve.checkpoint._adaprune import adaprune_checkpoint as adaprune_checkpoint
    from masksolve.checkpoint._permute import permute_checkpoint as permute_checkpoint
    from masksolve.torch._adaprune.stack import NoStackError as NoStackError

__all__ = [
    "AnotherRunError",
    "CheckReport",
    "CheckpointBudget",
    "CheckpointError",
    "CheckpointPlan",
    "ChosenTensor",
    "Comparison",
    "PackReport",
    "PackedTensor",
    "PatternPlan",
    "PruneReport",
    "PrunedAs",
    "PrunedTensor",
    "SkippedTensor",
    "TensorCheck",
    "TensorComparison",
    "TensorInfo",
    "TileRecord",
    "WorkerLostError",
    "WorstTile",
    "apply_masks",
    "budget_checkpoint",
    "check_checkpoint",
    "compare_checkpoints",
    "dask_executor",
    "pack_checkpoint",
    "page",
    "plan_checkpoint",
    "prune_checkpoint",
    "read_masks",
    "unpack_checkpoint",
]

_WITH_TORCH = {
    "CheckpointAdaPruneReport": "_adaprune",
    "NoStackError": "_adaprune",
    "adaprune_checkpoint": "_adaprune",
    "permute_checkpoint": "_permute",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # It names its extra where PyTorch is missing.
    import_module("masksolve.torch")
    value = getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_TORCH})
