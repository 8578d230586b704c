"""Built-in reward functions of a task and an episode, sync or async.

A reward returns a `Reward`, several of them, or a bare number or bool (then it is the team's, named
like the function). It sees the whole task, the answer included. A reward that fails makes the
episode unscorable, which is not the same as worth 0.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Awaitable, Callable, Iterable
from fractions import Fraction
from typing import Any

from ...agents.lookup import load_function, trusted
from ...agents.programs.workflow import SOURCE as WORKFLOW
from ...agents.text.answers import extract, normalise, same
from ...agents.tools.verifiers import resolve_verifier, verify
from ...agents.types import Reward, SettingError, Task, Turn
from ..types import Episode
from .code import hidden_verdict
from .judge import judge
from .math_check import CheckerError, CheckerTimeout, equal, gym_score
from .qa import scores
from .scoring import RewardFn, awaited, check_names, fn_name, is_missing

EXPLICIT = re.compile(r"\\boxed\s*\{|\banswer\b[^\n:=]{0,20}[:=]|####", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_EXACT = re.compile(
    r"[-+]?(?:\d{1,500}(?:\.\d{0,500})?|\.\d{1,500})(?:e[-+]?\d{1,3})?(?:/\d{1,500})?"
)
# three letters in a row: a word, which math-verify would take for a product of variables
_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|log|exp|sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|mod|max|min"
_MATH_WORDS = re.compile(rf"\\[a-zA-Z]+|\b(?:{_FUNCTIONS})\b")


# rewards


async def correct(task: Task, episode: Episode) -> Reward:
    """1 if the team's output is the task's answer, else 0.

    Equal is: the same after normalisation, or the same mathematically (math-verify; in another
    process, 3 s at most). Tasks of reasoning-gym are scored by their own set, and count if it gives
    the full score. Several answers (a list) are alternatives. Programs have to pass every hidden
    test (`passed_tests`), HotpotQA and DROP ask for their exact match (`em`).
    """
    grader = next((fn for key, fn in GRADERS.items() if key in task.meta), _compared)
    return await grader(task, episode)


async def _compared(task: Task, episode: Episode) -> Reward:
    """`correct` of a task set without a grader of its own: the output against the task's answer."""
    several = task.answer if isinstance(task.answer, (list, tuple)) else [task.answer]
    golds = [str(gold) for gold in several if not is_missing(gold) and str(gold).strip()]
    if not golds:
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    if not (episode.output or "").strip():
        return Reward("correct", 0.0, "no answer")
    text = ""
    for gold in golds:
        answer = _candidate(episode.output or "", numeric=is_mathematical(gold))
        if same(answer, gold):
            return Reward("correct", 1.0)
        try:
            if (
                not _both_numbers(gold, answer)
                and is_mathematical(gold)
                and await equal(gold, answer)
            ):
                return Reward("correct", 1.0)
        except (CheckerTimeout, CheckerError) as error:  # a comparison that the answer broke
            text = str(error)
    return Reward("correct", 0.0, text)


async def _all_tests_pass(task: Task, episode: Episode) -> Reward:
    passed = await passed_tests(task, episode)
    return dataclasses.replace(passed, name="correct", value=float(passed.value == 1.0))


async def _exact_match(task: Task, episode: Episode) -> Reward:
    return Reward("correct", em(task, episode))


async def _full_score(task: Task, episode: Episode) -> Reward:
    score = await graded(task, episode)
    return Reward("correct", float(score.value >= 1.0 - 1e-9), score.text)


# how `correct` grades the tasks of a set: by the key of `task.meta` under which the set stores what
# its grader reads. Other tasks are compared with their answer.
GRADERS: dict[str, Callable[[Task, Episode], Awaitable[Reward]]] = {
    "_tests": _all_tests_pass,
    "_scorer": _exact_match,
    "_reasoning_gym": _full_score,
}


