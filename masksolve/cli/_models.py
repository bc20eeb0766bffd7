"""The files of `masksolve adaprune`: models and calibration data in, pruned models out."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from masksolve._errors import NotInstalledError
from masksolve._tiles import Direction
from masksolve._words import counted
from masksolve.checkpoint._adaprune import pruned_as
from masksolve.checkpoint._blocks import REPORT, is_copied
from masksolve.checkpoint._file import ChosenTensor, PrunedAs
from masksolve.checkpoint._layout import read_checkpoint
from masksolve.checkpoint._record import RECORD, read_record, record_of
from masksolve.torch._adaprune.records import AdaPruneReport
from masksolve.torch._layers import layout_of
from masksolve.torch._model_config import quietly, renamer

_logger = logging.getLogger("masksolve")

_ARRAYS = (".npy", ".safetensors")


@dataclass(frozen=True)
class LoadedModel:
    """A model; if it comes from a Hugging Face folder, that and its tokenizer, and what has been pruned there."""

    model: nn.Module
    folder: Path | None = None
    tokenizer: Any | None = None
    pruned: Mapping[str, PrunedAs] = field(default_factory=dict)


def call_factory(source: str) -> LoadedModel:
    """Call `module:factory`.

    Raises
    ------
    click.UsageError
        If it does not have that form, or fails.
    """
    module, _, factory = source.partition(":")
    if not module or not factory:
        raise click.UsageError(f"{source!r} is neither a folder that exists nor module:factory")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), factory, None)
        if not callable(found):
            raise AttributeError(f"module {module!r} has no function {factory!r}")
        model = found()
    except Exception as error:
        raise click.UsageError(f"{source!r} fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise click.UsageError(f"{source!r} returned {type(model).__name__}; it must return a torch.nn.Module")
    return LoadedModel(model)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder.

    Raises
    ------
    click.UsageError
        If the folder is none, or has no tokenizer. Nothing is ever downloaded.
    NotInstalledError
        If transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise click.UsageError(f"{folder} has no config.json; give a Hugging Face folder, or module:factory")
    try:
        import transformers
    except ImportError as error:
        raise NotInstalledError(
            f"{folder} needs transformers, which is not installed; pip install 'masksolve[transformers]'"
        ) from error
    try:
        with quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        text = " ".join(str(error).split())
        raise click.UsageError(
            f"the tokenizer of {folder} cannot be loaded ({type(error).__name__}: {text[:200]}); if there is none, "
            "save the model's there (tokenizer.save_pretrained)"
        ) from error
    # Without its files, a tokenizer takes every word for an unknown one.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise click.UsageError(f"{folder} has no tokenizer; save the model's there (tokenizer.save_pretrained)")
    return tokenizer


def load_folder(folder: Path, tokenizer: Any) -> LoadedModel:
    """Load the model of a Hugging Face folder as a whole.

    Raises
    ------
    click.UsageError
        If it is not complete. Nothing is ever downloaded.
    CheckpointError
        If the folder's record of an earlier prune is corrupt or of another checkpoint.
    """
    import transformers

    record = folder / RECORD
    pruned = read_record(record, read_checkpoint(folder).tensors) if record.exists() else {}
    try:
        # The architecture that was saved, its head included.
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        kind = getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel
        model = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise click.UsageError(f"{folder} cannot be loaded ({type(error).__name__}: {error})") from error
    return LoadedModel(model, folder, tokenizer, pruned)


def read_batches(files: Sequence[Path], tokenizer: Any | None, *, samples: int, length: int, size: int) -> list[Any]:
    """Return batches for the model: lines of text through its tokenizer, or arrays.

    Parameters
    ----------
    files : sequence of Path
        Text, one sample per line, for a model with a tokenizer; a line of few tokens is a short sample. Otherwise
        .npy, the model's argument, or .safetensors, its keyword arguments; the first axis of every array counts
        samples.
    tokenizer
        None for a model from code.
    samples, size : int
        How many samples to read at most, divided evenly among the files, and how many make a batch.
    length : int
        Tokens of a line to keep at most.

    Raises
    ------
    click.UsageError, OSError
        For a file that cannot be read, or holds nothing, for text of fewer tokens than one sample may have, and for
        more files than samples.
    """
    if samples < len(files):
        raise click.UsageError(f"--samples {samples} is less than one from each of {len(files)} --calibration files")
    per_file = [samples // len(files) + (index < samples % len(files)) for index in range(len(files))]
    if tokenizer is None:
        return [batch for path, count in zip(files, per_file, strict=True) for batch in _arrays(path, count, size)]
    lines = [line for path, count in zip(files, per_file, strict=True) for line in _lines(path, count)]
    # Lines of one length together: padding would count among the inputs.
    lengths: dict[int, list[list[int]]] = {}
    for line in lines:
        tokens = tokenizer(line, truncation=True, max_length=length)["input_ids"]
        if tokens:
            lengths.setdefault(len(tokens), []).append(tokens)
    total = sum(count * len(found) for count, found in lengths.items())
    if total < length:
        raise click.UsageError(
            f"--calibration {', '.join(map(str, files))} gives {counted(total, 'token')} in "
            f"{counted(len(lines), 'line')}, fewer than the {length} (--length) of one sample; give more text, one "
            "sample per line, or a smaller --length"
        )
    return [
        {"input_ids": torch.tensor(lengths[count][start : start + size])}
        for count in sorted(lengths)
        for start in range(0, len(lengths[count]), size)
    ]


def _lines(path: Path, at_most: int) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"--calibration {path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    if not lines:
        raise click.UsageError(f"--calibration {path} holds no text; give one sample per line")
    # Spread over the file.
    return [lines[index] for index in np.linspace(0, len(lines) - 1, min(at_most, len(lines))).astype(int)]


def _arrays(path: Path, at_most: int, size: int) -> Iterator[Any]:
    if path.suffix not in _ARRAYS:
        raise click.UsageError(f"--calibration {path} is neither {' nor '.join(_ARRAYS)}, which a module:factory needs")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        is_alone = path.suffix == ".npy"
        named = {"": torch.from_numpy(np.load(path, allow_pickle=False))} if is_alone else load_file(path)
    except (ValueError, TypeError, EOFError, SafetensorError) as error:
        raise click.UsageError(f"--calibration {path} cannot be read as {path.suffix} ({error})") from None
    shapes = [tuple(tensor.shape) for tensor in named.values()]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or 0 in counts:
        raise click.UsageError(
            f"--calibration {path} has arrays of shapes {shapes}; the first axis of each counts samples, of which all "
            "need the same number, and at least one"
        )
    for start in range(0, min(at_most, *counts), size):
        batch = {name: tensor[:at_most][start : start + size] for name, tensor in named.items()}
        yield batch[""] if is_alone else batch


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder to fill that gets its name when it is complete, and disappears if something goes wrong.

    Raises
    ------
    click.UsageError
        If the name is taken, or where it is to be cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise click.UsageError(f"--output {path} exists; name another folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise click.UsageError(f"--output {path}: {path.parent} is not a folder that can be written; create it first")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield unfinished
        # mkdtemp's are for their owner alone.
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(loaded: LoadedModel, report: AdaPruneReport, direction: Direction, folder: Path) -> None:
    """Write a Hugging Face folder again, or model.safetensors with the state dict, and what was pruned.

    The folder gets all files of the one that the model comes from, but for weights in other formats.
    """
    if loaded.folder is not None:
        model: Any = loaded.model
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]  # a folder has one
        for name in _other_files(loaded.folder):
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(loaded.folder / name, folder / name)
    else:
        from safetensors.torch import save_model as save

        save(loaded.model, str(folder / "model.safetensors"))
    (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    _write_record(loaded, report, direction, folder)


def _other_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a Hugging Face folder, relative to it, but for its weights and those of an earlier prune."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and is_copied(name):
            yield name


def _write_record(loaded: LoadedModel, report: AdaPruneReport, direction: Direction, folder: Path) -> None:
    """Write for `masksolve check` which tensors of the checkpoint in a folder are pruned, and to what."""
    model = loaded.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pruned = {id(parameters[layer.name]): layer for layer in report.layers}
    name_in_model = renamer(model)
    chosen, found = [], set()
    tensors = read_checkpoint(folder).tensors
    for tensor in tensors:
        place = id(parameters.get(name_in_model(tensor.name)))
        if place in pruned:
            layer = pruned[place]
            owner, attribute = layer.name.rpartition(".")[::2]
            is_transposed = layout_of(model.get_submodule(owner), attribute).transposed
            chosen.append(ChosenTensor.of(tensor, pruned_as(is_transposed, tensor, layer.pattern, direction)))
            found.add(place)
    if len(found) < len(pruned):
        lost = next(layer.name for place, layer in pruned.items() if place not in found)
        _logger.warning("%s is stored under another name: no %s is written, include what to check", lost, RECORD)
        return
    names = {tensor.name for tensor in tensors}
    earlier = {name: line for name, line in loaded.pruned.items() if name in names}
    (folder / RECORD).write_text(record_of(chosen, earlier), encoding="utf-8")
