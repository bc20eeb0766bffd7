"""The inputs that weights are multiplied with inside a forward, however its code gets at them.

Attentions, recurrent layers and stacks of experts call no layer for their products: code of PyTorch and transformers
multiplies with views of the weights. A dispatch mode sees each operation; those whose operand lies in a watched
weight's memory, with the axes of some of its matrices, show the inputs. No routing is computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from masksolve.torch._adaprune.source import Source

_aten = torch.ops.aten
# The places of both factors among the arguments.
_FACTORS = {
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.mv: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.addmv: (1, 2),
}

# Gets a source, rows of inputs and the groups of its weight that they are multiplied with.
Show = Callable[[Source, Tensor, range], None]


class Products(TorchDispatchMode):
    """Shows the rows that the weights of some sources are multiplied with, within the context.

    Parameters
    ----------
    sources : iterable of Source
    show : callable
        Called before each product.
    hidden : dict
        Gets the name of an operation that reads a source's weight and does not show its inputs.
    """

    def __init__(self, sources: Iterable[Source], show: Show, hidden: dict[Source, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._show, self._hidden = show, hidden
        self._watched: dict[int, list[tuple[Source, Tensor]]] = {}
        for source in sources:
            operators = source.operators
            self._watched.setdefault(_storage(operators), []).append((source, operators))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = [tensor for tensor in _tensors((args, kwargs)) if _storage(tensor) in self._watched]
        if not reads:
            return func(*args, **kwargs)
        # In inference mode a linear or an LSTM arrives whole.
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        sources = {
            source: operators
            for read in reads
            for source, operators in self._watched[_storage(read)]
            # Several may share their memory.
            if 0 <= read.storage_offset() - operators.storage_offset() < operators.numel()
        }
        shown = {source for source, operators in sources.items() if self._shows(func, args, source, operators)}
        found = func(*args, **kwargs)
        if not any(_storage(tensor) in self._watched for tensor in _tensors(found)):
            for source in sources.keys() - shown:
                self._hidden.setdefault(source, str(func.overloadpacket))
        return found

    def _shows(self, func: Any, args: Any, source: Source, operators: Tensor) -> bool:
        """Show the rows of a product with a source's weight; return whether it is one."""
        if func.overloadpacket not in _FACTORS:
            return False
        left, right = (args[place] for place in _FACTORS[func.overloadpacket])
        if right.ndim == 1:
            right = right.unsqueeze(1)
        for rows, operand in ((left, right), (right.mT, left.mT)):
            if _storage(operand) != _storage(operators):
                continue
            if operand.ndim == 3 and operand.stride(0) == 0:
                rows, operand = rows.flatten(0, 1), operand[0]
            groups = _groups_of(operand, operators)
            if groups is None:
                return False
            if rows.ndim == 2:
                self._show(source, rows, groups)
                return True
            for group, mine in zip(groups, rows, strict=True):
                # Llama 4 multiplies every token with every expert, those of other experts as zeros.
                self._show(source, mine[mine.any(1)], range(group, group + 1))
            return True
        return False


def _groups_of(operand: Tensor, operators: Tensor) -> range | None:
    """Return which matrices lie in an operand, transposed: (inputs, outputs) of one or more, or a batch of those."""
    if operand.ndim == 3:
        first = _groups_of(operand[0], operators)
        if first is None or len(first) != 1 or (len(operand) > 1 and operand.stride(0) != operators.stride(0)):
            return None
        return range(first.start, first.start + len(operand))
    groups, outputs, inputs = operators.shape
    count, rest = divmod(operand.shape[1], outputs)
    if operand.shape[0] != inputs or rest or count > groups:
        return None
    if operand.stride() != (operators.stride(2), operators.stride(1)):
        return None
    if count > 1 and operators.stride(0) != outputs * operators.stride(1):
        return None
    start, rest = divmod(int(operand.storage_offset() - operators.storage_offset()), operators.stride(0))
    return None if rest else range(start, start + count)


@contextmanager
def plain_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Make modules multiply with their weights by the plain operations of PyTorch, within the context.

    Fused kernels of attentions and recurrent layers, and all but the "eager" one of transformers' implementations of
    experts, do not show what they multiply.
    """
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
        for config in configs.values():
            if hasattr(config, "_experts_implementation"):
                stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
                config._experts_implementation = "eager"
        yield


@contextmanager
def no_fused_recurrence() -> Iterator[None]:
    """Compute recurrent layers without oneDNN and cuDNN, within the context."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    were = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, was in zip(backends, were, strict=True):
            backend.enabled = was


def _storage(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for each in found:
            yield from _tensors(each)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
