"""Training under masks in the Trainer of Lightning, imported as `pytorch_lightning`."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback, LambdaCallback

from masksolve.torch.integrations._lightning import LightningCallback


class SparsifierCallback(LightningCallback, Callback):
    """The callback of `masksolve.torch.integrations.lightning`, for those who import `pytorch_lightning` instead."""

    _of_hooks = LambdaCallback
