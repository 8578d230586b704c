import asyncio
import dataclasses
import math
from dataclasses import dataclass, field

import pytest

from marlora.agents.concurrency import gather
from marlora.agents.patterns.chain import Chain
from marlora.agents.state import TeamState
from marlora.agents.system import System
from marlora.agents.testing import Fake
from marlora.agents.types import Completion, Decision, Reward, Sampling, SettingError, Task, Turn
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.types import Episode
from marlora.trainers.credit.counterfactual import counterfactual_rewards
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import CreditConfig

CONFIG = CreditConfig(credit="counterfactual")


@dataclass
class Recorded:
    """A player that gives the next of the scores told for (turn index, text that replaces it), and
    keeps what it was asked."""

    scores: dict
    asked: list = field(default_factory=list)

    async def play(self, job, state=None, *, given=(), replace=None, decisions=(), seed=None):
        if replace is None:  # played anew from the turn after those given
            index, said = len(tuple(given)), "anew"
        else:
            ((index, completion),) = replace.items()
            said = completion.text
        self.asked.append(
            {
                "job": job,
                "given": tuple(given),
                "index": index,
                "seed": seed,
                "decisions": decisions,
                "state": state,
            }
        )
        score = self.scores[index, said].pop(0)
        error = "gone" if score is None else None
        return Episode(
            job.id,
            job.group,
            job.task,
            rewards=() if error else (Reward("correct", score),),
            error=error,
        )


def recorded(turns, reward, **fields):
    return Episode(
        "e",
        "g",
        Task("t", "?"),
        seed=5,
        turns=tuple(turns),
        rewards=(Reward("correct", reward),),
        **fields,
    )


def run(player, episode, default="", **changes):
    config = dataclasses.replace(CONFIG, **changes)
    judged = asyncio.run(counterfactual_rewards(player, episode, config, default=default))
    assert (
        judged.turns == episode.turns and judged.rewards[: len(episode.rewards)] == episode.rewards
    )
    return judged


def test_difference_rewards():
    """R .8; without the turns .5, .8, .9: D = .3, 0, -.1."""
    episode = recorded(
        [Turn(i, a, text=f"said {a}") for i, a in enumerate("abc")],
        0.8,
        decisions=(Decision(0, "d", ("x",), "x", 0.0),),
    )
    player = Recorded({(0, "-"): [0.5], (1, "-"): [0.8], (2, "-"): [0.9]})
    state = TeamState({"a": "a-v1"}, {"a.prompt": "Judge."})
    judged = run(player, dataclasses.replace(episode, state=state), default="-")
    found = credit([judged], CONFIG)
    assert [found["e", i, 0] for i in range(3)] == pytest.approx([0.3, 0.0, -0.1])
    asked = {a["index"]: a for a in player.asked}
    assert [t.index for t in asked[2]["given"]] == [0, 1] and asked[0]["given"] == ()
    assert all(
        a["seed"] == 5 and a["state"] == state and a["decisions"] == episode.decisions
        for a in player.asked
    )
    assert len({a["job"].id for a in player.asked} | {"e"}) == 4


def test_several_replays_are_averaged_with_seeds_of_their_own():
    player = Recorded({(0, ""): [0.0, None, 1.0]})
    judged = run(player, recorded([Turn(0, "a", text="x")], 1.0), num_replays=3)
    assert credit([judged], CONFIG) == {("e", 0, 0): 0.5}
    assert len({a["seed"] for a in player.asked}) == 3 and player.asked[0]["seed"] == 5


def test_siblings_are_compared_by_what_follows_them():
    """Replays (1,1,0,1), (0,1,0,0), (1,0,1,0): q (.75,.25,.5), A (.375,-.375,0). The episode is the
    taken answer's first play."""
    turns = [Turn(0, "a", text=name, sibling=k, taken=k == 0) for k, name in enumerate("xyz")] + [
        Turn(1, "b", text="end")
    ]
    player = Recorded({(0, "x"): [1, 0, 1], (0, "y"): [0, 1, 0, 0], (0, "z"): [1, 0, 1, 0]})
    judged = run(player, recorded(turns, 1.0), counterfactual_baseline="siblings", num_replays=4)
    found = credit([judged], CONFIG)
    assert [found["e", 0, k] for k in range(3)] == pytest.approx([0.375, -0.375, 0.0])
    assert ("e", 1, 0) not in found and len(player.asked) == 11


