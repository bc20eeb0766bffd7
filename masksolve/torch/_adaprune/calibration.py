"""Running calibration batches through a model: which layers are called, and the second moments of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from masksolve.torch._adaprune.progress import ProgressBar
from masksolve.torch._adaprune.replay import Replay
from masksolve.torch._layers import is_conv1d, layout_of

# Batches on which running the model again is tried: two, as the second shows what the first leaves behind in the model.
_TRIED = 2
# Largest deviation of inputs that are computed again, as a share of their norm; wrong ones deviate far more.
_AGAIN = 1e-2
# Bytes of unfolded inputs, and of gathered normal equations, at a time.
CHUNK = 64 << 20
# Columns of a Gram matrix at a time.
_COLUMNS = 192


# Gets a module and the input of one of its calls.
Watcher = Callable[[nn.Module, Tensor], None]


class _Stop(BaseException):
    """Leaves a forward pass that has shown what was asked for, or something that is an error by itself.

    Not for a model's own `except Exception`.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class Moments:
    """Moments of the inputs x that a layer multiplies with, one row per product: number, sum and Gram matrix.

    Sums are taken relative to the first row: inputs that never change then have exactly no variance.

    Attributes
    ----------
    count : int
        Rows seen.
    origin : Tensor of float64, shape (groups, inputs)
        The first x.
    total : Tensor of float64, shape (groups, inputs)
        The sum of x - origin.
    products : Tensor of float64, shape (groups, inputs, inputs)
        The sum of (x - origin) (x - origin)ᵀ, on and below the diagonal; what is above it counts for nothing.
    """

    count: int
    origin: Tensor
    total: Tensor
    products: Tensor

    @staticmethod
    def size_of(module: nn.Module) -> int:
        """Return the bytes of the products."""
        groups, inputs = _inputs_of(module)
        return 8 * groups * inputs**2

    @staticmethod
    def of(module: nn.Module) -> Moments:
        """Return the moments of no input."""
        weight = cast(Tensor, module.weight)
        groups, inputs = _inputs_of(module)
        zeros = torch.zeros(groups, inputs, inputs + 1, dtype=torch.float64, device=weight.device)
        return Moments(0, zeros[..., 0].clone(), zeros[..., 0].clone(), zeros[..., 1:].contiguous())

    def add(self, module: nn.Module, x: Tensor) -> None:
        """Count the input of one call."""
        for rows in input_rows(module, x):
            if self.count == 0:
                self.origin = rows[:, 0].clone()
            self.count += rows.shape[1]
            moved = rows - self.origin.unsqueeze(1)
            self.total += moved.sum(1)
            # It is symmetric: the columns from the diagonal down are little more than half of it.
            for column in range(0, moved.shape[2], _COLUMNS):
                columns = moved[..., column : column + _COLUMNS]
                self.products[:, column:, column : column + _COLUMNS].baddbmm_(moved[..., column:].mT, columns)

    def gram(self) -> Tensor:
        """Return the Gram matrix X Xᵀ, the sum of x xᵀ."""
        half = (self.total + self.origin * (self.count / 2)).unsqueeze(2) * self.origin.unsqueeze(1)
        return self._symmetric() + half + half.mT

    def centred(self) -> Tensor:
        """Return the Gram matrix about the mean."""
        return self._symmetric() - self.total.unsqueeze(2) * self.total.unsqueeze(1) / max(self.count, 1)

    def _symmetric(self) -> Tensor:
        return self.products.tril() + self.products.tril(-1).mT

    def mean(self) -> Tensor:
        """Return the mean input, of shape (groups, inputs)."""
        return self.origin + self.total / max(self.count, 1)


