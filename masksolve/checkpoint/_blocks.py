"""The model of a Hugging Face folder, of whose blocks one at a time is loaded: no more is ever in memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, TensorInfo
from masksolve.checkpoint._layout import Checkpoint, read_checkpoint
from masksolve.checkpoint._record import RECORD
from masksolve.checkpoint._units import Unit, fill
from masksolve.checkpoint._work import hash_of_part
from masksolve.torch._adaprune.stack import NoStackError, Stack
from masksolve.torch._model_config import model_without_weights, renamer
from masksolve.torch._model_weights import Conversions, PartialWeights

AnyPath = str | os.PathLike[str]

# Of `adaprune`, beside the weights.
REPORT = "adaprune.json"

# Beside the weights that are written, dense ones in another format would pass for them.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")
# Of whole models, in whatever folder they lie; other weights of a folder in the folder are those of a module.
_EXPORTS = (".onnx", ".onnx_data", ".gguf", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel")
_EXPORT_FOLDERS = ("openvino", "coreml")

# Bytes of a large tensor; glibc's number of the option that says so.
_LARGE = 4 << 20
_M_MMAP_THRESHOLD = -3

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class BlockModel:
    """The model of a folder: weights outside of its blocks are mapped, and one block's at a time are loaded.

    Attributes
    ----------
    checkpoint : Checkpoint
    model : nn.Module
    stack : Stack
        It has yet to learn how the model calls its blocks.
    places : dict
        The file and the header's line of each tensor, by its name in the checkpoint.
    own : dict
        The names that the model has for these.
    largest_block : int
        Bytes of the weights of the largest block.
    changing : dict of int to list of TensorInfo
        The tensors that may change, by block, which derived classes find; those behind the blocks have the number
        after the last.
    """

    def __init__(self, folder: Path) -> None:
        if not any(folder.glob("*.safetensors")):
            raise NoStackError("it holds no .safetensors file")
        self.checkpoint = read_checkpoint(folder)
        self.places = {tensor.name: (file, tensor) for file in self.checkpoint.files for tensor in file.tensors}
        self.model = _skeleton(folder, self.checkpoint.tensors)
        try:
            self._weights = PartialWeights(self.model)
        except ImportError as error:
            raise NoStackError(f"this release of transformers loads weights in another way ({error})") from None
        self.stack = Stack(self.model)
        name_in_model = renamer(self.model)
        self.own = {name: name_in_model(name) for name in self.places}
        self.changing: dict[int, list[TensorInfo]] = {}
        sizes = [0] * len(self.stack.blocks)
        for name, (_, tensor) in self.places.items():
            block = self.stack.block_of(self.own[name])
            if block is not None and tensor.dtype not in DTYPES:
                raise NoStackError(f"{name} is stored as {tensor.dtype}")
            if block is not None:
                sizes[block] += tensor.nbytes
        self.largest_block = max(sizes)
        self._conversions = self._load_outside()

    @property
    def parts(self) -> list[int]:
        """The numbers of the parts in which anything may change, in their order."""
        return sorted(self.changing)

    def tensors_of(self, part: int) -> list[TensorInfo]:
        """Return the tensors of a part that repairs may change."""
        return self.changing.get(part, [])

    def load(self, part: int) -> Conversions:
        """Load the weights of a block; what is outside is there. Return what `stored` needs."""
        if part == len(self.stack.blocks):
            return self._conversions
        names = [name for name, own in self.own.items() if self.stack.block_of(own) == part]
        found = self._weights.load({name: self._read(name) for name in names})
        for name, parameter in self.stack.blocks[part].named_parameters():
            if parameter.is_meta:
                raise CheckpointError(f"{self.checkpoint.path} has no weights for {self.stack.path}.{part}.{name}")
        return found

    def unload(self, part: int) -> None:
        """Forget the weights of a block."""
        if part < len(self.stack.blocks):
            self._weights.unload([self.stack.blocks[part]])

    def stored(self, part: int, conversions: Conversions) -> dict[str, NDArray[np.uint8]]:
        """Return the bytes of the tensors of a part that repairs may change."""
        block = part if part < len(self.stack.blocks) else None
        loaded = {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if self.stack.block_of(name) == block
        }
        tensors = self.tensors_of(part)
        found = self._weights.stored(loaded, [tensor.name for tensor in tensors], conversions)
        for tensor in tensors:
            if tuple(found[tensor.name].shape) != tensor.shape:
                raise ValueError(
                    f"{tensor.name} cannot be written as it is stored: its shape would be "
                    f"{tuple(found[tensor.name].shape)}, not {tensor.shape}"
                )
        return {tensor.name: bytes_of(found[tensor.name].to(DTYPES[tensor.dtype])) for tensor in tensors}

    def file_of(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self.places[name][0].name

    def _load_outside(self) -> Conversions:
        """Map the weights outside of the blocks: what is not read takes no memory."""
        outside = {name for name, own in self.own.items() if self.stack.block_of(own) is None}
        tensors = {}
        for file in self.checkpoint.files:
            names = [tensor.name for tensor in file.tensors if tensor.name in outside]
            if names:
                with safe_open(self.checkpoint.folder / file.name, framework="pt") as shard:
                    tensors.update({name: shard.get_tensor(name) for name in names})
        found = self._weights.load(tensors)
        self._weights.tie()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and self.stack.block_of(name) is None:
                raise NoStackError(f"the checkpoint has no weights for {name}")
        return found

    def _read(self, name: str) -> Tensor:
        file, info = self.places[name]
        found = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        path = self.checkpoint.folder / file.name
        with path.open("rb", buffering=0) as shard:
            fill(shard, path, info.offset, bytes_of(found).data)
        return found


def units_of_parts(model: BlockModel, units: Sequence[Unit]) -> dict[int, dict[int, tuple[Unit, TensorInfo]]]:
    """Return the units, by number, of the tensors of each part that repairs may change, with these tensors."""
    places = {}
    for part in model.parts:
        for tensor in model.tensors_of(part):
            places[model.file_of(tensor.name), tensor.offset] = (part, tensor)
    found: dict[int, dict[int, tuple[Unit, TensorInfo]]] = {part: {} for part in model.parts}
    current: tuple[int, TensorInfo] | None = None
    for index, unit in enumerate(units):
        current = places.get((unit.file, unit.start), current)
        if current is not None and current[1].offset <= unit.start < current[1].offset + current[1].nbytes:
            part, tensor = current
            if model.file_of(tensor.name) == unit.file:
                found[part][index] = (unit, tensor)
    return found


def check_unchanged(
    model: BlockModel,
    part: int,
    conversions: Conversions,
    units: Mapping[int, tuple[Unit, TensorInfo]],
    fingerprints: Sequence[str],
) -> None:
    """Refuse weights that are not those of the input, or that their model does not give back as they are stored."""
    contents = model.stored(part, conversions)
    for index, (unit, tensor) in units.items():
        if hash_of_part(unit, tensor, contents[tensor.name]) != fingerprints[index]:
            raise CheckpointError(f"the input changed while it was read, or is stored otherwise: {unit.describe()}")


def is_copied(name: Path) -> bool:
    """Return whether a file of a folder, by its path in it, is neither weights nor what an earlier prune has left."""
    is_weights = len(name.parts) == 1 and name.name.endswith(_WEIGHTS)
    is_export = name.name.endswith(_EXPORTS) or name.parts[0] in _EXPORT_FOLDERS
    is_hidden = any(part.startswith(".") for part in name.parts)
    return not (is_weights or is_export or is_hidden) and str(name) not in (RECORD, REPORT)


def without_other_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without weights in other formats, and without the record, in whose place goes a new one."""
    shards = {file.name for file in checkpoint.files if file.tensors}
    index = {checkpoint.index.name} if checkpoint.index is not None else set()
    files = [file for file in checkpoint.files if file.name in shards | index or is_copied(Path(file.name))]
    return replace(checkpoint, files=tuple(files))


def _skeleton(folder: Path, tensors: Sequence[TensorInfo]) -> nn.Module:
    stored = next((DTYPES[each.dtype] for each in tensors if each.dtype in WEIGHT_DTYPES), torch.float32)
    try:
        model: Any = model_without_weights(folder, stored)
    except Exception as error:  # of any kind: it is another library's, and a file's that anybody wrote
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / 'config.json'} describes no model that transformers has ({type(error).__name__}: {text[:200]})"
        ) from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise NoStackError("its weights are quantized")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise NoStackError("it has batch norms")
    # A block's keys and values are for the tokens that come after it, of which there are none.
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, without a copy if they are contiguous."""
    found: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def map_large_tensors() -> None:
    """Let the C library map large tensors, where it can: the system then gets them back as soon as they are freed.

    By itself it stops doing so for tensors of up to 32 MiB once one of that size has been freed, and keeps what they
    leave.
    """
    _call_c_library("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def return_memory() -> None:
    """Give the system back what is free, where the C library can do that: fragments would add up."""
    _call_c_library("malloc_trim", 0)


def _call_c_library(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
