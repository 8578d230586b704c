"""Mending failed episodes with scripted agents: who is tried, what is refused, what is learnt of it
in the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from marlora.agents.patterns.actor_critic import ActorCritic
from marlora.agents.patterns.chain import Chain
from marlora.agents.system import System
from marlora.agents.types import BASE, AgentSpec, SettingError, Task, Turn
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.rewards.actor_critic import roles
from marlora.rollouts.rewards.builtin import correct, exact
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import samples
from marlora.trainers.credit.filtering import SelectionConfig, filter_turns
from marlora.trainers.methods.imitation.correction import (
    VERDICT,
    CorrectionConfig,
    Corrector,
    broken,
    is_corrected,
    tally,
)

Answer = Callable[[str, str], str]  # (who speaks, the last message) -> text


def team(
    system: System, answer: Answer, rewards: Sequence[Any]
) -> tuple[EpisodeRunner, ScriptedEngine]:
    def said(prompt: str, ref: Any, sampling: Any, k: int) -> str:
        return answer(
            ref.policy, prompt.rsplit("<|user|>", 1)[1].removesuffix("<|end|><|assistant|>")
        )

    engine = ScriptedEngine(said)
    speakers = {
        p: EngineCompleter(engine, engine.tokens, p)
        for p in [*(a.policy for a in system.specs), BASE]
    }
    return EpisodeRunner(system, speakers, rewards), engine


def play(
    system: System, answer: Answer, tasks: Sequence[Task], rewards: Sequence[Any], **settings: Any
) -> tuple[list[Episode], list[Episode]]:
    """Episodes of the tasks, and all that was played to mend those that failed."""
    player, engine = team(system, answer, rewards)
    repair, selection = CorrectionConfig(**settings), SelectionConfig()
    names = [spec.name for spec in system.specs]
    mender = Corrector(
        player,
        repair,
        selection,
        names,
        lambda turn, text: engine.tokens.write(turn.prompt_ids, text),
        {},
    )

    async def go() -> tuple[list[Episode], list[Episode]]:
        played = [await player.play(EpisodeRequest(task, f"g/{task.id}")) for task in tasks]
        return played, [
            e for episode in broken(played, repair, selection, names) for e in await mender(episode)
        ]

    return asyncio.run(go())


TASKS = [Task(f"t{i}", f"problem {i}", "20") for i in range(10)]


def verdict(talk: Episode) -> dict[str, Any]:
    """What a talk about a turn came to; the talk is no episode of the team's."""
    assert talk.kind == "aside" and talk.follows
    (found,) = [operation for operation in talk.operations if operation.name == VERDICT]
    read: dict[str, Any] = json.loads(found.text)
    return read


def three(agent: str, told: str) -> str:
    """Agent `a` knows problems 0 to 5, and 6 and 7 once it has had feedback; `b` repeats, `c`
    answers 20 if it reads "good"."""
    if "Rewrite the text below" in told:
        return told.rsplit("\n\n", 1)[1]
    if agent == BASE:
        return "think again"
    known = range(8) if "Feedback on it" in told else range(6)
    good = any(f"problem {i}" in told for i in known) or "good" in told
    return {
        "a": "good" if good else "poor",
        "b": f"b says {'good' if good else 'poor'}",
        "c": "20" if good else "10",
    }[agent]


CHAIN = Chain(["a", "b", "c"], views={"a": "{prompt}", "b": "{a}", "c": "{b}"})


def test_every_agent_learns_from_the_same_problems_mended_ones_included() -> None:
    """10 problems, 6 solved, 2 of 4 failures mended at the first agent: 8 examples per agent, 24 in
    all; the other two give none."""
    played, more = play(CHAIN, three, TASKS, [exact])
    assert [e.reward() for e in played] == [1.0] * 6 + [0.0] * 4
    found = filter_turns([*played, *more], SelectionConfig(), agents=["a", "b", "c"])
    kept = {agent: [k for k in found.kept if k.agent == agent] for agent in "abc"}
    assert {agent: len(of) for agent, of in kept.items()} == {"a": 8, "b": 8, "c": 8}
    assert [k.reason for k in kept["a"]] == ["success"] * 6 + ["repaired"] * 2
    assert {k.key[0].split("/")[1] for k in found.kept} == {f"t{i}" for i in range(8)}
    assert tally(more, SelectionConfig())["mended"] == {"a": 2}


def test_a_failed_run_that_is_not_mended_teaches_nobody() -> None:
    played, more = play(CHAIN, three, TASKS[8:], [exact])
    assert more and not any(is_corrected(e, SelectionConfig()) for e in more)
    assert not filter_turns([*played, *more], SelectionConfig()).kept


