"""The mask of a layer found from its first input to its last, what is lost made up for by the inputs that follow.

Frantar and Alistarh 2023 ("SparseGPT", arXiv 2301.00774): the error that a weight leaves goes to the weights of later
inputs, and their mask is found of what they have become. A tile of inputs is masked at once, all outputs together, so
that masks are transposable, as in Meng et al. 2025 ("TSENOR", arXiv 2505.23949).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Inputs after which the errors of all go to what follows, in one product.
_BLOCK = 128


def sparsegpt(weight: Tensor, inverse: Tensor, width: int, project: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the scores of weights when their turn came: the error that each would leave.

    Parameters
    ----------
    weight : Tensor of float64, shape (groups, outputs, inputs)
    inverse : Tensor of float64, shape (groups, inputs, inputs)
        That of H, damped.
    width : int
        Inputs that are masked at once; what is left at the end may be fewer.
    project : callable
        Returns the mask that keeps most of the scores of some inputs, of which it is given the first.

    Returns
    -------
    Tensor, shaped like the weight
        Every mask that was found is the one that keeps most of them.
    """
    # Row j holds what an error of input j does to those that follow, whose own H is inverted by the rest.
    factor = torch.linalg.cholesky(inverse, upper=True)
    own = factor.diagonal(dim1=1, dim2=2).unsqueeze(1)
    moved, scores, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    inputs = weight.shape[2]
    block = max(width, _BLOCK // width * width)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        for first in range(start, stop, width):
            tile = slice(first, min(first + width, stop))
            scores[:, :, tile] = (moved[:, :, tile] / own[:, :, tile]).square()
            mask = project(scores[:, :, tile], first)
            for j in range(tile.start, tile.stop):
                lost = torch.where(mask[:, :, j - first], 0.0, moved[:, :, j])
                errors[:, :, j] = lost / own[:, :, j]
                moved[:, :, j + 1 : stop] -= errors[:, :, j : j + 1] * factor[:, j : j + 1, j + 1 : stop]
        moved[:, :, stop:] -= errors[:, :, start:stop] @ factor[:, start:stop, stop:]
    return scores
