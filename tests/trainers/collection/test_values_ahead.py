"""Values that change at each step while rollouts run ahead: every episode keeps those it began
with, and its turns train the policies that spoke them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.settings import setting
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.collection.engines import EngineGroup
from marlora.trainers.config import RunConfig
from marlora.trainers.credit.weights import CreditConfig
from marlora.trainers.errors import RunError
from marlora.trainers.loop.step_result import StepResult
from marlora.trainers.methods.policy_gradient.gptswarm import GPTSwarmTrainer
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.trainers.reading import rows
from tests.trainers.small_run import EPISODES, EVAL, bytes_mod_7, config
from tests.trainers.swarms import choice_tasks, scripted, swarm

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5


def played(folder: Path) -> list[Episode]:
    return list(Store(folder / "episodes").read(kind="train"))


def logprob(logits: Mapping[str, float], options: tuple[str, ...], choice: str) -> float:
    """log softmax of the choice; options without a logit have 0."""
    weights = {option: math.exp(logits.get(option, 0.0)) for option in options}
    return math.log(weights[choice] / sum(weights.values()))


# tables of logits


@dataclass
class TableConfig(RunConfig, CreditConfig):
    """Settings of a table of logits that is learnt from earlier states' decisions too."""

    learning_rate: float = setting("of Adam on the logits", 1.0)
    initial_probability: float = setting("of every edge before step 1", 0.5)
    across_tasks: bool = setting("compare all episodes of a step", True)


class TableTrainer(GPTSwarmTrainer):
    """Learns the edges of a swarm as `gptswarm_edges` does, which refuses `max_staleness`."""

    Config = TableConfig  # type: ignore[assignment]