def test_a_mended_turn_is_trained_on_its_original_prompt_as_written() -> None:
    (failed,), more = play(CHAIN, three, [TASKS[6]], [exact])
    talk, replay = more
    assert [t.saw_gold for t in talk.turns] == [True, True, True] and talk.turns[
        0
    ].agent == "feedback"
    first, second, third = replay.turns
    assert (
        first.prompt_ids == failed.turns[0].prompt_ids
        and first.messages == failed.turns[0].messages
    )
    assert (first.source, first.text, first.logprobs) == (
        "written",
        "good",
        (),
    ) and first.token_ids[-1] == 1
    assert [t.source for t in (second, third)] == ["sampled", "sampled"] and replay.output == "20"
    weights = filter_turns(more, SelectionConfig()).weights
    made, dropped = samples(more, weights, {name: name for name in "abc"}, ratios=False)
    assert [s.policy for s in made] == ["a", "b", "c"] and not dropped
    learnt = [token for token, m in zip(made[0].ids, made[0].mask, strict=True) if m]
    assert (
        tuple(learnt) == first.token_ids
        and made[0].ids[: len(first.prompt_ids)] == first.prompt_ids
    )
    assert samples(more, weights, {"a": "a"}, ratios=True)[0] == [], "no policy gradient on it"


def test_agents_are_tried_in_order_until_one_succeeds() -> None:
    """`a` cannot be mended, `b` can: what `a` had said belongs to the failed run."""

    def answer(agent: str, told: str) -> str:
        if "Rewrite the text below" in told:
            return told.rsplit("\n\n", 1)[1]
        if agent == BASE:
            return "think"
        good = "good" in told or (agent == "b" and "Feedback on it" in told)
        return {
            "a": "worse" if "Feedback on it" in told else "poor",
            "b": "good" if good else "poor",
            "c": "20" if good else "10",
        }[agent]

    _, more = play(CHAIN, answer, TASKS[:1], [exact])
    assert [e.group.split("/mend/")[1] for e in more] == [
        "a-0/talk-0",
        "a-0/play-0",
        "b-1/talk-0",
        "b-1/play-0",
    ]
    found = filter_turns(more, SelectionConfig())
    assert {k.agent: k.reason for k in found.kept} == {"b": "repaired", "c": "success"}
    assert found.dropped["a", "before the repair"] == 1
    _, only = play(CHAIN, answer, TASKS[:1], [exact], repair_agents=["a"])
    assert [e.group.split("/mend/")[1] for e in only] == ["a-0/talk-0", "a-0/play-0"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the total is 20", "tells the answer"),
        ("as your Feedback says: good", "shows that it was corrected"),
        ("", "empty"),
        ("poor", "nothing new"),
        ("good", ""),
    ],
)
def test_texts_that_give_themselves_away_are_refused(text: str, reason: str) -> None:
    def answer(agent: str, told: str) -> str:
        return text if "Rewrite the text below" in told else three(agent, told)

    _, more = play(CHAIN, answer, [TASKS[8]], [exact], repair_agents=["a"])
    assert verdict(more[0]) == {"agent": "a", "turn": 0, "refused": reason}
    assert len(more) == (1 if reason else 2)
    assert tally(more, SelectionConfig())["refused"] == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [("open SESAME, good", "shows that it was corrected"), ("as your Feedback says: good", "")],
)
def test_traces_of_ones_own_replace_the_shipped_ones(text: str, reason: str) -> None:
    def answer(agent: str, prompt: str) -> str:
        return text if "Rewrite the text below" in prompt else three(agent, prompt)

    _, more = play(CHAIN, answer, [TASKS[8]], [exact], repair_agents=["a"], traces=["sesame"])
    assert verdict(more[0])["refused"] == reason


def test_whose_it_is_to_answer_may_tell_the_answer() -> None:
    def answer(agent: str, told: str) -> str:
        return (
            "20"
            if agent in "ac" and ("Rewrite" in told or "Feedback" in told)
            else three(agent, told)
        )

    _, more = play(CHAIN, answer, [TASKS[8]], [exact], repair_agents=["c"])
    assert verdict(more[0])["refused"] == "" and is_corrected(more[1], SelectionConfig())
    _, refused = play(CHAIN, answer, [TASKS[8]], [exact], repair_agents=["a"])
    assert verdict(refused[0])["refused"] == "tells the answer"
    _, let = play(CHAIN, answer, [TASKS[8]], [exact], repair_agents=["a"], may_tell_answer=["a"])
    assert verdict(let[0])["refused"] == ""


