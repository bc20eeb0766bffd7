"""Training under masks in the Trainer of Lightning, imported as `lightning`."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback, LambdaCallback

from masksolve.torch.integrations._lightning import LightningCallback


class SparsifierCallback(LightningCallback, Callback):
    """Trains a LightningModule under N:M masks: from the beginning of `fit` to plain, sparse weights at its end.

    The Sparsifier is made when the fit begins, after `configure_model` and after the weights of `ckpt_path` are loaded,
    and counts what `trainer.global_step` counts, however many batches a step takes. The weights of checkpoints are the
    sparse ones under the model's own names, so that `load_from_checkpoint` and `trainer.test(ckpt_path="best")` need no
    masks; beside them are the masks, their potentials, the number of steps and the weights that are pruned, so that
    `fit(ckpt_path=...)` goes on bit for bit. Every refresh is logged with `log_dict`: mean kept importance, mean flip
    rate, seconds.

    Parameters
    ----------
    pattern : str, (int, int), Pattern or mapping
        N **kept** of every M, as for `Sparsifier`.
    finalize : bool
        Whether the model is finalized when the fit ends. If not, masks stay, and `sparsifier.finalize()` is up to you.
    **options
        Of `Sparsifier`.

    Attributes
    ----------
    sparsifier : Sparsifier or None
        None until the fit begins.

    Raises
    ------
    ValueError, TypeError
        As for `Sparsifier`; and for a WeightAveraging callback that stands before this one, or averages buffers.

    Notes
    -----
    `WeightAveraging(use_buffers=False)` has to stand after this callback. It copies the model before
    `LightningModule.setup`; layers that are made there are not masked then.

    Lightning asks no callback about checkpoints with `save_weights_only=True`: these have the dense weights, and the
    masks as further buffers.

    A `fit` of a model that has masks from another one goes on where it is by the same Trainer, and begins anew, with
    masks of the dense weights as they are then, by another one.

    Under DDP each process solves for itself. Weights that a strategy shards before the fit begins are refused.

    Examples
    --------
    >>> import logging, torch, lightning.pytorch
    >>> logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    >>> class Net(lightning.pytorch.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(16, 8)
    ...     def training_step(self, batch, index):
    ...         return self.layer(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), 0.1)
    >>> batches = torch.utils.data.DataLoader(torch.ones(8, 16), batch_size=2)
    >>> callback = SparsifierCallback("2:4", refresh_every=2)
    >>> quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    >>> trainer = lightning.pytorch.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet)
    >>> net = Net()
    >>> trainer.fit(net, batches)
    >>> callback.sparsifier.steps, int((net.layer.weight != 0).sum())
    (4, 64)
    """

    _of_hooks = LambdaCallback
