"""Safetensors checkpoints in, safetensors checkpoints out, of any size. Needs the extra `cli`."""

from masksolve.checkpoint._check import TensorCheck, check_checkpoint
from masksolve.checkpoint._engine import WorkerLostError, dask_executor
from masksolve.checkpoint._file import CheckpointError, TensorInfo
from masksolve.checkpoint._prune import apply_masks, prune_checkpoint
from masksolve.checkpoint._report import PrunedTensor, PruneReport
from masksolve.checkpoint._selection import SkippedTensor

__all__ = [
    "CheckpointError",
    "PruneReport",
    "PrunedTensor",
    "SkippedTensor",
    "TensorCheck",
    "TensorInfo",
    "WorkerLostError",
    "apply_masks",
    "check_checkpoint",
    "dask_executor",
    "prune_checkpoint",
]
