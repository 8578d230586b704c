"""What crosses from a workflow program into our process: never more than a bounded value."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from marlora.agents.execution import ExecutionResult, Limits
from marlora.rollouts.sandbox import sandbox, workflow, workflow_values
from marlora.rollouts.sandbox.workflow_values import (
    CHARS,
    DEPTH,
    DIGITS,
    ITEMS,
    BadValue,
    answering,
    plain_value,
)

QUICK = Limits(seconds=2.0, calls=20)
SHARED = "a = [1, 1, 1, 1]\nfor _ in range(11):\n    a = [a] * 4\n"
PARTS, CHARACTERS = f"more than {ITEMS} parts", f"more than {CHARS} characters"
# name: (program, how it ends, words of the error). `ask` is the only external.
HOSTILE: dict[str, tuple[str, str, str]] = {
    "a shared list": (f"{SHARED}a", "error", PARTS),
    "shared tuples": ("a = (1, 1)\nfor _ in range(18):\n    a = (a, a)\na", "error", PARTS),
    "shared dicts": ("a = {}\nfor _ in range(18):\n    a = {1: a, 2: a}\na", "error", PARTS),
    "a shared text": ("['x' * 1000000] * 1000", "error", CHARACTERS),
    "long keys": ("{'x' * 600000: 1, 'y' * 600000: 1}", "error", CHARACTERS),
    "a tuple as a key": ("{(1,) * 200000: 1}", "error", PARTS),
    "a long list": ("[0] * 200000", "error", PARTS),
    "a long text": ("'x' * 2000000", "error", CHARACTERS),
    "a text of the memory": ("'x' * (60 << 20)", "error", CHARACTERS),
    "a number": ("10 ** 1000000", "error", f"more than {DIGITS} digits"),
    "a negative number": ("[-(10 ** 5000)]", "error", f"more than {DIGITS} digits"),
    "a number for each part": ("[10 ** 4100] * 1000", "error", f"more than {DIGITS} digits"),
    "nesting": ("a = []\nfor _ in range(30):\n    a = [a]\na", "error", f"more than {DEPTH} deep"),
    "a list in itself": ("a = []\na.append(a)\na", "error", f"more than {DEPTH} deep"),
    "a list in itself twice": ("a = []\na.append(a)\na.append(a)\na", "error", "more than"),
    "bytes": ("b'x' * 1000000", "error", "a bytes cannot come out"),
    "a set": ("set(range(100000))", "error", "a set cannot come out"),
    "a range": ("range(10 ** 9)", "error", "a range cannot come out"),
    "an argument": (f"{SHARED}await ask(a)", "error", PARTS),
    "an argument by name": (f"{SHARED}await ask(x=a)", "error", PARTS),
    "many arguments": ("await ask(*[1] * 200000)", "error", PARTS),
    "many names": ("await ask(**{'n' + str(n): n for n in range(100000)})", "error", PARTS),
    "a long name": ("await ask(**{'n' * 2000000: 1})", "error", CHARACTERS),
    "an argument's number": ("await ask(10 ** 5000)", "error", f"more than {DIGITS} digits"),
    "an argument, again and again": (
        f"{SHARED}while 1:\n    try:\n        await ask(a)\n    except ValueError:\n        pass",
        "time",
        "time limit",
    ),
    "an argument behind other builtins": (
        (
            "len = lambda x: 0\ntype = lambda x: int\nint = list = tuple = dict = str = None\n"
            f"{SHARED}await ask(a)"
        ),
        "error",
        PARTS,
    ),
    "an answer behind other builtins": (
        f"len = lambda x: 0\ntype = lambda x: None\n{SHARED}a",
        "error",
        PARTS,
    ),
    "an answer in brackets": (f"{SHARED}(\n    a  # all\n)", "error", PARTS),
    "an answer after others": (f"{SHARED}'ü'; (a)  # all", "error", PARTS),
    "an answer of two": (f"{SHARED}1, *a", "error", PARTS),
    "an answer of an entry": (
        "async def workflow():\n    return [1, 1] * 100000\nawait workflow()",
        "error",
        PARTS,
    ),
    "an error's text": ("raise ValueError('x ' * (12 << 20))", "error", "x x x"),
    "an error's text beyond memory": ("raise ValueError('x' * (60 << 20))", "memory", ""),
    "an unknown name": ("n" * 500000, "error", "NameError: name 'nnn"),
    "an unknown function": (f"await {'n' * 500000}()", "error", "is not defined"),
    "prints": ("while True:\n    print('x' * 1000)", "output", ""),
    "one print": ("print('x' * (20 << 20))", "output", ""),
    "prints of nothing": ("while True:\n    print('', end='')", "time", ""),
    "unknown names": (
        "while True:\n    try:\n        nobody\n    except NameError:\n        pass",
        "calls",
        "",
    ),
    "unknown functions": (
        "while True:\n    try:\n        nobody()\n    except NameError:\n        pass",
        "calls",
        "",
    ),
    "calls": ("while True:\n    ask('x')", "calls", ""),
    "deep source": ("-" * 50000 + "1", "syntax", "levels deep"),
    "a chain of attributes": ("a" + ".b" * 50000, "syntax", "levels deep"),
    "a number in the source": ("0x" + "f" * 100000, "syntax", "bits"),
    "a lone surrogate": ("'\ud800'", "syntax", "surrogate"),
}


def unfolded(value: Any) -> int:
    """Parts, characters and digits of a value, up to a bit more than it may have."""
    count, left = 0, [value]
    while left and count <= 2 * (ITEMS + CHARS):
        part = left.pop()
        count += (
            len(part)
            if isinstance(part, (str, bytes))
            else part.bit_length() // 3
            if type(part) is int
            else 1
        )
        left += (
            [*part, *part.values()]
            if isinstance(part, dict)
            else list(part)
            if isinstance(part, (list, tuple, set))
            else []
        )
    return count


@pytest.mark.parametrize("name", HOSTILE)
def test_no_program_hands_over_more_than_may_cross(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, status, words = HOSTILE[name]
    received, slow = [], [0.0]

    def seen(value: Any) -> Any:
        received.append(unfolded(value))
        return plain_value(value)

    async def ask(*args: Any, **named: Any) -> str:
        return "no"

    async def heartbeat() -> None:
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.01)
            slow[0] = max(slow[0], time.monotonic() - start)

    async def run() -> ExecutionResult:
        beside = asyncio.create_task(heartbeat())
        end = await sandbox.run(program, {"ask": ask}, QUICK)
        await asyncio.sleep(0.02)
        beside.cancel()
        return end

    monkeypatch.setattr(workflow, "plain_value", seen)
    end = asyncio.run(run())
    assert (end.status, end.value) == (status, None) and words in end.error, end.error
    assert len(end.error) <= 300 and len(end.output) <= QUICK.output
    assert max(received, default=0) <= ITEMS + CHARS  # it was stopped where it ran, not here
    assert slow[0] < 2.0


def test_our_process_does_not_trust_what_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the guard in the interpreter taken away, the same values are still cut."""
    bare = workflow_values._PRELUDE.replace("count(value, [", "(lambda *a: 0)(value, [")
    assert bare != workflow_values._PRELUDE
    monkeypatch.setattr(workflow_values, "_PRELUDE", bare)

    async def ask(*args: Any) -> str:
        return "no"

    for program in (f"{SHARED}a", f"{SHARED}await ask(a)", "10 ** 1000000", "set()"):
        end = asyncio.run(sandbox.run(program, {"ask": ask}, QUICK))
        assert end.status == "error" and "cannot come out of a program" in end.error


