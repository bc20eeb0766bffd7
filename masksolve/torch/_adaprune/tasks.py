"""The layers that AdaPrune prunes, their patterns and their order, and why it skips the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from masksolve import odds
from masksolve._inputs import check_direction
from masksolve._pattern import Pattern
from masksolve._patterns import PatternsLike, as_patterns, check_all_have_one
from masksolve._tiles import Direction
from masksolve.torch._adaprune.calibration import Trace, input_key
from masksolve.torch._adaprune.source import Source, sources_of
from masksolve.torch._layers import Layout, ParameterReport, Site, as_globs, check_module, is_stack_of_experts, select

_REPAIRED = "only Linear, Conv1D, convolution, attention and recurrent layers and stacks of experts are repaired"
_WITHOUT_PATTERN = "no pattern is given for it"


@dataclass(frozen=True, eq=False)
class Task:
    """One weight to prune, its pattern, and where its inputs come from: several sources where it is tied.

    `has_biases`: whether each source has a bias that it shares with no other layer.
    """

    site: Site
    sources: tuple[Source, ...]
    pattern: Pattern
    has_biases: bool

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.site.name

    @property
    def weight(self) -> nn.Parameter:
        """The weight."""
        return self.sources[0].weight

    @property
    def layout(self) -> Layout:
        """The axes of the weight, whichever way it is masked."""
        return self.sources[0].layout

    @property
    def biases(self) -> tuple[nn.Parameter, ...]:
        """One bias a source, or none."""
        return tuple(bias for each in self.sources if (bias := each.bias) is not None) if self.has_biases else ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that a repair may change."""
        return [self.weight, *self.biases]


def choose_tasks(
    model: nn.Module,
    pattern: PatternsLike,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    direction: Direction = "both",
    given: Collection[str] | None = None,
    unloaded: bool = False,
) -> tuple[list[Task], list[ParameterReport]]:
    """Return the weights to prune, in the model's order, and a line for every parameter.

    Parameters
    ----------
    model, pattern, include, exclude, direction
        As for `adaprune`.
    given : collection of str, optional
        The names of the weights that masks were given for.
    unloaded : bool
        Whether parameters may be on the meta device.

    Raises
    ------
    ValueError, TypeError
        As for `adaprune`.
    """
    patterns, all_sources = as_patterns(pattern), sources_of(model)
    unfit = _unfit(model, all_sources)
    sites, lines = select(
        model, patterns, include=include, exclude=exclude, direction=direction, unfit=unfit, unloaded=unloaded
    )
    _check_names("masks", given or (), lines)
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    tasks: list[Task] = []
    reasons: dict[str, str | None] = {}
    for site in sites:
        sources = tuple(all_sources[name] for name in site.names)
        if given is not None and site.name not in given:
            reasons.update(dict.fromkeys(site.names, "no mask was given for it"))
        elif site.pattern is None:
            reasons.update(dict.fromkeys(site.names, _WITHOUT_PATTERN))
        else:
            own = [bias for each in sources if (bias := each.bias) is not None and uses[id(bias)] == 1]
            tasks.append(Task(site, sources, site.pattern, len(own) == len(sources)))
    return tasks, without(lines, reasons)


def in_order(
    model: nn.Module, tasks: Sequence[Task], lines: Sequence[ParameterReport], trace: Trace, keep_first_last: bool
) -> tuple[list[Task], list[ParameterReport]]:
    """Sort the tasks by their first calls, and leave out those that are not called or stay dense.

    Raises
    ------
    ValueError
        If no pattern is given for one.
    """
    places = {source: place for place, source in enumerate(trace.order)}
    chosen: list[Task] = []
    reasons: dict[str, str | None] = {}
    for task in tasks:
        if task.pattern.zeros == 0:
            reasons.update(dict.fromkeys(task.site.names, f"{task.pattern} keeps everything"))
        elif hidden := [source for source in task.sources if source in trace.hidden]:
            reasons.update(dict.fromkeys(task.site.names, _reason_hidden(hidden[0], trace)))
        elif not all(source in places for source in task.sources):
            reasons.update(dict.fromkeys(task.site.names, "no calibration batch calls it"))
        elif keep_first_last and trace.first in task.sources:
            reasons.update(dict.fromkeys(task.site.names, "the first layer; `keep_first_last=False` prunes it"))
        elif keep_first_last and trace.last in task.sources:
            reasons.update(dict.fromkeys(task.site.names, "the last layer; `keep_first_last=False` prunes it"))
        else:
            chosen.append(task)
    skipped = without(lines, reasons)
    ends = [trace.first, trace.last] if keep_first_last else []
    check_all_have_patterns(model, [source for source in trace.order if source not in ends], skipped)
    return sorted(chosen, key=lambda task: min(places[source] for source in task.sources)), skipped


def check_some_are_left(layers: Sized, skipped: Sequence[ParameterReport]) -> None:
    """Refuse to prune nothing."""
    if not layers:
        found = "; ".join(f"{line.name}: {line.reason}" for line in skipped if len(line.shape) > 1)
        raise ValueError(f"no layer is left to prune ({found})")


