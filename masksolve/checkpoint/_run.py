"""One run over a checkpoint: hash the input, do the units that the journal does not have, verify, publish."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import xxhash

from masksolve._inputs import check_flag
from masksolve._patterns import Patterns
from masksolve._tiles import Direction
from masksolve._version import __version__
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._file import CheckpointError, ChosenTensor, printable
from masksolve.checkpoint._layout import Checkpoint
from masksolve.checkpoint._masks import hashes_of, masks_header, place_masks, places_in
from masksolve.checkpoint._quality import BandRecord, TileRecord, merge_bands
from masksolve.checkpoint._record import RECORD
from masksolve.checkpoint._selection import Globs
from masksolve.checkpoint._units import Place, Unit, put, sync, units_of
from masksolve.checkpoint._work import (
    Job,
    SolveMasks,
    StoredMasks,
    Target,
    UnitRecord,
    fingerprint_unit,
    prune_unit,
    try_method,
    verify_unit,
)
from masksolve.checkpoint._workspace import Workspace, allocate, check_room, open_workspace, sync_folder

_logger = logging.getLogger("masksolve")
Result = TypeVar("Result")

# What is called with the name of a phase, the bytes of it that are done, and all its bytes.
OnProgress = Callable[[str, int, int], None]

_ATTEMPTS = 2
_OUTPUT, _MASKS = "output", "masks.safetensors"


@dataclass(frozen=True)
class Steps:
    """The steps of a worker for each unit, in this order; the functions get the job and the unit first.

    Attributes
    ----------
    doing : str
        What the second step is called while it is done.
    read : callable
        Return the fingerprint of a unit of the input.
    write : callable
        Given the target and the fingerprint, write a unit of the output and return its record.
    verify : callable
        Given the target and the record, return whether the output holds the unit.
    """

    doing: str
    read: Callable[[Any, Any], str]
    write: Callable[[Any, Any, Target, str], UnitRecord]
    verify: Callable[[Any, Any, Target, UnitRecord], bool]


@dataclass(frozen=True)
class Unfinished:
    """An unfinished output, for `Order.begin`, which writes units by other means and journals each as `repaired`.

    Attributes
    ----------
    workspace : Workspace
    data : Path
        A folder for what it needs itself; it is gone when the run is finished.
    output : Path
        The folder of the output, its files in full size.
    units, fingerprints
        All units of the run, and the hashes of the input's.
    executor : Executor
    on_progress : callable or None
    """

    workspace: Workspace
    data: Path
    output: Path
    units: Sequence[Unit]
    fingerprints: Sequence[str]
    executor: Executor
    on_progress: OnProgress | None


@dataclass(frozen=True, kw_only=True)
class Order(ABC):
    """The order for a run: what is common to all kinds of them.

    Attributes
    ----------
    checkpoint
        The input.
    job
        What workers need to know of the run.
    output, masks : Path or None
        What is to be written.
    overwrite, resume
        As for `prune_checkpoint`.
    """

    checkpoint: Checkpoint
    job: Any
    output: Path | None
    masks: Path | None = None
    overwrite: bool
    resume: bool

    steps: ClassVar[Steps]

    def __post_init__(self) -> None:
        check_flag(self.overwrite, "overwrite")
        check_flag(self.resume, "resume")

    @property
    def target(self) -> Path:
        """The output beside which the run works."""
        target = self.output if self.output is not None else self.masks
        assert target is not None
        return target

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read, which no output may be."""
        # Links among them may lead anywhere, into the output too.
        return [self.checkpoint.path, *(self.checkpoint.folder / file.name for file in self.checkpoint.files)]

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments that have to be the same for a run to be resumed, as JSON, by the names that messages use."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file of the output."""
        return {file.name: file.size for file in self.checkpoint.files}

    @abstractmethod
    def units(self) -> list[Unit]:
        """Return the units of the input."""

    def trial(self) -> tuple[Any, ...] | None:
        """Return a function that a worker calls before all others begin, and its arguments."""
        return None

    def prepare(self, data: Path, hashes: dict[str, str]) -> None:
        """Make the unfinished files, in full size."""
        if self.output is not None:
            for name, size in self.sizes.items():
                allocate(data / _OUTPUT / name, size)

    def place(self, units: list[Unit], hashes: dict[str, str], data: Path) -> list[Unit]:
        """Return the units with what could not be known before the hashes of the tensors were."""
        return units

    def begin(self, unfinished: Unfinished) -> None:  # noqa: B027 (most orders have nothing to write before)
        """Write what is not for `Steps.write`, which writes whatever the journal does not have."""


