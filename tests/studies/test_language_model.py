"""The study of language models: it reads text, prunes what it says, keeps its results and draws from them."""

import csv
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from paper_figures.language_model import __main__ as program
from paper_figures.language_model import encoder, figures, text
from paper_figures.language_model.study import (
    APPROXIMATE,
    MORE_TEXT,
    PERMUTED,
    RECIPES,
    Case,
    Result,
    Setting,
    keep,
    read,
)

pytestmark = [pytest.mark.studies, pytest.mark.filterwarnings("ignore")]

WORDS = ["a", "few", "words", "of", "no", "meaning", "at", "all"]


def model_in(folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def text_in(folder: Path) -> Path:
    drawn = torch.randint(0, len(WORDS), (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for part in (*text.CALIBRATION, *text.EVALUATION):
        (folder / part).mkdir(parents=True)
        (folder / part / "page.rst.txt").write_text(" ".join(WORDS[number] for number in drawn))
    return folder


def test_windows_are_different_parts_of_the_text_and_always_the_same(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_in(tmp_path / "model"))
    folder = text_in(tmp_path / "text")
    found = text.windows(tokenizer, folder, text.CALIBRATION, 30, 10)
    assert torch.equal(found, text.windows(tokenizer, folder, text.CALIBRATION, 30, 10))
    whole = torch.tensor(tokenizer((folder / "library" / "page.rst.txt").read_text())["input_ids"]).view(-1, 10)
    places = [(whole == window).all(1).nonzero()[0].item() for window in found]
    assert len(set(places)) == 30
    with pytest.raises(SystemExit, match=r"has 400 tokens in library, not 41 times 10"):
        text.windows(tokenizer, folder, text.CALIBRATION, 41, 10)
    with pytest.raises(SystemExit, match="apt-get install python3-doc, or give --text FOLDER"):
        text.windows(tokenizer, tmp_path / "nowhere", text.CALIBRATION, 1, 10)


def test_every_recipe_prunes_and_all_is_drawn(tmp_path: Path) -> None:
    setting = Setting(calibrated=9, calibration_length=10, batch=3, evaluated=2, evaluation_length=20)
    study = setting.study(model_in(tmp_path / "model"), text_in(tmp_path / "text"))
    for recipe in ("magnitude", "magnitude, permuted", "admm, refined", MORE_TEXT, "greedy", "tsenor"):
        keep(tmp_path, study.run(Case("2:4", "both", recipe)))
    keep(tmp_path, study.run(Case("", "both", "dense")))
    found = read(tmp_path)
    assert len({each.perplexity for each in found}) > 5
    assert all((each.error > 0) == bool(each.case.pattern) for each in found)
    for case in program.all_cases():
        if not (tmp_path / f"{case.name}.json").exists():
            keep(tmp_path, Result(case, 20.0, 0.1, 30.0, 2000))
    assert {each.case.recipe for each in read(tmp_path)} == {"dense", MORE_TEXT, *RECIPES, *PERMUTED, *APPROXIMATE}
    page = tmp_path / "README.md"
    page.write_text((Path(figures.__file__).parent / "README.md").read_text())
    figures.draw(read(tmp_path), tmp_path)
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    with (tmp_path / "perplexity.csv").open() as file:
        # 2:4 from more text is not among them.
        assert len(list(csv.DictReader(file))) == len(program.all_cases()) + 1
    assert "16:32 1.00 to 1.00" in page.read_text()
    assert "| 8:16 | magnitude | 20 -> 20 | 0.1000 -> 0.1000 |" in page.read_text()


def test_an_encoder_is_compared_by_its_embeddings(tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model")
    config = transformers.MPNetConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    transformers.MPNetModel(config).save_pretrained(folder)
    setting = Setting(calibrated=8, calibration_length=10, batch=4, evaluated=12, evaluation_length=20)
    study = setting.study(folder, text_in(tmp_path / "text"))
    results = tmp_path / "results"
    results.mkdir()
    for case in encoder.all_cases():
        if case.pattern == "2:4":
            encoder.run_case(study, case, results)
    found = {(each.case.recipe, each.case.direction): each for each in encoder.read(results)}
    for direction in ("both", "rows"):
        assert found["magnitude", direction].error < found["magnitude, no repair", direction].error
    assert found["magnitude", "rows"].error < found["magnitude", "both"].error
    assert all(0 < each.cosine < 1 and 0 <= each.agreement <= 1 for each in found.values())
    page = tmp_path / "README.md"
    page.write_text((Path(encoder.__file__).parent / "README.md").read_text())
    encoder.draw(list(found.values()), tmp_path)
    assert (tmp_path / "encoder.png").stat().st_size > 1000
    last = found["magnitude, no repair", "rows"]
    assert f"| one-sided | {last.cosine:.3f}, {last.agreement:.0%} | - | - |\n<!-- end -->" in page.read_text()
