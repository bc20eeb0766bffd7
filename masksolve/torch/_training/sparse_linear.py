"""Products of a Linear layer under a mask, on sparse tensor cores where there are any, and with thinned gradients.

Because a transposable 2:4 mask is 2:4 along its rows and along its columns, both x·Wᵀ and g·W are products with a
packed matrix, W in the forward pass and Wᵀ in the backward pass. The third product, the weight's gradient gᵀ·x, has no
mask: it is dense, or computed with an unbiased N:M estimate of g. Its sum runs over tokens, so the groups of M do too.
Everywhere else it is the masked dense product.

Nothing packed is kept: each product packs the masked weight as it is at that moment, so that no optimizer, checkpoint,
cast or compiled graph can leave a stale form behind. With one backward a step, that packs each form once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from masksolve._pattern import Pattern
from masksolve.torch._dtensor import is_sharded
from masksolve.torch._layers import check_module
from masksolve.torch._training.masked_read import plain
from masksolve.torch._training.masking import MaskedWeight, is_transformed, masked_parameter, unmasked_class
from masksolve.torch._training.unbiased import thinned

# Tests say "cpu".
_DEVICE = "cuda"
_DTYPES = (torch.float16, torch.bfloat16)
# cuSPARSELt packs multiples of 16; matrices too small for whole thread blocks gain nothing.
_MULTIPLE = 64
# What cuSPARSELt asks of the rows of the dense factor.
_ROWS, _ALIGNMENT = 8, 16
_OLDEST_CAPABILITY = (8, 0)
_KEPT = 2


def acceleration_reason(module: nn.Module) -> str:
    """Say whether the products of a layer run on sparse tensor cores, and why if they do not.

    Parameters
    ----------
    module : nn.Module
        A layer of a model that has a `Sparsifier`. Ask under autocast if the layer runs under it: it decides the dtype.

    Returns
    -------
    str
        "accelerated", or "not accelerated: " and every reason: the kind of layer, device, dtype, shape, mask.

    Examples
    --------
    >>> import torch, masksolve.torch
    >>> layer = torch.nn.Linear(64, 128, dtype=torch.bfloat16)
    >>> sparsifier = masksolve.torch.Sparsifier(layer, "2:4", accelerate=True)
    >>> acceleration_reason(layer)
    'not accelerated: sparse tensor cores need a CUDA device, the weight is on cpu'
    """
    found = masked_parameter(check_module(module, "module"), "weight")
    if found is None:
        return f"not accelerated: this {type(module).__name__} has no weight that a Sparsifier masks"
    weight, masked = found
    reasons = []
    if (unknown := reason_unknown(module)) is not None:
        reasons.append(unknown)
    elif not _is_attached(module) or not isinstance(masked, PackableWeight):
        reasons.append("the Sparsifier was made without accelerate=True, or the layer has another forward")
    if is_sharded(weight):
        reasons.append("its weight is sharded")
    reasons += _obstacles(weight.device.type, weight.device.index, tuple(weight.shape), _product_dtype(weight))
    if (most := _most_of_four(masked.mask)) is not None and max(most) > _KEPT:
        reasons.append(
            "sparse tensor cores need masks that keep at most 2 of 4 along rows, for the forward product, and along "
            "columns, for the backward one, as transposable 2:4 masks do; this one keeps up to "
            f"{most.along_rows} along rows and {most.along_columns} along columns"
        )
    return f"not accelerated: {'; '.join(reasons)}" if reasons else "accelerated"


def linear_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return the forward that packs and thins wherever it should and can; None for modules other than Linear."""
    return _forward if _is_linear(module) else None


def reason_unknown(module: nn.Module) -> str | None:
    """Say why a module's products stay as they are; None for a Linear."""
    name = unmasked_class(module).__name__
    if "forward" in vars(module):
        return f"this {name} has a forward of its own, as hooks of accelerate are"
    if _is_linear(module):
        return None
    return f"only the forward of nn.Linear is known, this {name} has its own, or one that calls it"


class PackableWeight(MaskedWeight):
    """A masked weight whose products may be those of a packed one.

    Attributes
    ----------
    is_packable : bool
        Whether the mask lay on a GPU and was 2:4 along both axes when `look` was called last.
    """

    def __init__(self, home: nn.Module, attribute: str, **options: Any) -> None:
        super().__init__(home, attribute, **options)
        self.look()

    def look(self) -> None:
        """Note whether the mask can be packed. Compiled graphs rely on it: call it after every change of the mask."""
        most = _most_of_four(self.mask) if self.mask.device.type == _DEVICE else None
        self.is_packable = most is not None and max(most) <= _KEPT
        self._seen = self._moment()

    def look_again(self) -> None:
        """Call `look` if the mask may have changed since."""
        # Averages may write the masks of a copy through `.data`, which leaves the version as it is.
        if self.is_copy or self._seen != self._moment():
            self.look()

    def _moment(self) -> tuple[int, int]:
        return id(self.mask), self.mask._version


