"""Checks of the first optimizer steps: that training has begun, and that every masked weight takes part."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from masksolve.torch._dtensor import is_sharded

_SAMPLES = 16


class _Version(NamedTuple):
    parameter: Tensor
    number: int


class FirstSteps:
    """A record of which parameters get gradients, which ones optimizers have and which ones change, for a few steps.

    Gradients are noted as they are computed: they may be gone when `step` is called, and `torch.autograd.grad` never
    leaves any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # By id, as adapters rename parameters; the parameters are held, so that no id is used again.
        self._versions = {id(each): _Version(each, each._version) for each in _trainable(model)}
        self._received: set[int] = set()
        self._stepped: set[int] = set()
        self._before: dict[int, tuple[Tensor, int, Tensor]] = {}
        # Python's collector does not see a cycle through PyTorch's hooks: one that held this object would keep it, the
        # model and the process group of DDP, with its threads, for ever.
        this = weakref.ref(self)
        self._hooks: list[RemovableHandle] = [each.register_hook(_noting(this, each)) for each in _trainable(model)]
        _hook_optimizers()
        with _LOCK:
            _WATCHING.add(self)

    def may_have_begun(self) -> bool:
        """Return whether there is any sign of training, or a reason why there may be none."""
        now = _trainable(self._model)
        # Those unfrozen or added since have no hook, and FSDP sets gradients behind every hook.
        if self._received or not now or any(id(each) not in self._versions or is_sharded(each) for each in now):
            return True
        return any(each.grad is not None or each._version != self._versions[id(each)].number for each in now)

    def untrained(self, parameters: Mapping[str, nn.Parameter]) -> list[str] | None:
        """Name those that got a gradient, but no optimizer has, in the first step that changed anything in the model.

        None as long as nothing changes, as where a GradScaler skips its first steps. Optimizers that are none of
        PyTorch's, or have copies of the parameters, are judged by what they change.
        """
        now = _trainable(self._model)
        if not self._received and any(id(each) not in self._versions or is_sharded(each) for each in now):
            # FSDP's gradients pass by every hook, and those of parameters that were added have none.
            return []
        stepped = self._stepped & {id(each) for each in self._model.parameters()}
        trained = {id(each) for each in self._model.parameters() if self._is_changed(each)} | stepped
        if not trained:
            return None
        return [
            name
            for name, each in parameters.items()
            if id(each) in self._received
            and id(each) not in trained
            and each.requires_grad
            # What other optimizers change in 16 bits may be lost in rounding.
            and (stepped or each.dtype.itemsize > 2)
        ]

    def forget(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before = [], {}
        with _LOCK:
            _WATCHING.discard(self)

    def receive(self, key: int) -> None:
        """Note that a parameter has got a gradient."""
        if not self._before:
            # Before the first optimizer step, but after all other changes of the model.
            self._before = {id(each): (each, each._version, _sample(each)) for each in _trainable(self._model)}
        self._received.add(key)

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note what an optimizer has, which is about to step."""
        self._stepped.update(id(each) for group in optimizer.param_groups for each in group["params"])

    def _is_changed(self, parameter: nn.Parameter) -> bool:
        if id(parameter) not in self._before:
            return False
        _, version, sample = self._before[id(parameter)]
        # Optimizers that write through `.data` or with their own kernels do not change the version.
        return parameter._version != version or not torch.equal(sample, _sample(parameter))


def _noting(this: weakref.ref[FirstSteps], parameter: Tensor) -> Callable[[Tensor], None]:
    key = id(parameter)

    def note(grad: Tensor) -> None:
        if (steps := this()) is not None:
            steps.receive(key)

    return note


# Those that want to know of optimizer steps, of whatever thread.
_WATCHING: weakref.WeakSet[FirstSteps] = weakref.WeakSet()
# Reentrant: while it is held, the collector may call what finalizes a Sparsifier.
_LOCK = threading.RLock()


@cache
def _hook_optimizers() -> None:
    """Let all optimizers tell of their steps, from now on: PyTorch cannot remove a hook while they do."""

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with _LOCK:
            watching = list(_WATCHING)
        for steps in watching:
            steps.note_step(optimizer)

    register_optimizer_step_pre_hook(note)


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