def check_all_have_patterns(model: nn.Module, layers: Collection[Source], lines: Sequence[ParameterReport]) -> None:
    """Refuse to leave some of these layers dense because no pattern is given for them."""
    names = [line.name for line in lines if line.reason == _WITHOUT_PATTERN]
    sources = sources_of(model)
    check_all_have_one([name for name in names if sources[name] in layers])


def by_inputs(tasks: Sequence[Task], trace: Trace) -> list[list[Task]]:
    """Group tasks that are called with the very same inputs, such as query, key and value of an attention."""
    groups: dict[object, list[Task]] = {}
    for task in tasks:
        key = tuple((input_key(source), tuple(trace.inputs[source])) for source in task.sources)
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def without(lines: Sequence[ParameterReport], reasons: Mapping[str, str | None]) -> list[ParameterReport]:
    """Return the lines, of which some turn out to be skipped, for these reasons."""
    return [replace(line, sparse=False, reason=reasons[line.name]) if line.name in reasons else line for line in lines]


def patterns_from_zeros(
    model: nn.Module,
    m: int,
    *,
    direction: Direction = "both",
    confidence: float = 0.95,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, Pattern]:
    """Choose the pattern that each layer of a sparse model nearly has, n of m from its share of zeros, for `adaprune`.

    Parameters
    ----------
    model : nn.Module
        With zeros among its weights, as pruning without structure leaves them.
    m : int
        Length of a group.
    direction : {"both", "rows", "columns"}
        As for `adaprune`: a layer needs a whole m x m tile, or a whole group along rows or columns.
    confidence : float
        Each layer takes the smallest n such that a group keeps at most n with this probability, if its zeros lie at
        random; the paper's code has 0.95 and 0.1.
    include, exclude : str or sequence of str, optional
        Globs of parameter names, as for `adaprune`.

    Returns
    -------
    dict of str to Pattern
        m:m, dense, where there are too few zeros.

    Raises
    ------
    ValueError, TypeError
        As for `adaprune` and `masksolve.odds.choose_pattern`.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, section on AdaPrune.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(80, 64)
    >>> with torch.no_grad():
    ...     _ = layer.weight.masked_fill_(torch.arange(80) % 10 < 7, 0)      # 7 of 10 are zero
    >>> print(patterns_from_zeros(layer, 8)["weight"])
    5:8
    """
    tasks, _ = choose_tasks(
        check_module(model),
        Pattern(m, m),
        include=as_globs(include),
        exclude=as_globs(exclude),
        direction=check_direction(direction),
    )
    weights = {task.name: task.weight.detach().cpu() for task in tasks}
    # NumPy has no bfloat16; zeros stay zeros.
    return odds.choose_patterns(
        {name: (weight != 0).numpy() for name, weight in weights.items()}, m, confidence=confidence
    )


def _reason_hidden(source: Source, trace: Trace) -> str:
    return f"{type(source.module).__name__} reads it by {trace.hidden[source]}, which does not show its inputs"


def _unfit(model: nn.Module, sources: Mapping[str, Source]) -> dict[str, str]:
    """Return the weights that cannot be repaired, and why."""
    uses: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append((name, model.get_submodule(name.rpartition(".")[0])))
    reasons = ((names, _reason_of_owners(names, sources)) for names in uses.values())
    return {name: reason for names, reason in reasons if reason is not None for name, _ in names}


def _reason_of_owners(names: Sequence[tuple[str, nn.Module]], sources: Mapping[str, Source]) -> str | None:
    for name, owner in names:
        attribute = name.rpartition(".")[2]
        if isinstance(owner, ParametrizationList):
            # `select` has a reason for those.
            return None
        if attribute.endswith("_orig") and hasattr(owner, f"{attribute.removesuffix('_orig')}_mask"):
            return f"{name} is masked by torch.nn.utils.prune; call prune.remove first"
        if name not in sources and is_stack_of_experts(owner, attribute):
            return f"nothing says along which axis the inputs of {name} lie; stacks of experts that say so are repaired"
        if name not in sources:
            return f"{name} is part of {type(owner).__name__}; {_REPAIRED}"
    if len({sources[name].layout for name, _ in names}) > 1:
        return "tied to a layer of another kind"
    return None


def _check_names(option: str, names: Collection[str], lines: Sequence[ParameterReport]) -> None:
    """Refuse what was given for a name that is not a weight to prune."""
    reasons = {line.name: line.reason for line in lines}
    for name in names:
        if name not in reasons:
            some = ", ".join(list(reasons)[:3])
            raise ValueError(
                f"{option} has {name!r}, which is none of the {len(reasons)} parameter names ({some}, ...)"
            )
        if reasons[name] is not None:
            raise ValueError(f"{option} has {name!r}, which cannot be pruned: {reasons[name]}; leave it out")
