"""Training under masks in the Trainer of Lightning, imported as `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.callbacks import Callback, LambdaCallback

from masksolve.torch.integrations._lightning import LightningCallback


class SparsifierCallback(LightningCallback, Callback):
    """The callback of `masksolve.torch.integrations.lightning`, for those who import `pytorch_lightning` instead."""

    def _after_all_others(self, **hooks: Any) -> LambdaCallback:
        return LambdaCallback(**hooks)
