"""Running calibration batches through a model: which layers are called, and the second moments of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from masksolve.torch._adaprune.products import Products, no_fused_recurrence, plain_products
from masksolve.torch._adaprune.progress import ProgressBar
from masksolve.torch._adaprune.replay import Replay
from masksolve.torch._adaprune.source import Source, called, replaced_forwards, sources_of
from masksolve.torch._batches import as_batches, call, does_not_run, windows

# Batches on which running the model again is tried: two, as the second shows what the first leaves behind in the model.
_TRIED = 2
# Largest deviation of inputs that are computed again, as a share of their norm; wrong ones deviate far more.
_AGAIN = 1e-2
# Bytes of unfolded inputs, and of gathered normal equations, at a time.
CHUNK = 64 << 20
# Columns of a Gram matrix at a time.
_COLUMNS = 192


# Gets a source, the input of one of its calls or products, and the groups of its weight that get it.
Watcher = Callable[[Source, Tensor, range], None]


class Stop(BaseException):
    """Leaves a forward pass that has shown what was asked for, or something that is an error by itself.

    Not for a model's own `except Exception`.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class Moments:
    """Moments of the inputs x that a weight is multiplied with, one row per product: number, sum and Gram matrix.

    Sums are taken relative to the first row: inputs that never change then have exactly no variance.

    Attributes
    ----------
    count : Tensor of int64, shape (groups,)
        Rows seen, on the CPU.
    origin : Tensor of float64, shape (groups, inputs)
        The first x.
    total : Tensor of float64, shape (groups, inputs)
        The sum of x - origin.
    products : Tensor of float64, shape (groups, inputs, inputs)
        The sum of (x - origin) (x - origin)ᵀ, on and below the diagonal; what is above it counts for nothing.
    matrices : range
        Which matrices of the weight these are the inputs of, as many as groups.
    """

    count: Tensor
    origin: Tensor
    total: Tensor
    products: Tensor
    matrices: range

    @staticmethod
    def size_of(source: Source) -> int:
        """Return the bytes of the products."""
        groups, _, inputs = source.operators.shape
        return 8 * groups * inputs**2

    @staticmethod
    def of(source: Source, matrices: range | None = None) -> Moments:
        """Return the moments of no input, of some of the weight's matrices if not of all."""
        groups, _, inputs = source.operators.shape
        matrices = range(groups) if matrices is None else matrices
        groups = len(matrices)
        zeros = torch.zeros(groups, inputs, inputs + 1, dtype=torch.float64, device=source.weight.device)
        count = torch.zeros(groups, dtype=torch.int64)
        return Moments(count, zeros[..., 0].clone(), zeros[..., 0].clone(), zeros[..., 1:].contiguous(), matrices)

    def narrow(self, matrices: range) -> Moments:
        """Return those of some of these matrices, as views."""
        chosen = self._places_of(matrices)
        return Moments(self.count[chosen], self.origin[chosen], self.total[chosen], self.products[chosen], matrices)

    def _places_of(self, matrices: range) -> slice:
        return slice(matrices.start - self.matrices.start, matrices.stop - self.matrices.start)

    def add(self, source: Source, x: Tensor, groups: range) -> None:
        """Count the input of one call or product."""
        own = range(max(groups.start, self.matrices.start), min(groups.stop, self.matrices.stop))
        if not own:
            return
        chosen = self._places_of(own)
        for rows in input_rows(source, x):
            if not bool(self.count[chosen].all()):
                fresh = (self.count[chosen] == 0).to(rows.device).unsqueeze(1)
                self.origin[chosen] = torch.where(fresh, rows[:, 0], self.origin[chosen])
            self.count[chosen] += rows.shape[1]
            moved = rows - self.origin[chosen].unsqueeze(1)
            self.total[chosen] += moved.sum(1)
            # It is symmetric: the columns from the diagonal down are little more than half of it.
            for column in range(0, moved.shape[2], _COLUMNS):
                columns = moved[..., column : column + _COLUMNS]
                self.products[chosen, column:, column : column + _COLUMNS].baddbmm_(moved[..., column:].mT, columns)

    def gram(self) -> Tensor:
        """Return the Gram matrix X Xᵀ, the sum of x xᵀ."""
        half = (self.total + self.origin * (self._number / 2)).unsqueeze(2) * self.origin.unsqueeze(1)
        # In place: of a wide layer these matrices are larger than its weights.
        return self._symmetric().add_(half).add_(half.mT)

    def centred(self) -> Tensor:
        """Return the Gram matrix about the mean."""
        about = self.total / self._number.clamp(min=1)
        return self._symmetric().sub_(self.total.unsqueeze(2) * about.unsqueeze(1))

    def _symmetric(self) -> Tensor:
        return self.products.tril().add_(self.products.tril(-1).mT)

    def mean(self) -> Tensor:
        """Return the mean input, of shape (groups, inputs)."""
        return self.origin + self.total / self._number.clamp(min=1)

    @property
    def _number(self) -> Tensor:
        return self.count.to(self.total).unsqueeze(1)


