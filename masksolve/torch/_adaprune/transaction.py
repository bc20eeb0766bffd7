"""The changes that AdaPrune makes to a model, and those that an error undoes, or Ctrl-C unless they are finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from masksolve.torch._adaprune.layer import LayerRepair
from masksolve.torch._adaprune.records import PrunedLayer, RefinedBlock
from masksolve.torch._adaprune.tasks import Task


class Repairs:
    """The repairs of layers, as far as they have come.

    Attributes
    ----------
    layers : list of PrunedLayer
        The records of the repairs that are written.
    """

    def __init__(self) -> None:
        self.layers: list[PrunedLayer] = []
        self._found: list[tuple[Task, LayerRepair]] = []

    def add(self, task: Task, repair: LayerRepair) -> None:
        """Take up a repair, to be written by `write`."""
        self._found.append((task, repair))

    def write(self) -> None:
        """Write the values of all repairs taken up since the last call into the model."""
        while self._found:
            # One whose write is interrupted is not tried again: it is undone.
            task, repair = self._found.pop(0)
            with torch.no_grad():
                # Biases that are not corrected have no value, and stay.
                for parameter, value in zip(task.parameters, repair.values, strict=False):
                    parameter.copy_(value)
            self.layers.append(repair.record)


class Transaction(Repairs):
    """Repairs of layers and moves of batch norms that are undone if it comes to that.

    Use it in a `with` statement. A KeyboardInterrupt ends that without an error: what is finished stays, repairs that
    are found but not yet written are written, everything else is as it was. Any other error leaves nothing changed.

    Parameters
    ----------
    tasks : sequence of Task
    norms : sequence of nn.Module
        Batch norms, of which the buffers may change.

    Attributes
    ----------
    blocks : list of RefinedBlock
        The records of the blocks that are refined.
    moved_norms : list of nn.Module
        The batch norms that have moved.
    interrupted : bool
        Whether Ctrl-C ended it.
    """

    def __init__(self, tasks: Sequence[Task], norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks: list[RefinedBlock] = []
        self.moved_norms: list[nn.Module] = []
        self.interrupted = False
        self._tasks, self._norms = tasks, norms
        tensors = [*_parameters(tasks), *_buffers(norms)]
        self._saved = {tensor: tensor.detach().clone() for tensor in tensors}

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None:
            return False
        if not issubclass(kind, KeyboardInterrupt):
            _restore(self._saved, self._saved)
            return False
        self.interrupted = True
        self.write()
        standing = [norm for norm in self._norms if norm not in self.moved_norms]
        _restore(self._saved, [*_parameters(self.unfinished), *_buffers(standing)])
        return True

    @property
    def unfinished(self) -> list[Task]:
        """The tasks whose repairs are not written."""
        done = {layer.name for layer in self.layers}
        return [task for task in self._tasks if task.name not in done]

    def refine(self, record: RefinedBlock, values: Mapping[Tensor, Tensor]) -> None:
        """Write the values that a block gets when all its repairs are written."""
        repaired = {parameter: parameter.detach().clone() for parameter in values}
        try:
            _restore(values, values)
            self.blocks.append(record)
        except BaseException:
            # Nothing but an interrupt comes here; half a block was never refined.
            _restore(repaired, repaired)
            raise


def _parameters(tasks: Iterable[Task]) -> list[Tensor]:
    return [parameter for task in tasks for parameter in task.parameters]


def _buffers(norms: Iterable[nn.Module]) -> list[Tensor]:
    return [buffer for norm in norms for buffer in norm.buffers()]


def _restore(saved: Mapping[Tensor, Tensor], tensors: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(saved[tensor])
