"""The sandbox under attack: what a program tries, in both cages, and that each attack would work
without one."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from marlora.agents.execution import Limits, SandboxError, TestSuite
from marlora.agents.testing import fake_team
from marlora.agents.types import AgentSpec, Task
from marlora.rollouts.sandbox import isolation as cages_module
from marlora.rollouts.sandbox import sandbox, self_test
from marlora.rollouts.sandbox.isolation import Isolation
from marlora.rollouts.sandbox.python import check_plain, run_plain
from marlora.rollouts.sandbox.workflow import Interpreter
from tests.rollouts.attacks import FORGERIES, PLAIN, SECRET, WORKFLOWS, Attack

QUICK = Limits(seconds=0.7, cpu_seconds=5, memory=256 << 20)
PATIENT = Limits(seconds=30.0, cpu_seconds=20, memory=256 << 20)
HIDDEN = TestSuite((f"assert f(3) == {SECRET}",), ("f",))
HELD = self_test.isolations()
# The cage that this machine would use is attacked in every `make test`, the other one, if it holds
# too, in `make test-full`.
EACH = [
    pytest.param(held.kind, marks=[pytest.mark.slow] if k else [pytest.mark.process])
    for k, held in enumerate(HELD)
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What a program without a cage could reach."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "canary").write_text("the secret")
    (folder / "victim").write_text("whole")
    servers = [
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX),
    ]
    at, abstract = str(folder / "s"), f"\0marlora-{os.getpid()}"
    servers[1].bind(at)
    servers[2].bind(abstract)
    for server in servers:
        server.listen(100)
    yield {
        "CANARY": str(folder / "canary"),
        "VICTIM": str(folder / "victim"),
        "DROP": str(folder / "drop"),
        "PARENT": os.getpid(),
        "PORT": servers[0].getsockname()[1],
        "SOCKET": at,
        "ABSTRACT": abstract,
    }
    for server in servers:
        server.close()


def caged(kind: str) -> Isolation:
    return next(held for held in HELD if held.kind == kind)


def limits(attack: Attack) -> Limits:
    return QUICK if attack.met == ("time",) else PATIENT


def side_by_side(work: object, items: object) -> list:  # type: ignore[type-arg]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, items))  # type: ignore[call-overload]


def test_at_least_one_cage_holds_and_the_attacks_are_many() -> None:
    assert HELD, sandbox.state()
    assert len(PLAIN) + len(FORGERIES) + len(WORKFLOWS) >= 40
    assert len({attack.name for attack in PLAIN}) == len(PLAIN)


@pytest.mark.parametrize("kind", EACH)
def test_nothing_comes_through(
    kind: str, known: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = Path(str(known["CANARY"])).parent
    before = {
        path.name: (path.read_bytes() if path.is_file() else None, path.stat().st_mode)
        for path in folder.iterdir()
    }
    ends = side_by_side(
        lambda attack: run_plain(caged(kind), attack.text(known), limits(attack)), PLAIN
    )
    through = {
        a.name: end
        for a, end in zip(PLAIN, ends, strict=True)
        if "THROUGH" in end.output or end.status not in a.met
    }
    assert not through
    assert {
        path.name: (path.read_bytes() if path.is_file() else None, path.stat().st_mode)
        for path in folder.iterdir()
    } == before
    assert not Path("/tmp/marlora-attack").exists() and not Path("/dev/shm/marlora-attack").exists()


@pytest.mark.slow
def test_without_a_cage_the_attacks_work(known: dict[str, object], tmp_path: Path) -> None:
    """The controls: an attack that is refused everywhere, by a misspelling say, would prove nothing
    about a cage."""

    def bare(attack: Attack) -> str:
        folder = tmp_path / str(PLAIN.index(attack))
        folder.mkdir()
        for name in ("canary", "victim"):
            (folder / name).write_text("x")
        own = {
            "CANARY": str(folder / "canary"),
            "VICTIM": str(folder / "victim"),
            "DROP": str(folder / "drop"),
        }
        # numbered as in a process that holds many others, as a worker of a long test run does
        with open(os.devnull) as low:
            handle = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 500)
        try:
            return subprocess.run(
                [sys.executable, "-c", attack.text(known | own)],
                capture_output=True,
                text=True,
                timeout=60,
                pass_fds=[handle],
                env={**os.environ, "HF_TOKEN": "hf_secret"},
                start_new_session=False,
            ).stdout
        finally:
            os.close(handle)

    harmless = [attack for attack in PLAIN if attack.bare]
    said = side_by_side(bare, harmless)
    assert not [
        attack.name for attack, out in zip(harmless, said, strict=True) if "THROUGH" not in out
    ]


@pytest.mark.parametrize("kind", EACH)
def test_no_verdict_is_forged(kind: str) -> None:
    ends = side_by_side(
        lambda program: check_plain(caged(kind), program, HIDDEN, QUICK), FORGERIES.values()
    )
    assert not {
        name: end
        for name, end in zip(FORGERIES, ends, strict=True)
        if end.passed or len(end.results) != 1
    }
    honest = check_plain(caged(kind), f"def f(x): return {SECRET}", HIDDEN, PATIENT)
    assert honest.passed and honest.results == ("",)


@pytest.mark.process
def test_workflow_programs_reach_nothing_but_their_externals(known: dict[str, object]) -> None:
    asked: list[object] = []

    async def ask(question: str) -> str:
        asked.append(question)
        return "no"

    async def one(program: str) -> object:
        head = "".join(f"{name} = {known[name]!r}\n" for name in ("CANARY", "DROP"))
        return await sandbox.run(
            head + program, {"ask": ask}, Limits(seconds=1.0, memory=128 << 20, calls=20)
        )

    async def all_of_them() -> list[object]:
        return [await one(program) for program, _ in WORKFLOWS.values()]

    ends = asyncio.run(all_of_them())
    wrong = {
        name: end
        for (name, (_, met)), end in zip(WORKFLOWS.items(), ends, strict=True)
        if end.status not in met
    }  # type: ignore[attr-defined]
    assert not wrong
    assert not any("secret" in f"{end.value}{end.output}" for end in ends)  # type: ignore[attr-defined]
    assert set(asked) <= {"x"} and len(asked) <= 60  # at most 20 of each flood


@pytest.mark.parametrize("kind", [held.kind for held in HELD])
def test_nothing_is_left_running(kind: str) -> None:
    marked = Limits(seconds=0.5, cpu_seconds=4321)

    def left() -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += [str(entry)] if b'"cpu_seconds": 4321' in entry.read_bytes() else []
            except OSError:
                continue  # it ended just now
        return found

    during: list[str] = []
    watch = threading.Timer(0.25, lambda: during.extend(left()))
    watch.start()
    assert run_plain(caged(kind), "while True:\n    pass", marked).status == "time"
    watch.join()
    assert during, "the control: while it runs it is seen"
    for _ in range(100):  # bubblewrap's child dies of its parent's death, a moment later
        if not left():
            break
        threading.Event().wait(0.05)
    assert not left()


def test_scratch_is_bounded_in_bytes_and_files() -> None:
    kinds = {held.kind for held in HELD}
    program = """
