"""What a masked parameter consists of."""

from typing import cast

from torch import Tensor, nn

from masksolve.torch._training.masking import MaskedWeight, masked_parameter


def held(owner: nn.Module, attribute: str = "weight") -> tuple[nn.Parameter, Tensor]:
    """The dense weight and the mask of a module's parameter."""
    weight, masked = cast(tuple[nn.Parameter, MaskedWeight], masked_parameter(owner, attribute))
    return weight, masked.mask
