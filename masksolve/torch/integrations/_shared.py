"""What the callbacks have in common: how a Sparsifier is made and goes, and how a masked model reads sparse weights."""

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
        self.has_masks = options.get("masks") is not None

    def attach(self, model: nn.Module) -> Attached:
        """Mask a model."""
        return Attached(model, Sparsifier(model, self._pattern, **self._options))


class Attached:
    """A Sparsifier at work on a model, which loads state_dicts without masks meanwhile: those that it has stay."""

    def __init__(self, model: nn.Module, sparsifier: Sparsifier) -> None:
        self.model, self.sparsifier = model, sparsifier
        self._handle = model.register_load_state_dict_pre_hook(_add_masks)

    def is_on(self, model: object) -> bool:
        """Return whether it still masks this model: others may have finalized it."""
        return self.model is model and any(masked_attributes(module) for module in self.model.modules())

    def finalize(self) -> None:
        """Finalize the Sparsifier, and report missing masks again."""
        self.sparsifier.finalize()
        self._handle.remove()

    def make_way(self, model: nn.Module) -> None:
        """Make a model that is to be masked anew a plain one with its dense weights; another one stays masked."""
        if self.model is model:
            self.sparsifier._withdraw()
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
