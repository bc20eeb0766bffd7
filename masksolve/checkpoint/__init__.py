"""Safetensors checkpoints in, safetensors checkpoints out, of any size. Needs the extra `cli`."""

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
from masksolve.checkpoint._html import page
from masksolve.checkpoint._masks import read_masks
from masksolve.checkpoint._pack import PackedTensor, PackReport, pack_checkpoint, unpack_checkpoint
from masksolve.checkpoint._plan import CheckpointPlan, PatternPlan, plan_checkpoint
from masksolve.checkpoint._prune import apply_masks, prune_checkpoint
from masksolve.checkpoint._quality import TileRecord
from masksolve.checkpoint._report import PrunedTensor, PruneReport, WorstTile
from masksolve.checkpoint._selection import SkippedTensor
from masksolve.checkpoint._workspace import AnotherRunError

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
