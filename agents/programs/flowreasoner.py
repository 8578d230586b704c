"""FlowReasoner: a designer writes a program for a task, reads how public checks went, and writes
another, for several rounds.

The system of FlowReasoner (arXiv:2504.15257): one workflow per query, found by external feedback. A
round's program is run on what the task shows of right and wrong: its public tests (`meta["tests"]`,
of a coding task) or other problems of its kind with their answers (`meta["examples"]`). The best
round's program gives the answer; hidden tests and the task's own answer are a reward's.

Against the paper, whose reward formulas are not published: the rewards given here are ours
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
            that failed, in words; `turns`: the executors' for it.
        outputs: what the program answered to the task itself, per run (coding tasks; of others the
            task is answered last).
        calls: executor calls that its checks took.
    """

    design: Design
    passed: int = 0
    total: int = 0
    failure: str = ""
    turns: tuple[Turn, ...] = ()
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
        feedback, invalid: the designer's prompt after a round; fields `passed`, `total`,
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
        rounds: list[Round] = []
        for left in reversed(range(self.rounds)):
            now = await self.checked(await chat.reply(text, reads=reads), task, team)
            rounds.append(now)
            if not left or math.isnan(now.score) or (self.stop_early and now.score == 1.0):
                break
            parent, text = now, self.feedback_on(now)
            if self.parents == "drawn":
                parent = draw_parent(rounds, self.num_parents, team)
                chat = team[self.designer].fresh()
                text = (
                    f"{self.instructed(task)}\n\nAn earlier"
                    f" program:\n\n{parent.design.program}\n\n{self.feedback_on(parent)}"
                )
            reads = [
                turn
                for turn in parent.turns
                if "{failure}" in self.feedback and stands_in(turn.text, parent.failure)
            ]
            reads += [parent.design.turn] if self.parents == "drawn" and parent.design.turn else []
        best = rounds[best_round([each.score for each in rounds])]
        self.judge(best, rounds, team)
        if best.design.fault:
            return ""
        if best.outputs:
            return best.outputs[0]
        return answer_of(await self.perform(best.design, task, team))

    # rounds

    async def checked(self, turn: Turn, task: Task, team: Team) -> Round:
        """Check the program in a designer's turn, one run after the other, so that the order of
        calls does not depend on timing."""
        design = await self.read(turn, team)
        now = Round(design)
        if not design.fault:
            check = self._tested if task.meta.get("tests") else self._compared
            for _ in range(self.runs):
                now = await check(now, task, team)
        now = replace(now, calls=sum(t.index > turn.index for t in team.turns))
        team.rewards.append(reward_of(turn, "val", now.score, self.feedback_on(now)))
        return now

    async def _tested(self, now: Round, task: Task, team: Team) -> Round:
        """The task's own program, by its public tests."""
        start = len(team.turns)
        output = answer_of(await self.perform(now.design, task, team))
        tests = [str(test) for test in task.meta["tests"]]
        verdict = await team.check(*answered(task, output, tests), CHECKS)
        failures = (
            f"\n\nIt fails {test!r}: {why}"
            for test, why in zip(tests, verdict.results, strict=True)
            if why
        )
        passed = verdict.results.count("")
        now = _counted(now, passed, len(tests), next(failures, ""), team.turns[start:])
        return replace(now, outputs=(*now.outputs, output))

    async def _compared(self, now: Round, task: Task, team: Team) -> Round:
        """Other problems of its kind, whose answers are public."""
        for problem, answer in task.meta.get("examples") or ():
            start = len(team.turns)
            example = replace(task, prompt=str(problem))
            output = answer_of(await self.perform(now.design, example, team))
            right = same(output, str(answer))
            failure = (
                f"\n\nTo the problem {str(problem)!r} it answers {output[:200]!r}; right is"
                f" {str(answer)!r}."
            )
            failure = "" if right else failure
            now = _counted(now, int(right), 1, failure, team.turns[start:])
        return now

    def feedback_on(self, now: Round) -> str:
        """The designer's prompt after a round."""
        if now.design.fault:
            return self.feedback_text(self.invalid, now, "invalid")
        return self.feedback_text(self.feedback, now, "feedback")

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

    def judge(self, best: Round, rounds: Sequence[Round], team: Team) -> None:
        """Reward the team for its rounds: `performance`, see `worth`; of the best round's
        program `complexity`, minus the calls of operators in it beyond `free_nodes`, over these;
        `efficiency`, minus the executor calls of its checks, over `max_calls`.
        """
        valid = not best.design.fault
        written = nodes(best.design.program, tuple(self.callable)) if valid else 0
        worth = {
            "performance": (
                best.score
                if self.worth == "best"
                else sum(each.score for each in rounds) / len(rounds)
            ),
            "complexity": -max(0, written - self.free_nodes) / self.free_nodes,
            "efficiency": -best.calls / self.max_calls if valid else 0.0,
        }
        team.rewards.extend(Reward(name, value, source=SOURCE) for name, value in worth.items())


def _counted(now: Round, passed: int, total: int, failure: str, turns: Sequence[Turn]) -> Round:
    """The round with some checks more."""
    now = replace(now, passed=now.passed + passed, total=now.total + total)
    return now if now.failure or not failure else replace(now, failure=failure, turns=tuple(turns))


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


def draw_parent(rounds: Sequence[Round], count: int, team: Team) -> Round:
    """One of the first round and the `count` - 1 best others, by `parent_shares`."""
    others = sorted(rounds[1:], key=lambda each: -each.score)[: count - 1]
    candidates = [rounds[0], *others]
    return team.rng.choices(candidates, parent_shares([each.score for each in candidates]))[0]
