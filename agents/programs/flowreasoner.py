"""A designer at work on one task for several rounds: it writes a program, hears what public tests
make of it, and writes another.

The system of FlowReasoner (arXiv:2504.15257): one workflow per query, found by external feedback. A
round's program is run on what the task shows of right and wrong: its public tests (`meta["tests"]`,
of a coding task) or other problems of its kind with their answers (`meta["examples"]`). The best
round's program gives the answer; hidden tests and the task's own answer are a reward's.

Against the paper, whose reward formulas are not published: the rewards told here are ours
(`performance`, `complexity`, `efficiency`; `trainers/methods/policy_gradient/flowreasoner.py` adds
`diversity` and weighs them). With `parents: chat` the designer sees all its earlier rounds; `drawn`
is the released code's search: each round goes on from one earlier program, drawn by
`parent_shares`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..execution import answered
from ..lookup import trusted
from ..settings import setting
from ..team import Team
from ..text.answers import same, stands_in
from ..text.templates import render
from ..types import Reward, SettingError, Task, Turn
from .operators import CHECKS
from .restrictions import nodes
from .workflow import SOURCE, Design, Workflow, answer_of, reward_of

FEEDBACK = """Your program passes {passed} of {total} checks.{failure}

Write a better one between <graph> and </graph>."""
INVALID = """Your program cannot be run: {fault}

Write another one between <graph> and </graph>."""


@dataclass(frozen=True)
class Round:
    """One program and what came of it.

    Args:
        passed, total: checks, over all runs; 0 of 0 where the task shows none. `failure`: the first
            that failed, in words; `said`: what executors said for it.
        outputs: what the program answered to the task itself, per run (coding tasks; of others the
            task is answered last).
        calls: executor calls that its checks took.
    """

    design: Design
    passed: int = 0
    total: int = 0
    failure: str = ""
    said: tuple[Turn, ...] = ()
    outputs: tuple[str, ...] = ()
    calls: int = 0

    @property
    def score(self) -> float:
        """1 if all checks pass, else their share; -1 if the program cannot be run. NaN: nothing to
        check by."""
        if self.design.fault:
            return -1.0
        return self.passed / self.total if self.total else math.nan


@trusted("system")
@dataclass
class FlowReasoner(Workflow):
    """A designer with rounds of feedback, and its executors. Settings of `Workflow`, and:

    Args:
        rounds: programs that the designer writes at most. `runs`: how often each is run on each
            check.
        stop_early: end at the first program that passes every check.
        feedback, invalid: what the designer is told after a round; fields `passed`, `total`,
            `failure`, `program`, and `fault` of one that cannot be run.
        parents: `chat` (a round goes on in the designer's chat) or `drawn` (from one of the first
            and the `num_parents` - 1 best programs).
        worth: what `performance` is: the score of the `best` round, or the `mean` of all.
        free_nodes: calls of operators that a program may hold before `complexity` counts.
    """

    rounds: int = setting("programs that the designer writes at most", 3, at_least=1)
    runs: int = setting("runs of a program on each check", 1, at_least=1)
    stop_early: bool = True
    feedback: str = FEEDBACK
    invalid: str = INVALID
    parents: str = setting("where a round goes on from", "chat", choices=("chat", "drawn"))
    num_parents: int = setting("programs that a parent is drawn from", 4, at_least=1)
    worth: str = setting("rounds that `performance` counts", "best", choices=("best", "mean"))
    free_nodes: int = setting("calls of operators without a loss", 5, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attempts > 1 or self.fallback:
            raise SettingError(
                "attempts, fallback: rounds do their work; leave them out, and set rounds"
            )
        for name in ("feedback", "invalid"):
            self.feedback_text(getattr(self, name), Round(Design("")), name)

    async def run(self, task: Task, team: Team) -> str:
        chat, text, reads = team[self.designer].fresh(), self.instructed(task), list[Turn]()
        tried: list[Round] = []
        for left in reversed(range(self.rounds)):
            now = await self.tried(await chat.reply(text, reads=reads), task, team)
            tried.append(now)
            if not left or math.isnan(now.score) or (self.stop_early and now.score == 1.0):
                break
            parent, text = now, self.heard(now)
            if self.parents == "drawn":
                parent = draw_parent(tried, self.num_parents, team)
                chat = team[self.designer].fresh()
                text = (
                    f"{self.instructed(task)}\n\nAn earlier"
                    f" program:\n\n{parent.design.program}\n\n{self.heard(parent)}"
                )
            reads = [
                turn
                for turn in parent.said
                if "{failure}" in self.feedback and stands_in(turn.text, parent.failure)
            ]
            reads += [parent.design.turn] if self.parents == "drawn" and parent.design.turn else []
        kept = tried[best_round([each.score for each in tried])]
        self.judge(kept, tried, team)
        if kept.design.fault:
            return ""
        return (
            kept.outputs[0]
            if kept.outputs
            else answer_of(await self.perform(kept.design, task, team))
        )

    # rounds

    async def tried(self, turn: Turn, task: Task, team: Team) -> Round:
        """Check the program in a designer's turn, one run after the other, so that the order of
        calls does not depend on timing."""
        design = await self.read(turn, team)
        now = Round(design)
        if not design.fault:
            for _ in range(self.runs):
                now = await (self._tested if task.meta.get("tests") else self._compared)(
                    now, task, team
                )
        now = replace(now, calls=sum(t.index > turn.index for t in team.turns))
        team.rewards.append(reward_of(turn, "val", now.score, self.heard(now)))
        return now

    async def _tested(self, now: Round, task: Task, team: Team) -> Round:
        """The task's own program, by its public tests."""
        said = len(team.turns)
        output, tests = (
            answer_of(await self.perform(now.design, task, team)),
            [str(test) for test in task.meta["tests"]],
        )
        verdict = await team.check(*answered(task, output, tests), CHECKS)
        failed = next(
            (
                f"\n\nIt fails {t!r}: {why}"
                for t, why in zip(tests, verdict.results, strict=True)
                if why
            ),
            "",
        )
        now = _counted(now, verdict.results.count(""), len(tests), failed, team.turns[said:])
        return replace(now, outputs=(*now.outputs, output))

    async def _compared(self, now: Round, task: Task, team: Team) -> Round:
        """Other problems of its kind, whose answers are known to all."""
        for problem, answer in task.meta.get("examples") or ():
            said = len(team.turns)
            output = answer_of(
                await self.perform(now.design, replace(task, prompt=str(problem)), team)
            )
            right = same(output, str(answer))
            failed = (
                ""
                if right
                else (
                    f"\n\nTo the problem {str(problem)!r} it answers {output[:200]!r}; right is"
                    f" {str(answer)!r}."
                )
            )
            now = _counted(now, int(right), 1, failed, team.turns[said:])
        return now

    def heard(self, now: Round) -> str:
        """What the designer is told of a round."""
        return (
            self.feedback_text(self.invalid, now, "invalid")
            if now.design.fault
            else self.feedback_text(self.feedback, now, "feedback")
        )

    @staticmethod
    def feedback_text(template: str, now: Round, setting: str) -> str:
        """A template filled with the facts of a round."""
        fields = {
            "passed": now.passed,
            "total": now.total,
            "failure": now.failure,
            "fault": now.design.fault,
            "program": now.design.program,
        }
        return render(template, fields, setting=setting)

    def judge(self, kept: Round, tried: Sequence[Round], team: Team) -> None:
        """Tell what the rounds were worth to the team: `performance`, see `worth`; of the kept
        program `complexity`, minus the calls of operators in it beyond `free_nodes`, over these;
        `efficiency`, minus the executor calls of its checks, over `max_calls`.
        """
        valid = not kept.design.fault
        written = nodes(kept.design.program, tuple(self.callable)) if valid else 0
        worth = {
            "performance": (
                kept.score
                if self.worth == "best"
                else sum(each.score for each in tried) / len(tried)
            ),
            "complexity": -max(0, written - self.free_nodes) / self.free_nodes,
            "efficiency": -kept.calls / self.max_calls if valid else 0.0,
        }
        team.rewards.extend(Reward(name, value, source=SOURCE) for name, value in worth.items())


