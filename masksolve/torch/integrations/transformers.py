"""Training under masks in Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from masksolve._patterns import PatternsLike
from masksolve.torch._layers import masked_attributes
from masksolve.torch._training.records import RefreshRecord
from masksolve.torch._training.sparse_state import sparse_state_dict
from masksolve.torch._training.sparsifier import Sparsifier
from masksolve.torch.integrations._shared import Attached, Recipe

# Beside the weights of a checkpoint: the Sparsifier's state_dict, with the weights that are pruned.
FILE = "sparsifier.pt"
# The model's attribute for where it was saved last: in a search of hyperparameters, Trainer says it nowhere else.
_SAVED_TO = "_sparsifier_saved_to"


class SparsifierCallback(TrainerCallback):
    """Trains the model of a Trainer under N:M masks: from the beginning of `train` to plain, sparse weights at its end.

    The Sparsifier is made when training begins, and counts optimizer steps, however many backwards one takes. What
    `save_pretrained` writes meanwhile, and so every checkpoint, has the sparse weights under the model's own names:
    `from_pretrained` reads them without masksolve. A file sparsifier.pt beside them has the masks, their potentials,
    the number of steps, and the weights that are pruned, so that `resume_from_checkpoint` goes on bit for bit, and
    `load_best_model_at_end` loads the best model with its own masks.

    Parameters
    ----------
    pattern : str, (int, int), Pattern or mapping
        N **kept** of every M, as for `Sparsifier`.
    finalize : bool
        Whether the model is finalized when training ends. If not, masks stay, and `sparsifier.finalize()` is up to you.
    resume_from : path, optional
        The folder that `resume_from_checkpoint` names, where that is not the Trainer's own checkpoint of that step.
    log : callable, optional
        Gets the figures of every refresh. `Trainer.log` sends them to all loggers; without it they are in
        `state.log_history`.
    **options
        Of `Sparsifier`.

    Attributes
    ----------
    sparsifier : Sparsifier or None
        None until training begins.

    Raises
    ------
    FileNotFoundError
        When training begins, if it resumes and the checkpoint has no sparsifier.pt.
    ValueError, TypeError
        As for `Sparsifier`, when training begins.

    Notes
    -----
    A `train` that resumes from no checkpoint begins anew, at step 0, with masks of the dense weights as they are then,
    whatever came before.

    Under DistributedDataParallel each process solves for itself. FSDP and DeepSpeed shard the model before training
    begins, so that its weights are refused.

    A model that is no PreTrainedModel has no `save_pretrained`: its checkpoints have the dense weights, with the masks.

    Examples
    --------
    >>> import tempfile, torch, transformers
    >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    >>> transformers.logging.set_verbosity_error()
    >>> transformers.logging.disable_progress_bar()
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    >>> tokens = [{"input_ids": row, "labels": row} for row in torch.arange(64).view(8, 8) % 32]
    >>> callback = SparsifierCallback("2:4", refresh_every=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arguments = TrainingArguments(folder, max_steps=4, report_to="none", disable_tqdm=True, use_cpu=True)
    ...     trainer = Trainer(model, arguments, train_dataset=tokens, callbacks=[callback])
    ...     _ = trainer.train()  # doctest: +ELLIPSIS
    {...}
    >>> callback.sparsifier.steps, float((model.transformer.h[0].mlp.c_fc.weight != 0).float().mean())
    (4, 0.5)
    >>> [line["masks/flip_rate"] < 0.1 for line in trainer.state.log_history if "masks/flip_rate" in line]
    [True, True]
    """

    def __init__(
        self,
        pattern: PatternsLike,
        *,
        finalize: bool = True,
        resume_from: str | Path | None = None,
        log: Callable[[dict[str, float]], object] | None = None,
        **options: Any,
    ) -> None:
        self.sparsifier: Sparsifier | None = None
        self._recipe = Recipe(pattern, finalize, options)
        self._finalizes = finalize
        self._resume_from = resume_from
        self._log = log
        self._record: RefreshRecord | None = None
        self._attached: Attached | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Make the Sparsifier, and load what the checkpoint has of it if the training resumes from one."""
        model: nn.Module = rest["model"]
        if self._attached is not None and (not state.global_step or not self._attached.is_on(model)):
            # A training before was interrupted, or did not finalize.
            self._attached.make_way(model)
            self._attached = None
        if self._attached is None:
            self._attached = self._recipe.attach(model)
            self.sparsifier = self._attached.sparsifier
            if isinstance(model, PreTrainedModel):
                # Bound, so that a copy of the model saves itself.
                vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
        if state.global_step:
            self._load(_checkpoint(args, state) if self._resume_from is None else Path(self._resume_from))

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Scale the decay of "sr-ste" with the loss."""
        assert self.sparsifier is not None
        self.sparsifier._scale_decay(getattr(rest["optimizer"], "scaler", None))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Count a step, and refresh masks when they are due, while the gradients are there."""
        assert self.sparsifier is not None
        self._record = self.sparsifier.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Log the refresh of this step."""
        if self._record is None:
            return
        figures = self._record.means()
        if self._log is None:
            state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
        else:
            self._log(figures)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the Sparsifier's state beside the weights."""
        if args.should_save and self.sparsifier is not None:
            folder = _checkpoint(args, state)
            if not folder.is_dir():
                folder = Path(getattr(rest["model"], _SAVED_TO, folder))
            torch.save(self.sparsifier.state_dict(pruned=True), folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Give the best model its masks, if it was loaded, and finalize."""
        if self.sparsifier is None or self._attached is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))
        if self._finalizes:
            self._attached.finalize()
            for name in ("save_pretrained", _SAVED_TO):
                vars(self._attached.model).pop(name, None)
            self._attached = None

    def _load(self, folder: Path) -> None:
        assert self.sparsifier is not None
        if not (folder / FILE).is_file():
            raise FileNotFoundError(
                f"the training goes on from a checkpoint, and {folder} has no {FILE} with its masks; pass the folder "
                "that it resumes from as resume_from=, or begin a new training with the weights of a checkpoint that "
                "was made without a SparsifierCallback"
            )
        self.sparsifier.load_state_dict(torch.load(folder / FILE, map_location="cpu", weights_only=True))


def _checkpoint(args: Any, state: Any) -> Path:
    """Return the folder of the checkpoint of a step, as Trainer names it."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **rest: Any,
) -> None:
    """Save a model that trains under masks as the sparse one that it is."""
    if state_dict is None and any(masked_attributes(module) for module in self.modules()):
        state_dict = sparse_state_dict(self)
    vars(self)[_SAVED_TO] = str(save_directory)
    type(self).save_pretrained(self, save_directory, is_main_process, state_dict, **rest)
