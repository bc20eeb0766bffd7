"""Running a model again from its last change on: outputs of modules that no repair changes any more stand in for calls.

Layer by layer, AdaPrune needs the inputs of the next layer from the model as pruned so far. Running all of it for every
layer costs the square of the depth. The model's own code is what passes hidden states, masks and positions on, so it
runs each time; but modules that are finished return what they returned last instead of computing it again.

Of the finished modules that one module calls, the last one's output is kept, one hidden state per batch; outputs that
were passed on to finished modules alone are dropped, and NaN stands in for them. The input of the layer that changes
next is kept as well, so that what leads to it, such as the two factors of a gated product, is not.
Whether that is all that the model reads is not guessed from types: `Replay.learn` tries it on the model
before it is pruned, and keeps what is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from masksolve.torch._adaprune.source import Source, replaced_forwards


class _Dropped(NamedTuple):
    """The remains of a tensor that only finished modules read."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


# For one batch, the outputs of finished modules by the module that calls them, in the order of the calls. Outer modules
# come before those that they call.
_Kept = dict[nn.Module, dict[nn.Module, Any]]


class _Input(NamedTuple):
    """For one batch, the input of the first layer that was not finished, and the module that called it."""

    layer: nn.Module
    frame: nn.Module
    x: Tensor


