"""Puts a generated table between two marks of a Markdown file."""

from __future__ import annotations

from pathlib import Path


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- name --> and <!-- /name -->; the marks stay."""
    begin_mark, end_mark = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = path.read_text(encoding="utf-8").partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not (begin and end):
        raise SystemExit(f"{path} has no {begin_mark} followed by {end_mark}; add the two where the table belongs")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
