"""The tensor that reading a masked parameter gives: masked values; in-place changes reach the dense weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Whatever runs under it treats subclasses as plain tensors.
_DISABLED = torch._C.DisableTorchFunctionSubclass
_TENSOR: Any = Tensor
# Attributes that users read and mean the dense weight's: its gradient, its hooks, whether it trains.
_OF_THE_DENSE: frozenset[Any] = frozenset(
    {
        _TENSOR.grad.__get__,
        _TENSOR.grad.__set__,
        _TENSOR.grad.__delete__,
        _TENSOR.requires_grad.__get__,
        _TENSOR.requires_grad.__set__,
        _TENSOR.data.__set__,
        _TENSOR.register_hook,
        _TENSOR.register_post_accumulate_grad_hook,
    }
)
# Views that autograd does not see as such.
DETACHED: frozenset[Any] = frozenset({_TENSOR.data.__get__, _TENSOR.detach})


class MaskedRead(Tensor):
    """The masked values of a parameter, or a view of them.

    It is made again whenever the parameter is read, so a change of its values would be lost: `module.weight.clamp_()`,
    `module.weight.data += delta`, `nn.init`. Such changes go to the dense weight, or the same view of it; then the mask
    applies to what came of it. Everything else is computed with the masked values, and gives plain tensors.
    """

    _dense: Tensor
    _mask: Tensor

    @staticmethod
    def of(value: Tensor, dense: Tensor, mask: Tensor) -> MaskedRead:
        """Make one of masked values, the dense ones and the mask, all of one shape."""
        made = value.as_subclass(MaskedRead)
        made._dense, made._mask = dense, mask
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the masked values, and change the dense ones."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.autograd.grad:
            outputs, inputs, *rest = args
            with _DISABLED():
                return func(outputs, [_leaf_behind(each) for each in inputs], *rest, **kwargs)
        if func in _OF_THE_DENSE and _is_leaf(args[0]):
            # What is assigned may have been read too, as in `weight.data = weight.data.contiguous()`.
            with _DISABLED():
                return func(args[0]._dense, *map(_behind, args[1:]), **kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            return _change(func, args, kwargs)
        if kwargs.get("inplace"):
            raise RuntimeError(
                f"{name}(inplace=True) of a masked parameter would change a copy of it; without inplace, and assign "
                "the result to the parameter's data"
            )
        out = kwargs.get("out")
        if _has_read(out):
            with _DISABLED():
                func(*args, **{**kwargs, "out": _behind(out)})
                for each in out if isinstance(out, list | tuple) else [out]:
                    _renew(each)
            return out
        if len(types) > 1:
            # Another subclass takes part, which it can only once this one is out of the way.
            return func(*_plain(args), **_plain(kwargs))
        with _DISABLED():
            result = func(*args, **kwargs)
            if func in DETACHED:
                return MaskedRead.of(result, args[0]._dense.detach(), args[0]._mask)
            return _viewed(func, args, kwargs, result)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        # nn.Parameter(values) sets this on detached values of a subclass, which become a Parameter of their own.
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.__dict__.clear()

    def __copy__(self) -> MaskedRead:
        return cast(MaskedRead, self.detach())

    def set_(self, *source: Any) -> Tensor:
        """Give the dense weight other memory, as `data` does when it is assigned; PyTorch asks no subclass."""
        with _DISABLED():
            self._dense.set_(*_behind(source))
            return cast(Tensor, _renew(self))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return plain(self).detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).detach().__reduce_ex__(protocol)


def _change(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change the dense weight in place."""
    # nn.init passes its tensor by name.
    key = None if args else next(iter(kwargs))
    target = args[0] if key is None else kwargs[key]
    if func is _TENSOR.requires_grad_ and not _is_leaf(target):
        # Detached values that are to get gradients of their own are computed with: the masked ones.
        with _DISABLED():
            return func(*args, **kwargs)
    dense = _behind(target)
    if func is _TENSOR.__setitem__ and share_memory(dense, value := _behind(args[2])):
        # `module.weight.data[0] += 1` assigns what it has changed.
        args = (*args[:2], value)
    with _DISABLED():
        if key is None:
            func(dense, *args[1:], **kwargs)
        else:
            func(**{**kwargs, key: dense})
        for each in target if isinstance(target, list | tuple) else [target]:
            _renew(each)
    # `module.weight *= 2` assigns the result to module.weight, which takes parameters only.
    return dense if _is_leaf(target) else target


def _is_leaf(read: Any) -> bool:
    """Return whether values were read from a parameter itself: they are not a view of it and not detached."""
    return isinstance(read, MaskedRead) and isinstance(read._dense, nn.Parameter)


def _has_read(given: Any) -> bool:
    return any(isinstance(each, MaskedRead) for each in (given if isinstance(given, list | tuple) else [given]))


def _leaf_behind(read: Any) -> Any:
    return read._dense if _is_leaf(read) else read


def _behind(target: Any) -> Any:
    if isinstance(target, list | tuple):
        return [_behind(each) for each in target]
    return target._dense if isinstance(target, MaskedRead) else target


def _renew(read: Any) -> Any:
    """Let values that were read follow a change of the dense ones."""
    if isinstance(read, MaskedRead) and read.shape == read._dense.shape == read._mask.shape:
        with torch.no_grad():
            read.copy_(read._dense * read._mask)
    return read


def _viewed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return the result, with the same view of the dense weight behind it if it is a view of a masked one."""
    read = next((each for each in args if isinstance(each, MaskedRead)), None)
    several = isinstance(result, list | tuple)
    if read is None or not any(_is_view_of(read, each) for each in (result if several else (result,))):
        return result
    dense, mask = (
        func(*(getattr(each, part) if each is read else each for each in args), **kwargs)
        for part in ("_dense", "_mask")
    )
    if several:
        return type(result)(MaskedRead.of(*each) for each in zip(result, dense, mask, strict=True))
    return MaskedRead.of(result, dense, mask)


def _is_view_of(read: MaskedRead, result: Any) -> bool:
    if not isinstance(result, Tensor) or not result._is_view() or isinstance(result, MaskedRead):
        return False
    return share_memory(result, read)


def share_memory(tensor: Tensor, other: Any) -> bool:
    """Return whether something is a tensor in the memory of another."""
    return isinstance(other, Tensor) and tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def plain(read: Tensor) -> Tensor:
    """Return the same values as a plain tensor, for code that looks at types or ignores subclasses."""
    if not isinstance(read, MaskedRead):
        return read
    with _DISABLED():
        return read.as_subclass(Tensor)


def _plain(value: Any) -> Any:
    if isinstance(value, MaskedRead):
        return plain(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return value