class Replay:
    """The outputs of finished modules, which stand in for their calls.

    Parameters
    ----------
    model : nn.Module
    calls : mapping of nn.Module to sequence of int
        How often each batch calls every module, the model's own aside, that holds a layer. Others are cheap, and run.
    """

    def __init__(self, model: nn.Module, calls: Mapping[nn.Module, Sequence[int]]) -> None:
        self._model = model
        self._modules = [module for module in calls if not isinstance(module, torch.jit.ScriptModule)]
        self._once = {module for module in self._modules if max(calls[module]) <= 1}
        # What `learn` finds: outputs read after the next module's, modules within which everything has to run again.
        self._read_later: set[nn.Module] = set()
        self._rerun: set[nn.Module] = set()
        self._learning = self._is_spoilt = False
        self._without: set[int] = set()
        self._unfinished: dict[nn.Module, set[Source]] = {}
        self._kept: dict[int, _Kept] = {}
        self._inputs: dict[int, _Input] = {}
        self._nothing: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.start(0)

    @contextmanager
    def walk(self, sources: Iterable[Source]) -> Iterator[None]:
        """Let modules stand in for their calls, within the context.

        A module is finished once none of the modules that multiply with these weights, apart from those given to
        `finish`, is called before it returns.
        """
        handles = {}
        try:
            with replaced_forwards(self._modules, self._standing_in):
                for source in sources:
                    self._unfinished.setdefault(source.module, set()).add(source)
                for module in self._unfinished:
                    # A hook also keeps torch's fused encoder layers from bypassing the layer.
                    handles[module] = module.register_forward_pre_hook(self._meets_unfinished)
                yield
        finally:
            for handle in handles.values():
                handle.remove()
            self._unfinished.clear()
            self._kept.clear()
            self._inputs.clear()
            self._nothing.clear()

    def start(self, index: int) -> None:
        """Begin a run of this batch."""
        self._index = index
        self._is_final = True
        self._frames = [self._model]
        self._called: set[nn.Module] = set()

    def finish(self, sources: Iterable[Source]) -> None:
        """Note that these weights have changed for the last time."""
        for source in sources:
            self._unfinished[source.module].discard(source)
            if not self._unfinished[source.module]:
                del self._unfinished[source.module]

    def run_whole(self, block: nn.Module) -> None:
        """Forget what is kept of the layers of a block, which is not finished itself."""
        inside = set(block.modules())
        for kept in self._kept.values():
            for frame in inside & kept.keys():
                del kept[frame]
        self._inputs = {index: fed for index, fed in self._inputs.items() if fed.frame not in inside}

    def run_without(self, index: int) -> bool:
        """Run all of a batch each time from now on; return whether that makes a difference."""
        self._without.add(index)
        found = self._inputs.pop(index, None)
        return bool(self._kept.pop(index, None)) or found is not None

    def learn(
        self,
        groups: Sequence[Sequence[Source]],
        batches: Sequence[int],
        shows: _Shows,
        on_group: Callable[[str], None],
    ) -> None:
        """Find out which outputs have to be kept, so that each group of layers in turn gets the inputs that it gets.

        Parameters
        ----------
        groups : sequence of sequence of Source
            In the order of their first calls.
        batches : sequence of int
            Which to try it with, in turn: of several, one shows what another has left behind in the model.
        shows : callable
            Gets a batch and a group; whether a run shows it what the model without stand-ins did.
        on_group : callable
            Called after each group, with no text.
        """
        self._learning = True
        with self.walk(source for group in groups for source in group):
            for group in groups:
                for index in batches:
                    if not self._tries(index, group, shows):
                        self._mend(index, group, shows)
                self.finish(group)
                on_group("")
        self._learning = False

    def _mend(self, index: int, group: Sequence[Source], shows: _Shows) -> None:
        frames = list(reversed(self._kept[index]))
        for frame in frames:
            outputs = self._kept[index][frame]
            dropped = [
                each for each in outputs if not self._is_whole(index, frame, each) and each not in self._read_later
            ]
            self._read_later.update(dropped)
            if dropped and self._tries(index, group, shows, undo=True):
                for each in dropped:
                    self._read_later.discard(each)
                    if not self._tries(index, group, shows, undo=True):
                        self._read_later.add(each)
                self._tries(index, group, shows)
                return
        for frame in frames:
            self._rerun.add(frame)
            for kept in self._kept.values():
                self._read_later.difference_update(kept.pop(frame, ()))
            if self._tries(index, group, shows):
                return

    def _tries(self, index: int, group: Sequence[Source], shows: _Shows, undo: bool = False) -> bool:
        """Return whether a run shows a group what it should; forget what a run that does not has kept."""
        before = {frame: dict(outputs) for frame, outputs in self._kept.get(index, {}).items()}
        fed = self._inputs.get(index)
        self._is_spoilt = False
        found = shows(index, group) and not self._is_spoilt
        if undo or not found:
            self._kept[index] = before
            self._inputs.pop(index, None)
            if fed is not None:
                self._inputs[index] = fed
        return found

    def _meets_unfinished(self, module: nn.Module, args: Any) -> None:
        """Keep the input of a layer before which nothing changes any more."""
        if module not in self._unfinished:
            return
        fed = self._inputs.get(self._index)
        # One of several weights is repaired in a run of its own, and the module gets its input once more for the next.
        is_new = fed is None or fed.layer is not module
        is_kept = is_new and module in self._once and self._index not in self._without and len(args) == 1
        if self._is_final and is_kept and isinstance(args[0], Tensor):
            frame = self._frames[-1]
            self._inputs[self._index] = _Input(module, frame, args[0].clone())
            self._drop_last(self._kept.get(self._index, {}).get(frame, {}))
        self._is_final = False

    def _is_whole(self, index: int, frame: nn.Module, module: nn.Module) -> bool:
        """Return whether the output of a module is kept whether or not it is read later: of the last in its frame,
        unless the layer that comes next has its input.
        """
        fed = self._inputs.get(index)
        return module is next(reversed(self._kept[index][frame])) and (fed is None or fed.frame is not frame)

    def _drop_last(self, outputs: dict[nn.Module, Any]) -> None:
        if outputs and not self._learning:
            last = next(reversed(outputs))
            if last not in self._read_later:
                outputs[last] = map_tensors(_dropped, outputs[last])

    def _standing_in(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            frame, is_first = self._frames[-1], module not in self._called
            self._called.add(module)
            outputs = self._kept.get(self._index, {}).get(frame, {})
            if is_first and module in outputs:
                return self._returned(frame, module, outputs)
            fed = self._inputs.get(self._index)
            if is_first and fed is not None and fed.layer is module:
                args, kwargs = (fed.x.clone() if module in self._unfinished else self._inputs.pop(self._index).x,), {}
            self._frames.append(module)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._frames.pop()
            if is_first and self._is_final:
                self._keep(frame, module, output)
            return output

        return run

    def _keep(self, frame: nn.Module, module: nn.Module, output: Any) -> None:
        if module not in self._once or frame in self._rerun or self._index in self._without:
            return
        kept = self._kept.setdefault(self._index, {})
        for inner in module.modules():
            kept.pop(inner, None)
        outputs = kept.setdefault(frame, {})
        self._drop_last(outputs)
        # The model may write to it in place.
        outputs[module] = map_tensors(Tensor.clone, output)
        if self._learning:
            map_tensors(self._check, output)

    def _check(self, tensor: Tensor) -> None:
        self._is_spoilt |= bool(tensor.isnan().any())

    def _returned(self, frame: nn.Module, module: nn.Module, outputs: dict[nn.Module, Any]) -> Any:
        if module in self._read_later or self._is_whole(self._index, frame, module):
            return map_tensors(Tensor.clone, outputs[module])
        return map_tensors(self._not_numbers, map_tensors(_dropped, outputs[module]))

    def _not_numbers(self, dropped: Tensor | _Dropped) -> Tensor:
        """Return a view of one tensor of NaN for all, so that whatever reads it shows."""
        if isinstance(dropped, Tensor):
            return dropped.clone()
        key, size = (dropped.dtype, dropped.device), dropped.shape.numel()
        if key not in self._nothing or len(self._nothing[key]) < size:
            self._nothing[key] = torch.full((size,), torch.nan, dtype=dropped.dtype, device=dropped.device)
        return self._nothing[key][:size].view(dropped.shape)


_Shows = Callable[[int, Sequence[Source]], bool]


def _dropped(tensor: Tensor | _Dropped) -> Tensor | _Dropped:
    if isinstance(tensor, _Dropped) or not tensor.is_floating_point():
        return tensor
    return _Dropped(tensor.shape, tensor.dtype, tensor.device)


def map_tensors(function: Callable[[Any], Any], output: Any) -> Any:
    """Apply a function to every tensor of an output, also in tuples, lists and dicts; all else stays as it is."""
    if isinstance(output, _Dropped) or (isinstance(output, Tensor) and not isinstance(output, nn.Parameter)):
        return function(output)
    if type(output) in (tuple, list):
        return type(output)(map_tensors(function, each) for each in output)
    if type(output) is dict:
        return {key: map_tensors(function, each) for key, each in output.items()}
    return output