async def graded(task: Task, episode: Episode) -> Reward:
    """What a reasoning-gym set itself gives the output: 0 to 1, with its own partial points."""
    if "_reasoning_gym" not in task.meta:
        raise ValueError(f"task {task.id!r} is not of a reasoning-gym set; use `correct`")
    if not (episode.output or "").strip():
        return Reward("graded", 0.0, "no answer")
    own = task.meta["_reasoning_gym"]
    try:
        return Reward(
            "graded",
            await gym_score(
                own["name"], own["args"], own["entry"], _candidate(episode.output or "")
            ),
        )
    except (CheckerTimeout, CheckerError) as error:
        return Reward("graded", 0.0, str(error))


async def passed_tests(task: Task, episode: Episode) -> Reward:
    """Share of a coding task's hidden tests that the output's program passes, in the sandbox. Its
    text tells how many, never which."""
    if not (episode.output or "").strip():
        return Reward("passed_tests", 0.0, "no program")
    verdict = await hidden_verdict(task, episode.output or "")
    passed = sum(not result for result in verdict.results)
    return Reward(
        "passed_tests", verdict.share, f"{passed} of {len(verdict.results)} hidden tests passed"
    )


def em(task: Task, episode: Episode) -> float:
    """Exact match of HotpotQA and DROP (see `rewards/qa.py`), for any task with a text for an
    answer."""
    return scores(_candidate(episode.output or ""), task)[0]


def f1(task: Task, episode: Episode) -> float:
    """F1 of HotpotQA and DROP over words (see `rewards/qa.py`), for any task with a text for an
    answer."""
    return scores(_candidate(episode.output or ""), task)[1]


def exact(task: Task, episode: Episode) -> float:
    """1 if the output is the answer character by character, but for white space around it."""
    if is_missing(task.answer):
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    return float((episode.output or "").strip() == str(task.answer).strip())


def close(task: Task, episode: Episode) -> float:
    """1 if the output's number is near the answer: within 4 % of one with a decimal point, rounded
    to a whole one.

    So SiriuS scores numbers (arXiv 2502.04780). Bounds count, and are exact: fractions, no floating
    point. Other answers have to read the same.
    """
    if is_missing(task.answer):
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    gold, text = str(task.answer), _candidate(episode.output or "", numeric=True)
    try:
        value, answer = _fraction(gold), _fraction(text)
    except (ValueError, ZeroDivisionError):
        return float(same(text, gold))
    if "." in gold:
        return float(abs(answer - value) <= abs(value) * Fraction(4, 100))
    return float(round(answer) == value)


def format_ok(task: Task, episode: Episode) -> Reward:
    r"""1 if the last reply says its answer in so many words: `\boxed{...}`, `Answer: ...` or `####
    ...`. Apart from correctness."""
    last = next((turn for turn in reversed(episode.turns) if turn.taken), None)
    return Reward("format", float(last is not None and bool(EXPLICIT.search(last.text))))


format_ok.__name__ = "format"  # like the reward it gives


def length(task: Task, episode: Episode) -> float:
    """Minus the thousands of tokens the team sampled in turns it took; for metrics: it is learnt
    from only if `reward_weights` names it, with a small weight."""
    return -sum(len(turn.token_ids) for turn in episode.turns if turn.taken) / 1000


async def right(task: Task, episode: Episode) -> list[Reward]:
    """Of each turn: `correct`, as if its text were the team's output. It reads the gold answer, so
    no agent is ever shown it."""
    rewards = []
    for turn in episode.turns:
        value = await correct(task, dataclasses.replace(episode, output=turn.text))
        rewards.append(
            dataclasses.replace(
                value, name="right", agent=turn.agent, turn=turn.index, sibling=turn.sibling
            )
        )
    return rewards


@trusted("reward maker")
def verified(name: str) -> RewardFn:
    """Of each turn: what the verifier of this name says of its text, from 0 to 1 (see
    `agents.tools.verifiers.resolve_verifier`)."""
    verifier = resolve_verifier(name)
    reward = per_turn(lambda task, turn: verify(verifier, task, turn.text), "verifier")
    reward.__module__, reward.__qualname__ = (__name__, f"verified({name})")  # for `reward_name`
    return reward


def returned(task: Task, episode: Episode) -> list[Reward]:
    """The reward that a user's own program returned for its episode (see `gateway/programs.py`);
    NaN if it returned none."""
    return _by_source(episode, "returned")


