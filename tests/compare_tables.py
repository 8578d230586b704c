"""Tables of recipes/RESULTS.md that are written from the numbers of `marlora compare`.

`python -m tests.compare_tables` writes them from benchmarks/compare/*.json;
`tests/recipes/compare/test_results.py` compares them. A table stands between `<!-- compare NAME -->`
and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from marlora.recipes.compare.tables import as_markdown
from tests.repository import ROOT

RESULTS = ROOT / "recipes" / "RESULTS.md"
FOLDER = ROOT / "benchmarks" / "compare"
BLOCK = re.compile(r"(<!-- compare (\w+) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


def numbers(path: Path) -> dict[str, Any]:
    """What a comparison has measured."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def written_anew(document: str) -> str:
    """The document with every table as its numbers have it."""
    return BLOCK.sub(
        lambda block: f"{block[1]}{as_markdown(numbers(FOLDER / f'{block[2]}.json'))}{block[4]}",
        document,
    )


if __name__ == "__main__":
    RESULTS.write_text(written_anew(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
