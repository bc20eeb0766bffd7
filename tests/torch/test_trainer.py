"""Hugging Face's Trainer with masks: every run is a real one, of a very small model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import Sparsifier, sparse_state_dict
from masksolve.torch.integrations.transformers import FILE, SparsifierCallback
from tests import processes
from tests.torch.masked import held
from tests.torch.test_transformers import gpt2, llama
from tests.torch.test_traps import mlp

transformers = pytest.importorskip("transformers")

PATTERN = "3:8"
STEPS, HALF = 4, 2


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tokens() -> list[dict[str, Tensor]]:
    rows = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(
    folder: Path, model: Any, callback: SparsifierCallback, data: Any = None, others: Any = (), **options: Any
) -> Any:
    """Two backwards per step, a refresh at every other step, a checkpoint at every HALF steps."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=0.05,
        save_steps=HALF,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{**sizes, **options},
    )
    data = data or tokens()
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback, *others])


def callback(**options: Any) -> SparsifierCallback:
    return SparsifierCallback(PATTERN, refresh_every=2, **options)


class Seen(transformers.TrainerCallback):  # type: ignore[misc]
    """What of the masked model there was at the checkpoint in the middle."""

    def __init__(self, mine: SparsifierCallback) -> None:
        self.mine = mine
        self.output: Tensor | None = None

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        model = rest["model"].eval()
        if state.global_step == HALF:
            assert self.mine.sparsifier is not None
            self.steps = self.mine.sparsifier.steps
            self.output = model(input_ids=tokens()[0]["input_ids"][None]).logits.detach()
            self.copy = copy.deepcopy(model)
        model.train()


# How a model is made, and the options of its Sparsifier.
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gpt2": (gpt2, {}),
    "tied": (llama, {"include": ["model.embed_tokens.weight", "*_proj.weight"]}),
    "soft": (gpt2, {"gradient": "soft"}),
}
Run = tuple[str, Any, SparsifierCallback, Seen, Path]


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    make, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    mine = callback(**options)
    found = trainer(folder, make(), mine, others=[seen := Seen(mine)])
    found.train()
    return request.param, found, mine, seen, folder


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_is_one_of_the_optimizer_and_the_end_is_a_plain_sparse_model(run: Run) -> None:
    name, found, mine, seen, _ = run
    make, _ = MODELS[name]
    assert mine.sparsifier is not None
    assert (mine.sparsifier.steps, seen.steps) == (STEPS, HALF)
    assert list(found.model.state_dict()) == list(make().state_dict())
    assert [type(each) for each in found.model.modules()] == [type(each) for each in make().modules()]
    assert "save_pretrained" not in vars(found.model)
    assert not found.model._load_state_dict_pre_hooks
    sparse = [line.name for line in mine.sparsifier.report if line.sparse]
    for parameter in sparse:
        assert ms.is_valid_mask((found.model.get_parameter(parameter) != 0).numpy(), 3, 8)


def test_refreshes_are_in_the_history(run: Run) -> None:
    lines = [line for line in run[1].state.log_history if "masks/flip_rate" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 < line["masks/flip_rate"] < 1 and 0.3 < line["masks/kept_importance"] < 1 for line in lines)


def test_a_checkpoint_is_read_without_masks_as_the_model_that_was_trained(run: Run) -> None:
    _, found, _, seen, folder = run
    model, info = type(found.model).from_pretrained(folder / f"checkpoint-{HALF}", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model(input_ids=tokens()[0]["input_ids"][None]).logits, seen.output)
    assert model.get_input_embeddings().weight is model.lm_head.weight


def test_a_copy_of_a_model_in_training_saves_itself(run: Run, tmp_path: Path) -> None:
    twin = copy.deepcopy(run[3].copy)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    twin.save_pretrained(tmp_path)
    assert same(type(twin).from_pretrained(tmp_path), _finalized(twin))
    assert same(pickle.loads(pickle.dumps(twin)), twin)


def _finalized(model: Any) -> Any:
    twin = copy.deepcopy(model)
    ms.torch.finalize(twin)
    return twin