def _counted(now: Round, passed: int, total: int, failure: str, said: Sequence[Turn]) -> Round:
    """The round with some checks more."""
    now = replace(now, passed=now.passed + passed, total=now.total + total)
    return now if now.failure or not failure else replace(now, failure=failure, said=tuple(said))


def best_round(scores: Sequence[float]) -> int:
    """The number of the best round, the latest of equals; a score that is not known (NaN) is
    beneath all others."""
    return max(
        range(len(scores)), key=lambda n: (-math.inf if math.isnan(scores[n]) else scores[n], n)
    )


def parent_shares(scores: Sequence[float], lam: float = 0.3, alpha: float = 0.2) -> list[float]:
    """Chances of programs with these scores (0 to 1) to be gone on from, as in the released code:
    lam / n + (1 - lam) softmax(alpha (100 s - max 100 s))."""
    top = max(scores)
    weights = [math.exp(alpha * 100 * (score - top)) for score in scores]
    return [lam / len(scores) + (1 - lam) * weight / sum(weights) for weight in weights]


def draw_parent(tried: Sequence[Round], count: int, team: Team) -> Round:
    """One of the first round and the `count` - 1 best others, by `parent_shares`."""
    others = sorted(tried[1:], key=lambda each: -each.score)[: count - 1]
    candidates = [tried[0], *others]
    return team.rng.choices(candidates, parent_shares([each.score for each in candidates]))[0]
