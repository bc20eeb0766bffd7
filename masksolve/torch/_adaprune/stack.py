"""The stack of blocks that the hidden states of a language model go through, of which one at a time runs.

The model's own code passes masks and positions on, so it runs from the embeddings each time; but all blocks except one
return what they get instead of computing, and that one gets the hidden states that were kept for it. So only its
weights have to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from masksolve.torch._adaprune.calibration import Stop
from masksolve.torch._adaprune.source import Source, called, replaced_forwards, sources_of

# Computes the output of a block.
Compute = Callable[[Tensor], Tensor]
# Gets the hidden states that a block is called with, and what computes its output; returns what the model gets.
Act = Callable[[Tensor, Compute], Tensor | None]


class NoStackError(Exception):
    """A model has no stack of blocks that can run one at a time; the message says why."""


class Stack:
    """The blocks of a model.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.

    Attributes
    ----------
    path : str
        Where in the model the blocks are.
    blocks : list of nn.Module
    before, behind : list of Source
        The layers outside of the blocks that are called before and behind them, which `learn` finds.

    Raises
    ------
    NoStackError
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.path, self.blocks = _largest_list(model)
        self.before: list[Source] = []
        self.behind: list[Source] = []
        self._returns_tuples = False

    def learn(self, batch: Mapping[str, Tensor]) -> None:
        """Find out how the model calls its blocks, none of which has to be there.

        Raises
        ------
        NoStackError
            If that is not one after the other.
        """
        complaint = self._try(batch)
        if complaint is not None:
            self._returns_tuples = True
            if self._try(batch) is not None:
                raise NoStackError(complaint)

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter or a module of this name is in, or None."""
        head, _, tail = name.removeprefix(f"{self.path}.").partition(".")
        return int(head) if name.startswith(f"{self.path}.{head}.") and tail and head.isdigit() else None

    def run(self, number: int, batch: Mapping[str, Tensor], act: Act) -> None:
        """Run one block on a batch, as `running` does."""
        with self.running(number, act), torch.no_grad(), suppress(Stop):
            self.model(**batch)

    def arguments(
        self, number: int, batch: Mapping[str, Tensor], states: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a model calls a block with for a batch; `states` gets the hidden states as in `running`."""
        entering: list[Tensor] = []
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))

        with self.blocks[number].register_forward_pre_hook(note, with_kwargs=True):
            self.run(number, batch, lambda hidden, compute: entering.append(states(hidden)))
        return _with_states(entering[0], *found[0])

    @contextmanager
    def running(self, number: int, act: Act) -> Iterator[None]:
        """Let one block do what `act` does, within the context. Where that returns None, runs of the model end.

        `act` gets the hidden states as they leave the embeddings, and what computes the block's output from others.
        """

        def do(block: int, hidden: Tensor, compute: Compute) -> Tensor:
            if block != number:
                return hidden
            output = act(hidden, compute)
            if output is None:
                raise Stop
            return output

        with self._standing_in(do):
            yield

    def _try(self, batch: Mapping[str, Tensor]) -> str | None:
        """Note which layers are called outside of the blocks; return what does not fit a stack."""
        numbers: list[int] = []
        expected: Tensor | None = None
        complaint: str | None = None
        self.before, self.behind = [], []

        def act(number: int, hidden: Tensor, compute: Compute) -> Tensor:
            nonlocal expected, complaint
            if expected is not None and hidden is not expected:
                complaint = f"{self.path}.{number} does not get what the block before it returns"
                raise Stop
            numbers.append(number)
            expected = hidden.clone()
            return expected

        def note(module: nn.Module, args: Any, source: Source) -> None:
            nonlocal complaint
            if 0 < len(numbers) < len(self.blocks):
                complaint = f"a layer outside of {self.path} is called between its blocks"
                raise Stop
            (self.behind if numbers else self.before).append(source)

        within = {module for block in self.blocks for module in block.modules()}
        layers = [source for source in sources_of(self.model).values() if source.module not in within]
        layers += [called(each) for each in self.model.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))]
        handles = [
            source.module.register_forward_pre_hook(lambda module, args, source=source: note(module, args, source))
            for source in layers
            if source.module not in within
        ]
        try:
            with self._standing_in(act), torch.no_grad():
                self.model(**batch)
        except Stop:
            pass
        except Exception as error:
            complaint = f"it does not run with stand-ins for {self.path} ({type(error).__name__}: {error})"
        finally:
            for handle in handles:
                handle.remove()
        if complaint is None and numbers != list(range(len(self.blocks))):
            complaint = f"the blocks of {self.path} are not called once each, in their order"
        again = [source for source in self.before if source in self.behind]
        if complaint is None and again:
            complaint = f"a {type(again[0].module).__name__} is called both before {self.path} and behind it"
        return complaint

    @contextmanager
    def _standing_in(self, act: Callable[[int, Tensor, Compute], Tensor]) -> Iterator[None]:
        numbers = {block: number for number, block in enumerate(self.blocks)}

        def replace(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.get("hidden_states")
                if not isinstance(hidden, Tensor):
                    raise TypeError("a block gets no hidden states as its first argument")

                def compute(states: Tensor) -> Tensor:
                    own_args, own_kwargs = _with_states(states, args, kwargs)
                    found = forward(*own_args, **own_kwargs)
                    output: Tensor = found[0] if isinstance(found, (tuple, list)) else found
                    return output

                output = act(numbers[module], hidden, compute)
                return (output,) if self._returns_tuples else output

            return run

        with replaced_forwards(self.blocks, replace):
            yield


def _with_states(
    states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def _largest_list(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Return the path and the modules of the list that holds most of a model."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    outer = [(path, module) for path, module in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise NoStackError("it has no list of blocks")
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for _, module in outer]
    path, largest = outer[sizes.index(max(sizes))]
    for (other, _), size in zip(outer, sizes, strict=True):
        if other != path and size > max(sizes) // len(largest):
            raise NoStackError(f"{path} is not its only list of blocks: there is {other} too")
    return path, list(largest)
