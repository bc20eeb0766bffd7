"""Selection of a model's parameters: which can be masked, why the others cannot, and their (out, in) matrices."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from masksolve._globs import matches, none_of
from masksolve._kinds import (
    ADAPTER,
    EMBEDDING,
    OTHER,
    ROUTER,
    Axes,
    Kind,
    each_reason_once,
    is_gate,
    is_router,
    stack_of_experts,
    tied_to,
)
from masksolve._pattern import Pattern
from masksolve._patterns import Patterns
from masksolve._tiles import Direction, convolution_axes

Ragged = Literal["allow", "skip"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Whether classes of experts that have no `is_transposed` hold matrices (in, out).
_EXPERTS_THAT_DO_NOT_SAY = {"JetMoeParallelExperts": False, "Llama4TextExperts": True}
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Layout:
    """The axes of a weight: `groups` matrices along its first one, and whether those of a kernel follow the matrix's.

    A convolution weight is (groups * out, in, *kernel); several projections stacked in one weight are
    (groups * out, in); any other weight is (..., out, in). Where it is `transposed`, out and in are exchanged: then
    `matrices` are (out, in) all the same, unless this is the layout `for_masks` that are transposable themselves.
    """

    groups: int = 1
    convolution: bool = False
    transposed: bool = False

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the weight as a stack of matrices, a view: one for each kernel position and group."""
        if self.groups == 1 and not self.convolution:
            return weight.mT if self.transposed else weight
        split: Tensor = weight.unflatten(0, (self.groups, -1))
        if not self.convolution:
            return split
        found = split.permute(convolution_axes(split.ndim, lead=1))
        return found.mT if self.transposed else found

    def weight(self, matrices: Tensor) -> Tensor:
        """Undo `matrices`."""
        stored = matrices.mT if self.transposed else matrices
        if not self.convolution:
            return stored if self.groups == 1 else stored.flatten(0, 1)
        order = [int(axis) for axis in np.argsort(convolution_axes(matrices.ndim, lead=1))]
        return stored.permute(order).flatten(0, 1)

    def operators(self, weight: Tensor) -> Tensor:
        """Return the matrices (groups, outputs, inputs) that inputs are multiplied with: a row for each filter."""
        if self.convolution or weight.ndim == 2:
            stored = weight.mT if self.transposed else weight
            found: Tensor = stored.unflatten(0, (self.groups, -1)).flatten(2)
            return found
        return weight.mT if self.transposed else weight

    def weight_of(self, operators: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `operators`, for a weight of this shape."""
        if self.convolution or len(shape) == 2:
            rows = operators.flatten(0, 1)
            return rows.mT if self.transposed else rows.reshape(shape)
        return operators.mT if self.transposed else operators

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of one matrix of a weight."""
        first, second = shape[:2] if self.convolution else shape[-2:]
        return (second, first // self.groups) if self.transposed else (first // self.groups, second)

    def for_masks(self, shape: Sequence[int], m: int, direction: Direction) -> Layout:
        """Return the layout to solve in: stacked projections are one matrix where no tile lies across two."""
        found = replace(self, transposed=self.transposed and direction != "both")
        stays_apart = self.convolution or self.matrix_shape(shape)[0] % m
        return found if stays_apart else replace(found, groups=1)

    def matrix_axes(self, ndim: int) -> tuple[int, int]:
        """Return the axes of a weight that are the rows and the columns of its matrices."""
        first, second = (0, 1) if self.convolution else (ndim - 2, ndim - 1)
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True)
class Site:
    """A parameter that is masked: its names in the model (several when it is tied), its layout and its pattern.

    The pattern is None where it is fit to be masked, but no glob has a pattern for it.
    """

    names: tuple[str, ...]
    layout: Layout
    pattern: Pattern | None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True, repr=False)
class ParameterReport:
    """One parameter: sparse, or skipped and why. A tied one has a line for every name.

    Attributes
    ----------
    name : str
    shape : tuple of int
        () for parameters that are not initialised yet.
    sparse : bool
        Whether it gets a mask.
    reason : str or None
        Why it is skipped, or to which name it is tied; None for all others.
    gradient_sparsity : str or None
        What a Sparsifier made with `gradient_sparsity` thins the gradients to from which the weight's is computed, such
        as "2:4", or "dense: " and why not; None without it, and for parameters that are not sparse.
    """

    name: str
    shape: tuple[int, ...]
    sparse: bool
    reason: str | None = None
    gradient_sparsity: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return asdict(self)

    def __repr__(self) -> str:
        state = "sparse" if self.sparse else "skipped"
        shape = "x".join(map(str, self.shape)) or "no shape"
        reason = f": {self.reason}" if self.reason else ""
        gradient = f", gradients {self.gradient_sparsity}" if self.gradient_sparsity else ""
        return f"ParameterReport({self.name!r}, {shape}, {state}{reason}{gradient})"


