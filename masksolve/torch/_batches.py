"""Calibration batches: what they may be, how a model is called with one, and the windows that a convolution sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd


def as_batches(calibration: Iterable[Any]) -> list[Any]:
    """Return the batches of an iterable; refuse none, and one that is not in a list."""
    iterates = hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")
    if isinstance(calibration, (Tensor, Mapping)) or not iterates:
        raise TypeError(f"calibration is {described(calibration)}; give an iterable of batches, such as [batch]")
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration holds no batch; give a few hundred inputs of the model, in batches")
    return batches


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments in a batch: one tensor, a sequence of arguments or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, Sequence) else (batch,)), {}


def call(model: nn.Module, batch: Any) -> Any:
    """Return what a model makes of a batch."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def does_not_run(model: nn.Module, index: int, batch: Any, error: Exception) -> ValueError:
    """Return the error for a batch that a model cannot be called with."""
    return ValueError(
        f"calibration batch {index}, {described(batch)}, does not run through this "
        f"{type(model).__name__} ({type(error).__name__}: {error}); give what model(batch), "
        "model(*batch) or model(**batch) takes, on the model's device and without labels; nothing was changed"
    )


def described(batch: object) -> str:
    """Describe a batch in words."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {described(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return "[" + ", ".join(map(described, batch)) + "]"
    return f"a {type(batch).__name__}"


def windows(module: _ConvNd, x: Tensor) -> Tensor:
    """Return every window under the kernel: a view (B, channels, *places, *kernel) of the padded input."""
    axes = len(module.kernel_size)
    batch = x if x.ndim == axes + 2 else x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    found = functional.pad(batch, padding, mode) if any(padding) else batch
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        found = found.unfold(axis, (size - 1) * dilation + 1, step)[..., ::dilation]
    return found
