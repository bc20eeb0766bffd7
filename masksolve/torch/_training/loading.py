"""Judging the masks that `load_state_dict` brings to a masked model, before anything is written."""

from __future__ import annotations

from typing import Any

from torch import nn

from masksolve.torch._layers import masked_attributes
from masksolve.torch._training.masking import mask_faults


def guard_loading(model: nn.Module) -> None:
    """Make a model refuse a state_dict with a mask that its Sparsifier cannot have made, before anything is loaded."""
    if not _guards(model):
        model.register_load_state_dict_pre_hook(_refuse)


def unguard_loading(model: nn.Module) -> None:
    """Undo `guard_loading`, unless there are masks left."""
    if not any(masked_attributes(module) for module in model.modules()):
        for key in _guards(model):
            del model._load_state_dict_pre_hooks[key]


def _guards(model: nn.Module) -> list[int]:
    hooks: dict[int, Any] = model._load_state_dict_pre_hooks
    return [key for key, wrapped in hooks.items() if getattr(wrapped, "hook", None) is _refuse]


# A function, not a method: copies of the model have it, and must not copy a Sparsifier.
def _refuse(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for path, module in model.named_modules():
        for fault in mask_faults(module, state_dict, f"{prefix}{path}." if path else prefix).values():
            raise RuntimeError(
                f"the state_dict has a mask that the model's Sparsifier cannot have made: {fault}; nothing was loaded; "
                "make the Sparsifier for the pattern that was saved, or leave out the masks and load with strict=False"
            )
