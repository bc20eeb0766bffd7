"""Lightning's Trainer with masks, of both packages: every run is a real one, of a very small model."""

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from tests.torch.masked import held

PACKAGES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
STEPS, HALF = 4, 2

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    logging.getLogger(request.param).setLevel(logging.ERROR)
    importlib.import_module(request.param)
    return str(request.param)


def callback(package: str, **options: Any) -> Any:
    module = importlib.import_module(f"masksolve.torch.integrations.{PACKAGES[package]}")
    return module.SparsifierCallback("3:8", **{"refresh_every": 1, **options})


def net(package: str, seed: int = 0) -> Any:
    class Net(importlib.import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self, seed: int = 0) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
            self.validated: list[float] = []

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.layers(batch).square().mean()  # type: ignore[no-any-return]

        def validation_step(self, batch: Tensor, _: int) -> None:
            self.validated.append(float((self.layers[0].weight != 0).float().mean()))
            self.log("loss", self.layers(batch).square().mean())

        test_step = validation_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.05)

    return Net(seed)


def batches() -> Any:
    data = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(data, batch_size=4)


def trainer(package: str, folder: Path, *callbacks: Any) -> Any:
    """Two batches per step and two steps per epoch; a checkpoint after every epoch."""
    library = importlib.import_module(package)
    every = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(folder, "{step}", save_top_k=-1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return library.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        callbacks=[*callbacks, every],
        num_sanity_val_steps=0,
        **quiet,
    )


def averaging(package: str, **options: Any) -> Any:
    return importlib.import_module(f"{package}.callbacks").EMAWeightAveraging(decay=0.5, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("is_averaged", "gradient"), [(False, "ste"), (True, "ste"), (False, "soft")])
def test_a_resumed_fit_is_the_uninterrupted_one(package: str, is_averaged: bool, gradient: str, tmp_path: Path) -> None:
    def start(seed: int, folder: Path) -> tuple[Any, Any, Any]:
        mine = callback(package, gradient=gradient)
        others = [averaging(package, use_buffers=False)] if is_averaged else []
        return net(package, seed), trainer(package, folder, mine, *others), mine

    model, whole, mine = start(0, tmp_path)
    whole.fit(model, batches(), batches())
    assert mine.sparsifier.steps == whole.global_step == STEPS
    assert list(model.state_dict()) == list(net(package).state_dict())
    assert ms.is_valid_mask((model.layers[3].weight != 0).numpy(), 3, 8)
    assert set(model.validated) == {0.375} or gradient == "soft"
    assert {"masks/kept_importance", "masks/flip_rate", "masks/seconds"} <= whole.callback_metrics.keys()

    checkpoint = tmp_path / f"step={HALF}.ckpt"
    resumed, again, other = start(1, tmp_path / "again")
    again.fit(resumed, batches(), batches(), ckpt_path=checkpoint)
    assert other.sparsifier.steps == STEPS
    assert other.sparsifier.last_refresh.layers == mine.sparsifier.last_refresh.layers
    assert same(resumed, model)

    # Whoever reads a checkpoint needs no masks.
    read = type(model).load_from_checkpoint(checkpoint)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(value, weights[key]) for key, value in read.state_dict().items())
    assert ms.is_valid_mask((read.layers[3].weight != 0).numpy(), 3, 8)
    whole.test(model, batches(), ckpt_path=checkpoint, verbose=False)
    assert ms.is_valid_mask((model.layers[3].weight != 0).numpy(), 3, 8)