def pack(masked: Tensor) -> Tensor:
    """Pack a 2:4 matrix (out, in) for cuSPARSELt, which keeps what is not zero."""
    # Weights under a mask are -0.0 where they were negative, which a packer may take for a value to keep.
    packed: Tensor = torch._cslt_compress(torch.add(masked, 0.0, out=masked.new_empty(masked.shape)))
    return packed


def masked_linear(
    inputs: Tensor, masked: Tensor, *, packed: bool = True, thin: Pattern | None = None, packed_thin: bool = False
) -> Tensor:
    """Return inputs · maskedᵀ, (..., in) by (out, in), of one dtype.

    Parameters
    ----------
    packed : bool
        Whether the products with the weight are those of a packed one, in 16 bits.
    thin : Pattern or None
        What the gradient of the outputs is thinned to for the weight's gradient, and only for that.
    packed_thin : bool
        Whether the product with that is one of a packed matrix.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    found = _product(rows, masked, packed, thin, packed_thin)
    return found.reshape(*inputs.shape[:-1], masked.shape[0])


def _multiply(rows: Tensor, masked: Tensor) -> Tensor:
    count = rows.shape[0]
    rows = functional.pad(rows, (0, 0, 0, -count % _ROWS)).contiguous()
    if rows.data_ptr() % _ALIGNMENT:
        rows = rows.clone()
    product: Tensor = torch._cslt_sparse_mm(pack(masked), rows.t(), transpose_result=True)
    return product[:count]


# Rows (k, in) · maskedᵀ (out, in). One operator that packs and multiplies, so that compilers need not know the form.
sparse_product = torch.library.custom_op("masksolve::sparse_product", _multiply, mutates_args=(), device_types=_DEVICE)


@sparse_product.register_fake
def _(rows: Tensor, masked: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], masked.shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, masked: Tensor, packed: bool, thin: Pattern | None, packed_thin: bool) -> Tensor:
        return cast(Tensor, sparse_product(rows, masked)) if packed else rows @ masked.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, masked, ctx.packed, ctx.thin, ctx.packed_thin = inputs
        ctx.save_for_backward(rows, masked)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, masked = ctx.saved_tensors
        of_rows = of_weight = None
        # Not the operator itself: gradients may have gradients.
        if ctx.needs_input_grad[0]:
            of_rows = _product(gradient, masked.t(), ctx.packed)
        if ctx.needs_input_grad[1]:
            thin = gradient if ctx.thin is None else thinned(gradient, ctx.thin)
            if ctx.packed_thin:
                # No tokens, to a multiple of what can be packed.
                fill = 0, 0, 0, -len(thin) % _MULTIPLE
                thin, rows = functional.pad(thin, fill), functional.pad(rows, fill)
                of_weight = _product(rows.t(), thin.t(), True).t()
            else:
                of_weight = thin.t() @ rows
        return of_rows, of_weight, None, None, None


def _product(
    rows: Tensor, masked: Tensor, packed: bool, thin: Pattern | None = None, packed_thin: bool = False
) -> Tensor:
    return cast(Tensor, _Product.apply(rows, masked, packed, thin, packed_thin))  # type: ignore[no-untyped-call]


def _forward(self: nn.Linear, inputs: Tensor) -> Tensor:
    weight = plain(self.weight)
    # Under another class, put on the layer by others, the weight need not be the masked one.
    found = masked_parameter(self, "weight")
    # The dense product handles empty and nested inputs, and refuses others in its own words.
    if found is None or not _is_plain(inputs, weight):
        return functional.linear(inputs, weight, self.bias)
    masked, dtype = found.masked, _product_dtype(weight)
    thin = masked.thin if weight.requires_grad and torch.is_grad_enabled() and not _is_traced() else None
    packed = packed_thin = False
    if isinstance(masked, PackableWeight) and _is_suited(
        weight.device.type, weight.device.index, tuple(weight.shape), dtype
    ):
        packed = _is_packed(masked)
        packed_thin = thin is not None and _most_of_any_four(thin) <= _KEPT
    if not packed and thin is None:
        return functional.linear(inputs, weight, self.bias)
    product = masked_linear(inputs.to(dtype), weight.to(dtype), packed=packed, thin=thin, packed_thin=packed_thin)
    return product if self.bias is None else product + self.bias.to(dtype)


def _is_traced() -> bool:
    """Return whether what runs is traced, or transformed by torch.func: there gradients stay exact."""
    # Dynamo cannot ask; what it exports is a forward.
    return not torch.compiler.is_compiling() and (is_transformed() or torch._C._get_tracing_state() is not None)


def _is_plain(inputs: Tensor, weight: Tensor) -> bool:
    """Return whether inputs and weight are plain tensors that a Linear can multiply."""
    if type(inputs) not in (Tensor, nn.Parameter) or inputs.is_nested or inputs.layout != torch.strided:
        return False
    if type(weight) is not Tensor or inputs.device != weight.device or inputs.shape[-1:] != weight.shape[1:]:
        return False
    fits = inputs.dtype != torch.float64 if _is_autocast(weight) else inputs.dtype == weight.dtype
    return fits and inputs.numel() > 0


def _is_packed(masked: PackableWeight) -> bool:
    # A compiled graph cannot look.
    if torch.compiler.is_compiling():
        return masked.is_packable and not masked.is_copy
    masked.look_again()
    return masked.is_packable


def _most_of_any_four(pattern: Pattern) -> int:
    """Return the most entries that a pattern keeps of a group of 4."""
    if pattern.m % 4 == 0:
        return min(pattern.n, 4)
    return 4 // pattern.m * pattern.n if 4 % pattern.m == 0 else 4


def _is_autocast(weight: Tensor) -> bool:
    return torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64


def _product_dtype(weight: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(weight.device.type) if _is_autocast(weight) else weight.dtype


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_suited(device: str, index: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return not _obstacles(device, index, shape, dtype)


def _obstacles(device: str, index: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """List what rules out products with a packed weight, apart from its mask."""
    reasons = []
    if device != _DEVICE:
        reasons.append(f"sparse tensor cores need a CUDA device, the weight is on {device}")
    elif refusal := _refusal(index or 0):
        reasons.append(refusal)
    if dtype not in _DTYPES:
        reasons.append(f"the products have to be in float16 or bfloat16, as under autocast, not {dtype}")
    if len(shape) != 2 or any(side % _MULTIPLE for side in shape):
        reasons.append(f"the weight has to be a matrix of multiples of {_MULTIPLE}, its shape is {shape}")
    return reasons


@cache
def _refusal(index: int) -> str | None:
    """Say why a GPU cannot multiply packed matrices, found out by trying; None if it can."""
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CAPABILITY:
        given = ".".join(map(str, capability))
        return f"sparse tensor cores come with compute capability 8.0, cuda:{index} has {given}"
    if not torch.backends.cusparselt.is_available():
        return "this build of PyTorch has no cuSPARSELt"
    rows, masked = (each.to(f"{_DEVICE}:{index}") for each in _sample())
    try:
        product = sparse_product(rows, masked)
    except RuntimeError as error:
        return f"cuSPARSELt refuses cuda:{index}: {str(error).splitlines()[0]}"
    with torch.autocast(_DEVICE, enabled=False):
        is_right = torch.equal(product, rows @ masked.t())
    return None if is_right else f"cuSPARSELt computes a wrong product on cuda:{index}"


def _sample() -> tuple[Tensor, Tensor]:
    """Return integers, so small that their products are exact, and a 2:4 matrix of them with zeros of either sign."""
    rows = torch.arange(3 * _MULTIPLE).remainder(5).sub(1).view(3, _MULTIPLE).bfloat16()
    weight = torch.arange(_MULTIPLE**2).remainder(3).sub(1).view(_MULTIPLE, _MULTIPLE).bfloat16()
    places = torch.arange(_MULTIPLE)
    return rows, weight * ((places[:, None] + places) % 4 < 2)


class _Most(NamedTuple):
    along_rows: int
    along_columns: int


def _most_of_four(mask: Tensor) -> _Most | None:
    """Return the most entries that a mask keeps of a group of 4, each way; None if it has no such groups."""
    if mask.ndim != 2 or any(side % 4 for side in mask.shape) or is_sharded(mask):
        return None
    most = [mask.unflatten(axis, (-1, 4)).sum(axis + 1, dtype=torch.uint8).amax() for axis in (1, 0)]
    return _Most(*torch.stack(most).tolist())


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is known to compute the product with its weight."""
    is_own = isinstance(module, nn.Linear) and unmasked_class(module).forward is nn.Linear.forward
    # MultiheadAttention takes the weight of its output projection and does not call it.
    return is_own and not isinstance(module, NonDynamicallyQuantizableLinear)


def _is_attached(module: nn.Module) -> bool:
    return type(module).forward is _forward
