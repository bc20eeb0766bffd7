"""A checkpoint: one safetensors file, or a folder of shards with an index, as Hugging Face lays it out."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from masksolve.checkpoint._file import CheckpointError, Header, TensorInfo, parse_json, read_header

# What its name ends with: "model" is before it, or another name, as in folders of diffusers.
_INDEX = ".safetensors.index.json"
# Under this name in the metadata of a shard, and of an index, stands how it was packed.
PACKED = "masksolve_packed"
_NO_HEADER = Header((), {})


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a checkpoint: its name relative to the folder, its size, and what its header says if it is a shard."""

    name: str
    size: int
    header: Header = _NO_HEADER

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors in it, in the order of the header."""
        return self.header.tensors


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint. A single file is a folder's one shard; only `path` tells them apart."""

    path: Path
    files: tuple[CheckpointFile, ...]

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder; otherwise a single file."""
        return self.path.is_dir()

    @property
    def folder(self) -> Path:
        """The folder to which the names of the files are relative."""
        return self.path if self.is_folder else self.path.parent

    @property
    def index(self) -> CheckpointFile | None:
        """The file that says which tensors are in which shard, if there is one."""
        found = (file for file in self.files if file.name.endswith(_INDEX) and "/" not in file.name)
        return next(found, None) if self.is_folder else None

    @property
    def tensors(self) -> list[TensorInfo]:
        """The tensors of all shards."""
        return [tensor for file in self.files for tensor in file.tensors]


def read_checkpoint(path: Path, *, packed: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint and check them against its index.

    Raises
    ------
    CheckpointError
        If a file is missing or not a whole safetensors file, or the index and the shards contradict each other; if it
        is packed and is not to be, or the other way round.
    """
    checkpoint = _read(path)
    is_packed = any(PACKED in file.header.metadata for file in checkpoint.files)
    if is_packed and not packed:
        raise CheckpointError(f"{path} is packed: it holds values and bits instead of weights; unpack it first")
    if packed and not is_packed:
        raise CheckpointError(f"{path} is not packed; name a checkpoint that was packed")
    return checkpoint


def _read(path: Path) -> Checkpoint:
    if not path.is_dir():
        return Checkpoint(path, (_shard(path.parent, path.name),))
    others = _files_in(path)
    loose = [name for name in others if name.endswith(".safetensors") and "/" not in name]
    indexes = [name for name in others if name.endswith(_INDEX) and "/" not in name]
    if len(indexes) > 1:
        raise CheckpointError(f"{path} holds {' and '.join(indexes)}; move all but one away, with their shards")
    if indexes:
        shards = _indexed_shards(path / indexes[0], others, loose)
    elif len(loose) == 1:
        shards = [_shard(path, loose[0])]
    elif loose:
        raise CheckpointError(f"{path} holds {len(loose)} .safetensors files and no index; name one of the files")
    else:
        raise CheckpointError(f"{path} is a folder without a .safetensors file; name a checkpoint")
    names = {shard.name for shard in shards}
    rest = [CheckpointFile(name, (path / name).stat().st_size) for name in others if name not in names]
    return Checkpoint(path, (*shards, *rest))


def _files_in(path: Path) -> list[str]:
    """Return the names of all files in a folder; links, of which caches of downloads are full, are followed."""

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None

    names = []
    for folder, _, files in os.walk(path, onerror=refuse, followlinks=True):
        for file in (Path(folder, name) for name in files):
            if not file.is_file():
                raise CheckpointError(f"{file} is a broken link, or not a file to copy; mend or remove it")
            names.append(file.relative_to(path).as_posix())
    return sorted(names)


def _shard(folder: Path, name: str) -> CheckpointFile:
    header = read_header(folder / name)
    return CheckpointFile(name, (folder / name).stat().st_size, header)


def _indexed_shards(index: Path, files: Collection[str], loose: Collection[str]) -> list[CheckpointFile]:
    folder = index.parent
    weight_map = parse_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to shards")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if name not in files:
            raise CheckpointError(
                f"{index} names the shard {name!r}, which the folder does not hold; download it again"
            )
    for name in loose:
        if name not in names:
            raise CheckpointError(
                f"{folder / name} is not named in {index.name}, so its tensors would stay as they are; "
                "add it to the index, or move it away"
            )
    shards = [_shard(folder, name) for name in sorted(names)]
    held = {tensor.name for shard in shards for tensor in shard.tensors}
    for tensor in weight_map:
        if tensor not in held:
            raise CheckpointError(f"{index} names the tensor {tensor!r}, which no shard has")
    for shard in shards:
        for info in shard.tensors:
            if weight_map.get(info.name) != shard.name:
                said = f"says is in {weight_map[info.name]!r}" if info.name in weight_map else "does not name"
                raise CheckpointError(f"{folder / shard.name} has the tensor {info.name!r}, which {index.name} {said}")
    return shards
