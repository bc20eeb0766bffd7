"""Refining a block as a whole: the weights that its layers keep are trained to return what the dense model's returned.

Layer by layer, each weight is fitted to what its own dense one makes of its inputs. What layers lose adds up in the
output of their block, and from block to block; there one may make up for another, and for earlier ones.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from masksolve._inputs import check_choice
from masksolve.torch._adaprune.input_pool import TensorStore
from masksolve.torch._adaprune.records import RefinedBlock
from masksolve.torch._adaprune.replay import map_tensors
from masksolve.torch._adaprune.tasks import Task

Refinement = Literal["block"]
REFINEMENTS: tuple[Refinement, ...] = get_args(Refinement)

# Steps of Adam at first, as a share of the root mean square of the weights that are kept; they fall to none along half
# a cosine. The second is for where the first serves held-out batches no better: blocks with outputs of extreme size.
_RATES = (1e-2, 1e-3)
_BETAS = (0.9, 0.99)
# As good as none: gradients may be of any size.
_EPSILON = 1e-15
# Passes over the calibration data at most. One that is worse than the best so far may come before better ones.
_PASSES = 6
_PATIENCE = 3
# One batch in this many is held out, and at least one.
_HELD_OUT = 8
# Largest deviation of an output that is computed again, as a share of its norm.
_AGAIN = 1e-2


def check_refinement(refine: Refinement | None, *, sequential: bool, batches: int) -> None:
    """Refuse a refinement that there is not, or that cannot be had from these inputs.

    Raises
    ------
    ValueError, TypeError
    """
    if refine is None:
        return
    check_choice(refine, "refine", REFINEMENTS)
    if not sequential:
        raise ValueError(
            f"refine={refine!r} needs the inputs of the model as pruned so far; leave it out, or re-fit layers on those"
        )
    if batches < 2:
        raise ValueError(f"refine={refine!r} holds out a batch, and calibration has only one; give smaller batches")


@dataclass(frozen=True, eq=False)
class Block:
    """A module, and those of its weights that are pruned in it and nowhere else.

    Attributes
    ----------
    name : str
    module : nn.Module
    tasks : sequence of Task
        In the order of execution.
    """

    name: str
    module: nn.Module
    tasks: Sequence[Task]

    def of(self, tasks: Iterable[Task]) -> Block | None:
        """Return the block of those of these tasks that are in it, if there are several."""
        inside = set(self.module.modules())
        mine = [task for task in tasks if all(source.owner in inside for source in task.sources)]
        return Block(self.name, self.module, mine) if len(mine) > 1 else None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a block: its arguments in the pruned model, and what the block of the dense model returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor


def blocks_of(model: nn.Module, tasks: Sequence[Task]) -> list[Block]:
    """Return the blocks of a model: the outermost members of its nn.ModuleLists and nn.Sequentials with several tasks.

    Parameters
    ----------
    model : nn.Module
    tasks : sequence of Task
    """
    found: list[Block] = []
    for name, members in model.named_modules():
        if not isinstance(members, (nn.ModuleList, nn.Sequential)) or any(_within(name, block) for block in found):
            continue
        for key, module in members.named_children():
            block = Block(f"{name}.{key}" if name else key, module, tasks)
            if (mine := block.of(tasks)) is not None:
                found.append(mine)
    return found


def _within(name: str, block: Block) -> bool:
    return name == block.name or name.startswith(f"{block.name}.")


def called_once(
    blocks: Iterable[Block], tasks: Sequence[Task], calls: Mapping[nn.Module, Sequence[int]]
) -> list[Block]:
    """Return the blocks of these tasks that every batch calls once.

    Parameters
    ----------
    blocks, tasks
        As from `blocks_of`; tasks that are not pruned after all are left out.
    calls : mapping of nn.Module to sequence of int
        How often each batch calls every module.
    """
    found = (block.of(tasks) for block in blocks if set(calls[block.module]) == {1})
    return [block for block in found if block is not None]


class Targets:
    """The outputs of a dense model's blocks for each batch."""

    def __init__(self, blocks: Sequence[Block], store: TensorStore) -> None:
        self._store = store
        self._found: dict[nn.Module, list[Tensor]] = {block.module: [] for block in blocks}

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Keep what the blocks return within the context, where each batch runs once, in turn."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._found[module].append(self._store.keep(_hidden_states(output)))

        with ExitStack() as stack:
            for module in self._found:
                stack.enter_context(module.register_forward_hook(keep))
            yield

    def pop(self, block: Block) -> list[Tensor]:
        """Return those of a block, one per batch, and forget them."""
        return self._found.pop(block.module)


