"""Tensors in memory up to a cap, in temporary files beyond it: cached inputs of one weight, outputs of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from masksolve.torch._adaprune.source import Source


class TensorStore:
    """Copies of tensors, on the device or in temporary files.

    Use it in a `with` statement, which deletes the files.

    Parameters
    ----------
    cap : int
        Bytes to keep in memory.
    """

    def __init__(self, cap: int) -> None:
        self._free = cap
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def spilled(self) -> int:
        """The number of tensors on disk."""
        return 0 if self._folder is None else len(list(Path(self._folder.name).iterdir()))

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy, which is on the CPU if it is in a file."""
        size = tensor.numel() * tensor.element_size()
        if size <= self._free:
            self._free -= size
            return tensor.clone()
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="masksolve-")
        path = Path(self._folder.name) / f"{self.spilled}.pt"
        torch.save(tensor.contiguous().clone(), path)
        found: Tensor = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return found


class InputPool(TensorStore):
    """The samples that a weight was multiplied with: rows of a Linear's input, images of a convolution's."""

    def __init__(self, cap: int) -> None:
        super().__init__(cap)
        self._parts: list[Tensor] = []
        self._groups: list[range] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts = []
        super().__exit__(kind, error, trace)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the samples."""
        return self._parts[0].dtype

    def add(self, source: Source, x: Tensor, groups: range) -> None:
        """Keep the input of one call or product."""
        module = source.owner
        self._groups.append(groups)
        if isinstance(module, _ConvNd):
            samples = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
        else:
            samples = x.reshape(-1, x.shape[-1])
        self._parts.append(self.keep(samples))

    def take(self, chosen: Tensor) -> Iterator[tuple[Tensor, range]]:
        """Yield samples by number and the groups that they are for, those of equal shape and groups in one tensor."""
        starts = torch.tensor([0, *map(len, self._parts)]).cumsum(0)
        part_of = torch.bucketize(chosen, starts[1:], right=True)
        taken: dict[tuple[tuple[int, ...], range], list[Tensor]] = {}
        for number in part_of.unique().tolist():
            part = self._parts[number]
            mine = part[(chosen[part_of == number] - starts[number]).to(part.device)]
            taken.setdefault((tuple(part.shape[1:]), self._groups[number]), []).append(mine)
        for (_, groups), samples in taken.items():
            yield torch.cat([each.to(self._parts[0].device) for each in samples]), groups
