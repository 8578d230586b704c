"""Whose prompt is rewritten: by the blame of credit rules, and at random as the control."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.state import Param
from marlora.agents.types import AgentSpec, Reward, Task, Turn
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.credit.weights import RewardWeights
from marlora.trainers.methods.prompts.agent_choice import AgentChoice, AgentChoiceConfig
from marlora.trainers.methods.prompts.prompts_and_weights import (
    PromptsAndWeightsConfig,
    PromptsAndWeightsTrainer,
)
from tests.trainers.methods.prompts.prompts_and_weights_run import rows_of

pytestmark = pytest.mark.usefixtures("one_thread")
AGENTS = ("a", "b", "c", "d")
CULPRIT = "c"


def fine(task: Task, episode: Episode) -> float:
    return float(episode.output == "ok")


def works(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
    """A careful agent says ok if it is told nothing bad; a careless one half of the time. The
    helper's instruction is to be careful."""
    if "Write a better instruction" in prompt:
        return "<INSTRUCTION>careful</INSTRUCTION>"
    system, _, asked = prompt.partition("<|user|>")
    slips = "careless" in system and random.Random(f"{sampling.seed}/{k}").random() < 0.5
    return "bad" if slips or "bad" in asked else "ok"


def team(folder: Path, model: Path, **changes: Any) -> PromptsAndWeightsTrainer:
    """A chain of four whose third agent is careless."""
    agents = [AgentSpec(n, prompt="careless" if n == CULPRIT else "careful") for n in AGENTS]
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        policies={name: {"trainable": False} for name in AGENTS},
        helpers={"proposer": {}},
        tasks="tests.trainers.state_tasks:digits",
        rewards=["tests.trainers.methods.prompts.test_agent_choice:fine"],
        num_val_tasks=0,
        num_generations=8,
        tasks_per_step=4,
        max_steps=2,
        round_steps=1,
        gate="always",
        max_completion_length=6,
        max_proposal_tokens=60,
        save_every=9,
        prompt_credit="counterfactual",
    )
    return PromptsAndWeightsTrainer(
        system=Chain(agents),
        args=PromptsAndWeightsConfig(**{**settings, **changes}),
        engine=ScriptedEngine(works),
    )


@pytest.fixture(scope="module")
def asked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptsAndWeightsTrainer:
    made = team(tmp_path_factory.mktemp("asked") / "run", model)
    made.train()
    return made


def test_replays_find_the_agent_that_slips(asked: PromptsAndWeightsTrainer) -> None:
    """Of the wrong episodes all were wrong by the third agent: before its turn they are worth half,
    after it nothing. The others' turns change nothing but by chance of the replays."""
    proposals = rows_of(asked.args.folder)[0]["prompts"]["proposals"]
    blame = proposals["blame"]
    assert set(blame) == set(AGENTS) and blame["d"] == 0
    assert blame[CULPRIT] > 0.3 > max(blame["a"], blame["b"])
    assert proposals["agents"] == [CULPRIT] and len(proposals["new"]) == 1


def test_what_replays_cost_is_metered_and_they_are_neither_stored_nor_trained(
    asked: PromptsAndWeightsTrainer,
) -> None:
    """Eight wrong episodes, played twice from before each of four turns: 2 x (4 + 3 + 2 + 1)."""
    summary = json.loads((asked.args.folder / "summary.json").read_text(encoding="utf-8"))
    ledger = summary["ledger"]["trial"]
    assert sum(ledger[name]["calls"] for name in AGENTS) == 8 * 2 * (4 + 3 + 2 + 1)
    stored = list(asked.run.rollouts.store)
    assert {episode.kind for episode in stored} <= {"train", "aside", "eval"}
    assert not any("/value/" in episode.id for episode in stored)


@pytest.mark.slow
def test_the_choice_finds_the_agent_and_chance_does_not(model: Path, tmp_path: Path) -> None:
    """The share of proposals that go to the agent that slips, in five runs: by replays most of
    them, at random a quarter; `grpo` blames all alike, so it is no better than chance."""
    shares: dict[str, list[float]] = {"counterfactual": [], "grpo": []}
    for seed in range(5):
        made = team(tmp_path / str(seed), model, seed=seed)
        made.train()
        blame = rows_of(made.args.folder)[0]["prompts"]["proposals"]["blame"]
        shares["counterfactual"].append(blame[CULPRIT] / sum(blame.values()))
        played = made.run.rollouts.store.read(kind="train")
        alike = choice(prompt_credit="grpo").blame([e for e in played if e.step == 1])
        shares["grpo"].append(alike[CULPRIT] / sum(alike.values()))
    assert min(shares["counterfactual"]) > 0.4 and fmean(shares["counterfactual"]) > 0.65, shares
    assert shares["grpo"] == pytest.approx([0.25] * 5), shares


# the choice alone, of episodes with rewards worked out by hand


PARAMS = [Param(f"{name}.prompt", "", kind="text", agent=name) for name in "ab"]


def episode(name: str, a: float, b: float) -> Episode:
    """Agents a and b with a reward each; the team's is the smaller one."""
    turns = tuple(Turn(k, agent, text="x") for k, agent in enumerate("ab"))
    rewards = (Reward("exact", min(a, b)), Reward("own", a, agent="a"), Reward("own", b, agent="b"))
    return Episode(name, "g", Task("t", "?"), seed=0, turns=turns, rewards=rewards)


EPISODES = [episode("e0", 1, 1), episode("e1", 1, 0), episode("e2", 1, 0), episode("e3", 0, 1)]


def choice(**settings: Any) -> AgentChoice:
    return AgentChoice(None, AgentChoiceConfig(**settings), RewardWeights())  # type: ignore[arg-type]


def test_a_rule_on_own_rewards_blames_who_earned_less() -> None:
    """By `rae` without memory (decay 0) a reward is compared with the agent's one before: no baseline
    but 0 for the first. In the wrong episodes e1, e2, e3 agent b got 0 - 1, 0 - 0, 1 - 0 and a got
    0, 0, -1."""
    made = choice(prompt_credit="rae", blamed_episodes=3)
    made.credit.rae_decay = 0.0
    assert made.blame(EPISODES) == {"a": pytest.approx(1 / 3), "b": 0.0}


def test_a_rule_that_compares_nothing_draws_at_random_and_says_so() -> None:
    """All episodes of the group are right, so `grpo` has no advantage for anybody."""
    made = choice(prompt_credit="grpo")
    right = [episode("e0", 1, 1), episode("e1", 1, 1)]
    drawn = made.choose(PARAMS, 200, right, random.Random(0))
    assert drawn.blame == {} and 70 < Counter(drawn.agents)["a"] < 130
    control = choice().choose(PARAMS, 200, EPISODES, random.Random(0))
    assert control.blame == {} and control.agents == drawn.agents


def test_agents_are_drawn_in_proportion_to_their_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    made = choice(prompt_credit="grpo")
    monkeypatch.setattr(made, "blame", lambda episodes: {"a": 0.3, "b": 0.1, "helper": 5.0})
    drawn = made.choose(PARAMS, 400, EPISODES, random.Random(0))
    assert drawn.blame == {"a": 0.3, "b": 0.1} and 270 < Counter(drawn.agents)["a"] < 330


def test_episodes_without_a_reward_are_not_blamed() -> None:
    made = choice(prompt_credit="dr_grpo", blamed_episodes=1)
    lost = Episode("lost", "g", Task("t", "?"), seed=0, turns=EPISODES[0].turns, error="gone")
    assert [e.id for e in made._worst([lost, *EPISODES])] == ["e1"]
