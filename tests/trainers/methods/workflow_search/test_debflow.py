"""DebFlow: calls and verdicts of a debate in the sheet's numbers, what each side sees, and runs
that come to AFlow's tree where the moderator always sides with the first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.programs.program import Program
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import SettingError, Task
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.sandbox.sandbox import run as execute
from marlora.trainers.methods.workflow_search.debate import PROMPTS, Debate, verdict
from marlora.trainers.methods.workflow_search.debflow import HELPERS, DebFlowConfig, DebFlowTrainer
from tests.trainers.reading import rows
from tests.trainers.searches import larger_ensemble, random_words, reply_with, search

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = {side: reply_with(f"{side} edit", f"await custom('{side}')") for side in HELPERS[:2]}


@pytest.mark.parametrize(
    ("reply", "side"),
    [
        ("affirmative", "affirmative"),
        ("Affirmative.", "affirmative"),  # U4: the released code counts it as negative
        ("I side with the **Negative** one", "negative"),
        ("No", ""),
        ("", ""),
        ("both the affirmative and the negative", ""),
        ("affirmative? No.", ""),
        ("nothing is affirmatively so", ""),
    ],
)
def test_a_verdict_is_its_one_keyword(reply: str, side: str) -> None:
    assert verdict(reply) == side
    assert verdict("No, the affirmative", decisive=True) == "affirmative"


def debate(
    verdicts: Sequence[str], rounds: int = 2, prompts: Mapping[str, str] = PROMPTS, **replies: str
) -> tuple[str, Team]:
    """The winner, and the team, of a debate whose moderator says these words in turn."""
    given = iter(verdicts)

    def answer(agent: str, messages: Any) -> str:
        return (
            next(given) if agent == "moderator" else {**GOOD, "judge": "negative", **replies}[agent]
        )

    system = Debate(
        [*HELPERS],
        target=Program(["executor"], seconds=0.2),
        rounds=rounds,
        fields={"rules": "THE RULES", "failures": "THE FAILURES"},
        prompts=prompts,
    )
    team = fake_team(system.specs, answer, execute=execute)
    output = asyncio.run(system.run(Task("t", "the first prompt with EXPERIENCE"), team))
    (turn,) = output.reads
    return turn.agent, team  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("verdicts", "rounds", "calls", "winner"),
    [
        (["affirmative"], 2, 3, "affirmative"),
        (["No", "Negative."], 2, 6, "negative"),
        (["No", "No", "No"], 2, 10, "negative"),
        (["no", "no", "affirmative"], 3, 9, "affirmative"),
        (["no", "hm", "no", "no"], 3, 13, "negative"),
        (["no", "no", "no", "affirmative"], 3, 12, "affirmative"),  # the last verdict counts
        (["affirmative"], 0, 3, "affirmative"),
    ],
)
def test_calls_of_a_debate_are_the_sheets(
    verdicts: list[str], rounds: int, calls: int, winner: str
) -> None:
    """U1, U2."""
    ended, team = debate(verdicts, rounds)
    assert (ended, len(team.turns)) == (winner, calls)


def test_each_sees_what_it_may() -> None:
    _, team = debate(["No", "affirmative"])
    prompts = [(turn.agent, turn.messages[-1].content) for turn in team.turns]
    first, second, third, fourth, *_ = prompts
    assert first == ("affirmative", "the first prompt with EXPERIENCE")
    for agent, prompt in prompts[1:]:
        assert "EXPERIENCE" not in prompt, f"{agent} sees no experience"
        assert "THE FAILURES" in prompt
    assert "affirmative edit" in second[1] and "THE RULES" in second[1]
    assert "affirmative edit" in third[1] and "negative edit" in third[1]
    assert "negative edit" in fourth[1] and "affirmative edit" not in fourth[1]
    assert all(turn.saw_gold for turn in team.turns)
    assert [turn.reads for turn in team.turns[:3]] == [(), (0,), (0, 2)]  # 1 is a dry run


def test_its_prompts_can_be_changed() -> None:
    changed = {"disagree": "{other} NO", "compare": "{affirmative} OR {negative}"}
    _, team = debate(["affirmative"], prompts={**PROMPTS, **changed})
    _, second, third = (turn.messages[-1].content for turn in team.turns)
    assert second == f"{GOOD['affirmative']} NO"
    assert third == f"{GOOD['affirmative']} OR {GOOD['negative']}"
    with pytest.raises(SettingError, match=r"prompts\.judge: this method has no such prompt"):
        DebFlowConfig(prompts={"judge": "x"})


@pytest.mark.parametrize(
    ("broken", "winner"), [("affirmative", "negative"), ("negative", "affirmative")]
)
def test_a_proposal_that_cannot_be_run_loses_without_a_verdict(broken: str, winner: str) -> None:
    ended, team = debate(
        [], **{broken: reply_with("loop", "while True:\n    pass\nawait custom('x')")}
    )
    assert ended == winner and [turn.agent for turn in team.turns] == ["affirmative", "negative"]


def test_a_judge_without_a_side_leaves_it_to_the_first() -> None:
    assert debate(["no"], 0, judge="both are fine")[0] == "affirmative"


def debating(
    affirmative: Callable[[str, str], str], negative: Callable[[str, str], str], word: str
) -> Callable[[str, str], str]:
    """Helpers of a run; the moderator always says one word."""

    def propose(role: str, prompt: str) -> str:
        sides = {"affirmative": affirmative, "negative": negative}
        return sides[role](role, prompt) if role in sides else word

    return propose


def debflow(folder: Path, model: Path, propose: Any, **changes: Any) -> DebFlowTrainer:
    made: DebFlowTrainer = search(
        folder, model, propose, cls=DebFlowTrainer, config=DebFlowConfig, helpers=HELPERS, **changes
    )
    return made


@pytest.mark.slow
def test_with_a_moderator_who_always_sides_with_the_first_the_tree_is_aflows(
    model: Path, tmp_path: Path
) -> None:
    """U5: one wasted call of the negative side, one of the moderator. The losers are kept."""
    plain = search(tmp_path / "aflow", model, larger_ensemble, uniform=0.3, sharpness=0.2)
    propose = debating(larger_ensemble, random_words, "Affirmative!")
    debated = debflow(tmp_path / "debflow", model, propose)
    plain.train()
    debated.train()

    def tree(trained: Any) -> list[tuple[Any, ...]]:
        measured = [c for c in trained.search.candidates if c.scores]
        names = {c.id: n for n, c in enumerate(measured)}
        return [(c.values, [names[p] for p in c.parents], c.mean, c.note) for c in measured]

    assert tree(debated) == tree(plain) and len(tree(plain)) > 2
    talks = [e for e in Store(tmp_path / "debflow" / "episodes") if e.kind == "aside"]
    assert {len(talk.turns) for talk in talks} == {3}
    kept = [c for c in debated.search.candidates if not c.scores]
    assert kept and all(c.verdict == "lost the debate" and not c.fault for c in kept)


def test_a_loser_is_kept_and_taken_up_when_it_wins(model: Path, tmp_path: Path) -> None:
    """The negative side's edit loses first; then the affirmative side proposes the same program."""
    vote, word = "await ensemble([await custom(str(n)) for n in range(5)])", "await custom('word')"

    def affirmative(role: str, prompt: str) -> str:
        tried = "tried already: E:word" in prompt
        return reply_with("E:vote", vote) if tried else reply_with("E:word", word)

    def negative(role: str, prompt: str) -> str:
        return reply_with("E:other", vote)

    made = debflow(
        tmp_path / "run",
        model,
        debating(affirmative, negative, "affirmative"),
        max_steps=2,
        sample=1,
    )
    made.train()
    _, second, first = made.search.candidates
    assert (first.values["program"], second.values["program"]) == (word, vote)
    assert first.scores and second.scores and second.note == "E:other"
    assert (first.proposer, second.proposer) == ("affirmative", "negative")
    found = [row["program"] for row in rows(made.args.folder)]
    assert [row["id"] for row in found] == ["2", "1"] and found[1]["duplicates"] == 0


@pytest.mark.slow
def test_it_learns_and_with_two_sides_that_know_nothing_it_does_not(
    model: Path, tmp_path: Path
) -> None:

    def voting(role: str, prompt: str) -> str:
        return reply_with("vote", "await ensemble([await custom(str(n)) for n in range(7)])")

    sizes = {"num_val_tasks": 20, "num_eval_tasks": 40, "max_steps": 2}
    gains = {}
    for name, side in (("vote", voting), ("words", random_words)):
        propose = debating(random_words, side, "negative")
        summary = debflow(tmp_path / name, model, propose, **sizes).train()
        gains[name] = summary["eval"]["paired"]["ci95"][0]
    assert gains["vote"] > 0.05 and gains["words"] < 0.05, gains