def tables(folder: Path, model: Path, **changes: Any) -> TableTrainer:
    """A swarm whose 36 logits move by about 1 at each step."""
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        max_steps=STEPS,
        tasks_per_step=4,
        num_generations=1,
        num_eval_tasks=2,
        credit="dr_grpo",
    )
    return TableTrainer(
        system=swarm(),
        tasks=choice_tasks(),
        eval_tasks=choice_tasks("eval"),
        rewards=["exact"],
        engine=ScriptedEngine(scripted),
        args=TableConfig(**{**small, **changes}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_decisions_carry_the_log_probs_of_their_own_episodes_values(
    deterministic: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineGroup, "deterministic", deterministic)
    folder = tmp_path / "run"
    # with few places, episodes of a step begin before and after the step before it is learnt
    room = 64 if deterministic else 2
    tables(folder, model, max_staleness=1, max_concurrency=room).train()
    episodes, metrics = played(folder), rows(folder)
    decisions = [(e, d) for e in episodes for d in e.decisions]
    assert len(episodes) == STEPS * 4 and len(decisions) > 300
    for e, d in decisions:
        own = e.state.values["edges"][d.name]
        assert d.logprob == pytest.approx(logprob(own, d.options, d.choice), abs=1e-12)
    first = episodes[0].state.values["edges"]
    others = [d for e, d in decisions if e.state.values["edges"] != first]
    assert any(
        abs(d.logprob - logprob(first[d.name], d.options, d.choice)) > 0.1 for d in others
    ), "the values did not move: the test tests nothing"
    # how old they were, from the states that the steps' rows name
    in_force = {0: episodes[0].state.key, **{row["step"]: row["state"] for row in metrics}}
    assert len(set(in_force.values())) == STEPS + 1, "each step has a state of its own"
    for row in metrics:
        step = row["step"]
        ages = [
            step - 1 - next(s for s, key in in_force.items() if key == e.state.key)
            for e in episodes
            if e.step == step
        ]
        assert row["staleness"] == sum(ages) / 4 and row["max_staleness"] == max(ages) <= 1
        assert min(ages) >= 0
        if deterministic:
            assert set(ages) == {min(1, step - 1)}
    assert any(row["staleness"] > 0 for row in metrics), "nothing was played ahead"


def test_without_staleness_every_step_is_played_with_the_newest_values(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    made = tables(folder, model)
    made.train()
    in_force = {0: made.run.origin.key, **{row["step"]: row["state"] for row in rows(folder)}}
    assert len(set(in_force.values())) == STEPS + 1
    assert all(e.state.key == in_force[e.step - 1] for e in played(folder))
    assert not any("staleness" in row for row in rows(folder))


def test_values_that_are_too_old_are_never_learnt_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector that gives out states of two steps ago although one is allowed."""
    made = tables(tmp_path / "run", model, max_staleness=1)
    ahead = type(made.run.sync.team)
    put, kept = ahead.put, dict[int, Any]()

    def late(self: Any, step: int, state: Any) -> None:
        kept[step] = state
        put(self, step, state)

    monkeypatch.setattr(ahead, "put", late)
    monkeypatch.setattr(ahead, "newest", property(lambda self: kept[max(0, max(self.of) - 2)]))
    with pytest.raises(RunError, match="more than max_staleness 1 states behind"):
        made.train()
    assert len(rows(tmp_path / "run")) in (1, 2), "the first ones were young enough"


# mappings of agents to policies


class Mapped(GRPOTrainer):
    """GRPO, after whose first step the agent `first` speaks with another policy."""

    after = "last"

    def step(self, step: int) -> StepResult:
        result = super().step(step)
        state = self.run.state.with_values({"first.policy": self.after}) if step == 1 else None
        return StepResult(result.metrics, result.episodes, state)


def mapped(folder: Path, model: Path, after: str, **changes: Any) -> Mapped:
    made = Mapped(
        system=tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:EVAL],
        rewards=[bytes_mod_7],
        args=config(folder, model, proof_every=1, **changes),
    )
    made.after = after
    made.train()
    return made


def learnt(folder: Path, step: int) -> dict[tuple[str, int], str]:
    """By (episode, turn), the policy that learnt from it in this step."""
    lines = (folder / "learned.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if row["step"] == step]
    return {(row["episode"], row["turn"]): row["policy"] for row in found}


@pytest.mark.parametrize("bound", [0, 1])
def test_turns_train_the_policy_that_spoke_them(bound: int, model: Path, tmp_path: Path) -> None:
    """With rollouts one step ahead, step 2 is played before the mapping changes and learnt after
    it: no agent speaks as `first` any more, and its turns still train that policy."""
    folder = tmp_path / "run"
    mapped(folder, model, "last", max_staleness=bound)
    before = {"first": "first", "last": "last"}
    after = {"first": "last", "last": "last"}
    episodes = played(folder)
    assert len(episodes) == 3 * EPISODES
    for step in (1, 2, 3):
        spoke = after if step > 1 + bound else before
        turns = {(e.id, t.index): t for e in episodes if e.step == step for t in e.turns}
        assert {t.agent: t.policy for t in turns.values()} == spoke
        found = learnt(folder, step)
        assert found and all(policy == turns[key].policy for key, policy in found.items())
        assert {turns[key].agent for key in found} == {"first", "last"}
        row = rows(folder)[step - 1]
        assert not [reason for reason in row["dropped"] if "spoken" in reason]
        assert (row["policies"]["first"]["tokens"] > 0) == (spoke is before)
        # only what spoke can be compared
        assert {policy: proof["status"] for policy, proof in row["proof"].items()} == (
            dict.fromkeys(spoke.values(), "passed")
        )


def test_turns_of_a_policy_that_does_not_learn_are_dropped_and_counted(
    model: Path, tmp_path: Path
) -> None:
    """Step 2 is played by the bare base and learnt when `first` speaks with its own policy again:
    the probabilities are not that policy's."""
    folder = tmp_path / "run"
    mapped(folder, model, "first", max_staleness=1, values={"first.policy": "base"})
    episodes = played(folder)
    spoke = [{t.policy for e in episodes if e.step == s for t in e.turns} for s in (1, 2, 3)]
    assert spoke == [{"base", "last"}, {"base", "last"}, {"first", "last"}]
    assert set(learnt(folder, 2).values()) == {"last"} != set(learnt(folder, 3).values())
    reason, silent = "first: spoken by policy 'base'", "zero advantage"
    dropped = [row["dropped"] for row in rows(folder)]
    lost = dropped[1][reason] + dropped[1].get(f"first: {silent}", 0)
    assert lost == sum(e.step == 2 for e in episodes) and dropped[1][reason] > 0
    assert reason not in {**dropped[0], **dropped[2]}, "no agent that learns was spoken for"