def test_an_average_is_that_of_the_dense_weights(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    seen: list[Tensor] = []
    model, mine = net(package), callback(package)
    library = importlib.import_module(f"{package}.callbacks")

    def note(trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step > len(seen):
            seen.append(held(module.layers[0])[0].detach().clone())

    note_weights = library.LambdaCallback(on_train_batch_end=note)
    trainer(package, tmp_path, mine, averaging(package, use_buffers=False), note_weights).fit(
        model, batches(), batches()
    )
    expected = seen[0]
    for weight in seen[1:]:
        expected = (expected + weight) / 2
    assert len(seen) == STEPS
    kept = model.layers[0].weight != 0
    torch.testing.assert_close(model.layers[0].weight, torch.where(kept, expected, 0))
    assert ms.is_valid_mask(kept.numpy(), 3, 8)


def test_averages_that_would_not_be_sparse_are_refused(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    with pytest.raises(ValueError, match="EMAWeightAveraging averages buffers, and masks are among them"):
        trainer(package, tmp_path, callback(package), averaging(package)).fit(net(package), batches(), batches())
    first = averaging(package, use_buffers=False)
    with pytest.raises(ValueError, match="comes before the SparsifierCallback among the callbacks; let it come after"):
        trainer(package, tmp_path, first, callback(package)).fit(net(package), batches(), batches())


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_masks_are_those_of_the_weights_of_a_dense_checkpoint(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    dense = trainer(package, tmp_path)
    dense.fit(net(package), batches(), batches())
    for others in ([], [averaging(package, use_buffers=False)]):
        mine = callback(package, finalize=False)
        library = importlib.import_module(f"{package}.callbacks")
        masks: list[bool] = []

        def note(trainer: Any, module: Any, masks: list[bool] = masks) -> None:
            weight, mask = held(module.layers[0])
            masks.append(torch.equal(mask, torch.from_numpy(ms.solve_matrix(weight.detach().numpy(), 3, 8))))

        trainer(package, tmp_path / "sparse", mine, *others, library.LambdaCallback(on_train_start=note)).fit(
            net(package, 1), batches(), batches(), ckpt_path=tmp_path / f"step={HALF}.ckpt"
        )
        assert masks == [True]


def test_a_model_that_keeps_its_masks_is_tested_under_those_of_a_checkpoint(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    model, mine = net(package), callback(package, finalize=False)
    whole = trainer(package, tmp_path, mine)
    whole.fit(model, batches(), batches())
    checkpoint = tmp_path / f"step={HALF}.ckpt"
    before = model.layers[0].weight.detach()
    whole.test(model, batches(), ckpt_path=checkpoint, verbose=False)
    expected = torch.load(checkpoint, weights_only=True)["state_dict"]["layers.0.weight"]
    assert not torch.equal(before != 0, expected != 0)
    assert torch.equal(model.layers[0].weight, expected)


@pytest.mark.parametrize("is_averaged", [False, True])
def test_a_second_fit_begins_anew(is_averaged: bool, tmp_path: Path) -> None:
    package = "lightning.pytorch"
    model, mine = net(package), callback(package, finalize=False, until=STEPS + 1)
    others = [averaging(package, use_buffers=False)] if is_averaged else []
    for number in range(3):
        trainer(package, tmp_path / str(number), mine, *others).fit(model, batches(), batches())
        assert mine.sparsifier.steps == STEPS
        assert ms.is_valid_mask((model.layers[0].weight != 0).numpy(), 3, 8)
        if number > 0:
            mine.sparsifier.finalize()
            assert list(model.state_dict()) == list(net(package).state_dict())


def test_a_fit_that_goes_on_counts_on(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    model, mine = net(package), callback(package, finalize=False)
    whole = trainer(package, tmp_path, mine)
    whole.fit(model, batches(), batches())
    whole.fit_loop.epoch_loop.max_steps = 2 * STEPS
    whole.fit(model, batches(), batches())
    assert mine.sparsifier.steps == whole.global_step == 2 * STEPS


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_layers_made_late_stay_dense_where_weights_are_averaged(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    model, mine = net(package), callback(package)
    model.configure_model = lambda: model.layers.append(nn.Linear(16, 16)) if len(model.layers) < 5 else None
    trainer(package, tmp_path, mine, averaging(package, use_buffers=False)).fit(model, batches(), batches())
    assert [float((model.layers[i].weight != 0).float().mean()) for i in (3, 4)] == [0.375, 1.0]


def test_masks_that_are_given_are_not_replaced_where_weights_are_averaged(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    model = net(package)
    mask = torch.from_numpy(ms.solve_matrix(np.random.default_rng(0).normal(size=(16, 16)), 3, 8))
    mine = callback(package, refresh_every=None, include="layers.0.weight", masks={"layers.0.weight": mask})
    trainer(package, tmp_path, mine, averaging(package, use_buffers=False)).fit(model, batches(), batches())
    assert torch.equal(model.layers[0].weight != 0, mask)


def test_the_decay_is_that_of_a_step_however_many_batches_it_takes(tmp_path: Path) -> None:
    """Also where the loss is scaled, and in a last step that has fewer batches."""
    package = "lightning.pytorch"
    library = importlib.import_module(package)
    scaled = library.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256))
    steps = 0

    def check(trainer: Any, module: Any, optimizer: Any) -> None:
        nonlocal steps
        weight, mask = held(module.layers[3])
        torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))
        steps += 1

    for plugins in (None, scaled):
        model, mine = net(package), callback(package, gradient="sr-ste", decay=0.5, refresh_every=None)
        # The decay is all that there is.
        model.training_step = lambda batch, _, model=model: 0 * model.layers(batch).sum()
        library.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            plugins=plugins,
            accumulate_grad_batches=3,
            callbacks=[mine, library.callbacks.LambdaCallback(on_before_optimizer_step=check)],
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        ).fit(model, batches(), batches())
    assert steps == 2 * STEPS


def test_a_fit_after_a_test_begins_anew(tmp_path: Path) -> None:
    package = "lightning.pytorch"
    model, mine = net(package), callback(package)
    trainer(package, tmp_path, mine).fit(model, batches(), batches())
    trainer(package, tmp_path, mine).test(model, batches(), ckpt_path=tmp_path / f"step={HALF}.ckpt", verbose=False)
    other = net(package, 1)
    trainer(package, tmp_path / "other", mine).fit(other, batches(), batches())
    again, fresh = net(package, 1), callback(package)
    trainer(package, tmp_path / "again", fresh).fit(again, batches(), batches())
    assert mine.sparsifier.steps == STEPS
    assert same(other, again)
