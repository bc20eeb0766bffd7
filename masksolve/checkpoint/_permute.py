"""Permutations in a Hugging Face folder: the channels inside each block in an order in which masks keep more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from masksolve._pattern import PatternLike, as_pattern
from masksolve._tiles import Direction
from masksolve.checkpoint._blocks import (
    AnyPath,
    BlockModel,
    check_unchanged,
    return_memory,
    units_of_parts,
    without_other_weights,
    write_text,
)
from masksolve.checkpoint._file import CheckpointError, TensorInfo
from masksolve.checkpoint._record import RECORD
from masksolve.checkpoint._run import OnProgress, Order, Steps, Unfinished, run
from masksolve.checkpoint._units import Unit, units_of
from masksolve.checkpoint._work import (
    Job,
    UnitRecord,
    fill_unit,
    fingerprint_unit,
    prune_unit,
    verify_unit,
)
from masksolve.torch._adaprune.stack import NoStackError
from masksolve.torch._model_weights import Conversions
from masksolve.torch._outputs import outputs_of
from masksolve.torch._permute.axes import axes_of
from masksolve.torch._permute.records import PermutedAxis, PermuteReport
from masksolve.torch._permute.search import AxisSearch, names_of, permute_axes

REPORT = "permute.json"
# Of the random input on which a block's outputs are compared, so many that they reach most experts.
_TOKENS = 128


def permute_checkpoint(
    source: AnyPath,
    target: AnyPath,
    pattern: PatternLike,
    *,
    direction: Direction = "both",
    escapes: int = 0,
    time_limit: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> PermuteReport:
    """Write a copy of a Hugging Face folder with its channels in an order in which the best N:M masks keep more.

    It is the same model, before it is pruned: `masksolve.torch.permute_model` for folders larger than memory, of which
    one block at a time is loaded. Reordered are the hidden axes of feed-forward blocks and of experts, and the value
    channels within heads. Each block is run on random tokens before and after, in float32; an axis that changes what it
    computes is put back. The output has the files of the input, but for weights in other formats, the bytes of its
    shards, but for these lines, and permute.json with the report. Needs the extras `permute` and `transformers` too.

    Parameters
    ----------
    source, target : path
        As for `adaprune_checkpoint`.
    pattern, direction, escapes, time_limit, seed
        As for `masksolve.torch.permute_model`; `time_limit` is in seconds, for each axis.
    overwrite, resume, on_progress
        As for `prune_checkpoint`, with the phase "permuting" more.

    Returns
    -------
    PermuteReport
        Its deviation is that of the outputs of blocks, the largest of all.

    Raises
    ------
    NoStackError
        If the model has no stack of blocks that can run one at a time. Nothing has been written.
    CheckpointError
        As for `prune_checkpoint`; also if the folder has been pruned, or has no axis that may be reordered.
    ValueError, TypeError, OSError, NotInstalledError
        As for `permute_model` and `prune_checkpoint`.

    Examples
    --------
    >>> import tempfile
    >>> import transformers
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "dense"), Path(folder.name, "permuted")
    >>> config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=128)
    >>> transformers.GPT2LMHeadModel(config).save_pretrained(source)
    >>> found = permute_checkpoint(source, target, "2:4")
    >>> [axis.name for axis in found.axes][:2], found.deviation < 1e-5
    (['transformer.h.0.attn.c_proj', 'transformer.h.0.mlp.c_proj'], True)
    >>> folder.cleanup()
    """
    search = AxisSearch(as_pattern(pattern), direction, None, escapes, time_limit, seed)
    source, target = Path(source).absolute(), Path(target).absolute()
    if (source / RECORD).exists():
        raise CheckpointError(
            f"{source} has been pruned, by its {RECORD}, and its masks are for the order that it has; permute the "
            "dense model, then prune"
        )
    try:
        model = _Model(source)
    except NoStackError as reason:
        raise NoStackError(
            f"{source} cannot be permuted block by block: {reason}; load the model, and permute it by "
            "`masksolve.torch.permute_model`"
        ) from reason
    checkpoint = without_other_weights(model.checkpoint)
    order = _PermuteOrder(
        # In place of the report of an earlier order goes a new one.
        checkpoint=replace(checkpoint, files=tuple(file for file in checkpoint.files if file.name != REPORT)),
        job=Job(source, None),
        output=target,
        overwrite=overwrite,
        resume=resume,
        model=model,
        search=search,
    )
    run(order, 1, on_progress)
    return order.reports[0]


class _Model(BlockModel):
    """The model of a folder, and which of its tensors an order may change."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokens = {"input_ids": torch.randint(self._vocabulary(), (1, self._length()), generator=_generator())}
        self.stack.learn(self.tokens)
        held = names_of(self.model)
        found: dict[str, int] = {}
        for part, block in enumerate(self.stack.blocks):
            for axis in axes_of(block):
                for member in (*axis.makers, *axis.takers, *axis.others):
                    if name := held.get(id(member.tensor)):
                        found[name] = part
        stored = set(self.own.values())
        for name in found:
            if name not in stored:
                raise NoStackError(f"{name} is stored in another form")
        for name, (_, tensor) in self.places.items():
            if self.own[name] in found:
                self.changing.setdefault(found[self.own[name]], []).append(tensor)
        if not self.changing:
            raise CheckpointError(
                f"{folder}: no block of this {type(self.model).__name__} has an axis that is known to be free"
            )

    def load_widened(self, part: int) -> Conversions:
        """Load a block in float32, or float64, so that rounding hides nothing and what is stored is held exactly."""
        stored = {
            tensor.dtype for name, (_, tensor) in self.places.items() if self.stack.block_of(self.own[name]) == part
        }
        dtype = torch.float64 if "F64" in stored else torch.float32
        # Still without values: parameters get those of the checkpoint in the dtype that they have.
        self.stack.blocks[part].to(dtype)
        return self.load(part)

    def outputs(self, part: int) -> list[Tensor]:
        """Run a block on what the model calls it with for the random tokens."""
        args, kwargs = self.stack.arguments(part, self.tokens, lambda hidden: hidden)
        dtype = next(each.dtype for each in self.stack.blocks[part].parameters())
        with torch.no_grad():
            found: Any = self.stack.blocks[part](*_as_dtype(args, dtype), **_as_dtype(kwargs, dtype))
        return outputs_of(found)

    def _vocabulary(self) -> int:
        config: Any = self.model.config
        size: int | None = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        if size is None:
            raise NoStackError("it does not take tokens")
        return size

    def _length(self) -> int:
        config: Any = self.model.config
        return min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments of a block with their floats of the dtype that its weights have."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_as_dtype(each, dtype) for each in value)
    if isinstance(value, dict):
        return {name: _as_dtype(each, dtype) for name, each in value.items()}
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class _PermuteOrder(Order):
    """The order for a run that puts lines of some tensors in another order, and copies all else.

    Attributes
    ----------
    model : _Model
    search : AxisSearch
    reports : list of PermuteReport
        Its report, when it is done.
    """

    job: Job
    model: _Model
    search: AxisSearch
    reports: list[PermuteReport] = field(default_factory=list)

    steps: ClassVar[Steps] = Steps("copying", fingerprint_unit, prune_unit, verify_unit)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that have to be the same for a run to be resumed, as JSON, by the names that messages use."""
        options = {name: value for name, value in vars(self.search).items() if name != "importance"}
        return {
            "input": str(self.checkpoint.path),
            "output": str(self.output),
            **options,
            "pattern": str(self.search.pattern),
        }

    def units(self) -> list[Unit]:
        """Return the units of the input."""
        names = [tensor.name for part in self.model.parts for tensor in self.model.tensors_of(part)]
        return units_of(self.checkpoint, [], names)

    def begin(self, unfinished: Unfinished) -> None:
        """Reorder the blocks that the journal does not have."""
        self.reports.append(_permute(self.model, self.search, unfinished))


def _permute(model: _Model, search: AxisSearch, phase: Unfinished) -> PermuteReport:
    """Do it, block by block, and put the report into the output."""
    units = units_of_parts(model, phase.units)
    journal = phase.workspace.read_journal()
    done = {entry["part"]: entry for entry in journal if "part" in entry}
    sizes = {part: sum(tensor.nbytes for tensor in model.tensors_of(part)) for part in model.parts}

    def report() -> None:
        if phase.on_progress is not None:
            phase.on_progress("permuting", sum(sizes[part] for part in done), sum(sizes.values()))

    report()
    with phase.workspace.journal() as log:
        for part in model.parts:
            if part in done:
                continue
            records, axes, deviation = _permute_part(model, search, part, units[part], phase)
            for index, record in records.items():
                log.add({"unit": index, "repaired": True, **asdict(record)})
            done[part] = {"part": part, "axes": [axis.to_dict() for axis in axes], "deviation": deviation}
            log.add(done[part])
            report()
    axes = [_axis_of(line) for part in sorted(done) for line in done[part]["axes"]]
    changed = {name for axis in axes if axis.reason is None for name in axis.weights}
    matrices = (tensor.name for _, tensor in model.places.values() if len(tensor.shape) > 1)
    found = PermuteReport(
        pattern=search.pattern,
        axes=tuple(axes),
        deviation=max(entry["deviation"] for entry in done.values()),
        untouched=tuple(name for name in matrices if model.own[name] not in changed),
    )
    if not any("verified" in entry for entry in journal):
        write_text(phase.output / REPORT, json.dumps(found.to_dict(), indent=2) + "\n")
    return found


def _permute_part(
    model: _Model,
    search: AxisSearch,
    part: int,
    units: Mapping[int, tuple[Unit, TensorInfo]],
    phase: Unfinished,
) -> tuple[dict[int, UnitRecord], list[PermutedAxis], float]:
    """Reorder the axes of one block, and write its tensors."""
    block = model.stack.blocks[part]
    conversions = model.load_widened(part)
    try:
        check_unchanged(model, part, conversions, units, phase.fingerprints)
        axes = axes_of(block, f"{model.stack.path}.{part}")
        names = names_of(model.model)
        # Experts share a tensor.
        weights = {id(each.tensor): each.tensor for axis in axes for each in (*axis.makers, *axis.takers)}
        for place, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise CheckpointError(
                    f"{names[place] or 'a tied weight'} holds NaN or infinities, which have no importance; replace "
                    "them first"
                )
        found, deviation = permute_axes(axes, names, search, lambda: model.outputs(part), block)
        contents = model.stored(part, conversions)
        records = {
            index: fill_unit(unit, phase.output, tensor, contents[tensor.name])
            for index, (unit, tensor) in units.items()
        }
    finally:
        model.unload(part)
        return_memory()
    return records, found, deviation


def _axis_of(record: Mapping[str, Any]) -> PermutedAxis:
    """Return the record of an axis that a journal holds."""
    return PermutedAxis(**{**record, "weights": tuple(record["weights"])})
