"""Finalizing: zeros are written into masked parameters, and every trace of the masks is removed."""

from __future__ import annotations

from torch import nn

from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import check_module, masked_attributes
from masksolve.torch._training.loading import unguard_loading
from masksolve.torch._training.masking import (
    check_weight,
    detach,
    is_outermost,
    masked_parameter,
    write_zeros,
)


def finalize(model: nn.Module) -> None:
    """Write the zeros into every masked parameter of a model, and make all of them plain parameters again.

    For a copy of a masked model, such as an EMA or a `copy.deepcopy`, where its Sparsifier is not at hand.
    `Sparsifier.finalize` does the same for the model that it was made for.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Raises
    ------
    ValueError
        If nothing in the model is masked, or a parameter has changed its shape or is on the meta device.
    RuntimeError
        If a parameter is sharded by FSDP, its module was given another class since, or its mask is not of the
        Sparsifier's pattern, as in an average that averaged the masks too. The model is left as it was.

    Examples
    --------
    >>> import copy, torch, masksolve.torch
    >>> model = torch.nn.Linear(8, 8)
    >>> sparsifier = masksolve.torch.Sparsifier(model, "4:8")
    >>> average = copy.deepcopy(model)
    >>> masksolve.torch.finalize(average)
    >>> int((average.weight == 0).sum())
    32
    """
    places = [
        (f"{path}.{attribute}" if path else attribute, module, attribute)
        for path, module in check_module(model).named_modules()
        for attribute in masked_attributes(module)
    ]
    if not places:
        raise ValueError(f"this {type(model).__name__} has no masked parameter; there is nothing to finalize")
    remove_masks(places)
    for module in model.modules():
        unguard_loading(module)


def remove_masks(places: list[tuple[str, nn.Module, str]], *, write: bool = True) -> None:
    """Detach parameters, given as (name, owner, attribute), after checking that all of them can be.

    `write`: with zeros in them; else with their dense values.
    """
    for name, owner, attribute in places:
        found = masked_parameter(owner, attribute)
        assert found is not None
        weight, masked = found
        if write:
            check_weight(name, weight, masked)
        if is_sharded(weight) and not is_sharded(masked.mask):
            raise RuntimeError(
                f"parameter {name!r} is sharded by fully_shard, which holds on to it; gather the state dict with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True, load it into "
                "an unsharded model that has a Sparsifier, and finalize that"
            )
        if not is_outermost(owner):
            raise RuntimeError(
                f"the module of parameter {name!r} was given the class {type(owner).__name__} after it was masked, as "
                "torch.nn.utils.parametrize does; undo that first"
            )
        if write and (fault := masked.fault(masked.mask)) is not None:
            raise RuntimeError(
                f"parameter {name!r} has a mask that its Sparsifier cannot have made: {fault}; an AveragedModel needs "
                "use_buffers=False; copy the masks of the trained model, or refresh them"
            )
    # All of them first: names of one parameter share the mask of the first.
    for _, owner, attribute in places if write else ():
        write_zeros(owner, attribute)
    for _, owner, attribute in places:
        detach(owner, attribute)
