"""AdaPrune of a Hugging Face folder, one decoder block at a time: no more than that is ever in memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import xxhash
from torch import Tensor, nn

from masksolve._cores import usable_cores
from masksolve._inputs import check_choice, check_flag
from masksolve._pattern import Pattern
from masksolve._patterns import PatternsLike, as_patterns
from masksolve._tiles import Direction, across
from masksolve.checkpoint._blocks import (
    DTYPES,
    REPORT,
    AnyPath,
    BlockModel,
    bytes_of,
    check_unchanged,
    map_large_tensors,
    return_memory,
    units_of_parts,
    without_other_weights,
    write_text,
)
from masksolve.checkpoint._executors import run_all
from masksolve.checkpoint._file import ChosenTensor, PrunedAs, TensorInfo
from masksolve.checkpoint._record import RECORD, read_record, record_of
from masksolve.checkpoint._run import OnProgress, Order, Steps, Unfinished, run
from masksolve.checkpoint._units import Unit, fill, put, sync, units_of
from masksolve.checkpoint._work import (
    Job,
    UnitRecord,
    fill_unit,
    fingerprint_unit,
    prune_unit,
    verify_unit,
)
from masksolve.checkpoint._workspace import check_room
from masksolve.torch._adaprune.adaprune import OnLayer, as_options, repair_part, warn_of_few_tokens
from masksolve.torch._adaprune.blocks import Block, Call, Refinement, check_refinement, refine_block
from masksolve.torch._adaprune.calibration import Calibration, Part, Trace
from masksolve.torch._adaprune.layer import LayerOptions, Solver
from masksolve.torch._adaprune.products import plain_products
from masksolve.torch._adaprune.records import AdaPruneReport, Conversion, PrunedLayer, RefinedBlock
from masksolve.torch._adaprune.scores import SCORES, Score
from masksolve.torch._adaprune.source import Source, sources_of
from masksolve.torch._adaprune.stack import Compute, NoStackError
from masksolve.torch._adaprune.tasks import Task, check_all_have_patterns, check_some_are_left, choose_tasks, without
from masksolve.torch._layers import as_globs

Inputs = Literal["pruned", "dense"]
INPUTS: tuple[Inputs, ...] = ("pruned", "dense")


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointAdaPruneReport:
    """The result of `adaprune_checkpoint`: the report of the layers, and the memory that the run took.

    Attributes
    ----------
    report : AdaPruneReport
        As `masksolve.torch.adaprune` returns it.
    peak : int
        Bytes of memory that a process of the run held at most, code and libraries included.
    largest_block : int
        Bytes of the weights of the largest block.
    activations : int
        Bytes of the hidden states of all calibration batches at one place, which are kept on the disk.
    """

    report: AdaPruneReport
    peak: int
    largest_block: int
    activations: int

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that `json.dumps` takes."""
        rest = {name: value for name, value in vars(self).items() if name != "report"}
        return {**self.report.to_dict(), "memory": rest}

    def __repr__(self) -> str:
        return f"<CheckpointAdaPruneReport: {self.report!r}, peak memory {self.peak >> 20} MiB>"


@dataclass(frozen=True, eq=False)
class _Recipe:
    """The instructions by which a worker repairs a part of a model; `key` is that of the model it has built."""

    folder: Path
    key: str
    batches: Sequence[Mapping[str, Tensor]]
    patterns: Mapping[str, str]
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    keep_first_last: bool
    inputs: Inputs
    refine: Refinement | None
    options: LayerOptions


@dataclass(frozen=True)
class _Repaired:
    """A part that is done: its units, the records of its layers, and of it as a refined block if it is one.

    Then why other layers stay dense, and the memory that it took.
    """

    units: dict[int, UnitRecord]
    layers: list[PrunedLayer]
    blocks: list[RefinedBlock]
    reasons: dict[str, str]
    peak: int