@dataclass(frozen=True)
class _Found:
    """One name of a parameter."""

    name: str
    owner: nn.Module
    attribute: str
    parameter: Tensor


def check_module(module: nn.Module, name: str = "model") -> nn.Module:
    """Return the module, and refuse anything else."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    return module


def masked_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that a Sparsifier masks, which the module's class has."""
    found: tuple[str, ...] = getattr(type(module), "_masked_attributes", ())
    return found


def adapted_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that have adapters, which the module's class has."""
    found: tuple[str, ...] = getattr(type(module), "_adapted_attributes", ())
    return found


def thresholded_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that have trainable thresholds, which the module's class has."""
    found: tuple[str, ...] = getattr(type(module), "_thresholded_attributes", ())
    return found


def select(
    model: nn.Module,
    patterns: Patterns,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    ragged: Ragged = "allow",
    direction: Direction = "both",
    unfit: Mapping[str, str] | None = None,
    verb: str = "mask",
    unloaded: bool = False,
) -> tuple[list[Site], tuple[ParameterReport, ...]]:
    """Split the parameters of a model into those that are masked and those that are skipped.

    `unfit` has the names that the caller cannot mask even if they are included, and why. `verb` says in reasons what is
    done with a parameter, if it is not masked. If `unloaded`, parameters may be on the meta device, because their
    values are loaded later.

    Raises
    ------
    ValueError
        If a glob matches no name, an `include` glob only parameters that cannot be masked, nothing is left to mask,
        or a chosen parameter is on the meta device and not `unloaded`.
    """
    found = list(_named(model))
    _check_globs(found, include, exclude)
    kinds = kinds_of(model)
    sites, report = [], []
    for names in _tied(found):
        # Of the names of a tied parameter, the first that has one.
        pattern = next((each for each in (patterns.of(one.name) for one in names) if each is not None), None)
        reasons = [
            _reason_not_chosen(one, names, kinds[one.name], include, exclude, direction, unfit or {}, verb)
            or _reason_of_size(one.parameter, layout_of(one.owner, one.attribute), pattern, ragged, direction)
            for one in names
        ]
        chosen = next((one for one, reason in zip(names, reasons, strict=True) if reason is None), None)
        if chosen is None:
            report += [_line(one, reason) for one, reason in zip(names, reasons, strict=True)]
            continue
        if chosen.parameter.is_meta and not unloaded:
            raise ValueError(
                f"parameter {chosen.name!r} is on the meta device and has no values to find masks for; materialise the "
                "model first (to_empty and its initialisation, or load_state_dict with assign=True)"
            )
        first = names[0].name
        layout = layout_of(chosen.owner, chosen.attribute)
        if pattern is not None:
            layout = layout.for_masks(chosen.parameter.shape, pattern.m, direction)
        sites.append(Site(tuple(one.name for one in names), layout, pattern))
        report += [
            ParameterReport(
                name=one.name,
                shape=tuple(one.parameter.shape),
                sparse=True,
                reason=None if one is names[0] else f"tied to {first}",
            )
            for one in names
        ]
    patterns.check({line.name: None if line.sparse else line.reason for line in report}, "parameter")
    _check_chosen(model, f"{patterns} sparse" if verb == "mask" else f"{verb}ed", include, report)
    return sites, tuple(report)


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Return the kind of each parameter of a model, by every one of its names."""
    kinds = {}
    adapters, routers = _adapters(model), _routers(model)
    for names in _tied(list(_named(model))):
        embedding = next((one.name for one in names if _is_embedding(one)), None)
        for one in names:
            if embedding is not None:
                dense: str | None = EMBEDDING if _is_embedding(one) else tied_to(embedding)
            elif _is_within(one.name, adapters):
                dense = ADAPTER
            elif _is_within(one.name, routers):
                dense = ROUTER
            else:
                dense = _dense_by_owner(one)
            is_stack = not is_lazy(one.parameter) and one.parameter.ndim > 2
            layout = layout_of(one.owner, one.attribute)
            axes: Axes = "convolution" if layout.convolution else "stack" if is_stack else "matrix"
            transposed: bool | None = layout.transposed
            if is_stack_of_experts(one.owner, one.attribute):
                transposed = experts_lie_transposed(one.owner)
            kinds[one.name] = Kind(axes, dense, transposed=transposed)
    return kinds


def layout_of(owner: nn.Module, attribute: str) -> Layout:
    """Return the layout of one parameter of a module."""
    if isinstance(owner, _ConvNd) and attribute == "weight":
        return Layout(owner.groups, convolution=True, transposed=isinstance(owner, _ConvTransposeNd))
    if isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight":
        # Queries, keys and values, which cross-attention and other libraries take apart.
        return Layout(3)
    if is_recurrent(owner, attribute):
        # The gates of an LSTM or a GRU.
        return Layout(max(1, getattr(owner, attribute).shape[0] // owner.hidden_size))
    if is_conv1d(owner) and attribute == "weight":
        return Layout(transposed=True)
    return Layout(transposed=is_stack_of_experts(owner, attribute) and experts_lie_transposed(owner) is True)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is a transformers.Conv1D: a Linear whose weight is (in, out)."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and isinstance(module, conv1d)


def is_recurrent(owner: nn.Module, attribute: str) -> bool:
    """Return whether a parameter is a matrix of a recurrent layer, or of the output that an LSTM projects."""
    is_matrix = attribute.startswith(("weight_ih", "weight_hh", "weight_hr"))
    return is_matrix and isinstance(owner, (nn.RNNBase, nn.RNNCellBase))


def is_stack_of_experts(owner: nn.Module, attribute: str) -> bool:
    """Return whether a parameter holds one matrix for each expert of a module of transformers."""
    parameter = owner._parameters.get(attribute)
    # Others' modules may stack them otherwise.
    is_of_experts = type(owner).__module__.startswith("transformers.") and "Expert" in type(owner).__name__
    return is_of_experts and parameter is not None and not is_lazy(parameter) and parameter.ndim == 3


def experts_lie_transposed(owner: nn.Module) -> bool | None:
    """Return whether a module of transformers stacks experts as (expert, in, out); None where nothing says so."""
    said = getattr(owner, "is_transposed", _EXPERTS_THAT_DO_NOT_SAY.get(type(owner).__name__))
    return said if isinstance(said, bool) else None


def as_globs(globs: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Return one glob or several as a tuple."""
    if globs is None:
        return None
    found = (globs,) if isinstance(globs, str) or not isinstance(globs, Iterable) else tuple(globs)
    for glob in found:
        if not isinstance(glob, str):
            raise TypeError(f"include and exclude take globs of parameter names, such as 'encoder.*', got {glob!r}")
    return found


