"""Training under masks in Lightning's Trainer, whichever of its two packages that is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from masksolve._patterns import PatternsLike
from masksolve.torch._training.sparse_state import Taken, give_masks, take_masks
from masksolve.torch._training.sparsifier import Sparsifier
from masksolve.torch.integrations._shared import Attached, Recipe

# Of a checkpoint: what `_split` has taken out of its weights.
_KEY = "masksolve"
# Those of the model, and, where the first are an average, those that training goes on with.
_WEIGHTS = ("state_dict", "current_model_state")


class LightningCallback:
    """The hooks of Lightning's callback; mixed into the Callback of either package."""

    # The package's callback that is made of hooks.
    _of_hooks: ClassVar[Callable[..., Any]]

    def __init__(self, pattern: PatternsLike, *, finalize: bool = True, **options: Any) -> None:
        self.sparsifier: Sparsifier | None = None
        self._recipe = Recipe(pattern, finalize, options)
        self._finalizes = finalize
        self._attached: Attached | None = None
        self._saved: dict[str, Any] | None = None
        self._weights: dict[str, Any] | None = None
        # Steps at the last batch, and when the decay was last scaled.
        self._global_step, self._begun = 0, -1
        # Weight averaging comes later in the list, and replaces the weights of a checkpoint.
        self._last = self._of_hooks(on_save_checkpoint=_split)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the Sparsifier early for weight averaging, which copies the model now."""
        # A checkpoint may have been loaded for a test.
        self._saved = self._weights = None
        if stage != "fit":
            return
        if self._last not in trainer.callbacks:
            trainer.callbacks.append(self._last)
        averages = [each for each in trainer.callbacks if _is_averaging(each)]
        for each in averages:
            _check_averaging(each, trainer.callbacks.index(each) < trainer.callbacks.index(self))
        if self._attached is not None and (not trainer.global_step or not self._attached.is_on(pl_module)):
            # A fit before was interrupted, or did not finalize.
            self._attached.make_way(pl_module)
            self._attached = None
        if averages:
            self._attach(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Give the weights of a checkpoint back what is pruned, for a training that goes on or a model with masks."""
        is_masked = self._attached is not None and self._attached.is_on(pl_module)
        if _KEY not in checkpoint or (trainer.state.fn != "fit" and not is_masked):
            return
        for name, taken in checkpoint[_KEY].items():
            give_masks(checkpoint[name], Taken(**taken))
        self._weights = checkpoint["state_dict"]
        if is_masked:
            pl_module.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the Sparsifier."""
        if self._attached is None or not self._attached.is_on(self._attached.model):
            return {}
        return self._attached.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the Sparsifier until there is one."""
        self._saved = state_dict or None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the Sparsifier, and load what the checkpoint has of it if the training resumes from one."""
        is_masked = self._attached is not None
        self._attach(pl_module)
        assert self.sparsifier is not None
        if self._saved is not None:
            if not is_masked and self._weights is not None:
                pl_module.load_state_dict(self._weights)
            self.sparsifier.load_state_dict(self._saved)
        elif is_masked and not trainer.global_step and not self._recipe.has_masks:
            # Weights may have been loaded since.
            self.sparsifier._refresh(anew=True)
        self._saved = self._weights = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note how many optimizer steps were made before."""
        self._global_step = trainer.global_step
        self._begun = -1

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Scale the decay of "sr-ste" with the loss."""
        if self._begun != trainer.global_step:
            assert self.sparsifier is not None
            self.sparsifier._scale_decay(getattr(trainer.precision_plugin, "scaler", None))
            self._begun = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the optimizer steps of a batch, of which there may be none, and log a refresh."""
        assert self.sparsifier is not None
        for _ in range(trainer.global_step - self._global_step):
            record = self.sparsifier.step()
            if record is not None:
                pl_module.log_dict(record.means())
        self._global_step = trainer.global_step

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finalize, after all callbacks have seen the end of training."""
        if self._finalizes and self._attached is not None:
            self._attached.finalize()
            self._attached = None

    def _attach(self, model: nn.Module) -> None:
        if self._attached is None:
            self._attached = self._recipe.attach(model)
            self.sparsifier = self._attached.sparsifier


def _is_averaging(callback: object) -> bool:
    return any(each.__name__ == "WeightAveraging" for each in type(callback).__mro__)


def _check_averaging(callback: object, is_first: bool) -> None:
    name = type(callback).__name__
    if is_first:
        raise ValueError(f"{name} comes before the SparsifierCallback among the callbacks; let it come after")
    if getattr(callback, "_use_buffers", False):
        raise ValueError(
            f"{name} averages buffers, and masks are among them; make it with use_buffers=False, which copies them"
        )


def _split(trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Make the weights of a checkpoint sparse ones under plain names, and keep the rest in it by itself."""
    taken = {}
    for name in _WEIGHTS:
        if name in checkpoint:
            checkpoint[name] = dict(checkpoint[name])
            # Plain containers, which are read without masksolve.
            taken[name] = take_masks(pl_module, checkpoint[name])._asdict()
    if any(each["masks"] for each in taken.values()):
        checkpoint[_KEY] = taken
