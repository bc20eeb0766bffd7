"""A safetensors file: what its header says, and its tensors as arrays on the file itself.

The safetensors library checks the file. The arrays are made here, because the library gives NumPy no bfloat16 and
no place in the file to write to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or nothing in it can be pruned."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it: safetensors dtype, shape, and where in the file its bytes begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file, in the order of the header.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, truncated or no safetensors file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a .safetensors file")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), 8 + header_size + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def open_tensor(path: Path, tensor: TensorInfo) -> NDArray[Any]:
    """A tensor of a weight dtype as a read-only array on the file: only the parts that are used are read."""
    return np.memmap(path, WEIGHT_DTYPES[tensor.dtype], mode="r", offset=tensor.offset, shape=tensor.shape)
