"""What a model answers is never run: hostile answers against every scorer, and right ones directly
afterwards."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from marlora.agents.execution import Limits, SandboxError
from marlora.agents.types import Task, Turn
from marlora.rollouts.rewards import math_check
from marlora.rollouts.rewards.builtin import REWARDS, correct, exact, graded, resolve_rewards
from marlora.rollouts.rewards.judge import verdict
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.sandbox import scorer, self_test
from marlora.rollouts.sandbox.isolation import interpreter, package_folders, without_packages
from marlora.rollouts.sandbox.python import run_plain
from marlora.rollouts.sandbox.scorer import unplain
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode
from tests.rollouts.hostile import CODE, LOADS, answers

EVALUATES = re.compile(r"\beval\(|parse_expr|sympify|literal_eval|\bexec\(|json\.loads|yaml\.")
SETS_THAT_EVALUATE = (
    "binary_matrix",
    "boxnet",
    "codeio",
    "countdown",
    "game_of_life",
    "graph_color",
    "intermediate_integration",
    "jugs",
    "knight_swap",
    "n_queens",
    "number_sorting",
    "palindrome_partitioning",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
READ_AS_NO = {
    "game_of_life_halting"
}  # whatever does not say yes is a no to it, and right half of the time
THEN_A_RIGHT_ONE = {
    "shell",
    "the set patched",
    "setattr",
    "end",
    "every descriptor",
    "a later writer",
    "nesting",
    "power",
    "NUL",
}
MATHS = Task("math", "?", r"\frac{1}{2}")
CODING = Task(
    "code",
    "?",
    "x",
    "humaneval",
    meta={"names": ["f"], "setup": "", "tests": [], "_tests": ["assert f(3) == 9"]},
)
WORDS = Task("words", "?", ["Marie Curie"], "hotpotqa", meta={"_scorer": "hotpotqa"})
SPANS = Task("spans", "?", [["12", "red house"]], "drop", meta={"_scorer": "drop"})
SUM = Task("sum", "What is 20 + 22?", "42")
# Of each reward that reads what a model wrote: a task, and a right answer.
READERS: dict[str, tuple[Task, str]] = {
    "correct": (MATHS, "0.5"),
    "exact": (SUM, "42"),
    "close": (SUM, "42"),
    "em": (WORDS, "Marie Curie"),
    "f1": (SPANS, "12 | red house"),
    "right": (MATHS, r"\boxed{1/2}"),
    "verified(calculator)": (SUM, "42"),
    "passed_tests": (CODING, "def f(x): return x * x"),
}
READ_NOTHING = {
    "format",
    "length",
    "posted",
    "returned",
    "workflow",
}  # of the answer; `format` looks for a mark alone


def said(text: str) -> Episode:
    return Episode("e", "g", MATHS, turns=(Turn(0, "a", text=text),), output=text)


@pytest.fixture(scope="module")
def secret() -> Iterator[str]:
    """A key in the environment from before the scorers start, and short times for what runs
    long."""
    stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_verysecret")
        patch.setattr(math_check._gym, "timeout", 0.8)
        patch.setattr(math_check._math, "timeout", 0.8)
        yield "hf_verysecret"
    stop()


def stop() -> None:
    for each in (math_check._gym, math_check._math):
        each.stop()
        each._slow.clear()


def of_set(name: str) -> Task:
    (task,) = load_tasks(f"reasoning-gym:{name}", limit=1, num_tasks=1)
    return task


def attack(
    reward: str, task: Task, right: str | None, hostile: dict[str, str], secret: str
) -> dict[str, object]:
    """What came through, by name of the answer: full reward, a failed reward, a secret, or a right
    answer that lost its reward."""
    (fn,) = resolve_rewards(reward)

    async def all_of_them() -> dict[str, object]:
        through: dict[str, object] = {}
        for name, text in hostile.items():
            (found,) = await score(task, said(text), [fn])
            if not found.value < 1.0 or secret in found.text or len(found.text) > 3000:
                through[name] = found
            if right is not None and name in THEN_A_RIGHT_ONE:
                (found,) = await score(task, said(right), [fn])
                if found.value != 1.0:
                    through[f"right after {name}"] = found
        return through

    return asyncio.run(all_of_them())


def test_every_reward_that_reads_an_answer_is_attacked() -> None:
    elsewhere = {"graded", "judge"}  # `judge` asks a model; below is what its reply may do
    assert {name.split("(")[0] for name in READERS} | elsewhere | READ_NOTHING == set(REWARDS)
    assert len(CODE) + len(LOADS) >= 60


@pytest.mark.parametrize("name", READERS)
def test_no_reward_runs_an_answer(name: str, secret: str, tmp_path: Path) -> None:
    task, right = READERS[name]
    mark = tmp_path / "mark"
    assert (
        attack(
            name, task, right, answers(str(mark), quick=name in ("passed_tests", "right")), secret
        )
        == {}
    )
    assert not mark.exists()


def test_a_judge_that_was_talked_into_anything_takes_no_time_and_runs_nothing(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "mark"
    for text in (
        *answers(str(mark)).values(),
        "<SCORE>" + " " * 100_000 + "x",
        "<SCORE>" + "9" * 100_000 + "</SCORE>",
        "<SCORE>9</SCORE>" + " " * 100_000,
        "<SCORE>" * 20_000 + "9</SCORE>",
    ):
        start = time.process_time()
        assert math.isnan(verdict(text)) and time.process_time() - start < 1.0
    assert not mark.exists()


@pytest.mark.parametrize("name", ["countdown", "string_insertion", "complex_arithmetic"])
def test_sets_that_evaluate_run_no_answer(name: str, secret: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    task = of_set(name)
    assert (
        attack("graded", task, task.answer, answers(str(mark), quick=name != "countdown"), secret)
        == {}
    )
    assert not mark.exists()


def test_sets_that_evaluate_are_known() -> None:
    from reasoning_gym.factory import DATASETS

    found = {
        name for name, (kind, _) in DATASETS.items() if EVALUATES.search(inspect.getsource(kind))
    }
    assert found <= set(SETS_THAT_EVALUATE) | {"group_anagrams", "figlet_font", "composite"}
    assert set(SETS_THAT_EVALUATE) <= set(DATASETS)


@pytest.mark.slow
def test_no_set_runs_an_answer(secret: str, tmp_path: Path) -> None:
    from reasoning_gym.factory import DATASETS

    mark, through = tmp_path / "mark", {}
    first = of_set("countdown")
    for name in sorted(
        set(DATASETS) - {"composite"}
    ):  # composite is made of others, named in its settings
        task = of_set(name)
        hostile = answers(str(mark), quick=True)
        if name in SETS_THAT_EVALUATE:
            hostile |= {
                key: text
                for key, text in answers(str(mark)).items()
                if key in CODE or key == "power"
            }
        found = attack("graded", task, None, hostile, secret)
        if found and name not in READ_AS_NO:
            through[name] = found
        assert (
            asyncio.run(graded(first, said(str(first.answer)))).value == 1.0
        )  # of another set, directly afterwards
        if task.answer is not None and asyncio.run(graded(task, said(task.answer))).value != 1.0:
            through[name] = {"its own answer": task.answer}
    assert through == {}
    assert not mark.exists()


@pytest.mark.slow
def test_the_cage_changes_no_score_of_an_honest_answer() -> None:
    import reasoning_gym

    async def compared(name: str) -> list[tuple[str, float, float]]:
        one, other = load_tasks(f"reasoning-gym:{name}", limit=2)
        own = one.meta["_reasoning_gym"]
        dataset = reasoning_gym.create_dataset(own["name"], **own["args"])
        found = []
        for answer in (
            one.answer,
            other.answer,
            "1 + 1",
            "[1, 2]",
            "x**2 + 2*x",
            "2*x/3 + sin(x) + C",
            "[['A', 'B'], ['C']]",
        ):
            direct = dataset.score_answer(answer=answer, entry=unplain(own["entry"]))
            caged = (await graded(one, said(answer or "-"))).value
            found.append((f"{name}: {answer}", direct, caged))
        return found

    sets = sorted(
        set(SETS_THAT_EVALUATE) - {"boxnet", "graph_color"}
    )  # these two have no answer of their own
    told = [each for name in sets for each in asyncio.run(compared(name))]
    assert [each for each in told if each[1] != each[2]] == []
    assert sum(direct == 1.0 for _, direct, _ in told) >= len(sets)


def test_no_cage_no_score_and_plain_equality_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_holds() -> None:
        raise SandboxError("programs of a model cannot be run on this machine: no cage")

    stop()
    monkeypatch.setattr(math_check, "isolation", none_holds)
    assert asyncio.run(correct(Task("t", "?", "0.5"), said("1/2"))).value == 1.0
    assert asyncio.run(correct(Task("t", "?", "42"), said("43"))).value == 0.0
    assert exact(SUM, said("42")) == 1.0
    with pytest.raises(SandboxError, match="on this machine"):
        asyncio.run(score(Task("t", "?", "x+1"), said("1+x"), [correct]))
    assert math_check._math._scorer is None


# the parts


def test_what_may_be_evaluated_and_what_not() -> None:
    import sympy
    from sympy.parsing.sympy_parser import eval_expr

    guard = scorer.Guard()
    caller = type(
        "Frame",
        (),
        {
            "f_code": eval_expr.__code__,
            "f_locals": {"local_dict": {"x": sympy.Symbol("x"), "evil": print}},
        },
    )()
    other = type("Frame", (), {"f_code": compile("0", "x.py", "eval"), "f_locals": {"entry": 1}})()

    def refused(text: str, who: object) -> bool:
        return bool(guard.refused(compile(text, "<string>", "eval"), who))  # type: ignore[arg-type]

    mathematics = (
        "Integer(2)*Symbol('x')**Rational('1/2')",
        "sin(x) + E",
        "-x/3 + Function('f')(x)",
        "Add(1, 2, evaluate=False)",
    )
    assert not any(refused(text, caller) for text in mathematics)
    assert all(
        refused(text, caller)
        for text in ("evil(1)", "x.y", "S('1')", "y", "lambda: 1", "open('x')")
    )
    assert not any(
        refused(text, other)
        for text in ("[1, 'a', [2.5, None]]", "('a',)", "-1", "{'a': 1}", "True", "1 + 2 * 3")
    )
    assert all(
        refused(text, other)
        for text in ("entry", "sin(1)", "[entry]", "f'{entry}'", "().__class__", "[1 for _ in ()]")
    )


@pytest.mark.parametrize(
    "said_by_child",
    [
        b"",
        b"1.0",
        b"[1.0]",
        b'{"result": 2.0}',
        b'{"result": NaN}',
        b'{"result": true}',
        b'{"result": "1.0"}',
        b'{"result": 1.0}' * 2,
        b'{"result": 1.0, "more": 1}',
        b'{"error": 5}',
        b"\xff",
        b"[" * 900,
    ],
)
def test_a_verdict_that_is_not_one_score_is_none(said_by_child: bytes) -> None:
    told = scorer.valid_verdict(said_by_child)
    assert set(told) == {"error"}
    assert scorer.valid_verdict(b'{"result": 0.25}') == {"result": 0.25}


PROBE = """
def probe_work(job):
    import builtins
    def work(request):
        told = {"open": [], "environment": sorted(set(os.environ) & {"HF_TOKEN", "HOME"}), "patched": getattr(builtins, "patched", None)}
        for fd in range(64):
            try:
                os.fstat(fd)
                told["open"].append(fd)
            except OSError:
                pass
        for name, act in (("fork", os.fork), ("run", lambda: os.execv("/bin/true", ["true"])), ("kill", lambda: os.kill(os.getppid(), 0)),
                          ("read", lambda: open("/etc/passwd")), ("write", lambda: open(request["mark"], "w"))):
            try:
                act()
                told[name] = "done"
            except OSError as error:
                told[name] = "refused"
        builtins.patched = True
        raise ValueError(json.dumps(told))
    return lambda setup: work