import os
made = size = 0
try:
    while True:
        open(f"/tmp/{made}", "w").close()
        made += 1
except OSError:
    os.remove("/tmp/0")
try:
    file = os.open("/tmp/large", os.O_WRONLY | os.O_CREAT)
    while True:
        size += os.write(file, b"x" * 4096)
except OSError:
    print(made, size)
"""
    if "bubblewrap" in kinds:
        end = run_plain(caged("bubblewrap"), program, Limits(seconds=30.0, scratch=1 << 20))
        made, size = map(int, end.output.split())
        assert (
            made == 255 and size <= 1 << 20 and size >= (1 << 20) - 8192
        )  # 256 files, the folder among them
    if "landlock" in kinds:  # it cannot bound what is written, so nothing is
        assert (
            "PermissionError"
            in run_plain(caged("landlock"), "open('/tmp/x', 'w')", Limits(scratch=1 << 20)).error
        )


def test_where_no_cage_holds_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail closed: a machine without bubblewrap and Landlock, and one where they are there and do
    not hold."""
    self_test._tried.cache_clear()
    monkeypatch.setattr(
        cages_module, "call_filter", lambda *rights: "060000000000ff7f"
    )  # a filter that allows everything
    monkeypatch.setattr(self_test, "Isolation", lambda kind: Isolation("landlock"))
    try:
        with pytest.raises(
            SandboxError, match=r"does not hold; what came through: .*fork.*internet"
        ):
            asyncio.run(sandbox.run("print(1)"))
        with pytest.raises(SandboxError, match="cannot be run on this machine"):
            asyncio.run(sandbox.run("1 + 1", {}))
        with pytest.raises(SandboxError):
            asyncio.run(sandbox.check("def f(x): pass", HIDDEN))
        assert sandbox.state()[0] == "none"
        monkeypatch.setattr("platform.system", lambda: "Darwin")
        self_test._tried.cache_clear()
        with pytest.raises(SandboxError, match="Darwin"):
            asyncio.run(sandbox.run("print(1)"))
    finally:
        monkeypatch.undo()
        self_test._tried.cache_clear()


