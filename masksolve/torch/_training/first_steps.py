"""Checks of the first optimizer steps: that training has begun, and that every masked weight takes part."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from masksolve.torch._dtensor import is_sharded

_SAMPLES = 16
# Bytes of the floats in which any step is seen.
_EXACT = 4


class _Version(NamedTuple):
    parameter: Tensor
    number: int


class FirstSteps:
    """A record of which parameters get gradients and which ones change, until a step has changed any.

    Gradients are noted as they are computed: they may be gone when `step` is called, and `torch.autograd.grad` never
    leaves any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # By id, as adapters rename parameters; the parameters are held, so that no id is used again.
        self._versions = {id(each): _Version(each, each._version) for each in _trainable(model)}
        self._received: set[int] = set()
        self._before: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._hooks: list[RemovableHandle] = [each.register_hook(self._note(id(each))) for each in _trainable(model)]

    def may_have_begun(self) -> bool:
        """Return whether there is any sign of training, or a reason why there may be none."""
        now = _trainable(self._model)
        # Those unfrozen or added since have no hook, and FSDP sets gradients behind every hook.
        if self._received or not now or any(id(each) not in self._versions or is_sharded(each) for each in now):
            return True
        return any(each.grad is not None or each._version != self._versions[id(each)].number for each in now)

    def untrained(self, parameters: Mapping[str, nn.Parameter]) -> list[str] | None:
        """Name those that got a gradient but stood still in the first step that changed any parameter of the model.

        None as long as nothing changes, as where a GradScaler skips its first steps.
        """
        changed = {id(each) for each in self._model.parameters() if self._is_changed(each)}
        if not changed:
            return None
        # A fused optimizer leaves versions as they are, and its first steps may be lost in the rounding of 16 bits.
        may_round = not any(self._has_new_version(each) for each in self._model.parameters())
        return [
            name
            for name, each in parameters.items()
            if id(each) in self._received
            and id(each) not in changed
            and each.requires_grad
            and not (may_round and each.dtype.itemsize < _EXACT)
        ]

    def forget(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before = [], {}

    def _note(self, key: int) -> Callable[[Tensor], None]:
        # Python's collector does not see a cycle through PyTorch's hooks: one that held this object would keep it, the
        # model and the process group of DDP, with its threads, for ever.
        this = weakref.ref(self)

        def note(grad: Tensor) -> None:
            if (steps := this()) is not None:
                steps._receive(key)

        return note

    def _receive(self, key: int) -> None:
        if not self._before:
            # Before the first optimizer step, but after all other changes of the model.
            self._before = {id(each): (each, each._version, _sample(each)) for each in _trainable(self._model)}
        self._received.add(key)

    def _is_changed(self, parameter: nn.Parameter) -> bool:
        if id(parameter) not in self._before:
            return False
        # Optimizers that write through `.data` or with their own kernels do not change the version.
        return self._has_new_version(parameter) or not torch.equal(self._before[id(parameter)][2], _sample(parameter))

    def _has_new_version(self, parameter: nn.Parameter) -> bool:
        found = self._before.get(id(parameter))
        return found is not None and found[1] != parameter._version


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad and not is_lazy(each)]


def _sample(parameter: nn.Parameter) -> Tensor:
    """Return a few of the values."""
    values = parameter.detach()
    if is_sharded(values):
        values = values.to_local()
    count = min(_SAMPLES, values.numel())
    places = torch.linspace(0, max(values.numel() - 1, 0), count, device=values.device).long()
    return values[torch.unravel_index(places, values.shape)] if values.ndim else values.clone()
