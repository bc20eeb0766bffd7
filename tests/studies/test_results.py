"""What studies share: a result is there whole or not at all, and what is missing is made by several processes."""

import json
from pathlib import Path

import pytest

from paper_figures._results import keep, make

pytestmark = pytest.mark.studies


def test_a_result_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(TypeError):
        keep(path, {"a": object()})
    assert list(tmp_path.glob("*.json")) == []
    keep(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}


@pytest.mark.parametrize("alone", [False, True])
def test_each_call_is_made_once_and_told_of(alone: bool, capsys: pytest.CaptureFixture[str]) -> None:
    make(str, [(number,) for number in (5, 6, 7)], processes=2, alone=alone)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert sorted(line.split()[1] for line in lines) == ["5", "6", "7"]


def test_a_call_that_fails_is_told_of_and_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="'a'"):
        make(int, [("a",), ("1",), ("2",)], processes=2)  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert 'FAILED: ValueError("invalid literal' in out
    assert "in ('a',)" in out
    assert out.count("\n") == 3