def test_a_missing_bubblewrap_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="apt install bubblewrap"):
        self_test.run_self_test(Isolation("bubblewrap"))


@pytest.mark.parametrize("kind", [held.kind for held in HELD])
def test_harmless_programs_work(kind: str) -> None:
    program = """
import asyncio, collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math, random, re, statistics
async def twice(x):
    await asyncio.sleep(0)
    return 2 * x
print(asyncio.run(twice(21)), hashlib.sha256(b"x").hexdigest()[:4], fractions.Fraction(1, 3), statistics.mean([1, 2]), "ü")
"""
    end = run_plain(caged(kind), program, PATIENT)
    assert end.ok and end.output == "42 2d71 1/3 1.5 ü\n"
    failed = run_plain(caged(kind), "print('before')\nraise KeyError('what')", PATIENT)
    assert (failed.status, failed.output, failed.error) == ("error", "before\n", "KeyError: 'what'")
    assert run_plain(caged(kind), "def f(:", PATIENT).status == "syntax"
    assert (
        run_plain(caged(kind), "x = '\ud800'", PATIENT).status == "syntax"
    )  # no text, so no program


def test_values_cross_as_builtin_types_and_tests_are_counted_one_by_one() -> None:
    program = """
import collections
Point = collections.namedtuple("Point", "x y")
def same(value): return value
def kinds(): return [Point(1, 2), collections.Counter("aab"), collections.OrderedDict(a=1), True, 2**200, -0.5, 1j, b"x", {1, (2,)}, None]
def wrong(): raise ValueError("no")
def stuck():
    while True: pass
"""
    values = (
        "[(1, [2, {'a': {3}}]), float('inf'), -7, '\\u20ac', b'\\x00', frozenset({1}), {(1, 2):"
        " None}]"
    )
    tests = TestSuite(
        (
            f"assert all(same(v) == v and type(same(v)) is type(v) for v in {values})",
            (
                "assert kinds() == [(1, 2), {'a': 2, 'b': 1}, {'a': 1}, True, 2**200, -0.5, 1j,"
                " b'x', {1, (2,)}, None]"
            ),
            (
                "try:\n    wrong()\nexcept ValueError as error:\n    assert str(error) =="
                " 'no'\nelse:\n    raise AssertionError"
            ),
            "assert same(value=helper(1)) == 2",
            "assert same(1) == 2",
            "stuck()",
            "assert same(1) == 1",
        ),
        ("same", "kinds", "wrong", "stuck"),
        setup="def helper(x): return x + 1",
    )
    (verdict,) = {
        check_plain(held, program, tests, Limits(seconds=2.0)) for held in HELD
    }  # in every cage the same
    late = "not done within 2 s"
    assert verdict.results == ("", "", "", "", "AssertionError: ", late, late)
    assert verdict.share == pytest.approx(4 / 7) and not verdict.passed


