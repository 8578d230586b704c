"""FlowReasoner: its facts by hand, what a lesson is, what a trajectory earns, and a run of both
stages."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.patterns.chain import Chain
from marlora.agents.programs.flowreasoner import FlowReasoner
from marlora.agents.programs.workflow import SOURCE
from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import Denominators
from marlora.trainers.credit.program_scores import invalid_kinds
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import CreditConfig
from marlora.trainers.methods.policy_gradient.flowreasoner import (
    REWARD_WEIGHTS,
    FlowReasonerConfig,
    FlowReasonerTrainer,
    as_single_turn,
    rounds_of,
    with_diversity,
)
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss

torch.set_num_threads(1)
SYSTEM = FlowReasoner(
    ["designer", "executor"], tag="", feedback="{passed}/{total}", invalid="invalid"
)


def trajectory(
    name: str, *rounds: tuple[str, float, str], group: str = "g", **rewards: float
) -> Episode:
    """An episode of rounds (program, val, feedback). Every reply is two tokens, in one chat."""
    turns, told = [], []
    messages: tuple[Message, ...] = (Message("user", "query"),)
    for n, (program, value, feedback) in enumerate(rounds):
        turns.append(
            Turn(
                2 * n,
                "designer",
                messages,
                text=program,
                prompt_ids=(9,),
                token_ids=(5, 1),
                logprobs=(-0.5, -0.1),
            )
        )
        turns.append(Turn(2 * n + 1, "executor", (Message("user", "?"),), text="7", policy="base"))
        told.append(Reward("val", value, feedback, "designer", 2 * n, source=SOURCE))
        messages += (Message("assistant", program), Message("user", feedback))
    told += [Reward(key, value, source=SOURCE) for key, value in rewards.items()]
    return Episode(
        name, group, Task("t", "query", "7"), turns=tuple(turns), rewards=tuple(told), output="7"
    )


# facts of the sheet


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        (
            [0.5, 0.3, 0.8],
            [-0.132453, -0.927173, 1.059626],
        ),  # the spread of a sample, n - 1; with n: -.162221, -1.135550, 1.297771
        ([1, 0, 0, 1, 0.75], [0.878310, -1.073490, -1.073490, 0.878310, 0.390360]),
    ],
)
def test_advantages_of_a_group_are_those_of_all_its_rounds(
    rewards: list[float], advantages: list[float]
) -> None:
    """Facts 2 and 3."""
    group = [
        trajectory(str(n), ("a", 0.0, ""), ("b", r, ""), performance=r)
        for n, r in enumerate(rewards)
    ]
    found = credit(
        group,
        CreditConfig(credit="grpo", advantage_epsilon=0.0, reward_weights={"performance": 1.0}),
    )
    for n, expected in enumerate(advantages):
        assert [found[str(n), turn, 0] for turn in (0, 2)] == pytest.approx(
            [expected] * 2, abs=1e-6
        )


def test_equal_rewards_move_nothing() -> None:
    """Fact 4."""
    group = [trajectory(str(n), ("a", 0.5, ""), performance=0.5) for n in range(3)]
    assert credit(group, CreditConfig(reward_weights={"performance": 1.0})) == {}


@pytest.mark.parametrize(("ratio", "advantage", "worth"), [(1.3, 1.0, 1.2), (0.7, -1.0, -0.8)])
def test_clipping_by_hand(ratio: float, advantage: float, worth: float) -> None:
    """Fact 5, epsilon .2."""
    inputs = LossInputs(
        logp=torch.tensor([math.log(ratio)]),
        entropy=torch.zeros(1),
        behaviour=torch.zeros(1),
        advantage=torch.tensor([advantage]),
        sequence=torch.zeros(1, dtype=torch.long),
        total=Denominators(1, 1),
    )
    loss, _ = policy_loss(inputs, LossConfig(epsilon=0.2))
    assert -loss.item() == pytest.approx(worth)


# lessons


def test_a_trajectory_of_several_rounds_is_one_reply_to_the_bare_query() -> None:
    episode = trajectory(
        "e", ("p1", 0.0, "0/2"), ("bad", -1.0, "invalid"), ("p3", 1.0, "2/2"), ("p4", 0.5, "1/2")
    )
    (turn,) = as_single_turn(episode, SYSTEM, "# {reply} {feedback}\n").turns
    assert (
        turn.text == "# p1 0/2\n# bad invalid\np3"
    )  # up to the best round, whose program comes last
    assert turn.messages == (Message("user", "query"),) and turn.source == "written"
    assert (turn.index, turn.token_ids, turn.logprobs, turn.prompt_ids) == (4, (), (), (9,))
    assert as_single_turn(episode, SYSTEM).turns[0].text == "p1\n\n0/2\n\nbad\n\ninvalid\n\np3"


def test_a_first_round_that_is_kept_stays_as_it_was_sampled() -> None:
    episode = trajectory("e", ("p1", 1.0, "2/2"))
    assert as_single_turn(episode, SYSTEM).turns == episode.turns[:1]
    outside = dataclasses.replace(
        episode,
        turns=tuple(dataclasses.replace(t, token_ids=(), logprobs=()) for t in episode.turns),
    )
    assert [(t.text, t.source) for t in as_single_turn(outside, SYSTEM).turns] == [
        ("p1", "written")
    ]  # a teacher without tokens
    assert [
        t.text for t, _ in rounds_of(trajectory("e", ("p1", 0.5, ""), ("p2", 0.5, "")), SYSTEM)
    ] == ["p1", "p2"]
    assert as_single_turn(dataclasses.replace(episode, rewards=()), SYSTEM).turns == ()


# the reward


def test_diversity_is_each_programs_own() -> None:
    """Equal programs are 1 alike; `x()` and `yyyy()` share 2 of their 3 and 6 characters, so 2 * 2
    / 9."""
    programs = [
        ("x()", 1.0, ""),
        ("x( )  # the same", 1.0, ""),
        ("yyyy()", 1.0, ""),
        ("(", -1.0, ""),
    ]
    group = [trajectory(str(n), program) for n, program in enumerate(programs, 1)]
    alone = trajectory("5", ("x()", 1.0, ""), group="h")
    found = {e.id: e.reward("diversity") for e in with_diversity([*group, alone], SYSTEM)}
    alike = 2 * 2 / 9
    assert found == pytest.approx(
        {"1": 1 - (1 + alike) / 2, "2": 1 - (1 + alike) / 2, "3": 1 - alike, "4": 0.0, "5": 0.0}
    )


def test_weights_are_settings_and_ours_by_default() -> None:
    args = FlowReasonerConfig()
    assert (
        args.reward_weights == dict(REWARD_WEIGHTS)
        and args.weight("exact") == 0.0
        and args.weight("val") == 0.0
    )
    (episode,) = with_diversity(
        [trajectory("e", ("x()", 1.0, ""), performance=1.0, complexity=-0.5, efficiency=-0.3)],
        SYSTEM,
    )
    other = trajectory(
        "f", ("(", -1.0, ""), performance=-1.0, complexity=0.0, efficiency=0.0, diversity=0.0
    )
    found = credit([episode, other], FlowReasonerConfig(scale_rewards="none"))
    assert found["e", 0, 0] == pytest.approx(
        (0.95 + 1.0) / 2
    )  # 1 - .1 * .5, against -1 for what cannot be run


def test_shares_of_programs_that_cannot_be_run_by_what_is_wrong() -> None:
    told = [
        Reward("valid", 1.0),
        Reward("valid", 0.0, "name: 'magic'"),
        Reward("valid", 0.0, "name: 'x'"),
        Reward("valid", 0.0, "syntax: no"),
    ]
    assert invalid_kinds(told) == {"name": 0.5, "syntax": 0.25}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sft_steps": -1}, "sft_steps"),
        ({"sft_learning_rate": -1.0}, "sft_learning_rate"),
        ({"reasoning": "{thought}"}, "reasoning: unknown field"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        FlowReasonerConfig(**settings)


def test_the_warm_up_has_a_learning_rate_of_its_own() -> None:
    args = FlowReasonerConfig(sft_steps=2, sft_learning_rate=1e-3, learning_rate=1e-4, max_steps=4)
    assert [args.learning_rate_at(step, 1e-4) for step in (1, 2, 3)] == [1e-3, 1e-3, 1e-4]


# runs


def test_both_stages_of_a_run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up writes lessons in tokens; GRPO learns from sampled turns alone; what neither read
    is the task's answer."""
    for module in (
        "agents.programs.workflow",
        "trainers.methods.policy_gradient.flowreasoner",
    ):  # whatever a model with random weights says is a program
        monkeypatch.setattr(f"marlora.{module}.program_of", lambda text, tag: 'await custom("x")')
    tasks = [
        Task(f"t{n}", f"f{n}", "no model says this", meta={"examples": [["1", "x"], ["2", "y"]]})
        for n in range(2)
    ]
    system = FlowReasoner(
        ["designer", "executor"],
        tag="",
        feedback="{passed}/{total}",
        invalid="no",
        instruction="{prompt}",
        rounds=2,
        prompts={"custom": "{problem}"},
        max_text=100,
        template='await custom("y")',
    )
    args = FlowReasonerConfig(
        output_dir=str(tmp_path / "run"),
        model=str(model),
        engine="transformers",
        max_steps=2,
        tasks_per_step=2,
        num_generations=2,
        max_completion_length=4,
        sft_steps=1,
        success_threshold=0.0,
        rewards=["exact", "workflow", f"{__name__}:noise"],
        lora_r=2,
        reward_weights={"performance": 1.0, "diversity": 1.0, "noise": 1.0},
        reasoning="# {reply} {feedback}\n",
    )
    held_out = [dataclasses.replace(tasks[0], id="e", prompt="held out", split="eval")]
    summary = FlowReasonerTrainer(
        system=system, tasks=tasks, eval_tasks=held_out, args=args
    ).train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    learnt, now = (row["policies"]["designer"] for row in rows)
    assert rows[0]["selection"]["designer"]["kept"] and learnt["nll_after"] < learnt["nll_before"]
    assert (
        "selection" not in rows[1]
        and now["tokens"] > 0
        and rows[1]["policies"]["executor"]["tokens"] > 0
    )
    assert (
        set(summary["stages"]) == {"base", "sft", "rl"} and summary["stages"]["rl"]["rounds"] == 2.0
    )
    played = list(Store(tmp_path / "run/episodes"))
    assert all(
        "no model says this" not in m.content for e in played for t in e.turns for m in t.messages
    )
    with pytest.raises(SettingError, match="FlowReasoner trains a"):
        FlowReasonerTrainer(system=Chain(["a"]), tasks=tasks, eval_tasks=held_out, args=args)


def noise(task: Task, episode: Episode) -> float:
    """A reward that differs between replies: there is always something to learn."""
    return sum(str(episode.turns[0].text).encode()) % 7 / 6
