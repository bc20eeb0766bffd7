"""The kinds of a checkpoint's tensors, by the model that its config describes: from its modules, never its weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masksolve._kinds import Axes, Kind
from masksolve.torch._layers import kinds_of

Shape = Sequence[int]


def kinds_by_config(folder: Path, tensors: Mapping[str, Shape]) -> tuple[str, dict[str, Kind]]:
    """Return the class of the model that a folder's config.json describes, and the kinds of the tensors that it has.

    Only transformers' own classes are built, on the meta device; code beside the weights is never run.

    Raises
    ------
    Exception
        Whatever transformers raises for a config that it does not know, or that is spoilt.
    """
    with _quietly():
        model = _without_weights(folder)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        kinds = kinds_of(model)
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        name_in_model = renamer(model)
        found = {}
        for name, shape in tensors.items():
            own = name_in_model(name)
            if own in parameters and own in kinds:
                found[name] = _kind_of(shape, kinds[own], parameters[own].shape)
            elif own in parameters:
                found[name] = Kind(_axes_of(shape), "what a parametrization computes a weight from")
            elif own in buffers:
                found[name] = Kind("matrix", "a buffer, not a weight")
    return type(model).__name__, found


def renamer(model: nn.Module) -> Callable[[str], str]:
    """Return the function from names in a checkpoint to names in a model of transformers, as it loads them."""
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    conversion = _conversion(model)

    def name_in_model(name: str) -> str:
        for known in (name, conversion(name)):
            # A head's checkpoint may be that of the model below it, or the other way round.
            for candidate in (known, f"{prefix}{known}", known.removeprefix(prefix)):
                if candidate in names:
                    return candidate
        return name

    return name_in_model


def _conversion(model: Any) -> Callable[[str], str]:
    """Return how transformers renames tensors, such as those of single experts that it stacks."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # they are not public
        return lambda name: name
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    return lambda name: str(rename_source_key(name, renamings, converters)[0])


def _without_weights(folder: Path) -> nn.Module:
    import transformers

    automatic: Any = transformers.AutoModel
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    # Initialising draws numbers, even those that are never stored.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            model: nn.Module = kind(config)
        else:
            model = automatic.from_config(config, trust_remote_code=False)
    return model


def _kind_of(shape: Shape, kind: Kind, own: Shape) -> Kind:
    """Return the kind of a tensor that becomes, or becomes part of, a parameter of the shape `own`."""
    if len(shape) == len(own):
        return kind
    if kind.axes == "stack" and len(shape) == 2:
        # Of one expert, which the model stacks with the others.
        return Kind("matrix")
    return Kind(_axes_of(shape), kind.dense)


def _axes_of(shape: Shape) -> Axes | None:
    """Return how the axes of a tensor are read when its shape is all that is known."""
    return "matrix" if len(shape) < 3 else "convolution" if len(shape) > 3 else None


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers: its warnings about a config do not concern whoever prunes weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as log

        verbosity = log.get_verbosity()
        log.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