def input_rows(source: Source, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs that a weight is multiplied with, in float64, as chunks (groups or 1, rows, inputs).

    For a convolution each row is one window of the padded input, ordered as a filter is: input channel, then position.
    """
    module = source.owner
    if not isinstance(module, _ConvNd):
        rows = x.reshape(-1, x.shape[-1])
        for chunk in rows.split(max(1, CHUNK // (8 * rows.shape[1]))):
            yield chunk.double().unsqueeze(0)
        return
    found = windows(module, x)
    axes = len(module.kernel_size)
    size = 8 * math.prod(found.shape[1:])
    for chunk in found.split(max(1, CHUNK // max(1, size))):
        # (B, groups, channels, *places, *kernel) -> (groups, B, *places, channels, *kernel)
        split = chunk.unflatten(1, (module.groups, -1))
        places, kernel = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
        rows = split.permute(1, 0, *places, 2, *kernel)
        yield rows.flatten(2 + axes).flatten(1, 1 + axes).double()


@dataclass
class Trace:
    """The calls that the calibration batches make.

    Attributes
    ----------
    order : list of Source
        Layers, embeddings and batch norms in the order of their first inputs.
    calls : dict
        Of each, how often every batch calls its module so that it gets anything at all.
    inputs : dict
        Of each, the identity of its inputs: two of equal entries get the very same tensors.
    first, last : Source or None
        The ones, batch norms aside, that the first batch calls first and last.
    entered : dict
        Of each module that holds a layer, how often every batch calls it at all.
    digests : dict
        Of each, those of all its inputs together in each of the first batches.
    hidden : dict
        Of those whose inputs are not all seen, the operation that reads the weight.
    """

    order: list[Source] = field(default_factory=list)
    calls: dict[Source, list[int]] = field(default_factory=dict)
    inputs: dict[Source, list[tuple[int, int, range]]] = field(default_factory=dict)
    first: Source | None = None
    last: Source | None = None
    entered: dict[nn.Module, list[int]] = field(default_factory=dict)
    digests: dict[Source, dict[int, Digest]] = field(default_factory=dict)
    hidden: dict[Source, str] = field(default_factory=dict)


class Digest(NamedTuple):
    """Two numbers by which tensors differ: the product with a random one, and the norm. Of several, their sums."""

    product: float
    norm: float

    def plus(self, other: Digest | None) -> Digest:
        """Return the digest of the tensors of both."""
        return self if other is None else Digest(self.product + other.product, self.norm + other.norm)

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


def input_key(source: Source) -> object:
    """Return a key that is equal for weights that are multiplied with the same tensor in the same rows."""
    module = source.owner
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


@dataclass(frozen=True)
class Part:
    """The part of a model that is calibrated: some modules, with those within them.

    `start` is called with the number of a batch before each run of it.
    """

    modules: Sequence[nn.Module]
    start: Callable[[int], None]


class Calibration:
    """A model and the batches that calibrate it.

    Parameters
    ----------
    model : nn.Module
    batches : iterable
        Each a tensor, a sequence of positional arguments or a mapping of keyword arguments of the model.
    part : Part, optional
        Calls of other modules count for nothing.

    Raises
    ------
    ValueError, TypeError
        If there is no batch, or if this is a single batch, or not an iterable of batches.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], part: Part | None = None) -> None:
        self.model = model
        self._start = part.start if part is not None else lambda index: None
        modules = part.modules if part is not None else [model]
        self._calibrated = dict.fromkeys(each for module in modules for each in module.modules())
        self._names = {module: name for name, module in model.named_modules()}
        self._batches = as_batches(batches)
        self._replay = Replay(model, {})
        self._sources = [source for source in sources_of(model).values() if source.module in self._calibrated]
        self._multiplying = {source.module for source in self._sources if source.is_multiplied}
        self._sources += [
            called(module)
            for module in self._calibrated
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag, _BatchNorm, _ConvTransposeNd))
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def trace(self, watchers: Mapping[Source, Watcher], on_batch: Callable[[str], None]) -> Trace:
        """Run every batch through the whole model, note what is called, and show some inputs to their watchers."""
        found = Trace()
        # By object, not by id: ids are used again once tensors are freed.
        numbers, counter = WeakIdKeyDictionary(), count()
        layers = {source.module for source in self._sources}
        found.entered = {
            module: [0] * len(self._batches)
            for module in self._calibrated
            if module is not self.model and not layers.isdisjoint(module.modules())
        }
        digest = _Digester()
        for index in range(len(self._batches)):

            def enter(module: nn.Module, args: Any, index: int = index) -> None:
                found.entered[module][index] += 1

            def note(source: Source, x: Tensor, groups: range, index: int = index) -> None:
                if source not in found.calls:
                    found.order.append(source)
                    found.calls[source] = [0] * len(self._batches)
                    found.inputs[source] = []
                # A tensor that was written to in place is another input.
                version = 0 if x.is_inference() else x._version
                found.inputs[source].append((numbers.setdefault(x, next(counter)), version, groups))
                if index == 0 and not isinstance(source.module, _BatchNorm):
                    found.first = found.first or source
                    found.last = source
                if index < _TRIED:
                    digests = found.digests.setdefault(source, {})
                    digests[index] = digest(x).plus(digests.get(index))
                if source in watchers:
                    watchers[source](source, x, groups)

            def leave(source: Source, index: int = index) -> None:
                found.calls[source][index] += 1

            handles = [module.register_forward_pre_hook(enter) for module in found.entered]
            try:
                self._run(index, dict.fromkeys(self._sources, note), leave, found.hidden)
            finally:
                for handle in handles:
                    handle.remove()
            on_batch("")
        return found

    def learn(self, trace: Trace, groups: Sequence[Sequence[Source]], bar: ProgressBar) -> None:
        """Find out how to run the model up to each group of layers in turn without running all of it, for `walk`."""
        if len(groups) < 2:
            return
        self._replay = Replay(self.model, trace.entered)
        digest = _Digester()

        def shows(index: int, group: Sequence[Source]) -> bool:
            seen: dict[Source, Digest] = {}

            def see(source: Source, x: Tensor, groups: range) -> None:
                seen[source] = digest(x).plus(seen.get(source))

            try:
                self._show(index, trace, dict.fromkeys(group, see))
            except Exception:
                # Code that gets NaN may fail in any way; without stand-ins it does not.
                return False
            expected = {source: trace.digests[source][index] for source in group if trace.calls[source][index]}
            return seen.keys() == expected.keys() and all(seen[source].is_near(expected[source]) for source in seen)

        on_group = bar.phase("learning what to keep", len(groups))
        in_order = sorted(groups, key=lambda group: min(map(trace.order.index, group)))
        self._replay.learn(in_order, range(min(_TRIED, len(self._batches))), shows, on_group)

    @contextmanager
    def walk(self, sources: Iterable[Source]) -> Iterator[Callable[[Iterable[Source]], None]]:
        """Make `watch` run, within the context, only what follows modules that are finished.

        Only these layers change. Yields the function to call with those that have changed for the last time.
        """
        with self._replay.walk(sources):
            yield self._replay.finish

    def run_whole(self, block: nn.Module) -> None:
        """Run all of a block again, within `walk`, although layers of it are finished."""
        self._replay.run_whole(block)

    def calls_of(self, module: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """Yield the arguments of a module and what it returns, for every batch; each calls it once."""
        for index in range(len(self._batches)):
            found: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

            def note(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                found: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = found,
            ) -> None:
                found.append((args, kwargs, output))
                raise Stop

            with module.register_forward_hook(note, with_kwargs=True):
                try:
                    self._run(index, {}, lambda source: None, {})
                except Exception:
                    # As in `watch`.
                    if not self._replay.run_without(index):
                        raise
                    self._run(index, {}, lambda source: None, {})
            yield found[0]

    def watch(self, trace: Trace, watchers: Mapping[Source, Watcher]) -> None:
        """Show the inputs of some weights to their watchers, and run no batch further than that takes."""
        for index in range(len(self._batches)):
            shown = 0

            def see(source: Source, x: Tensor, groups: range) -> None:
                nonlocal shown
                shown += 1
                watchers[source](source, x, groups)

            try:
                self._show(index, trace, dict.fromkeys(watchers, see))
            except Exception:
                # A batch may take branches that those which were tried do not.
                if shown or not self._replay.run_without(index):
                    raise
                self._show(index, trace, watchers)

    def _show(self, index: int, trace: Trace, watchers: Mapping[Source, Watcher]) -> None:
        """Run one batch until the module of each watched weight has been called as often as the trace has it."""
        remaining = sum(trace.calls[source][index] for source in watchers)
        if remaining == 0:
            return

        def leave(source: Source) -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise Stop

        self._run(index, watchers, leave, {})

    def _run(
        self,
        index: int,
        watchers: Mapping[Source, Watcher],
        on_call: Callable[[Source], None],
        hidden: dict[Source, str],
    ) -> None:
        """Run one batch, showing the watchers every input.

        `on_call` is called once all inputs of a source are shown that a call of its module has. Sources whose weight
        is read by an operation that does not show its inputs are noted as `hidden`.
        """
        batch = self._batches[index]

        def show(source: Source, x: Tensor, groups: range) -> None:
            if x.numel() == 0:
                return
            # A sum is found ten times as fast; one that overflows says nothing.
            if x.is_floating_point() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                name = self._names[source.owner] + (f".{source.attribute}" if source.is_multiplied else "")
                text = f"an input of {name!r} holds NaN or infinities; nothing was changed"
                raise Stop(ValueError(f"calibration batch {index}: {text}"))
            try:
                watchers[source](source, x, groups)
            except Exception as error:
                # Not the fault of the batch: the disk may be full.
                raise Stop(error) from None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Every layer has one input, by whatever name.
            x = args[0] if args else next(iter(kwargs.values()))
            if x.numel():
                source = called(module)
                show(source, x, range(source.layout.groups))
                on_call(source)

        multiplied: dict[nn.Module, list[Source]] = {}
        for source in watchers:
            if source.is_multiplied:
                multiplied.setdefault(source.module, []).append(source)

        def showing(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(forward)
            def run(*args: Any, **kwargs: Any) -> Any:
                shown: dict[Source, None] = {}

                def see(source: Source, rows: Tensor, groups: range) -> None:
                    if rows.numel():
                        shown[source] = None
                        show(source, rows, groups)

                with no_fused_recurrence(), Products(multiplied[module], see, hidden):
                    output = forward(*args, **kwargs)
                for source in shown:
                    on_call(source)
                return output

            return run

        handles = [
            source.module.register_forward_pre_hook(hook, with_kwargs=True)
            for source in watchers
            if not source.is_multiplied
        ]
        self._replay.start(index)
        self._start(index)
        try:
            with torch.no_grad(), plain_products(self._multiplying), replaced_forwards(multiplied, showing):
                call(self.model, batch)
        except Stop as stop:
            if stop.error is not None:
                raise stop.error from None
        except Exception as error:
            raise does_not_run(self.model, index, batch, error) from error
        finally:
            for handle in handles:
                handle.remove()