WORKERS["probe"] = probe_work
"""


def test_a_child_could_do_nothing_even_if_an_answer_did_run(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line behind the hook, so without the hook: its descriptors, rights and memory,
    asked by a scorer of ours."""
    text = math_check.SCORER.read_text("utf-8").replace("    sys.addaudithook(guard)\n", "")
    (tmp_path / "scorer.py").write_text(text + PROBE, encoding="utf-8")
    monkeypatch.setattr(math_check, "SCORER", tmp_path / "scorer.py")
    monkeypatch.setitem(math_check.PACKAGES, "probe", "tabulate")
    probe = math_check.Checker("probe", 5.0)
    for _ in range(2):  # the second child knows nothing of what the first one left
        with pytest.raises(math_check.CheckerError, match="ValueError: ") as told:
            asyncio.run(probe.ask(None, "", mark=str(tmp_path / "mark")))
        assert json.loads(str(told.value).split(": ", 1)[1]) == {
            "open": [0, 1, 2, 3],
            "environment": [],
            "patched": None,
            "fork": "refused",
            "run": "refused",
            "kill": "refused",
            "read": "refused",
            "write": "refused",
        }
    probe.stop()
    assert not (tmp_path / "mark").exists()


def test_the_packages_of_python_are_hidden_from_programs(tmp_path: Path) -> None:
    """Of Python's own library all can be read, of the packages installed beside it none."""
    for name in ("lib/site-packages/secret", "lib/python3/dist-packages", "lib/json"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("lib/os.py", "lib/python3/x.py", "lib/site-packages/secret/a.py"):
        (tmp_path / name).write_text("")
    listed, readable = without_packages((str(tmp_path / "lib"), "/dev/null"))
    assert listed == [f"{tmp_path}/lib", f"{tmp_path}/lib/python3"]
    assert readable == [
        f"{tmp_path}/lib/json",
        f"{tmp_path}/lib/os.py",
        f"{tmp_path}/lib/python3/x.py",
        "/dev/null",
    ]


def test_packages_that_python_itself_has_cannot_be_read_in_any_cage() -> None:
    found = [
        file
        for path in interpreter()[1]
        for folder in package_folders(path)
        for file in sorted(Path(folder).glob("*/__init__.py"))
    ]
    assert found, "this Python has no packages of its own (pip at least): nothing to hide"
    for held in self_test.isolations():
        for file in (found[0], found[-1]):
            ran = run_plain(
                held,
                f"print(open({str(file)!r}).read(10), 'THROUGH')",
                Limits(seconds=20.0, memory=256 << 20),
            )
            assert ran.status == "error" and "THROUGH" not in ran.output
            assert "PermissionError" in ran.error or "FileNotFoundError" in ran.error