def _named(model: nn.Module) -> Iterator[_Found]:
    """Yield every name of every parameter, as it was before any parametrization moved it."""
    for path, module in model.named_modules():
        is_moved = isinstance(module, ParametrizationList)
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            head, _, tail = path.rpartition(".")
            prefix = head.removesuffix("parametrizations") + tail if is_moved else path
            name = prefix if is_moved else f"{prefix}.{attribute}" if prefix else attribute
            yield _Found(name, module, attribute, parameter)


def _tied(found: list[_Found]) -> list[list[_Found]]:
    """Group the names by parameter."""
    groups: dict[int, list[_Found]] = {}
    for one in found:
        groups.setdefault(id(one.parameter), []).append(one)
    return list(groups.values())


def _is_embedding(one: _Found) -> bool:
    return isinstance(one.owner, (nn.Embedding, nn.EmbeddingBag)) and one.attribute == "weight"


def _is_within(name: str, paths: Container[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in paths for count in range(1, len(parts) + 1))


def _adapters(model: nn.Module) -> set[str]:
    """Return the paths of the modules and parameters that PEFT has added to the layers of a model."""
    # Models with adapters have imported PEFT; others need not have it installed.
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if tuner is None:
        return set()
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, tuner)
        for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))
        if name != "base_layer"
    }


def _routers(model: nn.Module) -> set[str]:
    """Return the paths of modules that choose among experts, found by class, by name, or beside the experts."""
    paths = set()
    for path, module in model.named_modules():
        for name, child in module.named_children():
            is_beside_experts = is_gate(name) and hasattr(module, "experts")
            if is_router(name) or is_beside_experts or type(child).__name__.endswith("Router"):
                paths.add(f"{path}.{name}" if path else name)
    return paths


