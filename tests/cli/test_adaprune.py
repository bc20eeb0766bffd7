"""`masksolve adaprune`: models from code and from Hugging Face folders, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import masksolve as ms
from masksolve import cli
from masksolve._tiles import DIRECTIONS
from masksolve.checkpoint import prune_checkpoint
from masksolve.checkpoint._adaprune import INPUTS
from masksolve.torch._adaprune import adaprune as implementation
from masksolve.torch._adaprune.blocks import REFINEMENTS
from masksolve.torch._adaprune.layer import SOLVERS
from masksolve.torch._adaprune.scores import SCORES
from tests.cli.conftest import Run

FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))

def tied():
    model = make()
    model.z = torch.nn.Linear(16, 16)
    model.add_module("a", torch.nn.Linear(16, 16))
    model.z.weight = model.a.weight
    return torch.nn.Sequential(model[0], model.z, model.a)

def brackets():
    model = torch.nn.Sequential()
    for name in ("[bold]first", "[/b]", "last\\a"):
        model.add_module(name, torch.nn.Linear(8, 8))
    return model

def number():
    return 3

def lazy():
    import parts_of_tests
    return parts_of_tests.make()

def blocks():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(2))) for _ in range(2)))

def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `masksolve adaprune` in a folder that has a factory and data: (exit code, stdout, stderr)."""
    (tmp_path / "zoo_of_tests.py").write_text(FACTORY)
    (tmp_path / "parts_of_tests.py").write_text("from zoo_of_tests import make")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return partial(run, "adaprune")


CODE = ("zoo_of_tests:make", "--pattern", "3:4", "--output", "out")


def test_a_model_from_code_is_pruned_and_reported(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*CODE, "--calibration", "x.npy", "--importance", "wanda")
    assert code == 0
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert ms.is_valid_mask(state["2.weight"].numpy() != 0, 3, 4)
    assert bool((state["0.weight"] != 0).all())
    record = json.loads((tmp_path / "out" / "adaprune.json").read_text())
    assert [layer["name"] for layer in record["layers"]] == ["2.weight"]
    assert "1 layer pruned to 3:4" in out
    assert "the first layer; --all-layers prunes it" in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "out",
        "parts_of_tests.py",
        "x.npy",
        "zoo_of_tests.py",
    ]


def test_blocks_are_refined_and_reported(run: Run, tmp_path: Path) -> None:
    options = ("--calibration", "x.npy", "--batch", 10, "--refine", "block", "--all-layers")
    code, out, _ = run("zoo_of_tests:blocks", *CODE[1:], *options, "--report", "report.html")
    assert code == 0
    page = (tmp_path / "report.html").read_text()
    assert "Refined blocks" in page
    assert all(f"<td>{name}.weight</td>" in page for name in ("0.0", "0.1", "1.0", "1.1"))
    assert re.search(r"refined block\W+error\W+refined\W+time", out)
    record = json.loads((tmp_path / "out" / "adaprune.json").read_text())
    assert [block["name"] for block in record["blocks"]] == ["0", "1"]


def test_layers_that_few_samples_reach_keep_their_masks_alone(run: Run, tmp_path: Path) -> None:
    code, _, _ = run(*CODE, "--calibration", "x.npy", "--min-tokens", 51)
    assert code == 0
    (layer,) = json.loads((tmp_path / "out" / "adaprune.json").read_text())["layers"]
    assert layer["tokens"] == [50]
    assert layer["error_before"] == layer["error_after"] > 0


def test_a_terminal_sees_every_phase_from_the_loading_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    code, _, err = run(*CODE, "--calibration", "x.npy", "--all-layers")
    assert code == 0
    phases = ["loading zoo_of_tests:make", "running the dense model", "learning what to keep", "repairing"]
    places = [err.find(phase) for phase in phases]
    assert -1 not in places
    assert places == sorted(places)


def test_a_factory_may_import_what_lies_beside_it_when_it_is_called(run: Run, tmp_path: Path) -> None:
    before = list(sys.path)
    assert run("zoo_of_tests:lazy", *CODE[1:], "--calibration", "x.npy")[0] == 0
    assert sys.path == before


