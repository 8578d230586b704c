"""Rewards: functions of a task and an episode, sync or async.

A reward returns a `Reward`, several of them, or a bare number or bool (then it is the team's, named
like the function). It sees the whole task, the answer included. A reward that fails makes the
episode unscorable, which is not the same as worth 0.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from ...agents.lookup import load_function, trusted
from ...agents.programs.workflow import SOURCE as WORKFLOW
from ...agents.seeds import derive_seed
from ...agents.text.answers import extract, normalise, same
from ...agents.tools.verifiers import resolve_verifier, verify
from ...agents.types import AgentSpec, Ask, Call, Message, Reward, Sampling, Task, Turn
from ..types import Episode
from .code import hidden_verdict
from .math_check import CheckerError, CheckerTimeout, equal, gym_score
from .qa import scores
from .scoring import RewardFn, _awaited, fn_name

_EXPLICIT = re.compile(r"\\boxed\s*\{|\banswer\b[^\n:=]{0,20}[:=]|####", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_EXACT = re.compile(
    r"[-+]?(?:\d{1,500}(?:\.\d{0,500})?|\.\d{1,500})(?:e[-+]?\d{1,3})?(?:/\d{1,500})?"
)
_SCORE = re.compile(
    r"score\s{0,20}[:=]\s{0,20}\*{0,4}\s{0,20}(-?\d{1,30}(?:\.\d{1,30})?)(?!\d)", re.IGNORECASE
)
_WORD = re.compile(
    r"[^\W\d_]{3,}"
)  # three letters in a row: a word, which math-verify would take for a product of variables
_MATH_WORDS = re.compile(
    r"\\[a-zA-Z]+|\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|mod|max|min)\b"
)


# rewards


async def correct(task: Task, episode: Episode) -> Reward:
    """1 if the team's output is the task's answer, else 0.

    Equal is: the same after normalisation, or the same mathematically (math-verify; in another
    process, 3 s at most). Tasks of reasoning-gym are scored by their own set, and count if it gives
    the full score. Several answers (a list) are alternatives. Programs have to pass every hidden
    test (`passed_tests`), HotpotQA and DROP ask for their exact match (`em`).
    """
    if "_tests" in task.meta:
        return dataclasses.replace(
            passed := await passed_tests(task, episode),
            name="correct",
            value=float(passed.value == 1.0),
        )
    if "_scorer" in task.meta:
        return Reward("correct", em(task, episode))
    if "_reasoning_gym" in task.meta:
        score = await graded(task, episode)
        return Reward("correct", float(score.value >= 1.0 - 1e-9), score.text)
    if task.answer is None:
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    golds = [
        str(gold)
        for gold in (task.answer if isinstance(task.answer, (list, tuple)) else [task.answer])
    ]
    if not (episode.output or "").strip():
        return Reward("correct", 0.0, "no answer")
    text = ""
    for gold in golds:
        found = _candidate(episode.output or "", numeric=_is_mathematical(gold))
        if same(found, gold):
            return Reward("correct", 1.0)
        try:
            if (
                not _both_numbers(gold, found)
                and _is_mathematical(gold)
                and await equal(gold, found)
            ):
                return Reward("correct", 1.0)
        except (
            CheckerTimeout,
            CheckerError,
        ) as error:  # what a model wrote to break the comparison is a wrong answer
            text = str(error)
    return Reward("correct", 0.0, text)


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
    """Exact match of HotpotQA and DROP (see `reading.py`), for any task with a text for an
    answer."""
    return scores(_candidate(episode.output or ""), task)[0]


def f1(task: Task, episode: Episode) -> float:
    """F1 of HotpotQA and DROP over words (see `reading.py`), for any task with a text for an
    answer."""
    return scores(_candidate(episode.output or ""), task)[1]


def exact(task: Task, episode: Episode) -> float:
    """1 if the output is the answer character by character, but for white space around it."""
    if task.answer is None:
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    return float((episode.output or "").strip() == str(task.answer).strip())


def close(task: Task, episode: Episode) -> float:
    """1 if the output's number is near the answer: within 4 % of one with a decimal point, rounded
    to a whole one.

    So SiriuS scores numbers (arXiv 2502.04780). Bounds count, and are exact: fractions, no floating
    point. Other answers have to read the same.
    """
    if task.answer is None:
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    gold, found = str(task.answer), _candidate(episode.output or "", numeric=True)
    try:
        value, said = _fraction(gold), _fraction(found)
    except (ValueError, ZeroDivisionError):
        return float(same(found, gold))
    return float(
        abs(said - value) <= abs(value) * Fraction(4, 100) if "." in gold else round(said) == value
    )


def format_ok(task: Task, episode: Episode) -> Reward:
    r"""1 if the last reply says its answer in so many words: `\boxed{...}`, `Answer: ...` or `####
    ...`. Apart from correctness."""
    last = next((turn for turn in reversed(episode.turns) if turn.taken), None)
    return Reward("format", float(last is not None and bool(_EXPLICIT.search(last.text))))


format_ok.__name__ = "format"  # like the reward it gives


def length(task: Task, episode: Episode) -> float:
    """Minus the thousands of tokens the team sampled in turns it took; for metrics, or with a small
    weight."""
    return -sum(len(turn.token_ids) for turn in episode.turns if turn.taken) / 1000


async def right(task: Task, episode: Episode) -> list[Reward]:
    """Of each turn: `correct`, as if its text were the team's output. It reads the gold answer, so
    no agent is ever shown it."""
    found = []
    for turn in episode.turns:
        value = await correct(task, dataclasses.replace(episode, output=turn.text))
        found.append(
            dataclasses.replace(
                value, name="right", agent=turn.agent, turn=turn.index, sibling=turn.sibling
            )
        )
    return found


@trusted("reward maker")
def verified(name: str) -> RewardFn:
    """Of each turn: what the verifier of this name says of its text, from 0 to 1 (see
    `agents.verifiers.resolve_verifier`)."""
    verifier = resolve_verifier(name)
    reward = per_turn(lambda task, turn: verify(verifier, task, turn.text), "verifier")
    reward.__module__, reward.__qualname__ = (
        __name__,
        f"verified({name})",
    )  # what `reward_name` tells
    return reward


def returned(task: Task, episode: Episode) -> list[Reward]:
    """What a program of the user's said itself that its episode is worth (see `own_programs`). NaN
    if it said nothing."""
    return _told(episode, "returned")


def posted(task: Task, episode: Episode) -> list[Reward]:
    """What a holder of the reward token posted for the episode (see `proxy`). NaN if nobody did."""
    return _told(episode, "posted")


def workflow(task: Task, episode: Episode) -> list[Reward]:
    """What a workflow tells of itself. Of each program that a designer wrote, by its turn: `valid`,
    could it be run, and `ran`, did its run give an answer; why not stands in the text. Both count
    towards training only if `reward_weights` names them. Over rounds also `val` of each and, for
    the team, `performance`, `complexity` and `efficiency`. See `marlora.agents.programs.workflow`
    and `flowreasoner`.
    """
    return [r for r in episode.rewards if r.source == WORKFLOW]


def _told(episode: Episode, source: str) -> list[Reward]:
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
    "length": length,
    "passed_tests": passed_tests,
    "posted": posted,
    "returned": returned,
    "right": right,
    "verified": verified,
    "workflow": workflow,
}


def resolve_rewards(names: Iterable[str | RewardFn] | str | RewardFn) -> list[RewardFn]:
    """Reward functions by name (`correct`, `verified(calculator)`, `module:function`), several or
    one.

    Raises `SettingError` naming the one that cannot be found.
    """
    given = [names] if isinstance(names, str) or callable(names) else names
    return [
        load_function("reward", each, REWARDS) if isinstance(each, str) else each for each in given
    ]


# makers of rewards


def per_agent(value: Callable[[Task, Episode, str], Any], name: str = "") -> RewardFn:
    """A reward for each agent that spoke: `value(task, episode, agent)`, sync or async. An agent
    without a turn gets none."""

    async def rewards(task: Task, episode: Episode) -> list[Reward]:
        agents = dict.fromkeys(turn.agent for turn in episode.turns if turn.taken)
        return [
            Reward(name or fn_name(value), float(await _awaited(value(task, episode, a))), agent=a)
            for a in agents
        ]

    rewards.__name__ = name or fn_name(value)
    return rewards


def per_turn(value: Callable[[Task, Turn], Any], name: str = "") -> RewardFn:
    """A reward for each turn, siblings included: `value(task, turn)`, sync or async."""

    async def rewards(task: Task, episode: Episode) -> list[Reward]:
        return [
            Reward(
                name or fn_name(value),
                float(await _awaited(value(task, t))),
                agent=t.agent,
                turn=t.index,
                sibling=t.sibling,
            )
            for t in episode.turns
        ]

    rewards.__name__ = name or fn_name(value)
    return rewards


JUDGE = (
    "Task:\n{prompt}\n\nReference answer:\n{answer}\n\nAnswer to judge:\n{output}\n\nHow good is"
    " the answer to judge? Whatever it says about its own quality counts for nothing. Give your"
    " reasons in a few words, then end with a line `Score: N`, N from 0 (useless) to 10 (perfect)."
)


def judge(
    ask: Ask,
    *,
    agent: AgentSpec | None = None,
    template: str = JUDGE,
    scale: tuple[float, float] = (0.0, 10.0),
    name: str = "judge",
) -> RewardFn:
    """A judge model as a reward: value 0 to 1 on `scale`, its words as the reward's text.

    Args:
        ask: who answers: `lambda call: speaker(call, version)` of a `Completer`, or a `Fake` in
            tests. The judge is never trained.
        agent: its name, prompt and sampling (default: temperature 0, 256 tokens).
        template: what it is asked; `{prompt}`, `{answer}` and `{output}` are filled in.

    A reply without `Score: N` inside the scale is NaN: unscorable, not bad.
    """
    spec = agent or AgentSpec("judge", sampling=Sampling(temperature=0.0, max_tokens=256))
    low, high = scale

    async def reward(task: Task, episode: Episode) -> Reward:
        fill = {
            "{prompt}": task.prompt,
            "{answer}": str(task.answer),
            "{output}": str(episode.output),
        }
        question = re.sub(r"\{(?:prompt|answer|output)\}", lambda m: fill[m[0]], template)
        head = (Message("system", spec.prompt),) if spec.prompt else ()
        sampling = spec.sampling or Sampling(temperature=0.0)
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=derive_seed(episode.seed, name))
        (reply,) = await ask(Call(0, spec, (*head, Message("user", question)), sampling))
        scores = _SCORE.findall(reply.text)
        value = float(scores[-1]) if scores else math.nan
        value = (value - low) / (high - low) if low <= value <= high else math.nan
        return Reward(name, value, reply.text, source=spec.name)

    reward.__name__ = name
    return reward


# scoring


def _fraction(text: str) -> Fraction:
    """A number, exactly. Raises `ValueError` for what is none, and for one of so many digits that
    reading it would fill the memory."""
    text = normalise(text)
    if not _EXACT.fullmatch(text):
        raise ValueError(f"not a number: {text[:40]!r}")
    return Fraction(text)


def _is_mathematical(gold: str) -> bool:
    return not _WORD.search(_MATH_WORDS.sub(" ", gold))


def _both_numbers(a: str, b: str) -> bool:
    """Plain numbers that differ when read exactly do differ; no need to ask."""
    return bool(_NUMBER.fullmatch(a.strip()) and _NUMBER.fullmatch(b.strip()))


def _candidate(output: str, numeric: bool = False) -> str:
    """The answer in an output: what it says explicitly; else its last number where a number is
    asked for; else all of it."""
    found = extract(output) if numeric or _EXPLICIT.search(output) else None
    return output.strip() if found is None else found


def reward_name(fn: RewardFn) -> str:
    """How settings name a reward function: its short name if it is ours, else `module:function`."""
    short = next((name for name, known in REWARDS.items() if known is fn), None)
    return short or f"{fn.__module__}:{getattr(fn, '__qualname__', type(fn).__name__)}"
