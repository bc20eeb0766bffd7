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
        Whatever transformers raises for a config that it does not know, or that is corrupt.
    """
    with quietly():
        # Initialising draws numbers, even those that are never stored.
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = _of_config(folder)
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


def model_without_weights(folder: Path, stored: torch.dtype) -> nn.Module:
    """Return the model that a folder's config.json describes, in evaluation mode, its parameters on the meta device.

    Its buffers have their values. Only transformers' own classes are built; code beside the weights is never run.

    Parameters
    ----------
    folder : Path
    stored : torch.dtype
        The dtype of the weights; where the config names one, it is the model's.

    Raises
    ------
    Exception
        As for `kinds_by_config`.
    """
    register = nn.Module.register_parameter

    def unloaded(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # Tied ones, which are there already, stay tied.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    default = torch.get_default_dtype()
    with quietly(), torch.random.fork_rng(devices=[]):
        dtype = _dtype_of(folder) or stored
        try:
            nn.Module.register_parameter = unloaded  # type: ignore[method-assign, assignment]
            torch.set_default_dtype(dtype)
            return _of_config(folder).eval()
        finally:
            torch.set_default_dtype(default)
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _dtype_of(folder: Path) -> torch.dtype | None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = getattr(config, "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else None


def _of_config(folder: Path) -> nn.Module:
    import transformers

    automatic: Any = transformers.AutoModel
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
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
def quietly() -> Iterator[None]:
    """Silence transformers: its warnings about a config, and its bars, do not concern whoever prunes weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as log

        verbosity, shows_bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if shows_bars:
                log.enable_progress_bar()  # type: ignore[no-untyped-call]