def adaprune_checkpoint(
    source: AnyPath,
    target: AnyPath,
    calibration: Iterable[Mapping[str, Tensor]],
    pattern: PatternsLike,
    *,
    inputs: Inputs = "pruned",
    direction: Direction = "both",
    importance: Score = "magnitude",
    solver: Solver = "lstsq",
    refine: Refinement | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    keep_first_last: bool = True,
    correct_bias: bool = True,
    respect_zeros: bool = False,
    alternations: int = 0,
    damping: float = 1e-2,
    iterations: int = 1000,
    min_tokens: int = 1,
    memory_mib: int = 1024,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> CheckpointAdaPruneReport:
    """Write a copy of a Hugging Face folder in which `masksolve.torch.adaprune` has pruned the model.

    The weights of one block at a time are in memory, and the statistics of its inputs. The hidden states of the
    calibration batches go from block to block through files in the hidden folder beside the output. The output has the
    files of the input, but for weights in other formats, and the bytes of its shards, but for what is repaired;
    adaprune.json has the report, masksolve.json what each tensor was pruned to. It appears under its name only when it
    is complete and verified. Needs the extra `transformers` too.

    Parameters
    ----------
    source, target : path
        Folders with config.json and safetensors. Only transformers' own classes are built; code beside the weights is
        never run, and nothing is downloaded.
    calibration : iterable of mapping of str to Tensor
        Batches: keyword arguments of the model, without labels, such as {"input_ids": ...}.
    pattern
        As for `masksolve.torch.adaprune`, as are all options that are not listed here.
    inputs : {"pruned", "dense"}
        Whether layers are repaired on inputs from the model as pruned so far, one block after the other, or from the
        dense model, in any order: that is `sequential` of `adaprune`.
    importance : {"magnitude", "wanda", "ria", "hessian", "sparsegpt", "admm"}
        As for `adaprune`, but no callable: whether it is the same one could not be told when a run is resumed.
    overwrite, resume
        As for `prune_checkpoint`.
    workers : int, concurrent.futures.Executor or None
        As for `prune_checkpoint`. With inputs="dense", they repair the blocks too, one core each.
    on_progress : callable, optional
        As for `prune_checkpoint`, with the phases "running the dense model" (inputs="dense") and "repairing" more.

    Returns
    -------
    CheckpointAdaPruneReport

    Raises
    ------
    NoStackError
        If the model has no stack of blocks that can run one at a time. Nothing has been written.
    ValueError, TypeError
        As for `adaprune`.
    CheckpointError, OSError, WorkerLostError
        As for `prune_checkpoint`; also for a config.json that transformers does not know.

    Examples
    --------
    >>> import tempfile
    >>> import transformers
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "dense"), Path(folder.name, "sparse")
    >>> config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    >>> transformers.GPT2LMHeadModel(config).save_pretrained(source)
    >>> batches = [{"input_ids": torch.randint(50, (4, 32))} for _ in range(2)]
    >>> found = adaprune_checkpoint(source, target, batches, "2:4", importance="wanda")
    >>> [layer.name for layer in found.report.layers][:2], found.largest_block
    (['transformer.h.0.attn.c_attn.weight', 'transformer.h.0.attn.c_proj.weight'], 13120)
    >>> all(layer.error_after < layer.error_before for layer in found.report.layers)
    True
    >>> folder.cleanup()
    """
    start = time.perf_counter()
    check_flag(keep_first_last, "keep_first_last")
    check_choice(inputs, "inputs", INPUTS)
    if callable(importance):
        raise ValueError(
            f"importance must be one of {', '.join(map(repr, SCORES))} here, got {importance!r}: whether a callable is "
            "the same could not be told when a run is resumed; `masksolve.torch.adaprune` takes one, in memory"
        )
    batches = _as_batches(calibration)
    check_refinement(refine, sequential=inputs == "pruned", batches=len(batches))
    patterns = as_patterns(pattern)
    options = as_options(
        importance=importance,
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
    source, target = Path(source).absolute(), Path(target).absolute()
    recipe = _Recipe(
        folder=source,
        key=f"{os.getpid()} {time.monotonic_ns()}",
        batches=batches,
        patterns={glob: str(each) for glob, each in patterns.by_glob},
        include=as_globs(include),
        exclude=as_globs(exclude),
        keep_first_last=keep_first_last,
        inputs=inputs,
        refine=refine,
        options=options,
    )
    try:
        model = _model_of(recipe)
    except NoStackError as reason:
        raise NoStackError(
            f"{source} cannot be pruned block by block: {reason}; load the model, and prune it by "
            "`masksolve.torch.adaprune`"
        ) from reason
    checkpoint = without_other_weights(model.checkpoint)
    record = source / RECORD
    earlier = read_record(record, checkpoint.tensors) if record.exists() else {}
    order = _RepairOrder(
        checkpoint=checkpoint,
        job=Job(source, None),
        output=target,
        overwrite=overwrite,
        resume=resume,
        model=model,
        recipe=recipe,
        earlier=earlier,
        start=start,
    )
    if workers is None and inputs == "dense":
        workers = min(usable_cores(), len(model.parts))
    try:
        run(order, workers, on_progress)
    finally:
        _built.clear()
    return order.reports[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class _RepairOrder(Order):
    """The order for a run that repairs weights, and copies all else.

    Attributes
    ----------
    model : _Model
    recipe : _Recipe
    earlier : mapping of str to PrunedAs
        What earlier prunes have recorded beside the input.
    start : float
        When it began, by `time.perf_counter`.
    reports : list of CheckpointAdaPruneReport
        Its report, when it is done.
    """

    job: Job
    model: _Model
    recipe: _Recipe
    earlier: Mapping[str, PrunedAs]
    start: float
    reports: list[CheckpointAdaPruneReport] = field(default_factory=list)

    steps: ClassVar[Steps] = Steps("copying", fingerprint_unit, prune_unit, verify_unit)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that have to be the same for a run to be resumed, as JSON, by the names that messages use."""
        recipe, hasher = self.recipe, xxhash.xxh3_128()
        for batch in recipe.batches:
            for name, tensor in batch.items():
                hasher.update(f"{name} {tuple(tensor.shape)} ".encode())
                hasher.update(bytes_of(tensor).data)
        options = {name: value for name, value in vars(recipe.options).items() if name != "masks"}
        return {
            "input": str(self.checkpoint.path),
            "output": str(self.output),
            "pattern": str(as_patterns(recipe.patterns)),
            **options,
            "include": list(recipe.include or ()),
            "exclude": list(recipe.exclude or ()),
            "keep_first_last": recipe.keep_first_last,
            "inputs": recipe.inputs,
            "refine": recipe.refine,
            "the hash of the calibration data": hasher.hexdigest(),
            "the hash of the record": xxhash.xxh3_128_hexdigest(record_of([], self.earlier).encode()),
        }

    def units(self) -> list[Unit]:
        """Return the units of the input."""
        return units_of(self.checkpoint, self.model.chosen, self.model.biases)

    def begin(self, unfinished: Unfinished) -> None:
        """Repair what the journal does not have."""
        self.reports.append(_repair(self.recipe, self.model, unfinished, self.start, self.earlier))


def _as_batches(calibration: object) -> list[Mapping[str, Tensor]]:
    """Return the calibration batches as a list, if they are keyword arguments of a model."""
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise TypeError(f"calibration is a {type(calibration).__name__}; give an iterable of batches, such as [batch]")
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration holds no batch; give a few hundred inputs of the model, in batches")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(each, Tensor) for each in batch.values()):
            raise TypeError(
                f"calibration batch {index} is a {type(batch).__name__}; give a mapping of the model's argument names "
                'to tensors, such as {"input_ids": tokens}'
            )
        if not batch or not all(each.numel() for each in batch.values()):
            raise ValueError(f"calibration batch {index} holds no input; leave it out")
    return batches


class _Model(BlockModel):
    """The model of a folder, and what is to be repaired of it.

    Attributes
    ----------
    tasks : dict of int to list of Task
        By block; those of layers behind the blocks have the number after the last block's.
    lines : list of ParameterReport
    chosen : list of ChosenTensor
        The weights among the tensors that repairs may change.
    biases : list of str
        The names of the others.
    activations : int
        As in `CheckpointAdaPruneReport`.
    """

    def __init__(self, recipe: _Recipe) -> None:
        super().__init__(recipe.folder)
        batch = recipe.batches[0]
        self._sample = {name: tensor[:1] for name, tensor in batch.items()}
        self.stack.learn(self._sample)
        self._choose(recipe)
        self._find_tensors(recipe.options.direction)
        self._try_first_block()
        self.activations = self._try_batches(recipe.batches)

    @property
    def parts(self) -> list[int]:
        """The blocks in their order, and what is behind them, up to the last of which anything is repaired."""
        return list(range(max(self.tasks) + 1))

    def ends(self, part: int, keep_first_last: bool) -> Callable[[Trace], tuple[Source | None, Source | None]]:
        """Return what finds the layers of a part that are the whole model's first and last, if they stay dense."""

        def found(trace: Trace) -> tuple[Source | None, Source | None]:
            if not keep_first_last:
                return None, None
            is_first = part == 0 and not self.stack.before
            is_last = part >= len(self.stack.blocks) - 1 and (part == len(self.stack.blocks)) == bool(self.stack.behind)
            return trace.first if is_first else None, trace.last if is_last else None

        return found

    def keeps_dtypes(self, part: int) -> bool:
        """Return whether the model holds the weights of a part in the dtypes in which they are stored."""
        held = {task.weight.dtype for task in self.tasks.get(part, [])}
        return held == {DTYPES[tensor.dtype] for tensor in self.tensors_of(part)}

    def multiplying(self, part: int) -> list[nn.Module]:
        """Return the modules of a block that multiply with their weights themselves."""
        within = set(self.stack.blocks[part].modules())
        return [each.module for each in sources_of(self.model).values() if each.is_multiplied and each.module in within]

    def parameters_of(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Return the parameter that each of these tensors of the checkpoint is, or is part of."""
        found = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: found[self.own[name]] for name in names}

    def _choose(self, recipe: _Recipe) -> None:
        """Find the weights to prune, by part."""
        tasks, lines = choose_tasks(
            self.model,
            recipe.patterns,
            include=recipe.include,
            exclude=recipe.exclude,
            direction=recipe.options.direction,
            unloaded=True,
        )
        ends = [*self.stack.before[:1], *self.stack.behind[-1:]] if recipe.keep_first_last else []
        outside = {*self.stack.before, *self.stack.behind}
        self.tasks: dict[int, list[Task]] = {}
        reasons: dict[str, str | None] = {}
        for task in tasks:
            parts = {self.stack.block_of(name) for name in task.site.names}
            if len(parts) > 1:
                raise NoStackError(f"{task.name} is tied to a weight of another block")
            part = parts.pop()
            if part is not None:
                self.tasks.setdefault(part, []).append(task)
            elif any(source in ends for source in task.sources):
                end = "first" if task.sources[0] in self.stack.before else "last"
                reasons[task.name] = f"the {end} layer; `keep_first_last=False` prunes it"
            elif any(source in self.stack.before for source in task.sources):
                raise NoStackError(f"{task.name} is before its blocks")
            elif not all(source in outside for source in task.sources):
                reasons[task.name] = "no calibration batch calls it"
            else:
                self.tasks.setdefault(len(self.stack.blocks), []).append(task)
        self.lines = without(lines, reasons)
        layers = [source for source in sources_of(self.model).values() if source not in ends]
        check_all_have_patterns(self.model, layers, self.lines)
        check_some_are_left(self.tasks, self.lines)

    def _find_tensors(self, direction: Direction) -> None:
        """Find the tensors of the checkpoint that repairs may change."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        weights = {id(task.weight): (part, task) for part, tasks in self.tasks.items() for task in tasks}
        biases = {id(bias): part for part, task in weights.values() for bias in task.biases}
        self.chosen: list[ChosenTensor] = []
        self.biases: list[str] = []
        self.changing: dict[int, list[TensorInfo]] = {}
        found = set()
        for name, (_, tensor) in self.places.items():
            place = id(parameters.get(self.own[name]))
            if place in weights:
                part, task = weights[place]
                to = pruned_as(task.layout.transposed, tensor, task.pattern, direction)
                chosen = ChosenTensor.of(tensor, to)
                self.chosen.append(chosen)
                self.changing.setdefault(part, []).append(chosen)
            elif place in biases:
                self.biases.append(name)
                self.changing.setdefault(biases[place], []).append(tensor)
            else:
                continue
            found.add(place)
            if tensor.dtype not in DTYPES:
                raise NoStackError(f"{name} is stored as {tensor.dtype}")
        for place in [*weights, *biases]:
            if place not in found:
                what = weights[place][1].name if place in weights else "a bias"
                raise NoStackError(f"{what} is stored in another form")

    def _try_batches(self, batches: Sequence[Mapping[str, Tensor]]) -> int:
        """Run every batch up to the first block, and return the bytes of all of their hidden states."""
        sizes: list[int] = []
        for index, batch in enumerate(batches):
            try:
                self.stack.run(0, batch, lambda hidden, compute: sizes.append(hidden.numel() * hidden.element_size()))
            except Exception as error:
                raise ValueError(
                    f"calibration batch {index} does not run through this {type(self.model).__name__} "
                    f"({type(error).__name__}: {error}); give keyword arguments that it takes, without labels"
                ) from error
        return sum(sizes)

    def _try_first_block(self) -> None:
        """Run a sample through the first block."""

        def act(hidden: Tensor, compute: Compute) -> None:
            output = compute(hidden)
            if output.shape != hidden.shape or output.dtype != hidden.dtype:
                raise NoStackError("a block returns hidden states of another shape or dtype than it gets")

        conversions = self.load(0)
        try:
            self.stack.run(0, self._sample, act)
            self.stored(0, conversions)
        except Exception as error:
            raise NoStackError(f"its first block does not run alone ({type(error).__name__}: {error})") from error
        finally:
            self.unload(0)


# The model that this process has built, of which one thread at a time loads blocks.
_built: dict[str, _Model] = {}
_in_use = threading.Lock()


def _model_of(recipe: _Recipe) -> _Model:
    """Return the model of a recipe, which a process builds once."""
    if recipe.key not in _built:
        _built.clear()
        _built[recipe.key] = _Model(recipe)
    return _built[recipe.key]


def pruned_as(transposed: bool, tensor: TensorInfo, pattern: Pattern, direction: Direction) -> PrunedAs:
    """Return what a tensor of a model's weight is pruned to; of three axes, it is a stack of experts."""
    return PrunedAs(len(tensor.shape) == 3, pattern, across(direction) if transposed else direction)


@dataclass(frozen=True)
class _States:
    """The hidden states with which the calibration batches enter each block but the first, in a folder."""

    folder: Path

    def read(self, part: int, batch: int, like: Tensor) -> Tensor:
        """Return the states of a batch, which are of the kind of those that leave the embeddings."""
        if part == 0:
            return like
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        path = self._path(part, batch)
        with path.open("rb", buffering=0) as file:
            fill(file, path, 0, bytes_of(found).data)
        return found

    def write(self, part: int, batch: int, states: Tensor) -> None:
        """Keep the states of a batch, and wait until they are on the disk."""
        path = self._path(part, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb", buffering=0) as file:
            put(file, 0, bytes_of(states).data)
            sync(file)
        unfinished.replace(path)

    def has(self, part: int, batches: int) -> bool:
        """Return whether those of all batches are there."""
        return all(self._path(part, batch).exists() for batch in range(batches))

    def remove(self, part: int) -> None:
        """Forget those of a block."""
        shutil.rmtree(self._path(part, 0).parent, ignore_errors=True)

    def _path(self, part: int, batch: int) -> Path:
        return self.folder / str(part) / str(batch)


def _repair(
    recipe: _Recipe, model: _Model, phase: Unfinished, start: float, earlier: Mapping[str, PrunedAs]
) -> CheckpointAdaPruneReport:
    """Repair what the journal does not have, and put the reports into the output."""
    units = units_of_parts(model, phase.units)
    states = _States(phase.data / "states")
    dense = _States(phase.data / "dense")
    journal = phase.workspace.read_journal()
    done = {entry["part"]: entry for entry in journal if "part" in entry}
    is_verified = any("verified" in entry for entry in journal)
    sizes = {part: sum(tensor.nbytes for tensor in model.tensors_of(part)) for part in model.parts}
    finished = sum(sizes[part] for part in done)

    def report(size: int) -> None:
        if phase.on_progress is not None:
            phase.on_progress("repairing", size, sum(sizes.values()))

    def on_layer(task: Task, text: str) -> None:
        nonlocal finished
        finished += task.weight.numel() * task.weight.element_size()
        report(finished)

    remaining = [part for part in model.parts if part not in done and not is_verified]
    if remaining:
        copies = (2 if recipe.refine is None else 4) if recipe.inputs == "pruned" else len(model.parts)
        check_room(phase.workspace.folder, copies * model.activations)
    report(finished)
    if recipe.inputs == "dense":
        _keep_dense_states(recipe, model, states, remaining, phase.on_progress)
    with phase.workspace.journal() as log:
        calls = [
            (part, (recipe, part, units[part], phase.fingerprints, states, dense, phase.output)) for part in remaining
        ]
        results: Iterable[tuple[int, _Repaired]] = (
            run_all(phase.executor, _repair_part_alone, calls)
            if recipe.inputs == "dense"
            else ((part, _repair_part(*arguments, on_layer=on_layer)) for part, arguments in calls)
        )
        for part, found in results:
            for index, record in found.units.items():
                log.add({"unit": index, "repaired": True, **asdict(record)})
            done[part] = {
                "part": part,
                "layers": [layer.to_dict() for layer in found.layers],
                "blocks": [block.to_dict() for block in found.blocks],
                "reasons": found.reasons,
                "peak": found.peak,
            }
            log.add(done[part])
            states.remove(part)
            dense.remove(part)
            warn_of_few_tokens(model.tasks.get(part, []), found.layers, recipe.options.min_tokens)
            finished = sum(sizes[each] for each in done)
            report(finished)
    layers = [_layer_of(each) for part in sorted(done) for each in done[part]["layers"]]
    blocks = [_block_of(each) for part in sorted(done) for each in done[part]["blocks"]]
    reasons = {name: reason for entry in done.values() for name, reason in entry["reasons"].items()}
    skipped = tuple(line for line in without(model.lines, reasons) if not line.sparse)
    if not layers:
        # It would be the same again.
        phase.workspace.clear()
    check_some_are_left(layers, skipped)
    found_report = CheckpointAdaPruneReport(
        report=AdaPruneReport(
            direction=recipe.options.direction,
            layers=tuple(layers),
            blocks=tuple(blocks),
            skipped=skipped,
            batch_norms=(),
            interrupted=False,
            seconds=time.perf_counter() - start,
        ),
        peak=max([_peak_memory(), *(entry["peak"] for entry in done.values())]),
        largest_block=model.largest_block,
        activations=model.activations,
    )
    if not is_verified:
        pruned = {layer.name for layer in layers}
        names = {id(task.weight): task.name in pruned for tasks in model.tasks.values() for task in tasks}
        parameters = model.parameters_of([tensor.name for tensor in model.chosen])
        chosen = [tensor for tensor in model.chosen if names[id(parameters[tensor.name])]]
        write_text(phase.output / RECORD, record_of(chosen, earlier))
        write_text(phase.output / REPORT, json.dumps(found_report.to_dict(), indent=2) + "\n")
    return found_report


def _keep_dense_states(
    recipe: _Recipe, model: _Model, states: _States, parts: Sequence[int], on_progress: OnProgress | None
) -> None:
    """Keep the hidden states with which the batches enter each of these parts in the dense model."""
    last = max(parts, default=0)
    for part in range(last):
        if on_progress is not None:
            on_progress("running the dense model", part * model.largest_block, last * model.largest_block)
        if part + 1 in parts and states.has(part + 1, len(recipe.batches)):
            continue
        model.load(part)
        try:
            _pass_on(recipe, model, part, states)
        finally:
            model.unload(part)
            return_memory()
        if part not in parts:
            states.remove(part)


def _repair_part_alone(*arguments: Any) -> _Repaired:
    """Repair a part on one core, so that its bytes are the same however many workers there are."""
    with _in_use:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _repair_part(*arguments, on_layer=lambda task, text: None)
        finally:
            torch.set_num_threads(threads)


def _repair_part(
    recipe: _Recipe,
    part: int,
    units: Mapping[int, tuple[Unit, TensorInfo]],
    fingerprints: Sequence[str],
    states: _States,
    dense: _States,
    output: Path,
    *,
    on_layer: OnLayer,
) -> _Repaired:
    """Repair the layers of one part and write them; pass the hidden states on where the next part gets them pruned."""
    map_large_tensors()
    model = _model_of(recipe)
    stack, blocks = model.stack, len(model.stack.blocks)
    at = 0

    def start(batch: int) -> None:
        nonlocal at
        at = batch

    def act(hidden: Tensor, compute: Compute) -> Tensor | None:
        entering = states.read(part, at, hidden)
        if part == blocks:
            return entering
        compute(entering)
        return None

    def on_repair(task: Task, text: str) -> None:
        return_memory()
        on_layer(task, text)

    tasks = model.tasks.get(part, [])
    conversions = model.load(part)
    try:
        layers: list[PrunedLayer] = []
        refined: list[RefinedBlock] = []
        reasons: dict[str, str] = {}
        records: dict[int, UnitRecord] = {}
        is_refined = recipe.refine is not None and part < blocks
        if is_refined:
            _pass_on(recipe, model, part, dense)
        if tasks:
            if model.keeps_dtypes(part):
                check_unchanged(model, part, conversions, units, fingerprints)
            modules = [stack.blocks[part]] if part < blocks else [source.module for source in stack.behind]
            with stack.running(min(part, blocks - 1), act):
                layers, reasons = repair_part(
                    Calibration(model.model, recipe.batches, Part(modules, start)),
                    tasks,
                    model.lines,
                    recipe.options,
                    model.ends(part, recipe.keep_first_last),
                    sequential=recipe.inputs == "pruned",
                    on_layer=on_repair,
                )
            if is_refined:
                refined = _refine(model, part, layers, _Calls(recipe, model, part, states, dense), recipe.options)
            contents = model.stored(part, conversions)
            for index, (unit, tensor) in units.items():
                records[index] = fill_unit(unit, output, tensor, contents[tensor.name])
            del contents
        if recipe.inputs == "pruned" and part + 1 in model.parts:
            _pass_on(recipe, model, part, states)
    finally:
        model.unload(part)
        return_memory()
    return _Repaired(records, layers, refined, reasons, _peak_memory())


class _Calls(Sequence[Call]):
    """The calls of a block for the calibration batches, each made when it is asked for."""

    def __init__(self, recipe: _Recipe, model: _Model, part: int, states: _States, dense: _States) -> None:
        self._batches, self._model, self._part, self._states, self._dense = recipe.batches, model, part, states, dense

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        stack, batch = self._model.stack, self._batches[index]
        args, kwargs = stack.arguments(self._part, batch, lambda hidden: self._states.read(self._part, index, hidden))
        entering = args[0] if args else kwargs["hidden_states"]
        return Call(args, kwargs, self._dense.read(self._part + 1, index, entering))


def _refine(
    model: _Model, part: int, layers: Sequence[PrunedLayer], calls: Sequence[Call], options: LayerOptions
) -> list[RefinedBlock]:
    """Train the layers of a block together, if there are several."""
    names = {layer.name for layer in layers}
    tasks = [task for task in model.tasks[part] if task.name in names]
    block = Block(f"{model.stack.path}.{part}", model.stack.blocks[part], tasks).of(tasks)
    if block is None:
        return []
    with plain_products(model.multiplying(part)):
        record, values = refine_block(block, calls, train_biases=options.correct_bias)
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)
    return [record]


def _pass_on(recipe: _Recipe, model: _Model, part: int, states: _States) -> None:
    """Run the batches through a block, and keep what they leave it with."""
    with plain_products(model.multiplying(part)):
        for index, batch in enumerate(recipe.batches):

            def act(hidden: Tensor, compute: Compute, index: int = index) -> None:
                states.write(part + 1, index, compute(states.read(part, index, hidden)))

            model.stack.run(part, batch, act)


def _layer_of(record: Mapping[str, Any]) -> PrunedLayer:
    """Return the record of a layer that a journal holds."""
    conversion = record["conversion"]
    return PrunedLayer(
        **{
            **record,
            **{name: tuple(record[name]) for name in ("shape", "tokens", "alternations")},
            "pattern": Pattern.parse(record["pattern"]),
            "conversion": None if conversion is None else Conversion(**conversion),
        }
    )


def _block_of(record: Mapping[str, Any]) -> RefinedBlock:
    """Return the record of a block that a journal holds."""
    return RefinedBlock(**{**record, "passes": tuple(record["passes"])})


def _peak_memory() -> int:
    """Return the bytes that this process has held at most; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