def resume(run: Run, folder: Path, **options: Any) -> tuple[Any, SparsifierCallback]:
    """Go on from the checkpoint in the middle with another model and a new callback."""
    name, _, _, _, source = run
    make, own = MODELS[name]
    again = trainer(folder, make(1), resumed := callback(**own, **options), save_strategy="no")
    again.train(resume_from_checkpoint=str(source / f"checkpoint-{HALF}"))
    return again, resumed


def check_same(run: Run, again: Any, resumed: SparsifierCallback) -> None:
    _, found, mine, _, _ = run
    assert mine.sparsifier is not None
    assert resumed.sparsifier is not None
    assert resumed.sparsifier.steps == mine.sparsifier.steps
    assert same(again.model, found.model)
    one, other = mine.sparsifier.last_refresh, resumed.sparsifier.last_refresh
    assert (one.step, one.layers) == (other.step, other.layers)


def test_a_resumed_training_is_the_uninterrupted_one(run: Run) -> None:
    check_same(run, *resume(run, run[4]))


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
def test_a_training_that_resumes_elsewhere_has_to_be_told_from_where(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-{HALF} has no {FILE} with its masks; pass the folder"):
        resume(run, tmp_path)
    check_same(run, *resume(run, tmp_path, resume_from=run[4] / f"checkpoint-{HALF}"))


def test_the_best_model_comes_with_its_own_masks(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": HALF, "greater_is_better": True}
    found = trainer(tmp_path, gpt2(), callback(finalize=False), **options)
    found.train()
    assert found.state.best_model_checkpoint.endswith(f"checkpoint-{HALF}")
    best = type(found.model).from_pretrained(found.state.best_model_checkpoint)
    assert all(torch.equal(value, best.state_dict()[key]) for key, value in sparse_state_dict(found.model).items())
    weight, mask = held(found.model.transformer.h[0].mlp.c_fc)
    assert ms.is_valid_mask(mask.numpy(), 3, 8)
    # The dense weights are those of that step too.
    assert bool((weight != 0).all())


class Loss(nn.Module):
    """A model that is none of transformers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(seed)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


def test_other_models_resume_too_and_figures_go_where_they_are_wanted(tmp_path: Path) -> None:
    data = [{"x": row} for row in torch.randn(16, 16, generator=torch.Generator().manual_seed(0))]
    logged: list[dict[str, float]] = []
    whole = trainer(tmp_path, Loss(0), callback(log=logged.append), data)
    whole.train()
    assert [list(each) for each in logged] == [["masks/kept_importance", "masks/flip_rate", "masks/seconds"]] * 2
    again = trainer(tmp_path, Loss(1), callback(), data, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert same(whole.model, again.model)


class Interrupt(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        raise KeyboardInterrupt


def test_a_training_that_is_begun_again_counts_from_zero(tmp_path: Path) -> None:
    model, mine = gpt2(), callback(until=STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, mine, others=[Interrupt()]).train()
    weight = held(model.transformer.h[0].mlp.c_fc)[0].detach().clone()
    again = trainer(tmp_path, model, mine, others=[begun := Begun()], save_strategy="no")
    again.train()
    assert mine.sparsifier is not None
    # Masks of the dense weights, of which none was lost.
    assert torch.equal(begun.weight, weight)
    assert torch.equal(begun.mask, torch.from_numpy(ms.solve_matrix(weight.numpy().T, 3, 8).T))
    assert (begun.steps, mine.sparsifier.steps) == (0, STEPS)
    assert ms.is_valid_mask((model.transformer.h[0].mlp.c_fc.weight != 0).numpy(), 3, 8)
    assert not model._load_state_dict_pre_hooks


class Begun(transformers.TrainerCallback):  # type: ignore[misc]
    """The first masks."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 0:
            self.weight, self.mask = (each.clone() for each in held(rest["model"].transformer.h[0].mlp.c_fc))
            self.steps = int(rest["model"].state_dict()["transformer.h.0.attn.c_attn.weight_mask_steps"])


class Gradients(transformers.TrainerCallback):  # type: ignore[misc]
    """Those of the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 0:
            self.found = held(rest["model"].net[0])[0].grad.clone()  # type: ignore[union-attr]


def test_the_decay_is_that_of_a_step_however_many_backwards_it_takes(tmp_path: Path) -> None:
    data = [{"x": row} for row in torch.randn(16, 16, generator=torch.Generator().manual_seed(0))]
    found = []
    for backwards, size in ((1, 4), (2, 2), (4, 1)):
        seen = Gradients()
        sizes = {"gradient_accumulation_steps": backwards, "per_device_train_batch_size": size}
        mine = callback(gradient="sr-ste", decay=0.5)
        trainer(tmp_path, Loss(0), mine, data, [seen], save_strategy="no", max_grad_norm=0.0, **sizes).train()
        found.append(seen.found)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("is_finalized", [False, True])
def test_a_training_after_one_that_kept_its_masks_begins_anew(tmp_path: Path, is_finalized: bool) -> None:
    model, mine = gpt2(), callback(finalize=False)
    for number in range(2):
        trainer(tmp_path / str(number), model, mine, save_strategy="no").train()
        assert mine.sparsifier is not None
        assert mine.sparsifier.steps == STEPS
        if is_finalized:
            mine.sparsifier.finalize()
    if is_finalized:
        assert list(model.state_dict()) == list(gpt2().state_dict())
    assert ms.is_valid_mask((model.transformer.h[0].mlp.c_fc.weight != 0).numpy(), 3, 8)


def test_a_training_of_another_model_leaves_the_masks_of_the_first(tmp_path: Path) -> None:
    mine = callback(finalize=False)
    trainer(tmp_path / "one", first := gpt2(), mine, save_strategy="no").train()
    sparsifier = mine.sparsifier
    trainer(tmp_path / "two", gpt2(1), mine, save_strategy="no").train()
    assert sparsifier is not None
    sparsifier.finalize()
    assert ms.is_valid_mask((first.transformer.h[0].mlp.c_fc.weight != 0).numpy(), 3, 8)


def test_a_model_whose_head_was_replaced_is_masked_anew(tmp_path: Path) -> None:
    data = [{"x": row} for row in torch.randn(16, 16, generator=torch.Generator().manual_seed(0))]
    model, mine = Loss(0), callback(finalize=False)
    trainer(tmp_path, model, mine, data, save_strategy="no").train()
    model.net[2] = nn.Linear(16, 8)
    trainer(tmp_path, model, mine, data, save_strategy="no").train()
    assert [ms.is_valid_mask((model.net[i].weight != 0).numpy(), 3, 8) for i in (0, 2)] == [True, True]


def test_what_a_sparsifier_does_not_take_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="n=5"):
        SparsifierCallback("5:4")
    with pytest.raises(TypeError, match="refresh_evry"):
        SparsifierCallback("2:4", refresh_evry=3)
    with pytest.raises(TypeError, match="finalize"):
        SparsifierCallback("2:4", finalize=1)  # type: ignore[arg-type]


def test_pruned_weights_belong_to_the_weights_that_they_were_saved_with() -> None:
    saved = Sparsifier(mlp(), "2:4").state_dict(pruned=True)
    other = Sparsifier(mlp(1), "2:4")
    before = other.state_dict()["masks"]["0.weight"].clone()
    with pytest.raises(ValueError, match=r"do not belong to the weights of '0.weight'.* load the model that was saved"):
        other.load_state_dict(saved)
    assert torch.equal(other.state_dict()["masks"]["0.weight"], before)
    with pytest.raises(ValueError, match=r"pruned weights \(3,\) for '0.weight'; its mask prunes \(128,\)"):
        other.load_state_dict({**saved, "pruned": {"0.weight": torch.ones(3)}})


def test_no_other_library_is_imported_before_its_callback_is() -> None:
    libraries = ["transformers", "accelerate", "lightning", "pytorch_lightning"]
    script = "import sys, masksolve.torch, masksolve.torch.integrations\n"
    script += f"print([each for each in {libraries} if each in sys.modules])"
    assert processes.run(script) == "[]\n"
