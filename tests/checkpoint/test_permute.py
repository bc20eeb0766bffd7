"""`masksolve permute` of a folder: the same model, masks that keep more, and the bytes of the model in memory."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from masksolve import NotInstalledError  # noqa: E402
from masksolve.checkpoint import (  # noqa: E402
    CheckpointError,
    NoStackError,
    permute_checkpoint,
    prune_checkpoint,
)
from masksolve.torch import permute_model  # noqa: E402
from tests.checkpoint.test_adaprune import folder_of, model_of, weights_in  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(24).view(2, 12) % 40


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def bytes_in(folder: Path) -> dict[str, bytes]:
    # Seconds differ.
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "permute.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["GPT2", "Llama", "Llama, tied", "Mixtral", "Phi3"])
def test_the_model_is_the_same_and_its_masks_keep_more(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = folder_of(tmp_path / "in", name, dtype), tmp_path / "out"
    report = permute_checkpoint(source, target, "1:2")
    # PyTorch has no grouped products of experts in float64.
    precision, allowed = (torch.float32, 1e-4) if name == "Mixtral" else (torch.float64, 1e-9)
    torch.testing.assert_close(logits(target, precision), logits(source, precision), rtol=allowed, atol=allowed)
    assert report.deviation < 1e-5
    assert all(axis.reason is None for axis in report.axes)
    assert all(axis.kept_after > axis.kept_before for axis in report.axes)
    before, after = weights_in(source), weights_in(target)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key].flatten().sort().values, tensor.flatten().sort().values)
    assert not changed & set(report.untouched)
    assert any("0." in key for key in changed)
    assert any("1." in key for key in changed)
    kept = {
        folder: {
            each.name: each.kept_importance
            for each in prune_checkpoint(folder, folder.with_suffix(".sparse"), "1:2", workers=1).tensors
        }
        for folder in (source, target)
    }
    of_changed = [key for key in kept[source] if key in changed]
    assert sum(kept[target][key] for key in of_changed) > sum(kept[source][key] for key in of_changed)
    assert json.loads((target / "permute.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_weights_wider_than_the_config_says_keep_every_bit(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        # One of each block in float64.
        wide = {name: each.double() * (1 + 2**-40) if "down_proj" in name else each for name, each in tensors.items()}
        save_file(wide, path, {"format": "pt"})
    permute_checkpoint(source, tmp_path / "out", "1:2")
    before, after = weights_in(source), weights_in(tmp_path / "out")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].flatten().sort().values, tensor.flatten().sort().values)
    assert any(not torch.equal(before[name], after[name]) for name in before if "down_proj" in name)


def test_without_scipy_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(NotInstalledError, match=r"pip install 'masksolve\[permute\]'"):
        permute_checkpoint(source, tmp_path / "out", "1:2")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_it_has_the_weights_of_the_model_that_is_permuted_in_memory(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    permute_checkpoint(source, tmp_path / "out", "2:4", escapes=2, seed=3)
    model = model_of("Llama")
    permute_model(model, "2:4", TOKENS, escapes=2, seed=3)
    expected = dict(model.named_parameters())
    for name, tensor in weights_in(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name])


def test_a_run_that_is_stopped_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    source, straight, stopped = folder_of(tmp_path / "in", layers=3), tmp_path / "straight", tmp_path / "stopped"
    expected = permute_checkpoint(source, straight, "1:2")

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "permuting" and 0 < done < total:
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            permute_checkpoint(source, stopped, "1:2", resume=resume, on_progress=stop)
        assert not stopped.exists()
    with pytest.raises(CheckpointError, match="seed was 0, now it is 1"):
        permute_checkpoint(source, stopped, "1:2", seed=1, resume=True)
    with pytest.raises(FileExistsError, match="was not finished; `resume=True` continues it"):
        permute_checkpoint(source, stopped, "1:2")
    found = permute_checkpoint(source, stopped, "1:2", resume=True)
    assert bytes_in(stopped) == bytes_in(straight)
    assert [axis.kept_after for axis in found.axes] == [axis.kept_after for axis in expected.axes]
    # Of what is finished, nothing is done again.
    assert permute_checkpoint(source, stopped, "1:2", resume=True, overwrite=True).axes


def test_an_order_is_searched_again_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    source, once, twice = folder_of(tmp_path / "in"), tmp_path / "once", tmp_path / "twice"
    first = permute_checkpoint(source, once, "1:2", time_limit=1e-9)
    assert {axis.kept_after - axis.kept_before for axis in first.axes} == {0}
    second = permute_checkpoint(once, twice, "1:2")
    assert json.loads((twice / "permute.json").read_text()) == json.loads(json.dumps(second.to_dict()))
    pruned = tmp_path / "pruned"
    prune_checkpoint(twice, pruned, "1:2", workers=1)
    assert (pruned / "permute.json").read_bytes() == (twice / "permute.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"has been pruned, by its masksolve.json, .* permute the dense model"):
        permute_checkpoint(pruned, tmp_path / "x", "1:2")


def test_one_sided_masks_keep_more_too(tmp_path: Path) -> None:
    source, target = folder_of(tmp_path / "in"), tmp_path / "out"
    report = permute_checkpoint(source, target, "1:2", direction="rows")
    before, after = (
        prune_checkpoint(folder, tmp_path / f"{folder.name}.sparse", "1:2", direction="rows", workers=1).tensors
        for folder in (source, target)
    )
    better = {
        old.name for old, new in zip(before, after, strict=True) if new.kept_importance > old.kept_importance + 1e-6
    }
    # Those of which the axis is along the inputs.
    assert better == {name for axis in report.axes for name in axis.weights if "down" in name or "o_proj" in name}


def test_what_cannot_be_permuted_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    for options, kind, message in (
        ({"pattern": "2:1"}, ValueError, "n must lie between 0 and m=1, got n=2"),
        ({"time_limit": 0}, ValueError, "time_limit must be positive, in seconds, got 0"),
        ({"escapes": -1}, ValueError, "escapes must be at least 0, got -1"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"direction": "up"}, ValueError, "unknown direction 'up'"),
        ({"target": source}, CheckpointError, "is the input, or a file of it"),
        ({"target": source / "x"}, CheckpointError, "lies within"),
        ({"source": tmp_path}, NoStackError, "it holds no .safetensors file"),
    ):
        given: dict[str, Any] = {"source": source, "target": tmp_path / "out", "pattern": "1:2", **options}
        with pytest.raises(kind, match=re.escape(message)):
            permute_checkpoint(given.pop("source"), given.pop("target"), given.pop("pattern"), **given)
        assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    (path,) = (each for each in source.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(each))
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinities"):
        permute_checkpoint(source, tmp_path / "out", "1:2")
    assert not (tmp_path / "out").exists()


def test_models_without_a_stack_or_an_axis_say_so(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    vision.save_pretrained(tmp_path / "vision")
    with pytest.raises(NoStackError, match=r"it does not take tokens; load the model, and permute it by `masksolve"):
        permute_checkpoint(tmp_path / "vision", tmp_path / "out", "1:2")
    sizes = {"d_model": 16, "n_layers": 2, "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    mamba.save_pretrained(tmp_path / "mamba")
    with pytest.raises(CheckpointError, match="no block of this MambaForCausalLM has an axis that is known to be free"):
        permute_checkpoint(tmp_path / "mamba", tmp_path / "out", "1:2")
    assert not (tmp_path / "out").exists()