def _inputs_of(module: nn.Module) -> tuple[int, int]:
    """Return the number of groups, and of the inputs of an output in each."""
    weight = cast(Tensor, module.weight)
    groups, _, inputs = layout_of(module, "weight").operators(weight.detach()).shape
    return groups, inputs


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs that a layer multiplies its weights with, in float64, as chunks (groups, rows, inputs).

    For a convolution each row is one window of the padded input, ordered as a filter is: input channel, then position.
    """
    if not isinstance(module, _ConvNd):
        rows = x.reshape(-1, x.shape[-1])
        for chunk in rows.split(max(1, CHUNK // (8 * rows.shape[1]))):
            yield chunk.double().unsqueeze(0)
        return
    windows = _windows(module, x)
    axes = len(module.kernel_size)
    size = 8 * math.prod(windows.shape[1:])
    for chunk in windows.split(max(1, CHUNK // max(1, size))):
        # (B, groups, channels, *places, *kernel) -> (groups, B, *places, channels, *kernel)
        split = chunk.unflatten(1, (module.groups, -1))
        places, kernel = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
        rows = split.permute(1, 0, *places, 2, *kernel)
        yield rows.flatten(2 + axes).flatten(1, 1 + axes).double()


def _windows(module: _ConvNd, x: Tensor) -> Tensor:
    """Return every window under the kernel: a view (B, channels, *places, *kernel) of the padded input."""
    axes = len(module.kernel_size)
    batch = x if x.ndim == axes + 2 else x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = functional.pad(batch, padding, mode) if any(padding) else batch
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, (size - 1) * dilation + 1, step)[..., ::dilation]
    return windows


@dataclass
class Trace:
    """The calls that the calibration batches make.

    Attributes
    ----------
    order : list of nn.Module
        Layers and batch norms in the order of their first calls.
    calls : dict
        Of each, how often every batch calls it with anything at all.
    inputs : dict
        Of each, the identity of its inputs: two layers of equal entries are called with the very same tensors.
    first, last : nn.Module or None
        The layers, embeddings included, that the first batch calls first and last.
    entered : dict
        Of each module that holds a layer, how often every batch calls it at all.
    digests : dict
        Of each layer and batch norm, those of its first input in each of the first batches.
    """

    order: list[nn.Module] = field(default_factory=list)
    calls: dict[nn.Module, list[int]] = field(default_factory=dict)
    inputs: dict[nn.Module, list[tuple[int, ...]]] = field(default_factory=dict)
    first: nn.Module | None = None
    last: nn.Module | None = None
    entered: dict[nn.Module, list[int]] = field(default_factory=dict)
    digests: dict[nn.Module, dict[int, Digest]] = field(default_factory=dict)


class Digest(NamedTuple):
    """Two numbers by which tensors differ: the product with a random one, and the norm."""

    product: float
    norm: float

    def is_near(self, expected: Digest) -> bool:
        """Return whether this is the digest of a tensor that was computed again."""
        within = _AGAIN * expected.norm
        return abs(self.product - expected.product) <= within and abs(self.norm - expected.norm) <= within


class _Digester:
    """Computes digests, all with one random tensor."""

    def __init__(self) -> None:
        self._random = torch.empty(0)

    def __call__(self, x: Tensor) -> Digest:
        flat = x.flatten().float()
        if len(self._random) < len(flat):
            self._random = torch.randn(len(flat), generator=torch.Generator().manual_seed(0)).to(flat.device)
        return Digest(float(flat @ self._random[: len(flat)].to(flat.device)), float(flat.norm()))


def input_key(module: nn.Module) -> object:
    """Return a key that is equal for layers that multiply the same tensor in the same rows."""
    if not isinstance(module, _ConvNd):
        return None
    return (
        module.kernel_size,
        module.stride,
        module.dilation,
        module.groups,
        module.padding_mode,
        tuple(module._reversed_padding_repeated_twice),
    )


def is_layer(module: nn.Module) -> bool:
    """Return whether AdaPrune can repair a module: a Linear, a Conv1D, or a convolution that is not transposed."""
    is_convolution = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    return isinstance(module, nn.Linear) or is_convolution or is_conv1d(module)


class Calibration:
    """A model and the batches that calibrate it.

    Parameters
    ----------
    model : nn.Module
    batches : iterable
        Each a tensor, a sequence of positional arguments or a mapping of keyword arguments of the model.

    Raises
    ------
    ValueError, TypeError
        If there is no batch, or if this is a single batch, or not an iterable of batches.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        iterates = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        if isinstance(batches, (Tensor, Mapping)) or not iterates:
            raise TypeError(f"calibration is {_described(batches)}; give an iterable of batches, such as [batch]")
        self._batches = list(batches)
        if not self._batches:
            raise ValueError("calibration holds no batch; give a few hundred inputs of the model, in batches")
        self._replay = Replay(model, {})

    def __len__(self) -> int:
        return len(self._batches)

    def trace(self, watchers: Mapping[nn.Module, Watcher], on_batch: Callable[[str], None]) -> Trace:
        """Run every batch through the whole model, note what is called, and show some inputs to their watchers."""
        found = Trace()
        # By object, not by id: ids are used again once tensors are freed.
        numbers, counter = WeakIdKeyDictionary(), count()
        layers = {
            module
            for module in self._model.modules()
            if isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag, _ConvNd, _BatchNorm)) or is_conv1d(module)
        }
        found.entered = {
            module: [0] * len(self._batches)
            for module in self._model.modules()
            if module is not self._model and not layers.isdisjoint(module.modules())
        }
        digest = _Digester()
        for index in range(len(self._batches)):

            def enter(module: nn.Module, args: Any, index: int = index) -> None:
                found.entered[module][index] += 1

            def note(module: nn.Module, x: Tensor, index: int = index) -> None:
                if module not in found.calls:
                    found.order.append(module)
                    found.calls[module] = [0] * len(self._batches)
                    found.inputs[module] = []
                found.calls[module][index] += 1
                # A tensor that was written to in place is another input.
                version = 0 if x.is_inference() else x._version
                found.inputs[module].append((numbers.setdefault(x, next(counter)), version))
                if index == 0 and not isinstance(module, _BatchNorm):
                    found.first = found.first or module
                    found.last = module
                if index < _TRIED and index not in found.digests.setdefault(module, {}):
                    found.digests[module][index] = digest(x)
                if module in watchers:
                    watchers[module](module, x)

            handles = [module.register_forward_pre_hook(enter) for module in found.entered]
            try:
                self._run(index, dict.fromkeys(layers, note))
            finally:
                for handle in handles:
                    handle.remove()
            on_batch("")
        return found

    def learn(self, trace: Trace, groups: Sequence[Sequence[nn.Module]], bar: ProgressBar) -> None:
        """Find out how to run the model up to each group of layers in turn without running all of it, for `walk`."""
        if len(groups) < 2:
            return
        self._replay = Replay(self._model, trace.entered)
        digest = _Digester()

        def shows(index: int, group: Sequence[nn.Module]) -> bool:
            seen: dict[nn.Module, Digest] = {}

            def see(module: nn.Module, x: Tensor) -> None:
                if module not in seen:
                    seen[module] = digest(x)

            try:
                self._show(index, trace, dict.fromkeys(group, see))
            except Exception:
                # Code that gets NaN may fail in any way; without stand-ins it does not.
                return False
            expected = {module: trace.digests[module][index] for module in group if trace.calls[module][index]}
            return seen.keys() == expected.keys() and all(seen[module].is_near(expected[module]) for module in seen)

        on_group = bar.phase("learning what to keep", len(groups))
        in_order = sorted(groups, key=lambda group: min(map(trace.order.index, group)))
        self._replay.learn(in_order, range(min(_TRIED, len(self._batches))), shows, on_group)

    @contextmanager
    def walk(self, layers: Iterable[nn.Module]) -> Iterator[Callable[[Iterable[nn.Module]], None]]:
        """Make `watch` run, within the context, only what follows modules that are finished.

        Only these layers change. Yields the function to call with those that have changed for the last time.
        """
        with self._replay.walk(layers):
            yield self._replay.finish

    def watch(self, trace: Trace, watchers: Mapping[nn.Module, Watcher]) -> None:
        """Show the inputs of some modules to their watchers, and run no batch further than that takes."""
        for index in range(len(self._batches)):
            shown = 0

            def see(module: nn.Module, x: Tensor) -> None:
                nonlocal shown
                shown += 1
                watchers[module](module, x)

            try:
                self._show(index, trace, dict.fromkeys(watchers, see))
            except Exception:
                # A batch may take branches that those which were tried do not.
                if shown or not self._replay.run_without(index):
                    raise
                self._show(index, trace, watchers)

    def _show(self, index: int, trace: Trace, watchers: Mapping[nn.Module, Watcher]) -> None:
        """Run one batch until each watched module has been called as often as the trace has it."""
        remaining = sum(trace.calls[module][index] for module in watchers)
        if remaining == 0:
            return

        def counted(module: nn.Module, x: Tensor) -> None:
            nonlocal remaining
            watchers[module](module, x)
            remaining -= 1
            if remaining == 0:
                raise _Stop

        self._run(index, dict.fromkeys(watchers, counted))

    def _run(self, index: int, watchers: Mapping[nn.Module, Watcher]) -> None:
        """Run one batch, showing the watchers the input of every call of their module."""
        batch = self._batches[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Every layer has one input, by whatever name.
            x = args[0] if args else next(iter(kwargs.values()))
            if x.numel() == 0:
                return
            # A sum is found ten times as fast; one that overflows says nothing.
            if x.is_floating_point() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                text = f"an input of {self._names[module]!r} holds NaN or infinities; nothing was changed"
                raise _Stop(ValueError(f"calibration batch {index}: {text}"))
            try:
                watchers[module](module, x)
            except Exception as error:
                # Not the fault of the batch: the disk may be full.
                raise _Stop(error) from None

        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in watchers]
        self._replay.start(index)
        try:
            with torch.no_grad():
                if isinstance(batch, Mapping):
                    self._model(**batch)
                elif isinstance(batch, Sequence):
                    self._model(*batch)
                else:
                    self._model(batch)
        except _Stop as stop:
            if stop.error is not None:
                raise stop.error from None
        except Exception as error:
            raise ValueError(
                f"calibration batch {index}, {_described(batch)}, does not run through this "
                f"{type(self._model).__name__} ({type(error).__name__}: {error}); give what model(batch), "
                "model(*batch) or model(**batch) takes, on the model's device and without labels; nothing was changed"
            ) from error
        finally:
            for handle in handles:
                handle.remove()


def _described(batch: object) -> str:
    """Describe a batch in words."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {_described(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return "[" + ", ".join(map(_described, batch)) + "]"
    return f"a {type(batch).__name__}"
