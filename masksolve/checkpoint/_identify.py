"""Identify the tensors of a checkpoint: by the model's config where there is one, by their names otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from masksolve._kinds import Kind, dense_by_name, transposed_by_name
from masksolve.checkpoint._file import CheckpointError, TensorInfo, parse_json
from masksolve.checkpoint._layout import Checkpoint

_CONFIG = "config.json"


@dataclass(frozen=True)
class Identified:
    """The kind of each tensor, and in words what says so."""

    kinds: dict[str, Kind]
    by: str


def identify(checkpoint: Checkpoint) -> Identified:
    """Find out what each tensor of a checkpoint is.

    A config.json beside the weights decides, if transformers is installed and knows the model; no code beside it is
    ever run. Whatever is wrong with it, the names decide, and `by` says why.
    """
    tensors = checkpoint.tensors
    by_name = {tensor.name: _kind_by_name(tensor) for tensor in tensors}
    try:
        model, known = _by_config(checkpoint)
    except _NoModelError as error:
        return Identified(by_name, f"the names of the tensors ({error})")
    others = len(by_name.keys() - known.keys())
    if others == len(by_name):
        return Identified(by_name, f"the names of the tensors (none of which the {model} of {_CONFIG} has)")
    rest = f"; {others} that it does not have, by their names" if others else ""
    return Identified({**by_name, **known}, f"the model of {_CONFIG} ({model}{rest})")


class _NoModelError(Exception):
    """There is no model to ask; the message says why."""


def _by_config(checkpoint: Checkpoint) -> tuple[str, dict[str, Kind]]:
    path = checkpoint.folder / _CONFIG
    if not path.is_file():
        raise _NoModelError(f"there is no {_CONFIG} beside them")
    try:
        config = parse_json(path.read_bytes(), path)
    except (OSError, CheckpointError) as error:
        raise _NoModelError(f"{_CONFIG} cannot be read: {error}") from None
    if "model_type" not in config:
        raise _NoModelError(f"{_CONFIG} names no model_type")
    try:
        import transformers  # noqa: F401 (imported first, for its name in the message)

        from masksolve.torch._model_config import kinds_by_config
    except ImportError as error:
        raise _NoModelError(f"{error.name or 'transformers'} is not installed, to read {_CONFIG}") from None
    try:
        return kinds_by_config(checkpoint.folder, {tensor.name: tensor.shape for tensor in checkpoint.tensors})
    except Exception as error:  # of any kind: it is another library's, and a file's that anybody wrote
        text = " ".join(str(error).split())
        raise _NoModelError(f"{_CONFIG}: {type(error).__name__}: {text[:200]}") from None


def _kind_by_name(tensor: TensorInfo) -> Kind:
    axes = len(tensor.shape)
    return Kind(
        "matrix" if axes < 3 else "convolution" if axes > 3 else None,
        dense_by_name(tensor.name),
        transposed=transposed_by_name(tensor.name),
    )
