"""Tables of recipes/RESULTS.md that are written from committed numbers, benchmarks/results/.

A file there holds a section's numbers: `section` (how the heading begins), its `tables` by name
(`command`, `source`, `head`, `rows`), and `quoted`, the numbers that stand in prose alone, by what
they are or how their paragraph begins. Table NAME of FILE.json stands between `<!-- table FILE.NAME -->` and `<!-- end of
FILE.NAME -->`. `python -m tests.results_tables` writes all of them; with `FILE.NAME RUN...` it takes a table's rows from run folders first (`LABEL=RUN` names one).
`test_results_tables.py` compares.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.repository import ROOT

RESULTS = ROOT / "recipes" / "RESULTS.md"
FOLDER = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\w+)\.(\w+) -->\n)(.*?)(<!-- end of \2\.\3 -->)", re.DOTALL)
COMPARED = re.compile(r"<!-- compare (\w+) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)
NUMBER = re.compile(
    r"(?<![\w.])(\d*\.\d+(?:e-?\d+)?|\d{1,3}(?:,\d{3})+)(?![\dM])"
)  # 0.6M is a size
COLUMNS = ("run", "seed", "before", "after", "difference, 95 %", "tokens to learn", "seconds")
NOT_PROSE = re.compile(
    r"`[^`]*`|<!--.*?-->|^\|[^\n]*|\]\(.*?\)|arXiv:? ?[\d.]+|\b\d+\.\d+\.\d+",
    re.MULTILINE | re.DOTALL,
)  # code, tables, addresses, papers and versions of libraries


def numbers(text: str) -> set[float]:
    """Shares, differences and counts of a text, without their signs."""
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


def read(name: str) -> dict[str, Any]:
    """What a section has measured."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def as_json(value: Any, indent: int = 0) -> str:
    """JSON with a line for each key of a mapping and each row of a table."""
    rows = isinstance(value, list) and value and all(isinstance(each, list) for each in value)
    if not rows and not (isinstance(value, dict) and value):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        text = functools.partial(json.dumps, ensure_ascii=False)
        inner = [f"{text(key)}: {as_json(each, indent + 1)}" for key, each in value.items()]
    else:
        inner = [json.dumps(each, ensure_ascii=False) for each in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    start = "\n" + " " * (indent + 1)
    return f"{first}{start}{f',{start}'.join(inner)}{start[:-1]}{last}"


def write(name: str, content: dict[str, Any]) -> None:
    """The file of a section, anew."""
    (FOLDER / f"{name}.json").write_text(as_json(content) + "\n", encoding="utf-8")


def number(value: float, sign: str = "") -> str:
    """.385, 1.000 or +.520."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.3f}"


def cell(value: Any) -> str:
    """A value as a table shows it: a share, a count, or a difference with its interval."""
    if isinstance(value, list):
        difference, low, high = (number(each, "+") for each in value)
        return f"{difference} ({low} .. {high})"
    if isinstance(value, float):
        return number(value)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def as_markdown(table: dict[str, Any]) -> str:
    """The table as it stands in the document."""
    rows = [table["head"], *table["rows"]]
    lines = ["| " + " | ".join(map(cell, row)).strip() + " |" for row in rows]
    lines.insert(1, "|---" * len(table["head"]) + "|")
    return "\n".join(re.sub(r" +", " ", line) for line in lines) + "\n"


def table_of(block: re.Match[str]) -> dict[str, Any]:
    """The numbers of a table of the document."""
    found: dict[str, Any] = read(block[2])["tables"][block[3]]
    return found


def written_anew(document: str) -> str:
    """The document with every table as its numbers have it."""
    return BLOCK.sub(lambda block: f"{block[1]}{as_markdown(table_of(block))}{block[5]}", document)


def sections(document: str) -> Iterator[tuple[str, str]]:
    """Heading and text of every section of the second level, what stands before them first."""
    for text in re.split(r"^(?=## )", document, flags=re.MULTILINE):
        heading, _, rest = text.partition("\n")
        yield heading.lstrip("# "), rest


def prose(text: str) -> str:
    """The sentences of a section, without tables, code, addresses, papers and versions."""
    return NOT_PROSE.sub(" ", COMPARED.sub(" ", BLOCK.sub(" ", text)))


def measured(content: Any) -> set[float]:
    """All numbers of a JSON value, those that stand in its texts too, without their signs."""
    if isinstance(content, dict):
        return set().union(*map(measured, content.values()))
    if isinstance(content, list):
        return set().union(*map(measured, content))
    return numbers(content) if isinstance(content, str) else {abs(float(content or 0))}


def row(label: str, run: Path) -> list[Any]:
    """What a run folder says of itself, in the order of COLUMNS. Raises `KeyError` for a run that
    was not evaluated before and after."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    before, after = (summary["eval"][side]["accuracy"] for side in ("before", "after"))
    paired = summary["eval"]["paired"]
    difference = [round(each, 4) for each in (paired["difference"], *paired["ci95"])]
    return [
        *(label, settings["seed"], round(before, 4), round(after, 4), difference),
        *(summary["budget"]["spent"]["tokens"], round(summary["seconds"]["total"])),
    ]


def take(table: str, runs: Sequence[str], section: str, command: str) -> None:
    """Write the rows of FILE.NAME from run folders. The section of a file that is there stays."""
    file, _, name = table.partition(".")
    there = (FOLDER / f"{file}.json").exists()
    content: dict[str, Any] = (
        read(file) if there else {"section": section, "tables": {}, "quoted": {}}
    )
    if not content["section"]:
        raise SystemExit(f"{file}.json is new: say with --section how the section's heading begins")
    named = [each.rpartition("=")[::2] for each in runs]
    found = [row(label or Path(run).name, Path(run)) for label, run in named]
    head, source = list(COLUMNS), "summary.json and config.yaml of the runs"
    known = {"command": command, "source": source, "head": head, "rows": found}
    content["tables"][name] = known
    write(file, content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else "")
    parser.add_argument("table", nargs="?", help="FILE.NAME, to take its rows from runs")
    parser.add_argument("runs", nargs="*", help="run folders; LABEL=RUN names one")
    parser.add_argument("--section", default="", help="how the heading of a new file begins")
    parser.add_argument("--command", default="", help="the command of the runs, as to be typed")
    given = parser.parse_args()
    if given.table:
        take(given.table, given.runs, given.section, given.command)
    else:
        RESULTS.write_text(written_anew(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
