"""Train with Lightning under 2:4 masks, and load the checkpoint: `python examples/lightning_fit.py`."""

from __future__ import annotations

import tempfile

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import masksolve as ms
from masksolve.torch.integrations.lightning import SparsifierCallback


class Regression(pl.LightningModule):
    """Learns a function of sixteen numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs).squeeze(1), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, of all parameters."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main() -> None:
    """Train for three epochs."""
    pl.seed_everything(0)
    inputs = torch.randn(2048, 16)
    targets = (inputs[:, :4].sum(1)).sin() + inputs[:, 4] * inputs[:, 5]
    batches = DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        callback = SparsifierCallback("2:4", refresh_every=20)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, default_root_dir=folder, callbacks=[callback], logger=False
        )
        trainer.fit(Regression(), batches)
        model = Regression.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    mask = model.net[2].weight != 0
    assert ms.is_valid_mask(mask, 2, 4)
    assert ms.is_valid_mask(mask.T, 2, 4)
    print(f"loaded: {float(mask.float().mean()):.0%} of the middle layer's weights are not zero")


if __name__ == "__main__":
    main()
