"""Cached inputs of one weight: in memory up to a cap, in temporary files beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from masksolve.torch._adaprune.source import Source


class InputPool:
    """The samples that a weight was multiplied with: rows of a Linear's input, images of a convolution's.

    Use it in a `with` statement, which deletes the files.

    Parameters
    ----------
    cap : int
        Bytes to keep in memory.
    """

    def __init__(self, cap: int) -> None:
        self._free = cap
        self._parts: list[Tensor] = []
        self._groups: list[range] = []
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> InputPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts = []
        if self._folder is not None:
            self._folder.cleanup()

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the samples."""
        return self._parts[0].dtype

    @property
    def spilled(self) -> int:
        """The number of parts on disk."""
        return 0 if self._folder is None else len(list(Path(self._folder.name).iterdir()))

    def add(self, source: Source, x: Tensor, groups: range) -> None:
        """Keep the input of one call or product."""
        module = source.owner
        self._groups.append(groups)
        if isinstance(module, _ConvNd):
            samples = x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)
        else:
            samples = x.reshape(-1, x.shape[-1])
        size = samples.numel() * samples.element_size()
        if size <= self._free:
            self._free -= size
            self._parts.append(samples.clone())
            return
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="masksolve-")
        path = Path(self._folder.name) / f"{len(self._parts)}.pt"
        torch.save(samples.contiguous().clone(), path)
        self._parts.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True))

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