BROKEN_ARRAYS: dict[str, tuple[Any, str]] = {
    "empty.npy": (b"", "cannot be read as .npy (No data left in file)"),
    "cut.npy": (b"\x93NUMPY\x01\x00", "cannot be read as .npy"),
    "words.npy": (np.array(["a", "b"]), "cannot be read as .npy (can't convert np.ndarray of type numpy.str_"),
    "scalar.npy": (np.float32(1), "has arrays of shapes [()]; the first axis of each counts samples"),
    "none.npy": (np.zeros((0, 8), np.float32), "has arrays of shapes [(0, 8)]"),
    "cut.safetensors": (b"nothing of the kind", "cannot be read as .safetensors"),
    "empty.safetensors": ({}, "has arrays of shapes []"),
    "scalar.safetensors": ({"input": torch.tensor(1.0)}, "has arrays of shapes [()]"),
    "uneven.safetensors": ({"a": torch.ones(2), "b": torch.ones(3, 1)}, "has arrays of shapes [(2,), (3, 1)]"),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_arrays_that_are_no_samples_are_refused_by_name(name: str, run: Run, tmp_path: Path) -> None:
    content, message = BROKEN_ARRAYS[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, tmp_path / name)
    else:
        np.save(tmp_path / name, content)
    code, _, err = run(*CODE, "--calibration", name)
    assert code == 2
    assert f"--calibration {name} {message}" in err
    assert not (tmp_path / "out").exists()


def test_arrays_with_names_are_keyword_arguments(run: Run, tmp_path: Path) -> None:
    save_file({"input": torch.randn(20, 8)}, tmp_path / "x.safetensors")
    assert run(*CODE, "--calibration", "x.safetensors", "--all-layers", "--direction", "rows")[0] == 0
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert ms.is_valid_mask(state["0.weight"].numpy() != 0, 3, 4, direction="rows")


def test_no_more_samples_are_read_than_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    calibration = implementation.Calibration

    class Counting(calibration):  # type: ignore[misc,valid-type]
        def __init__(self, model: Any, batches: Any) -> None:
            seen.extend(map(len, batches))
            super().__init__(model, batches)

    monkeypatch.setattr(implementation, "Calibration", Counting)
    twice = ("--calibration", "x.npy", "--calibration", "x.npy")
    assert run(*CODE, *twice, "--samples", 31, "--batch", 10)[0] == 0
    assert seen == [10, 6, 10, 5]
    code, _, err = run(*CODE, *twice, "--samples", 1, "--output", "another")
    assert code == 2
    assert "--samples 1 is less than one from each of 2 --calibration files" in err


def test_an_interrupt_writes_what_is_finished(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repair = implementation.repair_layer
    done: list[str] = []

    def interrupted(task: Any, *rest: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(task.name)
        return repair(task, *rest)

    monkeypatch.setattr(implementation, "repair_layer", interrupted)
    code, _, err = run(*CODE, "--calibration", "x.npy", "--all-layers")
    assert code == 130
    assert "interrupted; the layers above are done" in err
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert ms.is_valid_mask(state["0.weight"].numpy() != 0, 3, 4)
    assert not ms.is_valid_mask(state["2.weight"].numpy() != 0, 3, 4)


BAD = {
    "no such model": (["nowhere"], "'nowhere' is neither a folder that exists nor module:factory"),
    "a factory that fails": (
        ["zoo_of_tests:broken"],
        "zoo_of_tests:broken' fails (RuntimeError: no weights)",
    ),
    "no such module": (["no_zoo:make"], "No module named 'no_zoo'"),
    "no such function": (["zoo_of_tests:f"], "module 'zoo_of_tests' has no function 'f'"),
    "no model": (["zoo_of_tests:number"], "returned int; it must return a torch.nn.Module"),
    "no Hugging Face folder": (["."], ". has no config.json"),
    "no data": (["--calibration", "none.npy"], "none.npy' does not exist"),
    "text for code": (["--calibration", "zoo_of_tests.py"], "is neither .npy nor .safetensors"),
    "unknown importance": (
        ["nowhere", "--importance", "fisher"],
        "'--importance': 'fisher' is not one of 'magnitude', 'wanda', 'ria', 'hessian', 'sparsegpt', 'admm'",
    ),
    "unknown solver": (["nowhere", "--solver", "sgd"], "'--solver': 'sgd' is not one of"),
    "unknown direction": (["nowhere", "--direction", "row"], "'--direction': 'row' is not one of"),
    "output exists": (["--output", "."], "--output . exists; name another folder"),
    "output nowhere": (["--output", "a/b"], "a is not a folder that can be written"),
    "a model from code with --resume": (["--resume"], "--resume is for folders that are pruned block by block"),
    "workers of pruned inputs": ([".", "--workers", "2"], "--workers needs --inputs dense; with pruned inputs, blocks"),
    "pattern too large": (["--pattern", "16:32"], "no parameter of this Sequential can be 16:32 sparse"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_gets_one_line_and_writes_nothing(case: str, run: Run, tmp_path: Path) -> None:
    options, message = BAD[case]
    calibration = () if "--calibration" in options else ("--calibration", "x.npy")
    source, *rest = options if not options[0].startswith("--") else [CODE[0], *options]
    code, out, err = run(source, *(CODE[1:] if "--pattern" not in rest else CODE[3:]), *calibration, *rest)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {
        "x.npy",
        "zoo_of_tests.py",
        "parts_of_tests.py",
        "__pycache__",
    }


def test_an_output_that_is_a_broken_link_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    code, out, err = run(*CODE, "--calibration", "x.npy", "--output", "link")
    assert (code, out, err) == (2, "", "masksolve: --output link exists; name another folder\n")


def test_a_hugging_face_folder_without_transformers_names_the_extra(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    code, _, err = run("bert", *CODE[1:], "--calibration", "x.npy")
    assert code == 2
    assert "pip install 'masksolve[transformers]'" in err


def bert(folder: Path) -> None:
    """A Hugging Face folder of a very small BERT."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["a", "few", "words", "of", "no", "meaning", "at", "all"]]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_folder_is_one_again_head_included(run: Run, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "text").write_text("a few words\nno meaning\n\nwords of meaning at all\nall of a few\n" * 7)
    code, out, _ = run(
        *("bert", "--calibration", "text", "--pattern", "2:4", "--output", "out"),
        *("--include", "bert.encoder.*.weight", "--exclude", "*LayerNorm*"),
    )
    assert code == 0
    assert "12 layers pruned to 2:4" in out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bert", "out"))
    assert list(before) == list(after)
    for name, weight in after.items():
        if "encoder" in name and weight.ndim == 2:
            assert ms.is_valid_mask(weight.numpy() != 0, 2, 4)
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert {path.name for path in (tmp_path / "bert").iterdir()} - {"vocab.txt"} < {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.filterwarnings("ignore")
def test_check_accepts_the_folder_with_the_layers_that_stayed_dense(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "text").write_text("a few words\nno meaning\n" * 20)
    options = ("bert", "--calibration", "text", "--pattern", "2:4", "--output", "out")
    assert run(*options, "--exclude", "bert.pooler.*")[0] == 0
    dense = load_file(tmp_path / "out" / "model.safetensors")["bert.pooler.dense.weight"]
    assert not ms.is_valid_mask(dense.numpy() != 0, 2, 4)
    for command in (["check", "out", "--pattern", "2:4"], ["check", "out", "--pattern", "3:4"]):
        monkeypatch.setattr(sys, "argv", ["masksolve", *command])
        assert cli.main() == 0
        assert "tensors were identified by masksolve.json" in capsys.readouterr().out
    layers = json.loads((tmp_path / "out" / "adaprune.json").read_text())["layers"]
    record = json.loads((tmp_path / "out" / "masksolve.json").read_text())
    assert sorted(tensor["name"] for tensor in record["tensors"]) == sorted(layer["name"] for layer in layers)


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_folder_keeps_its_other_files_but_weights_in_other_formats(run: Run, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    kept = ["README.md", "1_Pooling/config.json", "2_Dense/model.safetensors", "vocab.txt"]
    left = ["pytorch_model.bin", "onnx/model.onnx", "openvino/openvino_model.bin", ".cache/x"]
    for name in kept[:3] + left:
        (tmp_path / "bert" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bert" / name).write_text(f"what {name} held")
    (tmp_path / "bert" / "link.txt").symlink_to("README.md")
    (tmp_path / "text").write_text("a few words\nno meaning\n" * 20)
    assert run("bert", "--calibration", "text", "--pattern", "2:4", "--output", "out")[0] == 0
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "bert" / name).read_bytes()
    assert (tmp_path / "out" / "link.txt").read_text() == "what README.md held"
    for name in left:
        assert not (tmp_path / "out" / name).exists()


def test_names_of_layers_are_printed_as_they_are(run: Run) -> None:
    code, out, _ = run("zoo_of_tests:brackets", *CODE[1:], "--calibration", "x.npy")
    assert code == 0
    for name in ("[bold]first.weight", "[/b].weight", r"'last\x07.weight'"):
        assert f"│ {name} " in out


def test_a_tied_weight_of_a_model_from_code_is_checked_by_the_name_that_it_is_stored_under(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run("zoo_of_tests:tied", *CODE[1:], "--calibration", "x.npy", "--all-layers")
    assert code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    record = json.loads((tmp_path / "out" / "masksolve.json").read_text())
    assert {tensor["name"] for tensor in record["tensors"]} == {name for name in stored if name.endswith("weight")}
    monkeypatch.setattr(sys, "argv", ["masksolve", "check", "out", "--pattern", "3:4"])
    assert cli.main() == 0
    assert "all 2 tensors are" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "bert has no tokenizer; save the model's there"),
        ("config.json", "{", "the tokenizer of bert cannot be loaded (OSError: It looks like the config file"),
        ("model.safetensors", "", "model.safetensors is not a whole safetensors file"),
    ],
)
def test_a_hugging_face_folder_that_is_not_complete_is_refused(
    file: str, content: str | None, message: str, run: Run, tmp_path: Path
) -> None:
    bert(tmp_path / "bert")
    if content is None:
        (tmp_path / "bert" / file).unlink()
        (tmp_path / "bert" / "vocab.txt").unlink()
    else:
        (tmp_path / "bert" / file).write_text(content)
    (tmp_path / "text").write_text("a few words\n" * 30)
    code, _, err = run("bert", "--calibration", "text", "--pattern", "2:4", "--output", "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_folder_is_pruned_block_by_block_and_the_memory_is_reported(run: Run, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "text").write_text("a few words\nno meaning\n" * 20)
    options = ("--calibration", "text", "--pattern", "2:4", "--importance", "wanda", "--output", "out")
    code, out, err = run("bert", *options, "--report", "report.html")
    assert code == 0
    assert "as a whole" not in err
    page = (tmp_path / "report.html").read_text()
    for layer in json.loads((tmp_path / "out" / "adaprune.json").read_text())["layers"]:
        assert f"<td>{layer['name']}</td>" in page
        assert f">{layer['error_after']:.2%}</td>" in page
    assert "bert.encoder.layer.1.output.dense.weight: error" in err
    *_, done, memory = out.splitlines()
    assert done.startswith("out: 13 layers pruned to 2:4")
    assert re.fullmatch(r"peak memory .* [MG]iB; the weights of the largest block are .*, the hidden states .*", memory)
    stored = json.loads((tmp_path / "out" / "adaprune.json").read_text())["memory"]
    assert stored["largest_block"] == 4 * sum(
        tensor.numel()
        for name, tensor in load_file(tmp_path / "bert" / "model.safetensors").items()
        if "layer.0." in name
    )
    code, _, err = run("bert", *options)
    assert code == 2
    assert "exists; name another, or pass --overwrite" in err
    assert run("bert", *options, "--overwrite", "--inputs", "dense")[0] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_a_stack_of_blocks_is_loaded_whole_and_says_so(run: Run, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "pooler" not in name}, path, {"format": "pt"})
    (tmp_path / "text").write_text("a few words\nno meaning\n" * 20)
    options = ("--calibration", "text", "--pattern", "2:4", "--output", "out")
    code, _, err = run("bert", *options, "--resume")
    assert code == 2
    assert "--resume is for folders that are pruned block by block, which bert is not" in err
    code, out, err = run("bert", *options)
    assert code == 0
    assert (
        "bert is not pruned block by block but loaded as a whole: the checkpoint has no weights for bert.pooler" in err
    )
    assert "peak memory" not in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_folder_whose_tokenizer_cannot_be_made_gets_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text").write_text("a few words\n")
    code, _, err = run("llama", "--calibration", "text", "--pattern", "2:4", "--output", "out")
    assert code == 2
    assert "the tokenizer of llama cannot be loaded" in err
    assert err.endswith("if there is none, save the model's there (tokenizer.save_pretrained)\n")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


TEXTS = {
    "nothing": (b"", "--calibration text holds no text; give one sample per line"),
    "blank lines": (b" \n\n\t\n", "--calibration text holds no text; give one sample per line"),
    "no text": (b"a few \xff", "--calibration text is not UTF-8 text (invalid start byte at byte 6)"),
    "less than a window": (
        b"a few words\nno meaning\n",
        "--calibration text gives 9 tokens in 2 lines, fewer than the 10 (--length) of one sample; give more text",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_calibration_data_is_refused_by_name(case: str, run: Run, tmp_path: Path) -> None:
    content, message = TEXTS[case]
    bert(tmp_path / "bert")
    (tmp_path / "text").write_bytes(content)
    before = set(tmp_path.iterdir())
    code, _, err = run("bert", "--calibration", "text", "--pattern", "2:4", "--output", "out", "--length", 10)
    assert code == 2
    assert message in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.filterwarnings("ignore")
def test_lines_of_fewer_tokens_are_shorter_samples(run: Run, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "text").write_text("a few words\nno meaning\nall of a few words of no meaning at all\n")
    options = ("--pattern", "2:4", "--output", "out", "--length", 8)
    assert run("bert", "--calibration", "text", *options)[0] == 0
    layers = json.loads((tmp_path / "out" / "adaprune.json").read_text())["layers"]
    assert {tuple(layer["tokens"]) for layer in layers if "encoder" in layer["name"]} == {(5 + 4 + 8,)}


def check(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["masksolve", "check", *arguments])
    return cli.main()


def test_check_accepts_one_sided_layers_as_what_the_record_says_they_are(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*CODE, "--calibration", "x.npy", "--all-layers", "--direction", "rows")[0] == 0
    assert not ms.is_valid_mask(load_file(tmp_path / "out" / "model.safetensors")["2.weight"].numpy() != 0, 3, 4)
    for arguments in (["out"], ["out", "--pattern", "3:4"]):
        assert check(monkeypatch, *arguments) == 0
        assert "tensors are 3:4 (keeps 3 of every 4, zeroes 1) along rows" in capsys.readouterr().out
    assert check(monkeypatch, "out", "--direction", "both") == 1


@pytest.mark.filterwarnings("ignore")
def test_what_was_pruned_before_stays_in_the_record(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "text").write_text("a few words\nno meaning\n" * 20)
    first = "bert.encoder.layer.0.attention.self.query.weight"
    prune_checkpoint(tmp_path / "bert", tmp_path / "once", "1:8", include=[first], direction="columns")
    options = ("once", "--calibration", "text", "--pattern", "2:4", "--output", "out")
    assert run(*options, "--include", "*.key.weight")[0] == 0
    lines = json.loads((tmp_path / "out" / "masksolve.json").read_text())["tensors"]
    assert {(line["name"], line["pattern"], line["direction"]) for line in lines} == {
        (first, "1:8", "columns"),
        (first.replace("query", "key"), "2:4", "both"),
        (first.replace("query", "key").replace("0", "1"), "2:4", "both"),
    }
    assert check(monkeypatch, "out") == 0


@pytest.mark.filterwarnings("ignore")
def test_a_spoilt_record_in_the_folder_of_the_model_is_named_before_any_work(run: Run, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "bert" / "masksolve.json").write_text("{}")
    (tmp_path / "text").write_text("a few words\n" * 30)
    code, _, err = run("bert", "--calibration", "text", "--pattern", "2:4", "--output", "out")
    assert code == 2
    assert "bert/masksolve.json is neither masksolve.json nor the JSON report of a prune" in err


def test_the_choices_of_the_command_are_those_of_adaprune() -> None:
    choices = {each.name: each.type.choices for each in cli.adaprune_model.params if hasattr(each.type, "choices")}
    assert choices == {
        "importance": SCORES,
        "direction": DIRECTIONS,
        "solver": SOLVERS,
        "refine": REFINEMENTS,
        "inputs": INPUTS,
    }


def test_without_torch_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("masksolve.torch", "masksolve.cli._models"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run(*CODE, "--calibration", "x.npy")
    assert code == 2
    assert err.endswith("needs torch, which is not installed; pip install 'masksolve[torch]'\n")
