"""The parts of a masked parameter."""

from typing import cast

from torch import Tensor, nn

from masksolve.torch._training.masking import Held, masked_parameter


def held(owner: nn.Module, attribute: str = "weight") -> tuple[nn.Parameter, Tensor]:
    """The dense weight and the mask of a module's parameter."""
    weight, masked = cast(Held, masked_parameter(owner, attribute))
    return weight, masked.mask
