"""The parts of a report as one self-contained HTML page: charts as inline SVG, nothing from a network.

Without its script the page shows all that it has; the script sorts and filters tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# A text, or a text and the number that it stands for.
Cell = str | tuple[str, float]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #6a737d; --line: #d8dee4; --bar: #2f6fba; --rest: #e7ebef;
  --good: #2e8540; --bad: #b5352c; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #9aa4ae; --line: #3a424a; --bar: #6aa5e8;
  --rest: #2a3138; --good: #63b874; --bad: #e5766d; --paper: #15191d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.note { color: var(--faint); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.bar { fill: var(--bar); } .rest { fill: var(--rest); } .good { fill: var(--good); } .bad { fill: var(--bad); }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; } .numbers b { display: block;
  font-size: 1.5rem; } .numbers span { color: var(--faint); }
.tiles { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; width: 13rem; } figcaption {
  font-size: .8rem; overflow-wrap: anywhere; }
.kept { stroke: var(--bar); stroke-width: 1.5; } .cell { fill: var(--ink); }
.find { display: flex; gap: .8rem; align-items: baseline; margin: .4rem 0; color: var(--faint); } .find input {
  font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 4px;
  padding: .2rem .5rem; width: 18rem; max-width: 100%; }
th button { all: unset; cursor: pointer; font-weight: bold; } th button:focus-visible { outline: 2px solid var(--bar); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.pale { fill: var(--faint); } .wide { overflow-x: auto; } code { font-size: .85rem; overflow-wrap: anywhere; }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], rows = [...body.rows];
  if (rows.length < 2) continue;
  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = [...rows].sort((a, b) => {
        const x = value(a, column), y = value(b, column);
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return down ? -order : order;
      });
      body.replaceChildren(...sorted);
    };
  }
  const find = document.createElement("div"), input = document.createElement("input");
  const count = document.createElement("span");
  find.className = "find";
  input.type = "search";
  input.placeholder = "filter, such as q_proj";
  input.setAttribute("aria-label", "filter the rows of this table");
  const filter = () => {
    const words = input.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(words);
      shown += !row.hidden;
    }
    count.textContent = words ? `${shown} of ${rows.length}` : `${rows.length} rows`;
  };
  input.oninput = filter;
  filter();
  find.append(input, count);
  table.before(find);
}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page of these parts."""
    head = [
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>\n</head>\n<body>",
    ]
    return "\n".join([*head, *parts, f"<script>{_SCRIPT}</script>", "</body>\n</html>\n"])


def section(title: str, note: str = "") -> str:
    """Return a heading, and a note below it."""
    return f"<h2>{escape(title)}</h2>" + (f"\n<p class=note>{escape(note)}</p>" if note else "")


def shape_of(shape: Sequence[int]) -> str:
    """Return a shape in words."""
    return "×".join(map(str, shape)) or "scalar"


def headline(numbers: dict[str, str]) -> str:
    """Return numbers in large type, each with its name."""
    items = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in numbers.items())
    return f"<div class=numbers>{items}</div>"


def bars(rows: Iterable[tuple[str, float, str, str]], title: str) -> str:
    """Draw horizontal bars from rows of label, length as a share, value in words, class."""
    lines = []
    y = 0
    for label, share, value, kind in rows:
        short = label if len(label) <= 46 else f"…{label[-45:]}"
        lines.append(
            f"<g><title>{escape(label)}: {escape(value)}</title>"
            f"<text x=310 y={y + 13} text-anchor=end>{escape(short)}</text>"
            f"<rect class=rest x=320 y={y + 2} width=420 height=14 /><rect class={kind} x=320 y={y + 2} "
            f"width={420 * share:.1f} height=14 /><text x=750 y={y + 13}>{escape(value)}</text></g>"
        )
        y += 20
    return f"<svg viewBox='0 0 880 {y}' width=880 role=img aria-label='{escape(title)}'>{''.join(lines)}</svg>"


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: int = 0) -> str:
    """Return a table whose last columns are numbers; the page's script lets readers sort and filter it.

    A cell is a text, or a text and the number that it is sorted by.
    """
    first = len(headings) - numbers

    def cell(value: Cell, index: int) -> str:
        text, number = value if isinstance(value, tuple) else (value, None)
        attributes = " class=number" if index >= first else ""
        if number is not None:
            attributes += f" data-value={number!r}"
        return f"<td{attributes}>{escape(text)}</td>"

    kinds = ["" if index < first else " class=number" for index in range(len(headings))]
    heads = "".join(f"<th{kind}>{escape(head)}</th>" for kind, head in zip(kinds, headings, strict=True))
    body = "".join(f"<tr>{''.join(cell(each, index) for index, each in enumerate(row))}</tr>" for row in rows)
    return f"<div class=wide><table class=data><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