def test_regenerations_share_a_feedback_and_stop_at_the_first_success() -> None:
    said = iter(["worse", "poorer", "good", "never"])

    def answer(agent: str, told: str) -> str:
        return next(said) if "Feedback on it" in told else three(agent, told)

    _, more = play(
        CHAIN, answer, [TASKS[8]], [exact], repair_agents=["a"], max_feedback=2, max_regenerations=2
    )
    assert [e.group.split("/mend/")[1] + f"/{e.id[-1]}" for e in more] == [
        "a-0/talk-0/0",
        "a-0/play-0/0",
        "a-0/talk-0/1",
        "a-0/play-0/1",
        "a-0/talk-1/0",
        "a-0/play-1/0",
    ]
    assert more[0].turns[0].completion == more[2].turns[0].completion, (
        "the second regeneration reads the first one's feedback"
    )
    assert next(said) == "never" and is_corrected(more[-1], SelectionConfig())


def test_unsolved_tasks_are_mended_once_and_all_failures_if_asked() -> None:
    player, _ = team(CHAIN, three, [exact])

    async def go() -> list[Episode]:
        return [
            await player.play(EpisodeRequest(task, f"g/{task.id}", k))
            for task in TASKS[5:8]
            for k in range(2)
        ]

    played, names = asyncio.run(go()), ["a", "b", "c"]
    assert [e.id for e in broken(played, CorrectionConfig(), SelectionConfig(), names)] == [
        "g/t6/0",
        "g/t7/0",
    ]
    every = broken(played, CorrectionConfig(repair="all"), SelectionConfig(), names)
    assert [e.id for e in every] == ["g/t6/0", "g/t6/1", "g/t7/0", "g/t7/1"]
    assert broken(played, CorrectionConfig(repair="none"), SelectionConfig(), names) == []


def test_an_actor_that_corrected_itself_learns_to_say_so_at_once() -> None:
    """Actor-critic: wrong, judged wrong, feedback, right. The later answer, rephrased, becomes an
    answer to the first prompt, and nobody was told the answer; judge, critic and actor keep what
    they did well."""

    def answer(agent: str, told: str) -> str:
        if "Rewrite the text below" in told:
            assert agent == "actor" and told.endswith("So it is 5")
            return "It is 5"
        if agent == "judge":
            return "Verdict: right" if "5" in told else "Verdict: wrong"
        return {
            "critic": "count again",
            "actor": "So it is 5" if "Feedback" in told else "It is 4",
        }[agent]

    task = Task("t", "2+3?", "5")
    (episode,), more = play(
        ActorCritic(["actor", "judge", "critic"], max_rounds=1), answer, [task], [correct, roles]
    )
    talk, replay = more
    assert [t.saw_gold for t in talk.turns] == [False] and (
        replay.output,
        replay.turns[0].source,
    ) == ("It is 5", "written")
    found = filter_turns([episode, *more], SelectionConfig())
    assert [(k.key[1], k.agent, k.reason) for k in found.kept if k.key[0] == episode.id] == [
        (1, "judge", "success"),
        (2, "critic", "success"),
        (3, "actor", "success"),
    ]
    assert [(k.key[1], k.agent, k.reason) for k in found.kept if k.key[0] == replay.id] == [
        (0, "actor", "repaired"),
        (1, "judge", "success"),
    ]


def test_settings_are_checked() -> None:
    for settings, problem in [
        ({"repair": "some"}, "repair: expected one of unsolved, all, none"),
        ({"max_feedback": 0}, "max_feedback: expected at least 1"),
        ({"feedback_agent": "x"}, "feedback_agent: expected a mapping"),
        (
            {"feedback_agent": {"rol": "x"}},
            r"feedback_agent.rol: unknown field; did you mean 'role'",
        ),
        ({"regenerate": "{answer}"}, r"regenerate: unknown field \{answer\}"),
    ]:
        with pytest.raises(SettingError, match=problem):
            CorrectionConfig(**settings)  # type: ignore[arg-type]
    team_of = [AgentSpec("solver"), AgentSpec("feedback")]
    with pytest.raises(
        SettingError, match="repair_agents: 'slver' is no agent of the team; did you mean 'solver'"
    ):
        CorrectionConfig(repair_agents=["slver"]).check_agents(team_of)
    with pytest.raises(
        SettingError, match=r"feedback_agent\.name: 'feedback' is an agent of the team"
    ):
        CorrectionConfig().check_agents(team_of)
    CorrectionConfig(feedback_agent={"name": "outside"}).check_agents(team_of)


def test_a_written_turn_spells_no_special_token() -> None:
    _, engine = team(CHAIN, three, [exact])
    made = engine.tokens.write((2, 7), "x<|end|>y")
    assert (
        made.text == "x<|end|>y"
        and made.token_ids.count(1) == 1
        and made.token_ids[-1] == 1
        and made.prompt_ids == (2, 7)
    )
    assert Turn(0, "a", text=made.text).source == "sampled", (
        "a replay marks it written, not the completion"
    )
