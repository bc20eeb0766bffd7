"""Identification of a checkpoint's tensors: by the model's config, by names, or as the user says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import masksolve as ms
from masksolve import Pattern, cli
from masksolve.checkpoint import (
    CheckpointError,
    apply_masks,
    check_checkpoint,
    page,
    plan_checkpoint,
    prune_checkpoint,
)
from tests.checkpoint.test_selection import ATTENTION, LAYER, MASKED
from tests.checkpoints import RECORD, contents, tensors_of, write_shard
from tests.torch.transformer_models import CONFIGS, build

PATTERN = Pattern(4, 8)

# What 4:8 prunes of a folder that transformers has written, where that is not what the model calls its weights.
PRUNED: dict[str, list[str]] = {
    **MASKED,
    "GPTNeoX": [name.replace("lm_head", "embed_out") for name in MASKED["GPTNeoX"]],
    "Mixtral": [
        *ATTENTION,
        *(f"{LAYER}.block_sparse_moe.experts.{e}.{name}.weight" for e in range(8) for name in ("w1", "w2", "w3")),
        "lm_head.weight",
    ],
    "Qwen3-MoE": [
        *ATTENTION,
        *(f"{LAYER}.mlp.experts.{e}.{name}_proj.weight" for e in range(8) for name in ("gate", "up", "down")),
        "lm_head.weight",
    ],
}

# And what some others are, by the config and by their names.
EMBEDDING, ROUTER = "an embedding", "the router of a mixture of experts"
DENSE: dict[str, dict[str, str]] = {
    "GPT2": {"transformer.wte.weight": EMBEDDING, "transformer.wpe.weight": EMBEDDING},
    "T5": {
        "shared.weight": EMBEDDING,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": EMBEDDING,
    },
    "GPTNeoX": {"gpt_neox.embed_in.weight": EMBEDDING},
    "Llama": {"model.embed_tokens.weight": EMBEDDING},
    "Llama, tied": {"model.embed_tokens.weight": EMBEDDING},
    "Mixtral": {"model.embed_tokens.weight": EMBEDDING, f"{LAYER}.block_sparse_moe.gate.weight": ROUTER},
    "Qwen3-MoE": {"model.embed_tokens.weight": EMBEDDING, f"{LAYER}.mlp.gate.weight": ROUTER},
    "GPT-OSS": {"model.embed_tokens.weight": EMBEDDING, f"{LAYER}.mlp.router.weight": ROUTER},
    "BERT": {
        "bert.embeddings.position_embeddings.weight": EMBEDDING,
        "bert.embeddings.word_embeddings.weight": EMBEDDING,
    },
    "Whisper": {"model.encoder.embed_positions.weight": EMBEDDING},
}
ONLY_BY_CONFIG = {
    "model.encoder.conv1.weight",
    "model.encoder.conv2.weight",
    *(f"{LAYER}.mlp.experts.{name}_proj" for name in ("gate_up", "down")),
}


def save(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder)
    return folder


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRUNED)
def test_by_the_config_and_by_names_the_same_is_pruned(
    name: str, tmp_path: Path, no_transformers: Callable[[], None]
) -> None:
    source = save(name, tmp_path / "in")
    report = prune_checkpoint(source, tmp_path / "out", PATTERN)
    assert sorted(tensor.name for tensor in report.tensors) == sorted(PRUNED[name])
    assert report.identified_by == f"the model of config.json ({CONFIGS[name][0]})"
    reasons = {tensor.name: tensor.reason for tensor in report.skipped}
    for tensor, words in DENSE[name].items():
        assert reasons[tensor] == f"{words}; include it to prune it"
    assert not [tensor.name for tensor in check_checkpoint(tmp_path / "out", PATTERN).tensors if tensor.problem]

    no_transformers()
    by_names = prune_checkpoint(source, tmp_path / "by names", PATTERN)
    assert {tensor.name for tensor in by_names.tensors} == set(PRUNED[name]) - ONLY_BY_CONFIG
    assert by_names.identified_by == ("the names of the tensors (transformers is not installed, to read config.json)")
    reasons = {tensor.name: tensor.reason for tensor in by_names.skipped}
    for tensor, words in DENSE[name].items():
        assert reasons[tensor] == f"{words} by its name; include it to prune it"


@pytest.mark.filterwarnings("ignore")
def test_an_output_layer_that_is_stored_beside_the_embedding_it_is_tied_to_stays_dense(tmp_path: Path) -> None:
    source = save("Llama, tied", tmp_path / "in")
    tensors = tensors_of(source / "model.safetensors")
    write_shard(
        source / "model.safetensors",
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]},
        {"format": "pt"},
    )
    report = prune_checkpoint(source, tmp_path / "out", PATTERN)
    assert sorted(tensor.name for tensor in report.tensors) == sorted(PRUNED["Llama, tied"])
    reasons = {tensor.name: tensor.reason for tensor in report.skipped}
    assert reasons["lm_head.weight"] == ("tied to model.embed_tokens.weight, an embedding; include it to prune it")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("single", ["the folder", "its file"])
def test_a_config_beside_a_file_counts_as_that_of_the_folder(single: str, tmp_path: Path) -> None:
    source = save("T5", tmp_path / "in")
    plan = plan_checkpoint(source if single == "the folder" else source / "model.safetensors", [PATTERN])
    assert plan.identified_by == "the model of config.json (T5ForConditionalGeneration)"
    assert sorted(tensor.name for tensor in plan.plans[0].chosen) == sorted(PRUNED["T5"])


SPOILT: dict[str, tuple[Any, str]] = {
    "nothing": (None, "there is no config.json beside them"),
    "no JSON": ("{", "config.json cannot be read: "),
    "no model": ('{"hidden": 8}', "config.json names no model_type"),
    "an unknown model": ('{"model_type": "no-such-model"}', "config.json: ValueError: "),
    "sizes that cannot be": ('{"model_type": "llama", "hidden_size": "wide"}', "config.json: "),
    "code beside it": (
        '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}',
        "config.json: ValueError: ",
    ),
    "another model": (
        '{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, '
        '"num_attention_heads": 2, "vocab_size": 40}',
        "none of which the LlamaModel of config.json has",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SPOILT)
def test_whatever_is_wrong_with_a_config_the_names_decide_and_the_report_says_why(case: str, tmp_path: Path) -> None:
    config, why = SPOILT[case]
    source, ones = tmp_path / "in", np.ones((16, 16), np.float32)
    source.mkdir()
    write_shard(source / "model.safetensors", {"a.proj.weight": ones, "wte.weight": ones, "b.router.weight": ones})
    (source / "evil.py").write_text("raise SystemExit('code beside the weights was run')")
    if config is not None:
        (source / "config.json").write_text(config)
    report = prune_checkpoint(source, tmp_path / "out", PATTERN)
    assert [tensor.name for tensor in report.tensors] == ["a.proj.weight"]
    assert report.identified_by.startswith(f"the names of the tensors ({why}")
    assert report.to_dict()["identified_by"] == report.identified_by
    assert f"Tensors were identified by the names of the tensors ({why[:20]}" in page(report)


NAMES = {
    "wte.weight": EMBEDDING,
    "h.0.wpe.weight": EMBEDDING,
    "shared.weight": EMBEDDING,
    "tokens.embedding": EMBEDDING,
    "a.relative_attention_bias.weight": EMBEDDING,
    "bert.embeddings.word_embeddings.weight": EMBEDDING,
    "tok_embeddings.weight": EMBEDDING,
    "embed_out.weight": None,
    "lm_head.weight": None,
    "a.shared.up_proj.weight": None,
    "a.reembedder.weight": None,
    "embeddings.projection.weight": None,
    "a.mlp.gate.weight": ROUTER,
    "a.router.weight": ROUTER,
    "a.router.classifier.weight": ROUTER,
    "a.block_sparse_moe.gate.weight": ROUTER,
    "a.mlp.gate.wg.weight": ROUTER,
    "a.mlp.gate_proj.weight": None,
    "a.experts.0.gate_up_proj.weight": None,
    "a.experts.down_proj_bias": "a bias",
    "a.lora_A.weight": "part of a PEFT adapter",
    "a.lora_B.default.weight": "part of a PEFT adapter",
    "a.lora_proj.weight": None,
    "a.lora_down.weight": "part of a PEFT adapter",
    "emb.weight": EMBEDDING,
    "a.tok_emb.weight": EMBEDDING,
    "a.q_proj.weight_scale_inv": "what a quantized weight is scaled by",
    "a.q_proj.scales": "what a quantized weight is scaled by",
    "a.q_proj.input_scale_2": "what a quantized weight is scaled by",
    "a.experts.down_proj_zero_point": "what a quantized weight is scaled by",
    "a.scale.weight": None,
    "a.upscale": None,
    "a.scaled_proj": None,
}


def test_names_are_compared_part_by_part(tmp_path: Path) -> None:
    ones = np.ones((8, 8), np.float32)
    write_shard(tmp_path / "in.safetensors", dict.fromkeys(NAMES, ones))
    plan = plan_checkpoint(tmp_path / "in.safetensors", [PATTERN]).plans[0]
    reasons = {tensor.name: tensor.reason for tensor in plan.skipped}
    assert [tensor.name for tensor in plan.chosen] == [name for name, what in NAMES.items() if what is None]
    for name, what in NAMES.items():
        assert reasons.get(name) == (f"{what} by its name; include it to prune it" if what else None)


def three_axes(path: Path, *, rows: int = 24) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    tensors = {
        "experts": rng.standard_normal((5, rows, 16)).astype(np.float32),
        "conv": rng.standard_normal((16, 24, 3)).astype(np.float32),
        "w": rng.standard_normal((16, 16)).astype(np.float32),
        "thin": rng.standard_normal((16, 3, 16)).astype(np.float32),
    }
    write_shard(path, tensors)
    return tensors


def test_three_axes_are_skipped_until_somebody_says_what_they_are(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    three_axes(source)
    for options in ({}, {"include": ["*"]}):
        report = prune_checkpoint(source, tmp_path / "out.safetensors", PATTERN, overwrite=True, **options)
        assert [tensor.name for tensor in report.tensors] == ["w"]
        reasons = {tensor.name: tensor.reason for tensor in report.skipped}
        for name in ("experts", "conv"):
            assert reasons[name].startswith("3-D, either a stack of matrices (count, rows, columns) or the weight of a")
            assert reasons[name].endswith("say which by `stack` or `convolution`")
        assert reasons["thin"] == "16x3 holds no whole 8x8 tile"


@pytest.mark.parametrize("rows", [24, 20])
@pytest.mark.parametrize("bands", ["small", "whole"])
def test_each_matrix_of_a_stack_is_pruned_and_proven_by_itself(
    rows: int, bands: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bands == "small":
        from tests.checkpoint.test_sharded import small_bands

        small_bands(monkeypatch)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    before = three_axes(source, rows=rows)
    masks = tmp_path / "masks"
    options: dict[str, Any] = {"stack": ["exp*"], "convolution": ["conv"]}
    report = prune_checkpoint(source, target, Pattern(3, 8), masks=masks, method="greedy", **options)
    after = tensors_of(target)
    assert {tensor.name: tensor.stack for tensor in report.tensors} == {"experts": True, "conv": False, "w": False}
    assert report.command.endswith("--stack 'exp*' --convolution conv")
    solved = ms.solve_matrix(before["experts"], 3, 8, method="greedy")
    assert np.array_equal(after["experts"], np.where(solved, before["experts"], np.float32(0)))
    of_kernel = np.moveaxis(before["conv"], 2, 0)
    assert np.array_equal(np.moveaxis(after["conv"], 2, 0) != 0, ms.solve_matrix(of_kernel, 3, 8, method="greedy"))

    kept = next(tensor for tensor in report.tensors if tensor.name == "experts")
    certificate = ms.certify(before["experts"], solved, 3, 8)
    assert kept.gap == pytest.approx(certificate.gap)
    for tile in kept.worst_tiles:
        (expert,) = tile.matrix
        place = slice(tile.row, tile.row + len(tile.mask)), slice(tile.column, tile.column + len(tile.mask[0]))
        found = ["".join(map(str, line)) for line in solved[expert][place].astype(int)]
        assert list(tile.mask) == found
    for worst in report.worst_tiles:
        if worst.tensor == "experts":
            tile = worst.tile
            weights = before["experts"][tile.matrix][tile.row :, tile.column :][: len(tile.mask), : len(tile.mask[0])]
            assert np.array_equal(np.array(worst.weights), weights)

    apply_masks(source, masks, tmp_path / "applied.safetensors")
    assert contents(tmp_path / "applied.safetensors") == contents(target)
    checked = check_checkpoint(target, Pattern(3, 8), **options)
    assert [(tensor.name, tensor.problem) for tensor in checked.tensors] == [
        (tensor.name, None) for tensor in report.tensors
    ]


def test_places_in_a_stack_are_named_by_its_own_indices(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    tensors = three_axes(source)
    options: dict[str, Any] = {"stack": ["experts"], "include": ["experts"]}
    prune_checkpoint(source, tmp_path / "out.safetensors", PATTERN, **options)
    pruned = dict(tensors_of(tmp_path / "out.safetensors"))
    for entries, said in (
        ((slice(2, 3), slice(9, 10), slice(8, 16)), "mask[2, 9, 8:16] keeps 8 of 8 entries; 4:8 along rows"),
        ((slice(3, 4), slice(16, 24), slice(5, 6)), "mask[3, 16:24, 5] keeps 8 of 8 entries; 4:8 along columns"),
    ):
        spoilt = pruned["experts"].copy()
        spoilt[entries] = 1
        if entries[1].stop - entries[1].start > 1:
            spoilt[3, :, [column for column in range(16) if column != 5]] = 0
        write_shard(source, {**pruned, "experts": spoilt})
        (found,) = check_checkpoint(source, PATTERN, **options).tensors
        assert found.problem is not None
        assert said in found.problem
    tensors["experts"][4, 17, 3] = np.nan
    write_shard(source, tensors)
    with pytest.raises(CheckpointError, match=r"weights\[4, 17, 3\] is nan"):
        prune_checkpoint(source, tmp_path / "never", PATTERN, **options)


def test_options_that_contradict_the_tensors_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    three_axes(source)
    for options, message in (
        ({"stack": ["w"]}, r"`stack` 'w' matches no tensor of three or more axes \(w has 2\)"),
        ({"convolution": ["x*"]}, r"`convolution` 'x\*' matches none of the 4 tensor names"),
        ({"stack": ["exp*"], "convolution": ["e*"]}, "'experts' cannot be both a stack of matrices and a convolution"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plan_checkpoint(source, [PATTERN], **options)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_each_of_the_experts_that_a_config_names_is_pruned(tmp_path: Path) -> None:
    source = save("GPT-OSS", tmp_path / "in")
    report = prune_checkpoint(source, tmp_path / "out", PATTERN)
    for name in (f"{LAYER}.mlp.experts.{each}_proj" for each in ("gate_up", "down")):
        assert next(tensor for tensor in report.tensors if tensor.name == name).stack
        experts = tensors_of(tmp_path / "out" / "model.safetensors")[name]
        assert ms.is_valid_mask(experts != 0, 4, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GPT2", "GPT-OSS", "Mixtral"])
@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_groups_of_inputs_are_found_however_a_weight_is_stored(name: str, direction: str, tmp_path: Path) -> None:
    """Of a matrix (in, out), as GPT-2's and GPT-OSS's experts are, they run along the columns as it is stored."""
    source = save(name, tmp_path / "in")
    report = prune_checkpoint(source, tmp_path / "out", "2:8", direction=direction)
    stored = tensors_of(tmp_path / "out" / "model.safetensors")
    for tensor in report.tensors:
        is_turned = name != "Mixtral" and ("c_" in tensor.name or "experts" in tensor.name)
        assert tensor.direction == ({"rows": "columns", "columns": "rows"}[direction] if is_turned else direction)
        matrix = np.swapaxes(stored[tensor.name], -1, -2) if is_turned else stored[tensor.name]
        assert ms.is_valid_mask(matrix != 0, 2, 8, direction=direction)
    assert check_checkpoint(tmp_path / "out").passed
    assert {str(each.pattern) for each in check_checkpoint(tmp_path / "out").tensors} == {"2:8"}


@pytest.mark.filterwarnings("ignore")
def test_without_a_config_what_may_be_stored_either_way_is_skipped_until_somebody_says_how(
    tmp_path: Path, no_transformers: Callable[[], None]
) -> None:
    source = save("GPT2", tmp_path / "in")
    no_transformers()
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(CheckpointError, match="no tensor fits pattern 2:8") as caught:
        prune_checkpoint(source, tmp_path / "out", "2:8", direction="rows")
    assert "nothing says along which axis its inputs lie: include it if it is stored (out, in)" in str(caught.value)
    for options, axis in (({"include": "c_fc"}, 1), ({"include": "c_fc", "transposed": "c_fc"}, 0)):
        prune_checkpoint(source, tmp_path / "out", "2:8", direction="rows", overwrite=True, **options)  # type: ignore[arg-type]
        kept = np.moveaxis(tensors_of(tmp_path / "out" / "model.safetensors")[name] != 0, axis, 1)
        assert ms.is_valid_mask(kept, 2, 8, direction="rows")
    # Transposable masks are the same either way.
    assert len(prune_checkpoint(source, tmp_path / "both", PATTERN).tensors) == 4


def test_each_tensor_gets_the_pattern_of_the_first_glob_that_matches(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    before = three_axes(source / "model.safetensors")
    patterns = {"experts": "1:4", "w*": (2, 8), "*": "3:8"}
    report = prune_checkpoint(source, target, patterns, stack="experts", convolution="conv", masks=tmp_path / "masks")
    found = {tensor.name: str(tensor.pattern) for tensor in report.tensors}
    assert found == {"experts": "1:4", "w": "2:8", "conv": "3:8"}
    after = tensors_of(target / "model.safetensors")
    assert np.array_equal(after["experts"] != 0, ms.solve_matrix(before["experts"], 1, 4))
    assert np.array_equal(after["w"] != 0, ms.solve_matrix(before["w"], 2, 8))
    assert check_checkpoint(target).passed
    assert "--pattern experts=1:4 --pattern 'w*=2:8' --pattern '*=3:8'" in report.command
    apply_masks(source, tmp_path / "masks", tmp_path / "applied")
    assert contents(tmp_path / "applied") == contents(target)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"w": "2:4", "x*": "2:4"},
            r"pattern 'x\*' = 2:4 matches none of the 4 tensor names \(experts, co",
        ),
        ({"*": "2:4", "w": "4:8"}, "pattern 'w' = 4:8 is never used: the globs before it match all of its names"),
        (
            {"thin": "8:16", "*": "4:8"},
            r"pattern 'thin' = 8:16 is for nothing that can be pruned \(thin: 16x3 ho",
        ),
        (
            {"experts": "2:4"},
            r"no pattern is given for conv, w, thin \(3 of the weights to prune\); add",
        ),
        ({}, "pattern is an empty mapping"),
    ],
)
def test_patterns_that_do_not_go_with_the_tensors_are_refused(
    patterns: dict[str, str], message: str, tmp_path: Path
) -> None:
    three_axes(tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(
            tmp_path / "in.safetensors", tmp_path / "out", patterns, stack="experts", convolution=["conv", "thin"]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_config_of_a_model_with_weight_norm_identifies_its_other_weights(tmp_path: Path) -> None:
    source = save("Wav2Vec2", tmp_path / "in")
    report = prune_checkpoint(source, tmp_path / "out", PATTERN)
    assert report.identified_by == "the model of config.json (Wav2Vec2ForCTC)"
    assert "wav2vec2.feature_extractor.conv_layers.1.conv.weight" in {tensor.name for tensor in report.tensors}
    reasons = {tensor.name: tensor.reason for tensor in report.skipped}
    name = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    assert reasons[name] == "what a parametrization computes a weight from; include it to prune it"


def test_check_reads_which_tensors_were_pruned_from_what_the_prune_left(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    three_axes(source / "model.safetensors")
    report = prune_checkpoint(source, target, PATTERN, stack=["experts"], exclude=["w"])
    line = {"name": "experts", "stack": True, "pattern": "4:8", "direction": "both"}
    assert json.loads((target / RECORD).read_text())["tensors"] == [line]
    checked = check_checkpoint(target, PATTERN)
    assert [(tensor.name, tensor.problem) for tensor in checked.tensors] == [("experts", None)]
    assert {tensor.reason for tensor in checked.skipped} == {f"left dense, says {RECORD}"}
    assert checked.identified_by == RECORD
    assert checked.recorded
    # The user's word counts more.
    (other,) = check_checkpoint(target, PATTERN, include=["w"]).tensors
    assert other.problem is not None
    assert not check_checkpoint(target, PATTERN, include=["w"]).recorded
    with pytest.raises(CheckpointError, match=rf"with `include`, .* {RECORD} .* is not read; give `pattern`"):
        check_checkpoint(target, include=["w"])
    # A file has its report, where one was written.
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    alone = check_checkpoint(target / "model.safetensors", PATTERN, record=tmp_path / "report.json")
    assert [tensor.name for tensor in alone.tensors] == ["experts"]
    # Globs narrow a record that is given.
    with pytest.raises(CheckpointError, match=r"no tensor fits .*experts: not included"):
        check_checkpoint(target, record=target / RECORD, include=["w"])
    for option in ("stack", "convolution", "transposed"):
        with pytest.raises(CheckpointError, match=f"`record` says how tensors are read; leave out .*`{option}`"):
            check_checkpoint(target, record=target / RECORD, **{option: ["experts"]})
    with pytest.raises(CheckpointError, match=r"`transposed` masksolve\.json in .* is not read; give `pattern`"):
        check_checkpoint(target, transposed="experts")
    # Nor is a pattern for a glob without a tensor passed over.
    with pytest.raises(CheckpointError, match=r"'w' = 2:4 matches none of the 1 recorded tensor names \(experts\)"):
        check_checkpoint(target, {"w": "2:4", "*": "4:8"})


@pytest.mark.parametrize("how", ["prune", "apply"])
def test_a_second_prune_keeps_what_the_first_recorded(how: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    three_axes(tmp_path / "in" / "model.safetensors")
    prune_checkpoint(tmp_path / "in", tmp_path / "once", PATTERN, stack=["experts"])  # and w, which fits too
    if how == "prune":
        prune_checkpoint(tmp_path / "once", tmp_path / "twice", "2:8", include=["w"], direction="columns")
    else:
        prune_checkpoint(tmp_path / "in", None, "2:8", include=["w"], direction="columns", masks=tmp_path / "masks")
        apply_masks(tmp_path / "once", tmp_path / "masks", tmp_path / "twice", other_weights=True)
    report = check_checkpoint(tmp_path / "twice")
    assert {(each.name, str(each.pattern), each.direction, each.problem) for each in report.tensors} == {
        ("experts", "4:8", "both", None),
        ("w", "2:8", "columns", None),
    }
    assert report.passed
    assert {each.name for each in report.skipped} == {"conv", "thin"}
    # What is asked for counts more than what the record says.
    asked = check_checkpoint(tmp_path / "twice", "2:8")
    assert {each.name: each.problem is None for each in asked.tensors} == {"experts": False, "w": True}
    assert not asked.passed


def test_a_run_is_not_resumed_with_another_record_beside_the_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    three_axes(tmp_path / "in" / "model.safetensors")
    prune_checkpoint(tmp_path / "in", tmp_path / "once", PATTERN, stack=["experts"], exclude=["w"])

    def end(phase: str, done: int, total: int) -> None:
        if phase == "pruning" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "once", tmp_path / "out", "2:8", include=["w"], on_progress=end)
    (tmp_path / "once" / RECORD).unlink()
    with pytest.raises(CheckpointError, match="the hash of the record was"):
        prune_checkpoint(tmp_path / "once", tmp_path / "out", "2:8", include=["w"], resume=True)


def test_a_spoilt_record_is_not_replaced_by_another(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    three_axes(tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / RECORD).write_text("{}")
    with pytest.raises(CheckpointError, match=r"masksolve\.json is neither .* or remove it"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", PATTERN)
    assert not (tmp_path / "out").exists()


METHODS = {"exakt": "unknown method 'exakt'.*did you mean 'exact'", "enumerate": "116,963,796,250 masks"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_cannot_solve_the_pattern_is_refused_before_anything_is_read(method: str, tmp_path: Path) -> None:
    three_axes(tmp_path / "in")
    phases: list[str] = []
    with pytest.raises(CheckpointError, match=METHODS[method]):
        prune_checkpoint(
            *(tmp_path / "in", tmp_path / "out", "4:8"),
            method=method,
            on_progress=lambda phase, done, total: phases.append(phase),
        )
    assert phases == []
    with pytest.raises(CheckpointError, match=METHODS[method]):
        plan_checkpoint(tmp_path / "in", ["4:8"], method=method)


BAD_RECORDS = {
    "no JSON": ("{", "is not valid JSON"),
    "no record": ("{}", "is neither masksolve.json nor the JSON report of a prune"),
    "names alone": ('{"tensors": ["w"]}', "is neither masksolve.json nor the JSON report of a prune"),
    "another's": (
        '{"tensors": [{"name": "v", "stack": false, "pattern": "4:8", "direction": "both"}]}',
        "says that the tensor 'v' was pruned, which",
    ),
    "no direction": (
        '{"tensors": [{"name": "w", "stack": false, "pattern": "4:8"}]}',
        "is neither masksolve.json nor the JSON report of a prune (KeyError('direction'))",
    ),
    "a direction that is none": (
        '{"tensors": [{"name": "w", "stack": false, "pattern": "4:8", "direction": "up"}]}',
        "unknown direction 'up'",
    ),
    "a pattern that is none": (
        '{"tensors": [{"name": "w", "stack": false, "pattern": "9:8", "direction": "both"}]}',
        "n must lie between 0 and m=8",
    ),
    "a stack that is a word": (
        '{"tensors": [{"name": "w", "stack": "no", "pattern": "4:8", "direction": "both"}]}',
        "stack must be True or False, got 'no'",
    ),
    "a tensor twice": (
        '{"tensors": [%s, %s]}' % (2 * ('{"name": "w", "stack": false, "pattern": "4:8", "direction": "both"}',)),
        "names the tensor 'w' twice",
    ),
    "a number beyond what Python reads": ('{"tensors": ' + "1" * 5000 + "}", "is not valid JSON"),
    "nothing": ('{"tensors": []}', "says that no tensor was pruned"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    text, message = BAD_RECORDS[case]
    write_shard(tmp_path / "model.safetensors", {"w": np.zeros((8, 8), np.float32)})
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(tmp_path, PATTERN)
    assert message in str(caught.value)
    assert str(tmp_path / RECORD) in str(caught.value)


def test_the_command_says_what_tensors_are_identified_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    three_axes(source / "model.safetensors")
    options = ["--pattern", "4:8", "--stack", "experts", "--convolution", "conv"]
    by = "tensors were identified by the names of the tensors (there is no config.json beside them)"
    for command, said in (
        (["prune", source, "--output", tmp_path / "out", *options], by),
        (["plan", source, *options], by),
        (["check", tmp_path / "out", *options], by),
        (["check", tmp_path / "out", "--pattern", "4:8"], "tensors were identified by masksolve.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["masksolve", *map(str, command)])
        assert cli.main() == 0
        assert said in capsys.readouterr().out.splitlines()
