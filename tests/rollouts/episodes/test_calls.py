"""Calls of an episode: what each costs is in the episode's usage and in the ledger alike, also where
it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from marlora.agents.state import TeamState
from marlora.agents.transcript import Call
from marlora.agents.types import AgentSpec, Completion, Message, Sampling, Usage
from marlora.rollouts.budget import Budget
from marlora.rollouts.engines.base import EngineError, PromptTooLong
from marlora.rollouts.episodes.calls import TRIES, EpisodeCalls, cost_of
from marlora.rollouts.episodes.completers import AnswerLost
from marlora.rollouts.ledger import BudgetSpent, Ledger

CALL = Call(0, AgentSpec("a"), (Message("user", "hi"),), Sampling(max_tokens=5), 2)
MOST = (40, 10)  # tokens of a prompt and of two samples
OWN = [Completion("x", (1,) * 4, (2,) * 3), Completion("y", (1,) * 4, (2,) * 2)]
REPORTED = [Completion("x", usage=Usage(1, 12, 9, cached_tokens=5)), Completion("y")]
LOST = AnswerLost("lost", 0.0)


class Saying:
    """A completer that gives or raises these in turn, and remembers the versions it was asked."""

    def __init__(self, *answers: Sequence[Completion] | Exception, outside: bool = True) -> None:
        self.answers, self.outside, self.versions = list(answers), outside, list[str]()

    def most_prompt_tokens(self, call: Call) -> int:
        return MOST[0]

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        self.versions.append(version)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


def ask(saying: Saying, ledger: Ledger | None) -> tuple[Usage, BaseException | None]:
    """What one call adds to the agent's usage, and what it raises."""
    usage = {"a": Usage()}
    state = TeamState({"a": "a-v1"})
    calls = EpisodeCalls({"a": saying}, lambda: state, usage, ledger, "train", "e")

    async def go() -> BaseException | None:
        try:
            found = await calls(CALL)
        except Exception as error:
            return error
        assert [each.text for each in found] == ["x", "y"]
        return None

    raised = asyncio.run(go())
    if ledger is not None:
        assert ledger.spent() == usage["a"]  # the episode says what the ledger says
    return usage["a"], raised


def tokens(usage: Usage) -> tuple[int, int, int]:
    return usage.calls, usage.prompt_tokens, usage.sampled_tokens


def test_what_a_call_costs() -> None:
    assert cost_of(OWN) == Usage(1, 4, 5)
    assert cost_of(REPORTED) == Usage(1, 12, 9, cached_tokens=5)
    assert cost_of([]) == Usage(calls=1)


@pytest.mark.parametrize("ledger", [True, False])
def test_a_call_is_metered_with_the_version_of_the_state(ledger: bool) -> None:
    for answers, expected in ((OWN, (1, 4, 5)), (REPORTED, (1, 12, 9))):
        saying = Saying(answers)
        used, raised = ask(saying, Ledger() if ledger else None)
        assert raised is None and tokens(used) == expected and used.seconds > 0
        assert saying.versions == ["a-v1"]


def test_a_lost_answer_is_a_call_that_may_have_cost_all_it_could() -> None:
    used, raised = ask(Saying(LOST, LOST, REPORTED), Ledger())
    assert raised is None and tokens(used) == (3, 12 + 2 * MOST[0], 9 + 2 * MOST[1])
    saying = Saying(*[LOST] * 5)
    used, raised = ask(saying, Ledger())
    assert isinstance(raised, AnswerLost) and len(saying.versions) == TRIES == 4
    assert tokens(used) == (4, 4 * MOST[0], 4 * MOST[1])
    used, raised = ask(Saying(LOST, REPORTED), None)
    assert raised is None and tokens(used) == (1, 12, 9)


def test_there_may_be_no_room_to_ask_again() -> None:
    used, raised = ask(Saying(LOST, REPORTED), Ledger(Budget(tokens=99)))
    assert isinstance(raised, BudgetSpent) and tokens(used) == (1, *MOST)
    used, raised = ask(Saying(LOST, REPORTED), Ledger(Budget(tokens=100)))
    assert raised is None and tokens(used) == (2, 52, 19)


@pytest.mark.parametrize(
    ("error", "outside", "expected"),
    [
        (PromptTooLong("no"), True, (1, 0, 0)),  # refused: nothing was sampled
        (EngineError("gone"), True, (1, *MOST)),
        (EngineError("gone"), False, (1, 0, 0)),  # an engine of ours stops with the request
    ],
)
def test_a_call_that_fails(error: Exception, outside: bool, expected: tuple[int, int, int]) -> None:
    saying = Saying(error, outside=outside)
    used, raised = ask(saying, Ledger(Budget(tokens=50)))
    assert raised is error and tokens(used) == expected and len(saying.versions) == 1


class Slow(Saying):
    async def __call__(self, call: Call, version: str) -> list[Completion]:
        await asyncio.sleep(60)
        return []


def test_a_call_that_is_cancelled_may_go_on_at_an_outside_server() -> None:
    async def go(calls: EpisodeCalls) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(calls(CALL), 0.01)

    for outside, expected in ((True, (1, *MOST)), (False, (1, 0, 0))):
        usage, ledger = {"a": Usage()}, Ledger()
        slow = Slow(outside=outside)
        asyncio.run(go(EpisodeCalls({"a": slow}, TeamState, usage, ledger, "train", "e")))
        assert tokens(usage["a"]) == tokens(ledger.spent()) == expected
