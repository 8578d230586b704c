"""Rules of workflow programs: valid, or a fault in words at a bounded cost."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.programs.restrictions import (
    MAX_STEPS,
    Restrictions,
    _Matcher,
    nodes,
    parsed,
    program_of,
    similarity,
    whole,
)

CALL = "await custom('x')"
DEEP = {
    "a default of the entry": f"async def workflow(x={'not ' * 1500}1):\n    {CALL}",
    "a default of calls": f"async def workflow(x=f{'(1)' * 2000}):\n    return {CALL}",
    "a default of lambdas": f"def f(x={'lambda: ' * 900}1):\n    pass\n{CALL}",
    "a default by name": f"async def workflow(*, x=a{'[0]' * 2500}):\n    return {CALL}",
    "minus": f"{CALL}\n{'-' * 7000}1",
    "plus": f"{CALL}{' + 1' * 1900}",
    "powers": f"{CALL}{' ** 1' * 1500}",
    "attributes": f"{CALL}\nproblem{'.x' * 3900}",
    "calls of calls": f"{CALL}\nproblem{'()' * 3900}",
    "items of items": f"{CALL}\nproblem{'[0]' * 2600}",
    "else if": f"{CALL}\nif 1:\n 1\n" + "elif 1: 1\n" * 700 + "1",
    "f-strings": f"{CALL}\nf'{{{'[' * 150}1{']' * 150}}}'",
    "conditions": f"{CALL}\n{'1 if 1 else ' * 600}1",
    "brackets": f"{CALL}\n{'[' * 150}{']' * 150}",
    "blocks": f"{CALL}\n" + "".join(" " * n + "if 1:\n" for n in range(99)) + " " * 99 + "1",
    "levels of blocks": (
        f"{CALL}\n" + "".join(" " * n + "if 1:\n" for n in range(115)) + " " * 115 + "1"
    ),
    "a number in hex": f"{CALL}\n0x{'f' * 7000}",
    "a number": f"{CALL}\n{'9' * 7000}",
    "a NUL": f"{CALL}\n'\0'",
    "a lone surrogate": f"{CALL}\n'\ud800'",
    "a name of Unicode": CALL + "\n'\\N{" + "A" * 5000 + "}'",
    "an encoding": f"# coding: punycode\n{CALL}\n(",
    "decorators": f"@custom{'()' * 3000}\ndef f(): pass\n{CALL}",
    "patterns": f"match problem:\n case {'[' * 150}{']' * 150}: pass\n{CALL}",
}


@pytest.mark.parametrize("program", DEEP.values(), ids=DEEP)
def test_a_program_too_deep_to_walk_is_told_so_and_nothing_is_raised(program: str) -> None:
    assert len(program) <= 8000
    fault = Restrictions(("custom",), template="1", max_similarity=0.9).fault(program)
    assert fault.startswith("syntax: ") and len(fault) < 200


def test_every_program_that_is_taken_can_be_written_again() -> None:
    """What walks the tree of a valid program never meets Python's own limit."""
    for program in (
        f"{CALL}{' + 1' * 90}",
        f"{CALL}\n1{' ** 1' * 90}",
        f"{CALL}\nproblem{'[0]' * 90}",
        f"{CALL}\n{'[' * 90}{']' * 90}",
    ):
        assert Restrictions(("custom",)).fault(program) == ""
        assert (
            ast.unparse(parsed(program))
            and nodes(program, ["custom"]) == 1
            and whole(program, "p").endswith(program)
        )


def test_texts_made_to_be_slow_to_compare_are_not() -> None:
    letters = "".join(chr(0x4E00 + n) for n in range(110))
    one, other = letters * 70, "".join(letters[7 * n % 110] for n in range(7700))
    assert similarity(one, one) == 1.0
    matcher = _Matcher(one, other)
    assert (
        matcher.ratio() < 0.1 and -MAX_STEPS < matcher.left < 0
    )  # difflib alone takes 25 million steps
    text = Path(__file__).read_text(encoding="utf-8")
    first, second = text[:8000], text[4000:12000]
    assert similarity(first, second) == pytest.approx(
        difflib.SequenceMatcher(None, first.strip(), second.strip()).ratio(), abs=0.01
    )


def test_a_reply_of_nothing_but_tags_is_read_once() -> None:
    """The cost is told by how often it is searched, not by a clock."""

    class Text(str):
        searched = 0

        def find(self, *args: Any) -> int:  # type: ignore[override]
            Text.searched += 1
            return super().find(*args)

    assert program_of(Text("<graph>" * 50_000), "graph") is None and Text.searched == 2
    assert program_of("<graph>a<graph>b</graph>c</graph><graph>", "graph") == "a<graph>b"
