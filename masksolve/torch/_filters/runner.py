"""Running calibration batches through a model: what it returns, and what goes into some of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from masksolve.torch._batches import arguments, call, does_not_run
from masksolve.torch._outputs import outputs_of, relative_change, rounding

# Functions that see the inputs of modules.
Watchers = Mapping[nn.Module, Callable[[Tensor], object]]


class Runner:
    """A model and its batches; a model that returns something else when it is called again is refused.

    Attributes
    ----------
    model : nn.Module
    batches : sequence
    outputs : list of Tensor
        What the model returned for the first batch, before anything was changed.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.model, self.batches = model, batches
        self.outputs = self.run(0)
        if not relative_change(self.outputs, self.run(0)) <= rounding(model):
            raise ValueError(
                f"this {type(model).__name__} returns something else when it is called again, or NaN, so that nothing "
                "can be compared; make it deterministic, or give other inputs"
            )

    @property
    def points(self) -> int:
        """Inputs in all batches."""
        return sum(map(_points, self.batches))

    def show(self, watchers: Watchers) -> None:
        """Run the first batch for the watchers."""
        self.run(0, watchers)

    def run(self, index: int, watchers: Watchers | None = None) -> list[Tensor]:
        """Return what the model returns for a batch, and show the watchers what goes into their modules."""
        batch, errors = self.batches[index], []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                (watchers or {})[module](args[0] if args else next(iter(kwargs.values())))
            except Exception as error:
                # Not the fault of the model.
                errors.append(error)
                raise

        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in watchers or ()]
        try:
            found = outputs_of(call(self.model, batch))
        except Exception as error:
            if errors:
                raise
            raise does_not_run(self.model, index, batch, error) from error
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise ValueError(f"this {type(self.model).__name__} returns no tensor of floats that could be compared")
        return found

    def compare(self, expected: Sequence[Tensor], words: str) -> float:
        """Return how far the model is from what it has to return; refuse what is more than rounding."""
        found = relative_change(expected, self.run(0))
        if not found <= rounding(self.model):
            raise ValueError(
                f"this {type(self.model).__name__} computes something else than the larger one {words} (outputs "
                f"differ by {found:.1e}), so its graph does not say all of its channels; exclude the layers concerned. "
                "Nothing was changed"
            )
        return found


def _points(batch: Any) -> int:
    """Return how many inputs a batch holds."""
    args, kwargs = arguments(batch)
    return next((len(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.ndim), 0)