def posted(task: Task, episode: Episode) -> list[Reward]:
    """The reward that was posted to the gateway for the episode with its reward token; NaN if none
    was."""
    return _by_source(episode, "posted")


def workflow(task: Task, episode: Episode) -> list[Reward]:
    """The rewards that a workflow system gives itself. Of each program that a designer wrote, by
    its turn: `valid` (it can be run) and `ran` (its run gave an answer); the reason why not is the
    reward's text. Both count towards training only if `reward_weights` names them. Over rounds also
    `val` of each and, for the team, `performance`, `complexity` and `efficiency`. See
    `marlora.agents.programs.workflow` and `flowreasoner`.
    """
    return [r for r in episode.rewards if r.source == WORKFLOW]


def _by_source(episode: Episode, source: str) -> list[Reward]:
    return [r for r in episode.rewards if r.source == source] or [
        Reward(source, math.nan, f"no reward was {source}", source=source)
    ]


REWARDS: dict[str, Callable[..., Any]] = {
    "correct": correct,
    "exact": exact,
    "close": close,
    "em": em,
    "f1": f1,
    "format": format_ok,
    "graded": graded,
    "judge": judge,
    "length": length,
    "passed_tests": passed_tests,
    "posted": posted,
    "returned": returned,
    "right": right,
    "verified": verified,
    "workflow": workflow,
}


# what stands in the brackets of a reward's name that has some
MAKERS: dict[Callable[..., Any], str] = {
    judge: "judge(HELPER) or judge(URL, MODEL)",
    verified: "verified(VERIFIER)",
}


def resolve_rewards(names: Iterable[str | RewardFn] | str | RewardFn) -> list[RewardFn]:
    """Reward functions by name (`correct`, `verified(calculator)`, `judge(URL, MODEL)`,
    `module:function`), several or one.

    Raises `SettingError` naming the one that cannot be found, or two of one name.
    """
    given = [names] if isinstance(names, str) or callable(names) else list(names)
    functions = [
        load_function("reward", each, REWARDS) if isinstance(each, str) else each for each in given
    ]
    for given_name, function in zip(given, functions, strict=True):
        if function in MAKERS:
            raise SettingError(
                f"reward {given_name!r}: expected brackets behind it: {MAKERS[function]}"
            )
    check_names(functions)
    return functions


# makers of rewards


def per_turn(value: Callable[[Task, Turn], Any], name: str = "") -> RewardFn:
    """A reward for each turn, siblings included: `value(task, turn)`, sync or async."""

    async def rewards(task: Task, episode: Episode) -> list[Reward]:
        return [
            Reward(
                name or fn_name(value),
                float(await awaited(value(task, t))),
                agent=t.agent,
                turn=t.index,
                sibling=t.sibling,
            )
            for t in episode.turns
        ]

    rewards.__name__ = name or fn_name(value)
    return rewards


# reading answers


def _fraction(text: str) -> Fraction:
    """A number, exactly. Raises `ValueError` for what is none, and for one of so many digits that
    reading it would fill the memory."""
    text = normalise(text)
    if not _EXACT.fullmatch(text):
        raise ValueError(f"not a number: {text[:40]!r}")
    return Fraction(text)


def is_mathematical(gold: str) -> bool:
    return not _WORD.search(_MATH_WORDS.sub(" ", gold))


def _both_numbers(a: str, b: str) -> bool:
    """Plain numbers that differ when read exactly do differ; no need to ask."""
    return bool(_NUMBER.fullmatch(a.strip()) and _NUMBER.fullmatch(b.strip()))


def _candidate(output: str, numeric: bool = False) -> str:
    """The answer in an output: what it says explicitly; else its last number where a number is
    asked for; else all of it."""
    answer = extract(output) if numeric or EXPLICIT.search(output) else None
    return output.strip() if answer is None else answer


def reward_name(fn: RewardFn) -> str:
    """How settings name a reward function: its short name if it is built in, else
    `module:function`."""
    short = next((name for name, known in REWARDS.items() if known is fn), None)
    return short or f"{fn.__module__}:{getattr(fn, '__qualname__', type(fn).__name__)}"
