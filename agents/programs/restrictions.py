"""Static checks of a workflow program's source before it is run: rules whose faults are in words.

Nothing of a program runs here; it is parsed. Faults that only show when it runs are for a dry run
in the sandbox (`workflow.py`).
"""

from __future__ import annotations

import ast
import builtins
import difflib
import itertools
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..execution import program_in
from ..types import SettingError

# A coroutine of this name, without arguments, is the program's answer, if there is one.
ENTRY = "workflow"
FENCE = "```"
GIVEN = frozenset({"problem"})  # what a program may read besides its operators
_REFUSED = {
    "open",
    "exec",
    "eval",
    "compile",
    "input",
    "breakpoint",
    "globals",
    "locals",
    "vars",
    "memoryview",
    "exit",
    "quit",
    "help",
}
MAX_DEPTH, MAX_BITS = 100, 4096  # of a program's syntax tree, and of a number in it
MAX_STEPS = 1_500_000  # of one comparison of two programs
_DEEP = f"nested more than {MAX_DEPTH} levels deep"
BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_")) - _REFUSED


@dataclass(frozen=True)
class Restrictions:
    """The rules of a valid program.

    Args:
        operators: names that it may call; it has to call one.
        template: the example in the designer's prompt. `max_similarity`: above which likeness to
            it (`similarity`) a program is a copy; 1 takes copies too. ScoreFlow has 0.75 to 0.8,
            and none for code.
        banned: texts that must not stand in it. `max_nodes`: calls of operators, as written.
            `max_chars`: its length.
    """

    operators: Collection[str]
    template: str = ""
    max_similarity: float = 1.0
    banned: tuple[str, ...] = ()
    max_nodes: int = 20
    max_chars: int = 8000

    def __post_init__(self) -> None:
        if not 0 < self.max_similarity <= 1 or self.max_nodes < 1 or self.max_chars < 1:
            raise SettingError(
                "max_similarity: above 0 and at most 1, max_nodes and max_chars: from 1 expected, "
                f"got {self.max_similarity}, {self.max_nodes}, {self.max_chars}"
            )

    def fault(self, program: str) -> str:
        """The first rule that a program breaks, in words that begin with a short kind and a colon;
        "" if it keeps them all."""
        if len(program) > self.max_chars:
            return f"length: {len(program)} characters, at most {self.max_chars}"
        try:
            tree = parsed(program)
        except SyntaxError as error:
            return f"syntax: {' '.join(str(error).split())[:120]}"
        for text in self.banned:
            if text in program:
                return f"banned: {text!r} stands in it"
        if name := next(_unknown(tree, {*self.operators, *GIVEN}), ""):
            return f"name: {name[:60]!r} is no operator and is not defined"
        if name := next((n for n in _bound(tree) if n in self.operators or n in GIVEN), ""):
            return f"name: {name!r} is given and cannot be defined anew"
        nodes = calls_of(tree, self.operators)
        if not 0 < nodes <= self.max_nodes:
            return f"nodes: it calls {nodes} operators, expected 1 to {self.max_nodes}"
        if not _answers(tree):
            return (
                f"answer: its last line is no expression, and it defines no `async def {ENTRY}()`"
            )
        if (
            self.max_similarity < 1
            and (alike := similarity(program, self.template)) > self.max_similarity
        ):
            return f"copy: {alike:.2f} like the template, at most {self.max_similarity:g}"
        return ""


def program_of(text: str, tag: str) -> str | None:
    """The program in a designer's reply: between the last `<tag>` and its end, without a fence
    around it; None if there is none.

    Without a tag it is the last fenced block, or all of the reply. A tag that is a fence with its
    language, such as "```python", takes the last block fenced so, and no other.
    """
    if not tag:
        return program_in(text) or None
    if tag.startswith(FENCE):
        blocks = re.findall(rf"^{re.escape(tag)}[ \t]*\n(.*?)^{FENCE}", text, re.DOTALL | re.M)
        return (blocks[-1].strip("\n") or None) if blocks else None
    opening, ending, block, at = f"<{tag}>", f"</{tag}>", "", 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(ending, start)) >= 0:
        block, at = text[start + len(opening) : end], end + len(ending)
    return program_in(block) or None


def parsed(program: str) -> ast.Module:
    """The one way to parse what a model wrote: every tree it returns can be walked and written
    again. Raises `SyntaxError`.

    Time grows with the length of the program: `Restrictions.max_chars` bounds it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's regular expressions are none of our concern
            tree = ast.parse(program)
    except (ValueError, OverflowError) as error:  # NUL, lone surrogates
        raise SyntaxError(" ".join(str(error).split())[:120]) from error
    except (RecursionError, MemoryError) as error:
        raise SyntaxError(_DEEP) from error
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if any(
            type(n) is ast.Constant and type(n.value) is int and n.value.bit_length() > MAX_BITS
            for n in level
        ):
            raise SyntaxError(f"a number of more than {MAX_BITS} bits")
        if not level:
            return tree
    raise SyntaxError(_DEEP)


class _Matcher(difflib.SequenceMatcher[str]):
    """difflib's matcher with a bound on its steps; beyond it nothing matches. Some texts take it
    seconds."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(None, first, second)
        places: Mapping[str, Sequence[int]] = self.b2j  # type: ignore[attr-defined]
        self.steps = [0, *itertools.accumulate(1 + len(places.get(char, ())) for char in first)]
        self.left = MAX_STEPS

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        self.left -= self.steps[-1 if ahi is None else ahi] - self.steps[alo]
        return (
            difflib.Match(alo, blo, 0)
            if self.left < 0
            else super().find_longest_match(alo, ahi, blo, bhi)
        )


def similarity(one: str, other: str) -> float:
    """How alike two programs are, from 0 to 1 (difflib's ratio, on their text without blanks at the
    ends of lines)."""
    first, second = (
        "\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (one, other)
    )
    return _Matcher(first, second).ratio()


def nodes(program: str, operators: Collection[str]) -> int:
    """How many calls of operators stand in a valid program, each loop counted once: its
    complexity."""
    return calls_of(parsed(program), operators)


def calls_of(tree: ast.AST, operators: Collection[str]) -> int:
    return sum(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in operators
        for n in ast.walk(tree)
    )


def whole(program: str, problem: str) -> str:
    """The program as it is run: after what it is given, and with its entry called."""
    call = f"\nawait {ENTRY}()" if _entry(parsed(program)) else ""
    return f"problem = {problem!r}\n{program}{call}"


def _entry(tree: ast.Module) -> bool:
    return any(
        isinstance(n, ast.AsyncFunctionDef) and n.name == ENTRY and not _any_argument(n.args)
        for n in tree.body
    )


def _any_argument(args: ast.arguments) -> bool:
    return bool(args.posonlyargs or args.args or args.vararg or args.kwonlyargs or args.kwarg)


def _answers(tree: ast.Module) -> bool:
    return _entry(tree) or (bool(tree.body) and isinstance(tree.body[-1], ast.Expr))


def _bound(tree: ast.AST) -> Iterator[str]:
    """The names that a program binds anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest


def _unknown(tree: ast.AST, given: Collection[str]) -> Iterator[str]:
    """Names and attributes that a program may not use."""
    known = {*given, *_bound(tree), *BUILTINS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and (node.id not in known or node.id.startswith("__")):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("__")
            and node.attr != "__init__"
        ):
            yield node.attr
