"""The study of permutations: bounds hold, the axes of a model move together, and all is drawn."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import masksolve as ms
from paper_figures.permutation import __main__ as program
from paper_figures.permutation import figures
from paper_figures.permutation.study import AXES, FREE, PATTERNS, Case, Gain, Study, bound, read, run_case

pytestmark = [pytest.mark.studies, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_a_tiny_matrix_keeps_more_than_the_bound(seed: int, axes: str) -> None:
    importance = np.random.default_rng(seed).exponential(size=(4, 6)).astype(np.float32)
    rows = list(itertools.permutations(range(4))) if axes != "columns" else [tuple(range(4))]
    columns = list(itertools.permutations(range(6))) if axes != "rows" else [tuple(range(6))]
    stack = np.stack([importance[np.ix_(r, c)] for r in rows for c in columns[:: 1 + 7 * (axes == "both")]])
    best = float((stack * ms.solve_matrix(stack, 1, 2)).sum((1, 2), dtype=float).max())
    assert best <= bound(importance, 1, 2, axes) + 1e-6
    assert bound(importance, 1, 2, axes) <= bound(importance, 1, 2, "both") + 1e-6


def models_in(folder: Path) -> Study:
    rng = np.random.default_rng(0)
    names = [f"encoder.layer.{block}.{part}" for block in (0, 3) for part in ("query", "output")]
    minilm = {name: rng.standard_normal((32, 64)).astype(np.float32) for name in names}
    save_file({**minilm, "embeddings": minilm[names[0]], "encoder.norm": minilm[names[0]][0]}, folder / "minilm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "smollm2")
    return Study(folder / "minilm", folder / "smollm2")


def test_every_case_is_done_once_and_all_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, results = models_in(tmp_path), tmp_path / "results"
    results.mkdir()
    assert [name for name, _ in study.matrices("MiniLM")] == [
        f"encoder.layer.{block}.{part}" for block in (0, 3) for part in ("output", "query")
    ]
    assert len(list(study.matrices("SmolLM2"))) == 14
    done = [Case("SmolLM2", FREE, "2:4", 0.5), Case("MiniLM", "encoder.layer.3.query", "4:8", 0.2)]
    for case in [*done, Case("Gaussian", "32x16", "2:4", 0.2)]:
        run_case(study, case, results)
    found = dict(read(results))
    free, one = (found[case] for case in done)
    moved = {each.matrix for each in free if each.after > each.before + 1e-4}
    assert {name.split(".")[-2] for name in moved} == {"gate_proj", "up_proj", "down_proj", "v_proj", "o_proj"}
    assert all(each.after == each.before for each in free if each.matrix not in moved)
    assert [each.axes for each in one] == list(AXES)
    assert all(each.before < each.after <= each.bound <= each.unstructured for each in one)
    cases = program.all_cases(study)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        if not (results / f"{case.name}.json").exists():
            axes = [FREE] if case.matrix == FREE else AXES
            lines = [
                Gain(case.source, case.matrix, 32, 64, case.pattern, each, 0.7, 0.71, 0.8, 0.75, 0.8, case.seconds)
                for each in axes
            ]
            monkeypatch.setattr(Study, "run", lambda self, case, lines=lines: lines)
            run_case(study, case, results)
    page = tmp_path / "README.md"
    page.write_text((Path(figures.__file__).parent / "README.md").read_text())
    figures.draw(read(results), tmp_path)
    assert (tmp_path / "gain.png").stat().st_size > 1000
    text = page.read_text()
    assert text.count("| 70.00 |") >= len(PATTERNS)
    assert "2:4 +1.00, 4:8 +1.00" in text
