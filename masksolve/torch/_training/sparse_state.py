"""The weights of a masked model as a sparse checkpoint has them, while its training goes on."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import check_module, masked_attributes
from masksolve.torch._training.masking import Held, masked_parameter, masked_product


def sparse_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state_dict that a masked model would have after `finalize`, which leaves the model as it is.

    For a checkpoint in the middle of a training that can be read without masksolve, as the model that was evaluated.
    With `Sparsifier.state_dict(pruned=True)`, which has what is missing in it, the training resumes bit for bit.

    Parameters
    ----------
    model : nn.Module
        With a Sparsifier, or a copy of such a model.

    Returns
    -------
    dict
        The model's own keys. Masked weights are copies on the CPU, and one tensor under all names of a tied one; all
        else is what `model.state_dict()` has.

    Raises
    ------
    ValueError
        If nothing in the model is masked.
    RuntimeError
        If a masked parameter is sharded by FSDP.

    Examples
    --------
    >>> import torch, masksolve.torch
    >>> model = torch.nn.Linear(8, 8)
    >>> sparsifier = masksolve.torch.Sparsifier(model, "2:4")
    >>> state = sparse_state_dict(model)
    >>> list(state), int((state["weight"] != 0).sum())
    (['weight', 'bias'], 32)
    >>> other = torch.nn.Linear(8, 8)
    >>> other.load_state_dict(state)
    <All keys matched successfully>
    """
    # As it comes, with the versions of modules that PyTorch keeps in it.
    state = check_module(model).state_dict()
    if not take_masks(model, state).buffers:
        raise ValueError(f"this {type(model).__name__} has no masked parameter; its state_dict is a plain one")
    return state


class Taken(NamedTuple):
    """What `take_masks` has taken out of a state_dict, on the CPU.

    Attributes
    ----------
    buffers : dict
        The masks, and the numbers of steps, by their keys.
    pruned : dict
        The entries of every dense weight that the sparse one does not have, one after the other, by its key.
    masks : dict
        The key of its mask, by the key of a weight.
    """

    buffers: dict[str, Tensor]
    pruned: dict[str, Tensor]
    masks: dict[str, str]


def take_masks(model: nn.Module, state: dict[str, Any]) -> Taken:
    """Make a state_dict of a masked model, or of a copy of it, one of sparse weights under plain names."""
    taken, found = Taken({}, {}, {}), []
    keys: dict[int, str] = {}
    factors: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for attribute in masked_attributes(module):
            _, masked = cast(Held, masked_parameter(module, attribute))
            found.append((f"{prefix}{attribute}", masked))
            if masked.home is module:
                key = keys.setdefault(id(masked), f"{prefix}{masked.buffer}")
                factors.setdefault(key, f"{prefix}{masked.multiplier}")
                for buffer in masked.buffers:
                    if (value := state.pop(f"{prefix}{buffer}", None)) is not None:
                        taken.buffers[f"{prefix}{buffer}"] = value.cpu()
    # Names of one tensor share what is made of it.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for name, masked in found:
        key = keys[id(masked)]
        if name not in state or key not in taken.buffers:
            continue
        weight = state[name].detach()
        if is_sharded(weight):
            raise RuntimeError(
                f"parameter {name!r} is sharded by fully_shard; gather the state dict with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True, load it into "
                "an unsharded model that has a Sparsifier, and save that"
            )
        if (place := weight.data_ptr()) not in made:
            dense, mask = weight.cpu(), taken.buffers[key]
            # Adding zero turns the -0.0 of a negative weight into 0.0.
            made[place] = masked_product(dense, taken.buffers[factors[key]]).add_(0.0), dense[masked.absent(mask)]
        state[name], taken.pruned[name] = made[place]
        taken.masks[name] = key
    return taken


def give_masks(state: dict[str, Any], taken: Taken) -> None:
    """Undo `take_masks`."""
    state.update(taken.buffers)
    for name, values in taken.pruned.items():
        mask = taken.buffers[taken.masks[name]]
        absent = torch.ones_like(mask) if values.numel() == mask.numel() else ~mask
        state[name] = state[name].masked_scatter(absent.to(state[name].device), values.to(state[name].device))
