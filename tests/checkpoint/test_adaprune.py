"""`masksolve adaprune` of a folder, block by block: the bytes of the model in memory, resumed, and by any workers."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from masksolve.checkpoint import CheckpointError, NoStackError, adaprune_checkpoint, check_checkpoint  # noqa: E402
from masksolve.checkpoint._adaprune import INPUTS  # noqa: E402
from masksolve.torch import adaprune  # noqa: E402
from tests.torch.transformer_models import CONFIGS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(name: str, layers: int = 2, **changes: Any) -> Any:
    model, config, sizes = CONFIGS[name]
    depth = "n_layer" if "n_layer" in sizes else "num_hidden_layers"
    torch.manual_seed(0)
    found = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, depth: layers, **changes}))
    with torch.no_grad():
        for parameter in found.parameters():
            # Biases are zero, and routers send every token to the same experts, unless this is done.
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return found.eval()


def folder_of(path: Path, name: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    # Several shards, which hold blocks in part.
    model_of(name, **changes).to(dtype).save_pretrained(path, max_shard_size="20KB")
    return path


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 40, (5, 8 + index), generator=generator)} for index in range(count)]


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "adaprune.json"}


def layers_in(folder: Path) -> list[dict[str, Any]]:
    layers = json.loads((folder / "adaprune.json").read_text())["layers"]
    return [{name: value for name, value in layer.items() if name != "seconds"} for layer in layers]


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama", "1:4", {}),
    ("Llama, tied", "2:4", {"direction": "rows", "importance": "wanda", "exclude": ["*.1.*", "o_proj"]}),
    ("GPT2", "3:8", {"direction": "columns", "importance": "hessian"}),
    ("Mixtral", "2:4", {"keep_first_last": False, "min_tokens": 20}),
    ("Qwen3-MoE", "1:4", {"direction": "rows", "inputs": "dense"}),
    ("GPT-OSS", "2:4", {"direction": "rows", "include": ["*experts*", "q_proj"]}),
    ("BERT", "2:4", {"keep_first_last": False, "inputs": "dense"}),
    ("GPT2", "1:4", {"refine": "block"}),
    ("Mixtral", "2:4", {"refine": "block", "direction": "rows"}),
]


@pytest.mark.parametrize(("name", "pattern", "options"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_blocks_are_pruned_and_repaired_as_in_the_whole_model(
    name: str, pattern: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = folder_of(tmp_path / "in", name)
    (source / "notes.txt").write_text("beside the weights")
    (source / "pytorch_model.bin").write_bytes(b"dense weights")
    found = adaprune_checkpoint(source, tmp_path / "out", batches(), pattern, **options).report
    model = type(model_of(name)).from_pretrained(source).eval()
    in_memory = {name: value for name, value in options.items() if name != "inputs"}
    expected = adaprune(model, batches(), pattern, sequential=options.get("inputs") != "dense", **in_memory)
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    for one, two in zip(found.layers, expected.layers, strict=True):
        assert (one.tokens, one.pattern, one.shape) == (two.tokens, two.pattern, two.shape)
        assert (one.error_before, one.error_after) == pytest.approx((two.error_before, two.error_after), rel=1e-6)
    assert [block.name for block in found.blocks] == [block.name for block in expected.blocks]
    assert bool(found.blocks) == ("refine" in options)
    for one, two in zip(found.blocks, expected.blocks, strict=True):
        assert (one.error_before, *one.passes) == pytest.approx((two.error_before, *two.passes), rel=1e-3)
        assert one.error_after == min(one.error_before, *one.passes)
    skipped = [{(line.name, line.reason) for line in report.skipped} for report in (found, expected)]
    assert skipped[0] == skipped[1]
    model.save_pretrained(tmp_path / "expected")
    before, mine, theirs = (weights_in(tmp_path / folder) for folder in ("in", "out", "expected"))
    assert mine.keys() == theirs.keys() == before.keys()
    for each in mine:
        assert torch.equal(mine[each] != 0, theirs[each] != 0)
        # Sums are rounded otherwise on another number of cores.
        torch.testing.assert_close(mine[each], theirs[each], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(mine[each], before[each]) for each in mine)
    assert check_checkpoint(tmp_path / "out").passed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *({path.name for path in source.iterdir()} - {"pytorch_model.bin"}),
        "masksolve.json",
        "adaprune.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "expected"}


def stopping_after(layers: int) -> Any:
    """Progress that ends a run after this many layers more, as a kill would."""
    seen: list[int] = []

    def on_progress(phase: str, done: int, total: int) -> None:
        if phase == "repairing" and done not in seen:
            seen.append(done)
            if len(seen) > layers + 1:
                raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize(("inputs", "refine"), [("pruned", None), ("dense", None), ("pruned", "block")])
def test_a_run_that_is_stopped_twice_and_resumed_gives_the_same_bytes(inputs: Any, refine: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", "GPT2", torch.bfloat16, layers=3)
    options: dict[str, Any] = {"importance": "wanda", "inputs": inputs, "refine": refine}
    adaprune_checkpoint(source, tmp_path / "whole", batches(), "2:4", **options)
    for layers, parts in ((5, 1), (4, 2)) if inputs == "pruned" else ((0, 1), (0, 2)):
        with pytest.raises(KeyboardInterrupt) as caught:
            adaprune_checkpoint(
                source, tmp_path / "out", batches(), "2:4", resume=True, on_progress=stopping_after(layers), **options
            )
        assert "are done and kept" in caught.value.__notes__[0]
        assert not (tmp_path / "out").exists()
        journal = (tmp_path / ".out.masksolve" / "journal").read_text().splitlines()
        assert sum('"part"' in line for line in journal) == parts
    with pytest.raises(CheckpointError, match="importance was wanda, now it is magnitude"):
        adaprune_checkpoint(
            source, tmp_path / "out", batches(), "2:4", resume=True, **{**options, "importance": "magnitude"}
        )
    with pytest.raises(CheckpointError, match="the hash of the calibration data was"):
        adaprune_checkpoint(source, tmp_path / "out", batches(2), "2:4", resume=True, **options)
    with pytest.raises(FileExistsError, match="was not finished; `resume=True` continues it"):
        adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4", **options)
    adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4", resume=True, **options)
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")
    assert layers_in(tmp_path / "out") == layers_in(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "whole"}


def test_what_is_not_repaired_keeps_every_byte(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", dtype=torch.float16)
    report = adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4", include="down_proj").report
    changed = {layer.name for layer in report.layers}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1)}
    before, after = weights_in(source), weights_in(tmp_path / "out")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in changed)
    assert before.keys() == after.keys()


def test_the_bytes_are_the_same_however_many_work_on_blocks(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", layers=3)
    found = []
    for count in (1, 2):
        target = tmp_path / str(count)
        with ThreadPoolExecutor(count) as threads:
            adaprune_checkpoint(source, target, batches(), "1:4", inputs="dense", workers=threads)
        found.append((bytes_in(target), layers_in(target)))
    assert found[0] == found[1]


@pytest.mark.slow
def test_processes_that_share_the_blocks_write_the_same_bytes(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", layers=3)
    for workers in (1, 2):
        adaprune_checkpoint(source, tmp_path / str(workers), batches(), "1:4", inputs="dense", workers=workers)
    assert bytes_in(tmp_path / "1") == bytes_in(tmp_path / "2")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a glob that matches nothing": ({"include": "nowhere"}, ValueError, "include 'nowhere' matches none of the"),
    "a mapping that leaves a layer out": (
        {"pattern": {"q_proj": "2:4"}},
        ValueError,
        "no pattern is given for model.layers.0.self_attn.k_proj.weight",
    ),
    "a pattern that fits nothing": ({"pattern": "32:64"}, ValueError, "no parameter of this LlamaForCausalLM can be"),
    "nothing but the last layer": ({"include": "lm_head.weight"}, ValueError, "no layer is left to prune"),
    "an importance that is called": (
        {"importance": lambda name, weight: weight.abs()},
        ValueError,
        "could not be told when a run is resumed; `masksolve.torch.adaprune` takes one",
    ),
    "an unknown importance": ({"importance": "fisher"}, ValueError, "unknown importance 'fisher'"),
    "no batch": ({"calibration": []}, ValueError, "calibration holds no batch"),
    "a single batch": ({"calibration": batches(1)[0]}, TypeError, "calibration is a dict; give an iterable"),
    "a batch without names": (
        {"calibration": [torch.zeros(2, 3)]},
        TypeError,
        "calibration batch 0 is a Tensor; give a mapping",
    ),
    "an empty batch": (
        {"calibration": [*batches(1), {"input_ids": torch.zeros(0, 8, dtype=torch.long)}]},
        ValueError,
        "calibration batch 1 holds no input",
    ),
    "an unknown solver": ({"solver": "sgd"}, ValueError, "unknown solver 'sgd'"),
    "unknown refinement": ({"refine": "model"}, ValueError, "unknown refine 'model'"),
    "blocks of dense inputs": (
        {"refine": "block", "inputs": "dense"},
        ValueError,
        "refine='block' needs the inputs of",
    ),
    "one batch for blocks": ({"refine": "block", "calibration": batches(1)}, ValueError, "holds out a batch"),
    "unknown inputs": ({"inputs": "both"}, ValueError, "unknown inputs 'both'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    options, kind, message = REFUSED[case]
    source = folder_of(tmp_path / "in")
    with pytest.raises(kind, match=re.escape(message)):
        adaprune_checkpoint(source, tmp_path / "out", **{"calibration": batches(), "pattern": "2:4", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_batch_that_does_not_run_is_named_and_leaves_nothing(inputs: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    wrong = {"input_ids": torch.full((2, 8), 10_000)}
    with pytest.raises(ValueError, match=r"batch 2 does not run through this LlamaForCausalLM \(IndexError"):
        adaprune_checkpoint(source, tmp_path / "out", [*batches(2), wrong], "2:4", inputs=inputs)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_activations_that_are_not_finite_are_named_and_leave_nothing(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    path = next(path for path in source.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path))
    weights = load_file(path)
    weights["model.embed_tokens.weight"][:] = torch.inf
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"an input of .* holds NaN or infinities") as caught:
        adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4")
    assert not hasattr(caught.value, "__notes__")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    path = next(path for path in source.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(path))
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight': weights\[3, 5\] is nan"):
        adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_model_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    (source / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(CheckpointError, match=r"config.json describes no model that transformers has .*abacus"):
        adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_models_that_are_not_one_stack_of_blocks_say_why(tmp_path: Path) -> None:
    with pytest.raises(NoStackError, match="is not its only list of blocks"):
        adaprune_checkpoint(folder_of(tmp_path / "T5", "T5"), tmp_path / "out", batches(), "2:4")
    source = folder_of(tmp_path / "BERT", "BERT")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(NoStackError, match=r"the checkpoint has no weights for bert.pooler.dense.weight"):
        adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4")
    assert {path.name for path in tmp_path.iterdir()} == {"T5", "BERT"}


def test_experts_that_few_tokens_reach_are_named_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder_of(tmp_path / "in", "Mixtral")
    report = adaprune_checkpoint(source, tmp_path / "out", batches(1), "2:4", min_tokens=200).report
    stacks = [layer for layer in report.layers if len(layer.tokens) > 1]
    assert len(stacks) == 4
    assert all(layer.error_before == layer.error_after for layer in stacks)
    count = stacks[0].tokens[0]
    assert f"{count} reach {stacks[0].name}[0]" in caplog.text


@pytest.mark.parametrize("importance", ["hessian", "sparsegpt", "admm"])
def test_a_singular_hessian_leaves_finite_weights_and_masks(importance: Any, tmp_path: Path) -> None:
    # One token alone, so that all inputs of a layer are the same, and channels of it that are always zero.
    model = model_of("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3:9] = 0
    model.save_pretrained(tmp_path / "in")
    alike = [{"input_ids": torch.full((4, 8), 7)} for _ in range(2)]
    report = adaprune_checkpoint(
        tmp_path / "in", tmp_path / "out", alike, "1:4", importance=importance, keep_first_last=False
    ).report
    assert all(torch.isfinite(each).all() for each in weights_in(tmp_path / "out").values())
    # A single direction is repaired wholly, but for the damping.
    assert all(layer.error_after < 0.1 * layer.error_before for layer in report.layers)
    assert check_checkpoint(tmp_path / "out").passed


def test_layers_that_no_batch_calls_keep_their_bytes_and_are_named(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", "GPT2", add_cross_attention=True)
    report = adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4").report
    unreached = {line.name for line in report.skipped if line.reason == "no calibration batch calls it"}
    assert unreached == {
        f"transformer.h.{block}.crossattention.{name}.weight"
        for block in (0, 1)
        for name in ("c_attn", "q_attn", "c_proj")
    }
    before, after = weights_in(source), weights_in(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in unreached)
    with pytest.raises(ValueError, match=r"no layer is left to prune .*crossattention.* no calibration batch calls it"):
        adaprune_checkpoint(source, tmp_path / "none", batches(), "2:4", include="*.crossattention.*")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_the_options_of_one_layer_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", "GPT2")
    options: dict[str, Any] = {"alternations": 1, "damping": 0.1, "correct_bias": False, "respect_zeros": True}
    found = adaprune_checkpoint(source, tmp_path / "out", batches(), "2:4", **options).report
    model = type(model_of("GPT2")).from_pretrained(source).eval()
    expected = adaprune(model, batches(), "2:4", **options)
    for one, two in zip(found.layers, expected.layers, strict=True):
        assert one.error_after == pytest.approx(two.error_after, rel=1e-6)
        assert len(one.alternations) == len(two.alternations)
    before, after = weights_in(source), weights_in(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".bias"))


def test_the_report_prints_on_a_line_and_becomes_json(tmp_path: Path) -> None:
    found = adaprune_checkpoint(folder_of(tmp_path / "in"), tmp_path / "out", batches(), "2:4")
    assert re.fullmatch(r"<CheckpointAdaPruneReport: AdaPruneReport\(.*\), peak memory \d+ MiB>", repr(found))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain == json.loads((tmp_path / "out" / "adaprune.json").read_text())
    assert plain["memory"] == {
        "peak": found.peak,
        "largest_block": found.largest_block,
        "activations": found.activations,
    }
    assert found.activations == sum(batch["input_ids"].numel() for batch in batches()) * 16 * 4