@pytest.mark.parametrize(
    "value",
    [
        [[0] * 1000] * 101,
        [0] * ITEMS,
        ["x" * (CHARS // 2)] * 3,
        {"x" * (CHARS + 1): 1},
        10**DIGITS,
        -(10**DIGITS),
        {1},
        b"",
        1j,
        [object()],
        type("Text", (str,), {})("x"),
    ],
)
def test_values_that_are_too_large_or_of_no_plain_type_are_refused(value: Any) -> None:
    with pytest.raises(BadValue, match="cannot come out of a program"):
        plain_value(value)


def test_values_within_the_bounds_cross_as_they_are() -> None:
    program = (
        "shared = [1, 'ü', None]\n"
        "[shared, (True, 0.5, -7), {'k': shared, (1, 2): {}}, await ask(10 ** 3999, *[0] * 9)]"
    )
    asked: list[object] = []

    async def ask(*args: Any) -> list[int]:
        asked.append(args)
        return [3]

    end = asyncio.run(sandbox.run(program, {"ask": ask}, QUICK))
    shared = [1, "ü", None]
    assert end.value == [shared, (True, 0.5, -7), {"k": shared, (1, 2): {}}, [3]] and asked == [
        (10**3999, *[0] * 9)
    ]
    whole = asyncio.run(sandbox.run(f"[0] * {ITEMS - 1}", {}, QUICK)).value
    assert whole == [0] * (ITEMS - 1) == plain_value(whole)
    assert len(asyncio.run(sandbox.run(f"'x' * {CHARS}", {}, QUICK)).value) == CHARS


def test_a_program_never_learns_the_names_of_the_guards() -> None:
    async def ask(text: str) -> str:
        return "yes"

    for program in (
        "await __marlora_ask('x')",
        "__marlora_out(1)",
        "MARK_out(1)",
        "globals()['ask']",
    ):
        assert asyncio.run(sandbox.run(program, {"ask": ask}, QUICK)).status == "error"


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("x = 1", "x = 1"),
        ("", ""),
        ("x", "M_out((x))"),
        ("x = 'ü'; x, 2 # y\n", "x = 'ü'; M_out((x, 2)) # y\n"),
        ("a\r\n(b +\r\n c)\r\n", "a\r\nM_out(((b +\r\n c)))\r\n"),
        ("a\rawait b()", "a\rM_out((await b()))"),
        ("if a:\n    b", "if a:\n    b"),
        ("a\n\f\nb", "a\n\f\nM_out((b))"),
    ],
)
def test_the_answer_of_a_program_is_its_last_expression(program: str, told: str) -> None:
    assert answering(program, "M") == told