def test_a_turn_is_worth_the_value_after_it_less_the_value_before_it():
    """V before the turns .25, .5 and 1, and 0 at the end: A .25, .5 and -1, in sum R - V_0. All
    replays have seeds of their own, since those with the episode's would be the episode."""
    player = Recorded({(0, "anew"): [0, 0, 1, 0], (1, "anew"): [1, 1, 0, 0], (2, "anew"): [1] * 4})
    turns = [Turn(i, a, text=f"said {a}") for i, a in enumerate("abc")]
    judged = run(player, recorded(turns, 0.0), counterfactual_baseline="value", num_replays=4)
    assert credit([judged], CONFIG) == {("e", 0, 0): 0.25, ("e", 1, 0): 0.5, ("e", 2, 0): -1.0}
    assert [a["given"] for a in player.asked] == [
        tuple(turns[:k]) for k in range(3) for _ in "1234"
    ]
    seeds = {a["seed"] for a in player.asked}
    assert len(seeds) == 12 and 5 not in seeds and len({a["job"].id for a in player.asked}) == 12


def test_a_turn_beside_a_value_that_is_not_known_has_no_credit():
    player = Recorded({(0, "anew"): [0.0], (1, "anew"): [None], (2, "anew"): [1.0]})
    turns = [Turn(i, a, text=f"said {a}") for i, a in enumerate("abc")]
    judged = run(player, recorded(turns, 0.5), counterfactual_baseline="value")
    assert credit([judged], CONFIG) == {("e", 2, 0): -0.5}


def test_a_replay_that_cannot_be_scored_is_left_out(caplog):
    player = Recorded({(0, ""): [None], (1, ""): [0.0]})
    judged = run(player, recorded([Turn(0, "a", text="x"), Turn(1, "b", text="y")], 1.0))
    assert (
        credit([judged], CONFIG) == {("e", 1, 0): 1.0}
        and "replay of turn 0 of e cannot be scored: gone" in caplog.text
    )


def test_nothing_is_replayed_for_written_turns_gold_turns_and_unscorable_episodes():
    turns = [Turn(0, "a", text="x", source="written"), Turn(1, "b", text="y", saw_gold=True)]
    assert run(Recorded({}), recorded(turns, 1.0)).rewards == (Reward("correct", 1.0),)
    unscorable = asyncio.run(
        counterfactual_rewards(Recorded({}), recorded([Turn(0, "a")], math.nan), CONFIG)
    )
    assert len(unscorable.rewards) == 1
    with pytest.raises(SettingError, match="counterfactual_baseline"):
        CreditConfig(counterfactual_baseline="mean")


# with real rollouts


def rollouts(system, answer):
    fake = Fake(answer)

    async def speak(call, version):
        return await fake(call)

    speakers = {agent.policy: speak for agent in system.specs}
    return EpisodeRunner(
        system,
        speakers,
        [lambda task, episode: float(episode.output == task.answer)],
        sampling=Sampling(),
    )


def test_replays_of_a_chain_tell_who_mattered():
    """`first` finds the answer and `last` repeats what it is told; `idle`, in between, is read by
    nobody."""
    views = {"first": "{prompt}", "idle": "hm", "last": "{first}"}
    player = rollouts(
        Chain(["first", "idle", "last"], views=views),
        lambda agent, chat: {"first": "4"}.get(agent, chat[-1].content),
    )

    async def both():
        episode = await player.play(EpisodeRequest(Task("t", "2+2?", "4"), "g"))
        return await counterfactual_rewards(
            player, episode, CreditConfig(reward_weights={"<lambda>": 1.0}), default="?"
        )

    found = credit([asyncio.run(both())], CONFIG)
    assert {index: value for (_, index, _), value in found.items()} == {0: 1.0, 1: 0.0, 2: 1.0}


class Best(System):
    async def run(self, task, team):
        drafts = await gather(
            agent.reply(task.prompt, n=3, choose=lambda turns: 1) for agent in team
        )
        return drafts[0].text


def test_replays_of_siblings_play_each_of_them():
    answers = iter("543")

    async def speak(call, version):
        return [Completion(next(answers)) for _ in range(call.n)]

    player = rollouts(Best(["a"]), lambda agent, chat: "")
    player.completers = {"a": speak}
    config = CreditConfig(reward_weights={"<lambda>": 1.0}, counterfactual_baseline="siblings")

    async def both():
        episode = await player.play(EpisodeRequest(Task("t", "2+2?", "4"), "g"))
        return await counterfactual_rewards(player, episode, config)

    assert credit([asyncio.run(both())], CONFIG) == {
        ("g/0", 0, 0): -0.5,
        ("g/0", 0, 1): 1.0,
        ("g/0", 0, 2): -0.5,
    }