def refine_block(
    block: Block, calls: Sequence[Call], *, train_biases: bool = True
) -> tuple[RefinedBlock, dict[Tensor, Tensor]]:
    """Train what the layers of a block keep. Changes nothing.

    Parameters
    ----------
    block : Block
        Pruned and repaired.
    calls : sequence of Call
        Two or more. Some are held out: they decide when to stop, and whether it was worth it.
    train_biases : bool
        Whether their biases are trained along with them.

    Returns
    -------
    record : RefinedBlock
    values : dict of Tensor to Tensor
        Of parameters; none where held-out calls are not served better.
    """
    start = time.perf_counter()
    # Spread over all: they may come in the order of their lengths.
    testing = range(_HELD_OUT - 1, len(calls), _HELD_OUT) or range(len(calls) - 1, len(calls))
    training = [index for index in range(len(calls)) if index not in testing]
    before = best = _Trained(block, train_biases).error(calls[index] for index in testing)
    values: dict[Tensor, Tensor] = {}
    errors: list[float] = []
    for rate in _RATES:
        trained, waited = _Trained(block, train_biases), 0
        for _ in _trained_passes(trained.passes(calls, training, rate), block.name):
            errors.append(trained.error(calls[index] for index in testing))
            waited += 1
            if errors[-1] < best:
                best, values, waited = errors[-1], trained.values(), 0
            if waited == _PATIENCE:
                break
        if values:
            break
    seconds = time.perf_counter() - start
    return RefinedBlock(block.name, before, best, tuple(errors), seconds), values


def _trained_passes(passes: Iterator[None], name: str) -> Iterator[None]:
    try:
        yield from passes
    except RuntimeError as error:
        raise ValueError(f"block {name!r} cannot be trained by itself ({error}); leave out refine='block'") from error


class _Trained:
    """The parameters of a block in float32 or better, as they are trained."""

    def __init__(self, block: Block, biases: bool) -> None:
        self._module = block.module
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, Tensor] = {}
        # Of weights alone: of a bias everything is kept.
        self._kept: dict[str, Tensor] = {}
        # The root mean square of the weights that are kept, also for the bias beside them.
        self._sizes: dict[str, float] = {}
        names = {id(parameter): name for name, parameter in block.module.named_parameters()}
        for task in block.tasks:
            kept = task.weight.detach() != 0
            self._kept[names[id(task.weight)]] = kept
            for parameter in task.parameters if biases else [task.weight]:
                name, dtype = names[id(parameter)], torch.promote_types(parameter.dtype, torch.float32)
                self._parameters[name] = parameter
                self._masters[name] = parameter.detach().to(dtype, copy=True).requires_grad_()
                self._sizes[name] = float(task.weight.detach().norm()) / math.sqrt(max(int(kept.sum()), 1))

    def error(self, calls: Iterable[Call]) -> float:
        """Return the relative squared error of the outputs."""
        with torch.no_grad():
            lost = [(self._lost(call), call.target.double().square().sum()) for call in calls]
        off, energy = (float(torch.stack(each).sum()) for each in zip(*lost, strict=True))
        return off / energy if energy > 0 else math.inf if off > 0 else 0.0

    def passes(self, calls: Sequence[Call], chosen: Sequence[int], rate: float) -> Iterator[None]:
        """Go over some calls, with a step at each, as often as the caller asks, `_PASSES` times at most."""
        groups = [{"params": [master], "lr": rate * self._sizes[name]} for name, master in self._masters.items()]
        optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON, fused=True)
        steps = _PASSES * len(chosen)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for _ in range(_PASSES):
            for index in chosen:
                call = calls[index]
                # Gradients are needed even if the caller has switched them off.
                with torch.enable_grad():
                    loss = self._lost(call) / call.target.numel()
                    gradients = torch.autograd.grad(loss, list(self._masters.values()), materialize_grads=True)
                for (name, master), gradient in zip(self._masters.items(), gradients, strict=True):
                    master.grad = torch.where(self._kept[name], gradient, 0.0) if name in self._kept else gradient
                optimizer.step()
                schedule.step()
            yield

    def values(self) -> dict[Tensor, Tensor]:
        """Return the values as they are now, in the dtypes of the parameters."""
        return {
            parameter: self._masters[name].detach().to(parameter.dtype, copy=True)
            for name, parameter in self._parameters.items()
        }

    def _lost(self, call: Call) -> Tensor:
        own = {name: self._masters[name].to(parameter.dtype) for name, parameter in self._parameters.items()}
        output = _hidden_states(functional_call(self._module, own, call.args, dict(call.kwargs)))
        return (output - call.target.to(output.device)).double().square().sum()


def call_of(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, target: Tensor) -> Call:
    """Return a call of a block that can be made again.

    Parameters
    ----------
    block : Block
    args, kwargs, output
        The arguments, and what the block returned.
    target : Tensor
        What the block of the dense model returned.

    Raises
    ------
    ValueError
        If the block returns something else when it is called again.
    """
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    # No gradient goes through what was made in inference mode.
    args, kwargs, target = map_tensors(lambda x: x.clone() if x.is_inference() else x, (args, kwargs, target))
    with torch.no_grad():
        again, seen = _hidden_states(block.module(*args, **kwargs)), _hidden_states(output)
    if again.shape != seen.shape or not bool((again - seen).norm() <= _AGAIN * seen.norm()):
        raise ValueError(
            f"block {block.name!r} does not return the same when it is called with the same arguments again, so that "
            "it cannot be refined; leave out refine='block'"
        )
    return Call(args, kwargs, target)


def _is_cache(value: Any) -> bool:
    """Return whether this is transformers' store of keys and values, which would grow with each call."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(value, transformers.Cache)


def _hidden_states(output: Any) -> Tensor:
    """Return the tensor that a block returns, or the first of several."""
    found = output
    while isinstance(found, (tuple, list, Mapping)) and found:
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    if not isinstance(found, Tensor):
        raise ValueError(
            f"a block returns {type(output).__name__} that does not begin with a tensor, so that it cannot be refined; "
            "leave out refine='block'"
        )
    return found
