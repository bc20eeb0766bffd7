"""What the callbacks have in common: how a Sparsifier is made, and how a masked model reads sparse weights."""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn

from masksolve._inputs import check_flag
from masksolve._patterns import PatternsLike, as_patterns
from masksolve.torch._layers import masked_attributes
from masksolve.torch._training.masking import Held, masked_parameter
from masksolve.torch._training.sparsifier import Sparsifier


class Recipe:
    """What a Sparsifier is made with, checked as far as it can be without a model."""

    def __init__(self, pattern: PatternsLike, finalize: bool, options: dict[str, Any]) -> None:
        as_patterns(pattern)
        check_flag(finalize, "finalize")
        inspect.signature(Sparsifier).bind(None, pattern, **options)
        self._pattern, self._options = pattern, options

    def make(self, model: nn.Module, before: Sparsifier | None = None) -> Sparsifier:
        """Mask a model; anew, from its dense weights, if there is a Sparsifier from before."""
        if before is not None:
            before._withdraw()
        return Sparsifier(model, self._pattern, **self._options)


class PlainLoading:
    """Lets a masked model load a state_dict without masks: those that it has stay, and no key is missing.

    For as long as a callback sees to the masks itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handle = model.register_load_state_dict_pre_hook(_add_masks)

    def end(self) -> None:
        """Report missing masks again."""
        self._handle.remove()


# A function, not a method: copies of the model have it, and must not copy a callback.
def _add_masks(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for path, module in model.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        start = f"{path}." if path else ""
        for attribute in masked_attributes(module):
            _, masked = cast(Held, masked_parameter(module, attribute))
            for buffer in masked.buffers:
                if buffer in module._buffers and f"{start}{attribute}" in state_dict:
                    state_dict.setdefault(f"{start}{buffer}", module._buffers[buffer])