def _dense_by_owner(one: _Found) -> str | None:
    """Say why a parameter other than an embedding, a router or an adapter stays dense; None if it does not."""
    if _is_default(one.owner, one.attribute):
        return None
    is_of_experts = "Expert" in type(one.owner).__name__ or "experts" in one.name.split(".")
    if is_of_experts and not is_lazy(one.parameter) and one.parameter.ndim == 3:
        return stack_of_experts(one.parameter.shape)
    return OTHER


def _reason_not_chosen(
    one: _Found,
    names: list[_Found],
    kind: Kind,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    direction: Direction,
    unfit: Mapping[str, str],
    verb: str,
) -> str | None:
    for glob in exclude or ():
        for other in names:
            if matches(other.name, [glob]):
                return f"excluded by {glob!r}" + ("" if other is one else f", to which {other.name} is tied")
    for other in names:
        if other.attribute in masked_attributes(other.owner):
            return "already masked by a Sparsifier; finalize it first"
        if other.attribute in adapted_attributes(other.owner):
            return "has an adapter; merge_adapters first"
        if other.attribute in thresholded_attributes(other.owner):
            return "has trainable thresholds; finalize its DynamicSparsifier first"
        if isinstance(other.owner, ParametrizationList):
            return f"already parametrized by {type(list(other.owner)[-1]).__name__}; remove that parametrization first"
    parameter = one.parameter
    if is_lazy(parameter):
        return "not initialised yet; run the model once first"
    if parameter.ndim < 2:
        return f"{parameter.ndim}-D: not a matrix"
    if include is not None and not matches(one.name, include):
        return "not included"
    if one.name in unfit:
        return unfit[one.name]
    if include is None and kind.dense is not None:
        return f"{kind.dense}; include it to {verb} it"
    if include is None and kind.transposed is None and direction != "both":
        return (
            f"{stack_of_experts(parameter.shape)} of which nothing says along which axis inputs lie; include it "
            "to mask it as (expert, out, in)"
        )
    if parameter.dtype not in _DTYPES:
        return f"dtype {parameter.dtype} is not one of {', '.join(map(str, _DTYPES))}"
    return None


def _is_default(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION
    is_weight = attribute == "weight" and (isinstance(owner, (nn.Linear, _ConvNd)) or is_conv1d(owner))
    return is_weight or is_recurrent(owner, attribute) or is_stack_of_experts(owner, attribute)


def _reason_of_size(
    parameter: Tensor, layout: Layout, pattern: Pattern | None, ragged: Ragged, direction: Direction
) -> str | None:
    if pattern is None:
        return None
    m, shape = pattern.m, parameter.shape
    rows, columns = replace(layout, transposed=layout.transposed and direction != "both").matrix_shape(shape)
    size = f"{rows}x{columns}" if layout.groups == 1 else f"each of its {layout.groups} groups is {rows}x{columns} and"
    if direction == "both":
        lengths, what, way = [rows, columns], f"{m}x{m} tile", "both ways"
    else:
        lengths = [columns if direction == "rows" else rows]
        what, way = f"group of {m} along {direction}", f"along {direction}"
    if min(lengths) < m or 0 in shape:
        return f"{size} holds no whole {what}"
    if ragged == "skip" and any(length % m for length in lengths):
        return f"{size} is not a multiple of {m} {way}, and ragged='skip'"
    return None


def _line(one: _Found, reason: str | None) -> ParameterReport:
    shape = () if is_lazy(one.parameter) else tuple(one.parameter.shape)
    return ParameterReport(name=one.name, shape=shape, sparse=False, reason=reason)


def _check_globs(found: list[_Found], include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in globs or ():
            names = [one.name for one in found]
            if not any(matches(name, [glob]) for name in names):
                raise ValueError(f"{option} {glob!r} matches {none_of(names, 'parameter')}")


def _check_chosen(
    model: nn.Module, goal: str, include: Sequence[str] | None, report: Sequence[ParameterReport]
) -> None:
    for glob in include or ():
        matched = [line for line in report if matches(line.name, [glob])]
        if not any(line.sparse for line in matched):
            raise ValueError(f"include {glob!r} matches nothing that can be {goal} ({_reasons(matched)})")
    if not any(line.sparse for line in report):
        reasons = _reasons(report) or "it has no parameters"
        raise ValueError(f"no parameter of this {type(model).__name__} can be {goal} ({reasons})")


def _reasons(lines: Sequence[ParameterReport]) -> str:
    # The reasons of weights say more than those of biases.
    lines = [line for line in lines if len(line.shape) > 1] or list(lines)
    return each_reason_once([(line.name, line.reason or "") for line in lines])
