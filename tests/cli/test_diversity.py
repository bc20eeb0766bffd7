"""`masksolve diversity` and `masksolve odds`: what they print, and their exit codes."""

import pytest

from tests.cli.conftest import Run


def fields(out: str, line: str) -> list[str]:
    """The words of the one line that begins so, without its beginning."""
    (found,) = [text.removeprefix(line) for text in out.splitlines() if text.startswith(line)]
    return found.split()


def test_diversity_prints_the_counts_bits_per_weight_and_the_formulas_error(run: Run) -> None:
    code, out, err = run("diversity", "4:8")
    assert (code, err) == (0, "")
    assert "keeps 4 of every 8, zeroes 4" in out
    assert fields(out, "transposable ")[::4] == ["0.5745", "116,963,796,250"]
    assert fields(out, "transposable, at most 4 per line")[-1] == "94,473,463,102,448,047"
    assert fields(out, "one-sided")[::4] == ["0.7662", "576,480,100,000,000"]
    assert fields(out, "unstructured")[-1] == "1,832,624,140,942,590,534"
    assert fields(out, "the paper's formula  ")[-1] == "17,557,585,920,000"
    assert "150.1 times" in out
    assert "the asymptotic formula is 1.004 times" in out


def test_diversity_beyond_counting_says_that_it_is_asymptotic(run: Run) -> None:
    code, out, _ = run("diversity", "16:32")
    assert code == 0
    assert fields(out, "transposable ")[-1] == "9.772e254"
    assert "too many to count" in out
    assert "is the asymptotic formula's" in out
    assert fields(out, "the paper's formula is")[0] == "6.695e139"


@pytest.mark.parametrize("pattern", ["0:3", "1:1", "3:3"])
def test_diversity_of_a_pattern_with_one_mask_is_one(run: Run, pattern: str) -> None:
    code, out, _ = run("diversity", pattern)
    assert code == 0
    assert fields(out, "transposable ")[-1] == fields(out, "one-sided")[-1] == "1"


def test_odds_prints_the_odds_of_group_row_and_tile(run: Run) -> None:
    code, out, err = run("odds", "--sparsity", "0.7", "--pattern", "4:8", "--length", "16")
    assert (code, err) == (0, "")
    assert fields(out, "a group of 8") == ["0.942"]
    assert fields(out, "a row of 16") == ["0.8874"]
    assert fields(out, "a tile of 8x8, transposable") == ["0.4333"]
    assert "5:8 (keeps 5 of every 8, zeroes 3)" in out


def test_estimated_odds_come_with_their_interval(run: Run) -> None:
    _, out, _ = run("odds", "--sparsity", "0.8", "--pattern", "8:16")
    value, _, low, _, high, _, _ = fields(out, "a tile of 16x16, transposable")
    assert float(low) < float(value.rstrip(",")) < float(high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diversity", "9:8"], "n=9"),
        (["diversity", "4-8"], "'4-8'"),
        (["diversity"], "N:M"),
        (["odds", "--sparsity", "1.7", "--pattern", "4:8"], "1.7 is not in the range 0<=x<=1"),
        (["odds", "--sparsity", "0.7", "--pattern", "4:8", "--length", "0"], "0 is not in the range x>=1"),
        (["odds", "--sparsity", "nan", "--pattern", "4:8"], "'--sparsity': nan is not a number"),
        (["odds", "--pattern", "4:8"], "--sparsity"),
        (["odds", "--sparsity", "0.7", "--pattern", "4:3000"], "4:3000 are too large to draw"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("masksolve: ")
    assert err.count("\n") == 1