def test_calls_are_answered_in_rounds_so_that_timing_orders_nothing() -> None:
    """Two branches of two calls each: whichever is faster, the order of calls is that of the
    program."""
    program = """
import asyncio
async def branch(name):
    return await ask(await ask(name))
await asyncio.gather(branch("a"), branch("b"), branch("c"))
"""

    async def play(delays: dict[str, float]) -> tuple[list[str], object]:
        order: list[str] = []

        def ask(text: str) -> object:
            order.append(text)

            async def answer() -> str:
                await asyncio.sleep(delays.get(text, 0.0))
                return text + "!"

            return answer()

        return order, (await sandbox.run(program, {"ask": ask})).value  # type: ignore[dict-item]

    one = asyncio.run(play({"a": 0.05}))
    other = asyncio.run(play({"c": 0.05, "b!": 0.05}))
    assert one == other == (["a", "b", "c", "a!", "b!", "c!"], ["a!!", "b!!", "c!!"])


def test_an_externals_own_failure_ends_the_run_and_misuse_is_the_programs_to_handle() -> None:
    async def broken(x: int) -> int:
        raise ConnectionError("the server is gone")

    async def picky(x: int) -> int:
        if x > 1:
            raise sandbox.ProgramError("x is at most 1")
        return x

    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(
            sandbox.run(
                "try:\n    await broken(1)\nexcept Exception:\n    pass", {"broken": broken}
            )
        )
    program = (
        "try:\n    await picky(2)\nexcept ValueError as error:\n    said = str(error)\n(said, await"
        " picky(1))"
    )
    assert asyncio.run(sandbox.run(program, {"picky": picky})).value == ("x is at most 1", 1)


def test_a_cancelled_run_is_ended_at_once() -> None:
    async def cancelled() -> None:
        waiting = asyncio.ensure_future(
            sandbox.run("import time\ntime.sleep(1000)", None, Limits(seconds=1000.0))
        )
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cancelled())
    # The thread is free again: as many programs as there are threads run to their ends.
    assert all(end.ok for end in asyncio.run(_several(8)))


async def _several(count: int) -> list:  # type: ignore[type-arg]
    return await asyncio.gather(*(sandbox.run("print(1)", None, PATIENT) for _ in range(count)))


def test_the_python_tool_answers_a_model() -> None:
    calls = iter(
        [
            (
                '<tool_call>{"name": "python", "arguments": {"program": "print(6 *'
                ' 7)\\n1/0"}}</tool_call>'
            ),
            "42",
        ]
    )
    team = fake_team(
        [AgentSpec("solver", tools=("python",))],
        lambda agent, messages: next(calls),
        execute=sandbox.run,
    )

    async def talk() -> str:
        return (await team["solver"].reply(Task("t", "6 * 7?").prompt)).text

    assert asyncio.run(talk()) == "42"
    assert (
        "<tools>" in team.turns[0].messages[0].content
        and '"name": "python"' in team.turns[0].messages[0].content
    )
    assert (
        team.turns[1].messages[-1].content
        == "<tool_response>\n42\n\nerror: ZeroDivisionError: division by zero\n</tool_response>"
    )


def test_the_python_tool_without_a_sandbox_is_no_answer_but_an_end() -> None:
    call = '<tool_call>{"name": "python", "arguments": {"program": "1"}}</tool_call>'
    team = fake_team([AgentSpec("solver", tools=("python",))], lambda agent, messages: call)
    with pytest.raises(SandboxError, match="has no sandbox"):
        asyncio.run(team["solver"].reply("?"))  # type: ignore[arg-type]


def test_many_workflow_programs_at_once_may_be_the_first() -> None:
    """None of them finds the pool half open: not in one event loop, nor in several."""
    pool = Interpreter(self_test.isolation())

    async def several(start: int) -> list[object]:
        return [
            end.value
            for end in await asyncio.gather(
                *(pool.run(f"{start + n} + 1", {}, PATIENT) for n in range(4))
            )
        ]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda start: asyncio.run(several(start)), (0, 10))) == [
            [1, 2, 3, 4],
            [11, 12, 13, 14],
        ]
