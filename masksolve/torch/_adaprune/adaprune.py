"""AdaPrune: a trained model pruned to N:M, each layer re-fitted on a few unlabelled inputs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from masksolve._check import check_mask
from masksolve._errors import InvalidMaskError
from masksolve._inputs import as_count, check_choice, check_direction, check_flag, check_number
from masksolve._patterns import PatternsLike
from masksolve._tiles import Direction
from masksolve.torch._adaprune.batch_norm import Statistics, called_after, follow, running_batch_norms
from masksolve.torch._adaprune.blocks import (
    Block,
    Refinement,
    Targets,
    blocks_of,
    call_of,
    called_once,
    check_refinement,
    refine_block,
)
from masksolve.torch._adaprune.calibration import Calibration, Moments, Trace
from masksolve.torch._adaprune.input_pool import InputPool, TensorStore
from masksolve.torch._adaprune.layer import (
    SOLVERS,
    GroupInputs,
    LayerInputs,
    LayerOptions,
    LayerRepair,
    Solver,
    joined,
    repair_layer,
)
from masksolve.torch._adaprune.products import plain_products
from masksolve.torch._adaprune.progress import progress_bar
from masksolve.torch._adaprune.records import AdaPruneReport, PrunedLayer, RefinedBlock
from masksolve.torch._adaprune.scores import SCORES, Score
from masksolve.torch._adaprune.source import Source, called
from masksolve.torch._adaprune.tasks import Task, by_inputs, check_some_are_left, choose_tasks, in_order, without
from masksolve.torch._adaprune.transaction import Repairs, Transaction
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import ParameterReport, as_globs, check_module, is_stack_of_experts
from masksolve.torch._solver.solve import Importance, check_importance, described

_logger = logging.getLogger("masksolve")

# Matrices that a warning names at most.
_NAMED = 8

# Gets a task that is done, and a text.
OnLayer = Callable[[Task, str], None]


def adaprune(
    model: nn.Module,
    calibration: Iterable[Any],
    pattern: PatternsLike,
    *,
    direction: Direction = "both",
    importance: Score | Importance = "magnitude",
    masks: Mapping[str, Tensor] | None = None,
    solver: Solver = "lstsq",
    refine: Refinement | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    keep_first_last: bool = True,
    sequential: bool = True,
    correct_bias: bool = True,
    batch_norm: bool = True,
    respect_zeros: bool = False,
    alternations: int = 0,
    damping: float = 1e-2,
    iterations: int = 1000,
    min_tokens: int = 1,
    memory_mib: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> AdaPruneReport:
    """Prune a trained model to N:M, and repair each layer: re-fit what it keeps on a few hundred unlabelled inputs.

    Layer by layer, in the order of execution: find the mask S of the weight W, then choose the kept weights W′ and the
    bias that minimise ‖W X − (S∘W′) X‖² over the calibration inputs X. No labels and no training. Linear, convolution,
    attention and recurrent layers, transformers.Conv1D and its stacks of experts are pruned where they hold a whole
    m x m tile (one-sided: a whole group): a convolution at each kernel position, each expert and each projection of an
    attention by itself, on the inputs that it gets.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Runs in evaluation mode; its own mode is restored.
    calibration : iterable
        Batches of inputs, without labels: each a tensor, a sequence of arguments or a mapping of keyword arguments. A
        few hundred samples suffice. Held in memory. A layer runs about twice with each batch, once more where batch
        norms follow it, and more often in a module that is called several times.
    pattern : str, (int, int), Pattern or mapping
        N **kept** of every M, such as "4:8" or (4, 8). A mapping has one for the weights that each glob matches, the
        first that does: {"*.attention.*": "2:4", "*": "4:8"}, or what `patterns_from_zeros` returns.
    direction : {"both", "rows", "columns"}
        "both": transposable. One-sided: "rows", n of every m inputs of an output; "columns", of every m outputs of an
        input.
    importance : {"magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"} or callable
        What masks keep most of: abs(w); abs(w) times the norm of its input; abs(w) as a share of its row's sum and of
        its column's, both added, times the root of that norm; w² / [H⁻¹]_jj, the score of optimal brain surgeon;
        that score of what weights have become when their turn comes, and squares of weights that are found together
        with the mask, see Notes; or the scores that a callable returns for
        a weight's name and Parameter, of its shape, not negative.
    masks : mapping of str to Tensor of bool, optional
        The masks of some weights, True = kept, in place of those that keep the most importance; the other weights are
        skipped.
    solver : {"lstsq", "adam", "absorb", "none"}
        "lstsq": least squares, see Notes. "adam": the paper's, on cached inputs, after "absorb". "absorb": the mean of
        the weights that a group loses is added to those that it keeps. "none": the mask alone.
    refine : "block", optional
        Once its layers are repaired, train what each block keeps, all together, to return what the block of the dense
        model does; see Notes. Blocks are the members of an nn.ModuleList or nn.Sequential that hold several of the
        layers. Needs two batches or more, and `sequential`.
    include, exclude : str or sequence of str, optional
        Globs of parameter names, as for `Sparsifier`.
    keep_first_last : bool
        Skip the layers that are called first and last; embeddings count.
    sequential : bool
        True: inputs X come from the model as pruned so far. False: from the original model.
    correct_bias : bool
        Shift the bias, where a layer has its own, so that the mean output is unchanged; exact for any solver. Train it
        where blocks are refined.
    batch_norm : bool
        At the end, shift the running statistics of batch norms behind pruned layers by as much as the statistics of
        their inputs have moved over the calibration data.
    respect_zeros : bool
        Zeros stay zero, and masks keep at most n. For models that are sparse already.
    alternations : int
        How often to find masks again from the repaired weights, at most. A layer stops where that does not help. For
        masks that are found by a named importance, "sparsegpt" and "admm" aside.
    damping : float
        The amount added to the diagonal of H, as a share of its mean.
    iterations : int
        Steps of "adam".
    min_tokens : int
        A matrix, such as an expert's, that gets fewer inputs keeps its mask alone: nothing is fitted. Few inputs seldom
        harm where their spectrum decays, as in language models. About as many as an output keeps inputs do if it is
        flat, so a warning names the experts that get fewer inputs than they are wide.
    memory_mib : int
        Memory for the inputs that "adam" caches, one layer at a time, and for what dense blocks return that `refine`
        compares with; the rest goes to temporary files. Also for H = X Xᵀ: of as many experts of a stack as it holds in
        one run, and without `sequential` of as many layers.
    seed : int
        For the minibatches of "adam".
    progress : bool
        Show a progress bar with the errors of each layer on stderr. Needs the extra `cli`.

    Returns
    -------
    AdaPruneReport
        Also after Ctrl-C: finished layers stay pruned, all others are as they were.

    Raises
    ------
    ValueError, TypeError
        For bad options and globs, calibration batches that do not run through the model, and NaN among weights or
        activations. The model is left as it was.
    InvalidMaskError
        For a given mask that breaks the pattern.

    Notes
    -----
    Source: Hubara et al. 2021 (arXiv 2102.08124), AdaPrune; its solver is "adam", with 1000 iterations on 50 cached
    activations, learning rates 1e-3 and 1e-2. Here an activation is a row of a Linear's input, an image of a
    convolution's. "lstsq" solves the normal equations of every output on its kept inputs. Of narrow layers in closed
    form, in float64; of wide ones, where that would take outputs x (kept inputs)³ / 3 operations, by conjugate
    gradients of all outputs at once, about 100 x outputs x inputs²: the error, damping included, is then within a
    ten-thousandth of the least, with a proof for each output.

    "sparsegpt" is the order of Frantar and Alistarh 2023 (arXiv 2301.00774), with a tile's inputs masked at once.
    "admm" is the alternating direction method of multipliers of Meng et al. 2024 ("ALPS", arXiv 2406.07831), which
    moves all weights and finds the mask of the moved ones again, some thirty times, until both agree; as its masks are
    exact, transposable ones included, they converge as the authors prove. In language models layers are left with half
    to four fifths of the error that the other choices leave; where inputs are not correlated, with a few percent more.

    Blocks are refined by Adam, a step per batch, six passes at most, at rates that fall from a hundredth of the root
    mean square of a layer's weights to none. Every eighth batch, and at least one, is held out: the pass that serves
    those best counts; where none serves them better than the repaired layers do, the block stays as it was.

    Examples
    --------
    >>> import torch, masksolve.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> inputs = torch.randn(100, 4) @ torch.randn(4, 16)
    >>> report = masksolve.torch.adaprune(model, inputs.split(50), "4:8", keep_first_last=False)
    >>> [layer.name for layer in report.layers]
    ['0.weight', '2.weight']
    >>> report.layers[0].error_before > 0.01 > report.layers[0].error_after
    True
    >>> int((model[0].weight != 0).sum())
    256
    """
    start = time.perf_counter()
    check_module(model)
    for name, flag in {
        "keep_first_last": keep_first_last,
        "sequential": sequential,
        "batch_norm": batch_norm,
        "progress": progress,
    }.items():
        check_flag(flag, name)
    options = as_options(
        importance=importance,
        masks=masks,
        direction=direction,
        solver=solver,
        correct_bias=correct_bias,
        respect_zeros=respect_zeros,
        alternations=alternations,
        damping=damping,
        iterations=iterations,
        min_tokens=min_tokens,
        memory_mib=memory_mib,
        seed=seed,
    )
    tasks, lines = choose_tasks(
        model,
        pattern,
        include=as_globs(include),
        exclude=as_globs(exclude),
        direction=direction,
        given=masks,
    )
    _check_tasks(tasks, masks, direction)
    with _evaluation_mode(model), progress_bar(progress) as bar, ExitStack() as stack:
        runs = Calibration(model, calibration)
        check_refinement(refine, sequential=sequential, batches=len(runs))
        before = {norm: Statistics.of(norm) for norm in running_batch_norms(model) if batch_norm}
        blocks = blocks_of(model, tasks) if refine else []
        targets = Targets(blocks, stack.enter_context(TensorStore(options.memory)))
        with targets.seen():
            trace = runs.trace(
                {called(norm): seen.add for norm, seen in before.items()},
                bar.phase("running the dense model", len(runs)),
            )
        tasks, lines = in_order(model, tasks, lines, trace, keep_first_last)
        check_some_are_left(tasks, lines)
        batch_norms = called_after(list(before), trace, tasks[0].sources)
        rounds = _rounds(by_inputs(tasks, trace), options, sequential)
        blocks = called_once(blocks, tasks, trace.entered)
        if refine and not blocks:
            raise ValueError(
                f"refine={refine!r} finds no block: a member of an nn.ModuleList or nn.Sequential that each batch "
                "calls once, with several of the layers that are pruned; leave it out"
            )
        runs.learn(trace, [*map(_sources, rounds), *([called(norm)] for norm in batch_norms)], bar)
        with Transaction(tasks, batch_norms) as done:
            on_layer = bar.phase("repairing", len(tasks) + len(blocks))
            refinement = _Refinement(runs, blocks, targets, done, correct_bias, on_layer)
            _repair(runs, trace, rounds, options, sequential, lambda _, text: on_layer(text), done, refinement)
            on_norm = bar.phase("following with batch norms", len(batch_norms))
            with runs.walk(map(called, batch_norms)) as finish:
                # One by one: earlier norms change the inputs of later ones.
                for norm in batch_norms:
                    after = Statistics.of(norm)
                    runs.watch(trace, {called(norm): after.add})
                    if after.count:
                        follow(norm, before[norm], after)
                        done.moved_norms.append(norm)
                    finish([called(norm)])
                    on_norm("")
    warn_of_few_tokens(tasks, done.layers, options.min_tokens)
    reasons = {name: "interrupted before its repair" for task in done.unfinished for name in task.site.names}
    names = {module: name for name, module in model.named_modules()}
    return AdaPruneReport(
        direction=direction,
        layers=tuple(done.layers),
        blocks=tuple(done.blocks),
        skipped=tuple(line for line in without(lines, reasons) if not line.sparse),
        batch_norms=tuple(names[norm] for norm in done.moved_norms),
        interrupted=done.interrupted,
        seconds=time.perf_counter() - start,
    )


def as_options(
    *,
    importance: Score | Importance,
    masks: Mapping[str, Tensor] | None = None,
    direction: Direction,
    solver: Solver,
    correct_bias: bool = True,
    respect_zeros: bool = False,
    alternations: int = 0,
    damping: float = 1e-2,
    iterations: int = 1000,
    min_tokens: int,
    memory_mib: int = 1024,
    seed: int = 0,
) -> LayerOptions:
    """Return the options that concern one layer, checked as `adaprune` does.

    Raises
    ------
    ValueError, TypeError
        For one that is bad, or does not go with another.
    """
    check_direction(direction)
    check_choice(solver, "solver", SOLVERS)
    if not callable(importance):
        check_importance(importance, SCORES)
    if masks is not None and not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of names to bool tensors, got {masks!r}; give scores as `importance`")
    check_flag(correct_bias, "correct_bias")
    check_flag(respect_zeros, "respect_zeros")
    check_number(damping, "damping")
    if not 0 < damping < math.inf:
        raise ValueError(
            f"damping must be positive and finite, got {damping!r}; 1e-2 is the default, 1e-8 is nearly none"
        )
    options = LayerOptions(
        importance=importance,
        masks=masks,
        direction=direction,
        solver=solver,
        correct_bias=correct_bias,
        respect_zeros=respect_zeros,
        alternations=as_count(alternations, "alternations", 0),
        damping=damping,
        iterations=as_count(iterations, "iterations", 1),
        min_tokens=as_count(min_tokens, "min_tokens", 0),
        memory=as_count(memory_mib, "memory_mib", 0) << 20,
        seed=as_count(seed, "seed", 0),
    )
    if alternations and masks is not None:
        raise ValueError(f"alternations={alternations} finds masks again, but masks were given; use one of the two")
    if alternations and importance in ("sparsegpt", "admm"):
        raise ValueError(
            f"alternations={alternations} finds masks again from the repaired weights, and importance={importance!r} "
            "does so already; leave out one of them"
        )
    if alternations and callable(importance):
        raise ValueError(
            f"alternations={alternations} scores weights that are not the model's, which a callable importance cannot "
            f"do; use one of {', '.join(repr(each) for each in SCORES if each not in ('sparsegpt', 'admm'))}"
        )
    return options


def repair_part(
    runs: Calibration,
    tasks: Sequence[Task],
    lines: Sequence[ParameterReport],
    options: LayerOptions,
    ends: Callable[[Trace], tuple[Source | None, Source | None]],
    *,
    sequential: bool,
    on_layer: OnLayer,
) -> tuple[list[PrunedLayer], dict[str, str]]:
    """Prune and repair some weights of a model, whose parameters may be unloaded elsewhere. After an error they differ.

    Parameters
    ----------
    runs : Calibration
        Of the part of the model that holds them.
    tasks, lines
        Of the whole model.
    options : LayerOptions
    ends : callable
        Gets the trace of the part; returns the layers that stay dense as the first and the last.
    sequential : bool
        As for `adaprune`.
    on_layer : callable
        Called after each of them with the task and a text.

    Returns
    -------
    layers : list of PrunedLayer
    reasons : dict of str to str
        Why weights of the part are not among them, by name.
    """
    _check_tasks(tasks, options.masks, options.direction)
    trace = runs.trace({}, lambda text: None)
    trace.first, trace.last = ends(trace)
    before = {line.name for line in lines if line.sparse}
    names = {name for task in tasks for name in task.site.names}
    chosen, lines = in_order(runs.model, tasks, lines, trace, True)
    reasons = {line.name: line.reason for line in lines if line.name in before & names and not line.sparse}
    # Nothing stands in for calls: of all batches that takes more memory than the part, which is quickly run again.
    rounds = _rounds(by_inputs(chosen, trace), options, sequential)
    done = Repairs()
    _repair(runs, trace, rounds, options, sequential, on_layer, done)
    return done.layers, {name: reason for name, reason in reasons.items() if reason is not None}


def _rounds(groups: Sequence[list[Task]], options: LayerOptions, sequential: bool) -> list[list[list[Task]]]:
    """Put together the groups whose inputs one run collects: one, or as many as memory holds unless sequential."""
    rounds: list[list[list[Task]]] = []
    free = 0
    for group in groups:
        size = sum(map(Moments.size_of, group[0].sources))
        # Adam's inputs are kept for one layer at a time in any case.
        if sequential or options.solver == "adam" or size > free:
            rounds.append([])
            free = options.memory
        rounds[-1].append(group)
        free -= size
    return rounds


def _sources(groups: Iterable[Sequence[Task]]) -> list[Source]:
    """Return the sources of the inputs that the groups have."""
    return [source for group in groups for source in group[0].sources]


def _repair(
    runs: Calibration,
    trace: Trace,
    rounds: Sequence[Sequence[Sequence[Task]]],
    options: LayerOptions,
    sequential: bool,
    on_layer: OnLayer,
    done: Repairs,
    refinement: _Refinement | None = None,
) -> None:
    """Prune and repair every task: as it comes where `sequential`, all of them at the end otherwise.

    Blocks are refined when the last of their tasks is repaired.
    """
    # If not sequential, inputs come from the dense model, and no later layer depends on a repair.
    with runs.walk([source for groups in rounds for source in _sources(groups)]) as finish:
        for groups in rounds:
            found: dict[Task, list[LayerRepair]] = {task: [] for group in groups for task in group}
            for matrices in _experts_at_once(groups, options):
                with _inputs(runs, trace, _sources(groups), options, matrices) as seen:
                    for task, repairs in _repairs(groups, seen, options, matrices):
                        found[task] += repairs
                        if matrices is not None and matrices.stop < len(task.weight):
                            continue
                        repair = joined(found.pop(task), task, options.direction)
                        record = repair.record
                        _logger.info(
                            "%s: error %.3g, repaired %.3g", task.name, record.error_before, record.error_after
                        )
                        done.add(task, repair)
                        if sequential:
                            done.write()
                        text = f"{task.name}: error {record.error_before:.2%} -> {record.error_after:.2%}"
                        on_layer(task, text)
            if refinement is not None:
                refinement.of_repaired()
            finish(_sources(groups))
    done.write()


class _Refinement:
    """The blocks that are still to be refined."""

    def __init__(
        self,
        runs: Calibration,
        blocks: Sequence[Block],
        targets: Targets,
        done: Transaction,
        train_biases: bool,
        on_block: Callable[[str], None],
    ) -> None:
        self._runs, self._blocks, self._targets, self._done = runs, list(blocks), targets, done
        self._train_biases, self._on_block = train_biases, on_block

    def of_repaired(self) -> None:
        """Refine the blocks all of whose layers are repaired now."""
        repaired = {layer.name for layer in self._done.layers}
        for block in [each for each in self._blocks if repaired.issuperset(task.name for task in each.tasks)]:
            self._blocks.remove(block)
            record = self._refine(block)
            self._on_block(f"{block.name}: error {record.error_before:.2%} -> {record.error_after:.2%}")

    def _refine(self, block: Block) -> RefinedBlock:
        with torch.inference_mode(False), plain_products(block.module.modules()):
            # What is kept of its layers leads to the last one's input, not to what the block returns.
            self._runs.run_whole(block.module)
            found = zip(self._runs.calls_of(block.module), self._targets.pop(block), strict=True)
            calls = [call_of(block, *call, target) for call, target in found]
            record, values = refine_block(block, calls, train_biases=self._train_biases)
        _logger.info("%s: error %.3g, refined %.3g", block.name, record.error_before, record.error_after)
        self._done.refine(record, values)
        self._runs.run_whole(block.module)
        return record


def _experts_at_once(groups: Sequence[Sequence[Task]], options: LayerOptions) -> list[range | None]:
    """Return the matrices of which one run collects inputs, as many as memory holds; None stands for all."""
    sources = _sources(groups)
    are_experts = all(is_stack_of_experts(source.owner, source.attribute) for source in sources)
    # Adam keeps inputs instead, which go to files where memory ends.
    if len(groups) > 1 or not are_experts or options.solver == "adam":
        return [None]
    return list(_ranges(range(len(sources[0].operators)), _size_of_one(sources), options.memory))


def _repairs(
    groups: Sequence[Sequence[Task]], seen: Mapping[Source, LayerInputs], options: LayerOptions, matrices: range | None
) -> Iterator[tuple[Task, list[LayerRepair]]]:
    """Yield the repairs of each task, or of some of its matrices: several if those are many, which saves memory."""
    for group in groups:
        sources = group[0].sources
        if matrices is None:
            inputs = GroupInputs([seen[source] for source in sources], options.damping, options.min_tokens)
            for task in group:
                yield task, [repair_layer(task, inputs, options)]
            continue
        found: dict[Task, list[LayerRepair]] = {task: [] for task in group}
        # A repair takes about eight times the memory of the inputs' products.
        for part in _ranges(matrices, _size_of_one(sources), options.memory // 8):
            narrowed = [LayerInputs(moments=seen[source].moments.narrow(part)) for source in sources]
            inputs = GroupInputs(narrowed, options.damping, options.min_tokens)
            for task in group:
                found[task].append(repair_layer(task, inputs, options, part))
        yield from found.items()


def _size_of_one(sources: Sequence[Source]) -> int:
    """Return the bytes of the products of one matrix's inputs."""
    return sum(Moments.size_of(source) // len(source.operators) for source in sources)


def _ranges(matrices: range, size: int, memory: int) -> Iterator[range]:
    """Cut a range of matrices into ranges that memory holds, of at least one."""
    count = max(1, memory // size)
    for start in range(matrices.start, matrices.stop, count):
        yield range(start, min(start + count, matrices.stop))


@contextmanager
def _inputs(
    runs: Calibration, trace: Trace, sources: Sequence[Source], options: LayerOptions, matrices: range | None
) -> Iterator[dict[Source, LayerInputs]]:
    """Collect the inputs of some weights, or of some matrices of theirs, over the calibration batches."""
    with ExitStack() as stack:
        found = {
            source: LayerInputs(
                moments=Moments.of(source, matrices),
                pool=stack.enter_context(InputPool(options.memory // len(sources)))
                if options.solver == "adam"
                else None,
            )
            for source in sources
        }

        def see(source: Source, x: Tensor, groups: range) -> None:
            found[source].moments.add(source, x, groups)
            if (pool := found[source].pool) is not None:
                pool.add(source, x, groups)

        runs.watch(trace, dict.fromkeys(sources, see))
        yield found


def warn_of_few_tokens(tasks: Sequence[Task], layers: Iterable[PrunedLayer], min_tokens: int) -> None:
    """Log the matrices that got too few inputs to be repaired, and experts that got fewer than they are wide."""
    sources = {task.name: task.sources[0] for task in tasks}
    few = []
    for layer in layers:
        source = sources[layer.name]
        is_stack = is_stack_of_experts(source.owner, source.attribute)
        least = max(min_tokens, source.operators.shape[2] if is_stack else 1)
        few += [
            f"{count} reach{'es' if count == 1 else ''} {layer.name}{f'[{group}]' if len(layer.tokens) > 1 else ''}"
            for group, count in enumerate(layer.tokens)
            if count < least
        ]
    if few:
        more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
        _logger.warning(
            "few tokens of the calibration data: %s%s; of these, matrices with fewer than min_tokens=%d keep their "
            "masks without repair; give more calibration data, or change min_tokens",
            ", ".join(few[:_NAMED]),
            more,
            max(min_tokens, 1),
        )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_tasks(tasks: Sequence[Task], masks: Mapping[str, Tensor] | None, direction: Direction) -> None:
    """Refuse weights that cannot be repaired, and given masks that are not masks of the pattern."""
    for task in tasks:
        weight = task.weight.detach()
        if is_sharded(weight):
            raise ValueError(f"parameter {task.name!r} is sharded; prune the model before it is distributed")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"parameter {task.name!r} holds NaN or infinities; nothing was changed")
        if masks is None:
            continue
        mask = masks[task.name]
        is_tensor = isinstance(mask, Tensor) and not mask.is_meta
        if not is_tensor or mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ValueError(
                f"the mask of {task.name!r} is {described(mask)}; give a bool tensor of shape "
                f"{tuple(weight.shape)}, True = kept"
            )
        n, m = task.pattern.n, task.pattern.m
        try:
            check_mask(task.site.layout.matrices(mask).cpu().numpy(), n, m, direction=direction)
        except InvalidMaskError as error:
            raise InvalidMaskError(f"the mask of {task.name!r}: {error}") from None
