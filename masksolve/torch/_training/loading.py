"""Judging the masks that `load_state_dict` brings to a masked model, before anything is written."""

from __future__ import annotations

from torch import nn

from masksolve.torch._layers import masked_attributes
from masksolve.torch._training.masking import guards, refuse_masks


def guard_loading(model: nn.Module) -> None:
    """Make a model refuse a state_dict with a mask that its Sparsifier cannot have made, before anything is loaded."""
    if not guards(model):
        model.register_load_state_dict_pre_hook(refuse_masks)


def unguard_loading(model: nn.Module) -> None:
    """Undo `guard_loading`, unless there are masks left."""
    if guards(model) and not any(masked_attributes(module) for module in model.modules()):
        for key in guards(model):
            del model._load_state_dict_pre_hooks[key]
