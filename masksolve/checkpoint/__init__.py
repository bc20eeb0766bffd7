"""Safetensors checkpoints in, safetensors checkpoints out. Needs the extra `cli`."""

from masksolve.checkpoint._check import TensorCheck, check_checkpoint
from masksolve.checkpoint._file import CheckpointError, TensorInfo
from masksolve.checkpoint._prune import prune_checkpoint
from masksolve.checkpoint._report import PrunedTensor, PruneReport
from masksolve.checkpoint._selection import SkippedTensor

__all__ = [
    "CheckpointError",
    "PruneReport",
    "PrunedTensor",
    "SkippedTensor",
    "TensorCheck",
    "TensorInfo",
    "check_checkpoint",
    "prune_checkpoint",
]