@dataclass(frozen=True, kw_only=True)
class Request(Order):
    """The order for pruning.

    Attributes
    ----------
    chosen
        Which tensors get masks.
    patterns, direction
        What masks are asked for; the direction is None where given masks have several.
    globs, identified_by
        How these were chosen, and what says what tensors are.
    job : Job
    record : str
        What stands in the record beside the weights, if the output is a folder.
    places : mapping of str to Place
        Where in their file stored masks lie.
    other_weights : bool
        Whether stored masks may have been made for other weights.
    """

    job: Job
    chosen: Sequence[ChosenTensor]
    patterns: Patterns
    direction: Direction | None
    globs: Globs
    identified_by: str
    record: str
    places: Mapping[str, Place] = field(default_factory=dict)
    other_weights: bool = False

    steps: ClassVar[Steps] = Steps("pruning", fingerprint_unit, prune_unit, verify_unit)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.other_weights, "other_weights")

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read, which no output may be."""
        masks = self.job.masks
        return [*super().inputs, *([masks.file] if isinstance(masks, StoredMasks) else [])]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that have to be the same for a run to be resumed, as JSON, by the names that messages use."""
        plain = {"input": self.checkpoint.path, "output": self.output, "masks": self.masks, "pattern": self.patterns}
        masks = self.job.masks
        assert masks is not None
        how: dict[str, Any] = (
            {"method": masks.method}
            if isinstance(masks, SolveMasks)
            else {
                "applied": str(masks.file),
                "the hash of the masks": masks.hash,
                "other_weights": self.other_weights,
            }
        )
        return {
            **{name: None if value is None else str(value) for name, value in plain.items()},
            "direction": self.direction,
            **how,
            **{name: list(globs) for name, globs in vars(self.globs).items()},
            "what the tensors are identified by": self.identified_by,
            # What earlier prunes recorded beside the input is part of it.
            "the hash of the record": xxhash.xxh3_128_hexdigest(self.record.encode()),
        }

    def units(self) -> list[Unit]:
        """Return the units of the input: without an output, only those that have masks."""
        units = units_of(self.checkpoint, self.chosen)
        return units if self.output is not None else [unit for unit in units if unit.tensor is not None]

    def trial(self) -> tuple[Any, ...]:
        """Return the call that solves a tile of each kind, so that all others find its code on the disk."""
        return try_method, self.job, self.chosen

    def prepare(self, data: Path, hashes: dict[str, str]) -> None:
        """Make the unfinished files, the record and the file of masks among them."""
        super().prepare(data, hashes)
        if self.output is not None and self.checkpoint.is_folder:
            with (data / _OUTPUT / RECORD).open("w", encoding="utf-8") as record:
                record.write(self.record)
                record.flush()
                os.fsync(record.fileno())
        if self.masks is not None:
            header = masks_header(self.chosen, hashes)
            places = places_in(self.chosen, header)
            ends = [
                places[tensor.name].offset + tensor.flat_shape[0] * places[tensor.name].row for tensor in self.chosen
            ]
            allocate(data / _MASKS, max(ends))

    def place(self, units: list[Unit], hashes: dict[str, str], data: Path) -> list[Unit]:
        """Return the units with the places of their masks, if there are any; begins the file of masks to write."""
        if isinstance(self.job.masks, StoredMasks):
            return place_masks(units, self.places)
        if self.masks is None:
            return units
        header = masks_header(self.chosen, hashes)
        if (data / _MASKS).exists():  # not published yet
            # No unit holds the header, so every run writes it.
            with (data / _MASKS).open("r+b", buffering=0) as file:
                put(file, 0, memoryview(header))
                sync(file)
        return place_masks(units, places_in(self.chosen, header))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: the record of each tensor, and the hash of each unit of the input."""

    bands: dict[str, BandRecord]
    fingerprints: list[str]


def run(
    order: Order,
    workers: int | Executor | None,
    on_progress: OnProgress | None,
    check: Callable[[dict[str, str]], None] | None = None,
) -> Outcome:
    """Do what is ordered, or what an unfinished run has left of it.

    `check` is called with the hash of each chosen tensor's weights before anything is written.
    """
    _check_targets(order)
    units = order.units()
    with ExitStack() as stack:
        workspace = stack.enter_context(open_workspace(order.target))
        if order.masks is not None and order.masks != order.target:
            # Only to keep others out.
            stack.enter_context(open_workspace(order.masks))
        _check_unfinished(order, workspace)
        if order.output is not None and workspace.read_manifest() is None:
            # The input may take hours to read.
            check_room(workspace.folder, sum(order.sizes.values()))
        nbytes = sum(unit.nbytes for unit in units)
        with _noting_what_is_kept(workspace, len(units)), executor_for(workers, nbytes) as executor:
            trial = order.trial()
            if trial is not None:
                list(run_all(executor, trial[0], [(0, trial[1:])]))
            team = _Team(executor, order.job, order.steps, units, on_progress)
            fingerprints = team.fingerprint()
            hashes = hashes_of(units, fingerprints)
            if check is not None:
                check(hashes)
            manifest = {
                "masksolve": __version__,
                "arguments": order.arguments,
                "files": [[file.name, file.size] for file in order.checkpoint.files],
                "units": fingerprints,
            }
            unfinished = workspace.read_manifest()
            if unfinished is None:
                data = _prepare(order, workspace, hashes)
                workspace.write_manifest({**manifest, "data": data.name})
            else:
                _check_same(order, unfinished, manifest, units)
                data = workspace.folder / unfinished["data"]
            team = replace(team, units=order.place(units, hashes, data))
            target = Target(
                None if order.output is None else data / _OUTPUT, None if order.masks is None else data / _MASKS
            )
            order.begin(Unfinished(workspace, data, data / _OUTPUT, team.units, fingerprints, executor, on_progress))
            records = _finish(workspace, team, target, fingerprints)
            _publish(order, workspace, data)
    bands: dict[str, list[BandRecord]] = {}
    for index, unit in enumerate(units):
        band = records[index].band
        if unit.tensor is not None and band is not None:
            bands.setdefault(unit.tensor.name, []).append(band)
    return Outcome({name: merge_bands(parts) for name, parts in bands.items()}, fingerprints)


@dataclass(frozen=True)
class _Team:
    """Work on units, done by an executor, with reports of progress."""

    executor: Executor
    job: Any
    steps: Steps
    units: list[Unit]
    on_progress: OnProgress | None

    def fingerprint(self) -> list[str]:
        """Return the hash of every unit of the input."""
        everything = range(len(self.units))
        found = dict(self._do("reading", self.steps.read, [(index, ()) for index in everything]))
        return [found[index] for index in everything]

    def write(
        self, missing: Iterable[int], target: Target, fingerprints: Sequence[str]
    ) -> Iterable[tuple[int, UnitRecord]]:
        """Write units of the output."""
        return self._do(
            self.steps.doing, self.steps.write, [(index, (target, fingerprints[index])) for index in missing]
        )

    def verify(self, indices: Iterable[int], target: Target, records: dict[int, UnitRecord]) -> list[int]:
        """Return the units of the output that are not what was written."""
        found = self._do("verifying", self.steps.verify, [(index, (target, records[index])) for index in indices])
        return sorted(index for index, is_whole in found if not is_whole)

    def _do(
        self, phase: str, work: Callable[..., Result], items: list[tuple[int, tuple[Any, ...]]]
    ) -> Iterable[tuple[int, Result]]:
        total = sum(unit.nbytes for unit in self.units)
        done = total - sum(self.units[index].nbytes for index, _ in items)
        self._report(phase, done, total)
        calls = [(index, (self.job, self.units[index], *extra)) for index, extra in items]
        for index, result in run_all(self.executor, work, calls):
            yield index, result
            done += self.units[index].nbytes
            self._report(phase, done, total)

    def _report(self, phase: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(phase, done, total)


def _finish(workspace: Workspace, team: _Team, target: Target, fingerprints: Sequence[str]) -> dict[int, UnitRecord]:
    """Do what the journal does not have, and verify all; return the record of every unit."""
    records: dict[int, UnitRecord] = {}
    repaired: set[int] = set()
    for entry in workspace.read_journal():
        if "verified" in entry:
            return records
        for index in entry.get("redo", []):
            del records[index]
        if "unit" in entry:
            records[entry["unit"]] = _record_from(entry)
            if "repaired" in entry:
                repaired.add(entry["unit"])
    bands: dict[str, list[int]] = {}
    for index, unit in enumerate(team.units):
        if unit.tensor is not None:
            bands.setdefault(unit.tensor.name, []).append(index)
    suspects: Sequence[int] = range(len(team.units))
    missing = [index for index in suspects if index not in records]
    with workspace.journal() as journal:
        for _ in range(_ATTEMPTS):
            for index, record in team.write(missing, target, fingerprints):
                journal.add({"unit": index, **asdict(record)})
                records[index] = record
                tensor = team.units[index].tensor
                # Nothing more is known of a band that is packed.
                if tensor is None or record.band is None:
                    continue
                if all(each in records for each in bands[tensor.name]):
                    _log_tensor(tensor.name, [records[each] for each in bands[tensor.name]])
            bad = team.verify(suspects, target, records)
            if not bad:
                journal.add({"verified": True})
                return records
            for index in bad:
                _logger.warning("written, but not found again on the disk: %s", team.units[index].describe())
                del records[index]
            if not repaired.isdisjoint(bad):
                break  # `Order.begin` is over
            journal.add({"redo": bad})
            suspects = missing = bad
    raise OSError(f"the disk does not keep what is written to it: {team.units[bad[0]].describe()}; check the disk")


def _log_tensor(name: str, records: Sequence[UnitRecord]) -> None:
    band = merge_bands([record.band for record in records if record.band is not None])
    proof = "optimal" if band.optimal else f"gap {band.gap:.2e}"
    _logger.info("pruned %s: %.2f%%, %s", printable(name), band.kept_importance * 100, proof)


def _record_from(entry: dict[str, Any]) -> UnitRecord:
    """Return the record that a line of the journal holds."""
    band = entry["band"]
    if band is not None:
        worst = tuple(
            TileRecord(**{**tile, "matrix": tuple(tile["matrix"]), "mask": tuple(tile["mask"])})
            for tile in band["worst"]
        )
        band = BandRecord(**{**band, "gaps": tuple(band["gaps"]), "worst": worst})
    return UnitRecord(entry["output"], entry["masks"], band)


@contextmanager
def _noting_what_is_kept(workspace: Workspace, units: int) -> Iterator[None]:
    """Note on whatever ends a run that can be resumed how much of it is done and how to go on.

    Of a request that turns out to be wrong before anything is done, nothing is kept.
    """
    try:
        yield
    except BaseException as error:
        if workspace.read_manifest() is not None:
            done = len({entry["unit"] for entry in workspace.read_journal() if "unit" in entry})
            if not done and isinstance(error, ValueError):
                workspace.clear()
            else:
                error.add_note(f"{done} of {units} parts are done and kept; the same with `resume=True` continues")
        raise


def _check_targets(order: Order) -> None:
    """Refuse, before anything is read, what could not be written at the end."""
    checkpoint, inputs = order.checkpoint, order.inputs
    for target in (order.output, order.masks):
        if target is None:
            continue
        is_folder = checkpoint.is_folder and target == order.output
        if target.is_symlink() and not target.exists():
            # No folder can be given its name.
            raise FileExistsError(f"the output {target} is a broken link; remove it, or name another")
        if target.exists():
            if any(target.samefile(path) for path in inputs):
                raise CheckpointError(f"the output {target} is the input, or a file of it; name another")
            if target.is_dir() and not is_folder:
                raise IsADirectoryError(f"the output {target} is a folder; name a file in it")
            if not target.is_dir() and is_folder:
                raise NotADirectoryError(f"the output {target} is a file; the input is a folder, name a folder")
            if not order.overwrite and not (order.resume and Workspace(order.target).is_verified()):
                raise FileExistsError(f"the output {target} exists; name another, or pass `overwrite=True`")
            if is_folder and not list(target.glob("*.safetensors*")):
                raise CheckpointError(f"the output {target} is a folder that holds no checkpoint, and is not replaced")
        parent = target.parent
        if not parent.is_dir():
            raise FileNotFoundError(f"the output's folder {parent} does not exist; create it first")
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"the output's folder {parent} is not writable")
        resolved = target.resolve()
        for source in (path.resolve() for path in inputs):
            if source in resolved.parents or resolved in source.parents:
                raise CheckpointError(f"the output {target} lies within {source}, or that in it; name another place")
    if order.output is not None and order.masks is not None:
        output, masks = order.output.resolve(), order.masks.resolve()
        if output == masks or output in masks.parents:
            raise CheckpointError(f"the masks {order.masks} are, or lie in, the output; name another file")
        if output.parent.stat().st_dev != masks.parent.stat().st_dev:
            raise CheckpointError(f"{order.masks} and {order.output} must lie on one file system")


def _check_unfinished(order: Order, workspace: Workspace) -> None:
    manifest = workspace.read_manifest()
    if manifest is None:
        return
    if order.resume:
        # Of another order, these files are not what was finished; `_check_same` refuses it.
        if workspace.is_verified() and manifest["arguments"] == order.arguments:
            _check_not_removed(order, workspace, workspace.folder / manifest["data"])
        return
    if not order.overwrite:
        raise FileExistsError(
            f"an earlier run of {order.target} was not finished; `resume=True` continues it, "
            "`overwrite=True` discards what it has done"
        )
    workspace.clear()


def _check_not_removed(order: Order, workspace: Workspace, data: Path) -> None:
    """Begin again where what an earlier run had finished, and named, is gone."""
    files = _files(order, data)
    gone = [target for hidden, target in files if not hidden.exists() and not target.exists()]
    if not gone:
        return
    for _, target in files:
        if target.exists() and not order.overwrite:
            raise FileExistsError(
                f"{gone[0]} was finished by an earlier run, and has been removed since; move {target} away too, "
                "or pass `overwrite=True`"
            )
    _logger.warning("%s was finished by an earlier run, and has been removed since: it is made again", gone[0])
    workspace.clear()


def _prepare(order: Order, workspace: Workspace, hashes: dict[str, str]) -> Path:
    """Make the unfinished files, in full size, and wait until their names are on the disk."""
    workspace.clear()
    data = workspace.new_data_folder()
    order.prepare(data, hashes)
    # Before there is a manifest that names them.
    for folder in (data, *(path for path in data.rglob("*") if path.is_dir())):
        sync_folder(folder)
    return data


def _check_same(order: Order, old: dict[str, Any], new: dict[str, Any], units: Sequence[Unit]) -> None:
    """Refuse to resume what was begun otherwise, or from another input."""
    difference = None
    if old["masksolve"] != new["masksolve"]:
        difference = f"it was begun by masksolve {old['masksolve']}, this is {new['masksolve']}"
    for name, value in new["arguments"].items():
        before = old["arguments"].get(name)
        if before != value and difference is None:
            difference = f"{name} was {_plain(before)}, now it is {_plain(value)}"
    if difference is None and old["files"] != new["files"]:
        names = sorted(
            {file[0] for file in old["files"] + new["files"] if (file in old["files"]) != (file in new["files"])}
        )
        difference = f"the input has changed: {', '.join(names[:3])} has another size, is new or is missing"
    if difference is None and old["units"] != new["units"]:
        pairs = zip(units, old["units"], new["units"], strict=False)
        changed = [unit.describe() for unit, a, b in pairs if a != b] or ["its tensors"]
        difference = f"the input has changed: {changed[0]}"
    if difference is not None:
        raise CheckpointError(
            f"the unfinished run of {order.target} cannot be resumed: {difference}; "
            "make them the same, or pass `overwrite=True` without `resume` to begin again"
        )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _files(order: Order, data: Path) -> list[tuple[Path, Path]]:
    """Return what is to be published: each file or folder in the hidden folder, and the name that it is given."""
    files = []
    if order.masks is not None:
        files.append((data / _MASKS, order.masks))
    if order.output is not None:
        is_folder = order.checkpoint.is_folder
        files.append((data / _OUTPUT if is_folder else data / _OUTPUT / order.checkpoint.path.name, order.output))
    return files


def _publish(order: Order, workspace: Workspace, data: Path) -> None:
    """Give the finished files their names; what an earlier run has named already stays."""
    for hidden, target in _files(order, data):
        if not hidden.exists() and target.exists():
            continue
        if target.exists() and not order.overwrite:
            raise FileExistsError(
                f"{target} has appeared meanwhile; move it away, and `resume=True` gives the output its name"
            )
        if hidden.is_dir() and target.exists():
            # A folder cannot be replaced at once: the old one steps aside first.
            target.rename(data / "replaced")
        hidden.replace(target)
        sync_folder(target.parent)
    workspace.clear()
