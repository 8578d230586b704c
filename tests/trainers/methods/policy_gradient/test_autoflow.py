"""AutoFlow: its facts by hand, what a workflow earns and when it is kept, that held-out tasks teach
nothing, and runs that are cut off, evaluated, or must not exceed a budget.

The step language and the interpreter: tests/agents/programs; the tiny designer:
test_autoflow_learning.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.patterns.chain import Chain
from marlora.agents.programs.step_workflow import StepWorkflow
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import Denominators
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import CreditConfig, RewardWeights, weighted_sum
from marlora.trainers.methods.policy_gradient.autoflow import AutoFlowConfig, AutoFlowTrainer
from marlora.trainers.methods.policy_gradient.workflow_designs import ScoredWorkflow, WorkflowDesign
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss
from tests.trainers.autoflow_run import INVALID, config, flow, hashes, talker, team, trainer
from tests.trainers.loop.test_state import facts
from tests.trainers.reading import rows
from tests.trainers.state_tasks import digits

pytestmark = pytest.mark.usefixtures("one_thread")


class Cut(BaseException):
    """Stands for a kill."""


def shown(episode: Episode) -> str:
    """The task, and all that the episode's agents were shown."""
    messages = [message.content for turn in episode.turns for message in turn.messages]
    return " ".join([episode.task.prompt, *messages])


# facts of the sheet


@pytest.mark.parametrize(
    ("reward", "gradient", "after"),
    [
        (0.6, [-0.2, 0.4, -0.2], [0.326601, 0.346797, 0.326601]),
        (-2.0, [0.666667, -1.333333, 0.666667], [0.354770, 0.290461, 0.354770]),
    ],
)
def test_a_step_of_reinforce_by_hand(
    reward: float, gradient: list[float], after: list[float]
) -> None:
    """Facts 3 and 4: three workflows of equal logits, the second was sampled; no baseline, .1."""
    turn = Turn(0, "designer", (Message("user", "?"),), text="w", token_ids=(5,), logprobs=(-1.1,))
    episode = Episode("e", "g", Task("t", "?"), turns=(turn,), rewards=(Reward("exact", reward),))
    advantage = credit([episode], CreditConfig(credit="team"))["e", 0, 0]
    logits = torch.zeros(3, requires_grad=True)
    logp = logits.log_softmax(-1)[1:2]
    inputs = LossInputs(
        logp=logp,
        entropy=torch.zeros(1),
        behaviour=logp.detach(),
        advantage=torch.tensor([advantage]),
        sequence=torch.zeros(1, dtype=torch.long),
        total=Denominators(1, 1),
    )
    policy_loss(inputs, LossConfig())[0].backward()
    assert logits.grad is not None
    assert (-logits.grad).tolist() == pytest.approx(gradient, abs=1e-6)
    moved = (logits.detach() - 0.1 * logits.grad).softmax(-1)
    assert moved.tolist() == pytest.approx(after, abs=1e-6)


def test_the_weighted_score_of_a_planner_by_hand() -> None:
    """Fact 2: TravelPlanner's rates, weighed as rewards of one run would be."""
    rates = {"delivery": 0.9, "commonsense_micro": 0.7, "commonsense_macro": 0.2,
             "hard_micro": 0.3, "hard_macro": 0.1, "final": 0.05}  # fmt: skip
    weights = {"delivery": 10, "final": 100, "commonsense_macro": 5, "hard_macro": 5,
               "commonsense_micro": 1, "hard_micro": 1}  # fmt: skip
    rewards = [Reward(name, rate) for name, rate in rates.items()]
    assert weighted_sum(rewards, RewardWeights(reward_weights=weights)) == pytest.approx(16.5)


def chat_of(replies: Sequence[str]) -> Callable[..., str]:
    """A helper that gives these replies, by how many it has given in the chat that it is shown."""

    def say(prompt: str, *_: Any) -> str:
        if "You write." not in prompt:
            return "1"
        return replies[prompt.count("<|assistant|>") - 1]

    return say


def test_a_workflow_is_kept_when_it_is_strictly_better_than_the_best(
    model: Path, tmp_path: Path
) -> None:
    """Fact 6: rewards .2, -2, .5, .4 are kept at the first and the third step only."""
    replies = [flow(2), INVALID, flow(5), flow(4)]
    made = talker(tmp_path / "run", model, chat_of(replies), max_steps=4)
    made.train()
    told = [row["autoflow"] for row in rows(tmp_path / "run")]
    assert [row["reward"] for row in told] == pytest.approx([0.2, -2.0, 0.5, 0.4])
    assert [row["in_force_score"] for row in told] == pytest.approx([0.2, 0.2, 0.5, 0.5])
    adopted = [c.round for c in made.search.candidates if c.adopted]
    assert adopted == [0, 1, 3] and made.run.values["workflow"] == flow(5)
    assert made.search.candidates[-1].verdict.startswith("not better")
    assert told[1]["invalid"] == {"terminal": 1.0} and told[1]["score"] is None


# the policy gradient


def test_a_design_says_whether_it_is_valid() -> None:
    made = StepWorkflow(["designer", "reader"], designer="designer")
    for reply, worth, told in (
        (f"<workflow>{flow(1)}</workflow>", 1.0, ""),
        ("I cannot.", 0.0, "missing: the reply holds no workflow"),
    ):
        team = fake_team(["designer"], lambda agent, messages, reply=reply: reply)  # type: ignore[misc]
        design = WorkflowDesign(["designer"], target=made)
        turn = asyncio.run(design.run(Task("w", made.design_prompt()), team))
        assert turn.text == reply
        assert team.rewards == [Reward("valid", worth, told, "designer", 0, 0, "workflow")]


def test_what_is_trained_is_what_was_followed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reply learns from the mean of its own workflow's trials; equal ones are followed once."""
    learnt: list[Sequence[ScoredWorkflow]] = []
    learn = AutoFlowTrainer._learn

    def spy(self: AutoFlowTrainer, step: int, written: Any, seconds: float) -> Any:
        learnt.append(written)
        return learn(self, step, written, seconds)

    monkeypatch.setattr(AutoFlowTrainer, "_learn", spy)
    made = trainer(tmp_path / "run", model, num_generations=8, max_steps=1)
    summary = made.train()
    (written,) = learnt
    assert len({each.reward for each in written}) > 2, "something to compare"
    for each in written:
        text, fault = made.target.read(each.episode.turns[0].text)
        assert (each.text, each.fault) == (text, fault)
        assert each.reward == (-2.0 if fault else pytest.approx(int(text.split(":::")[2][-1]) / 10))
        told = [reward for reward in each.episode.rewards if reward.name == "valid"]
        assert [(r.value, r.text) for r in told] == [(float(not fault), fault)]
    distinct = {each.text for each in written if each.text}
    # two training tasks each; the first and the best on three validation tasks, and the end state
    assert max(each.reward for each in written) > 0
    assert summary["ledger"]["trial"]["reader"]["calls"] == 2 * len(distinct) + 3 * 3
    assert summary["ledger"]["train"]["designer"]["calls"] == 8
    (row,) = rows(tmp_path / "run")
    rewards = [each.reward for each in written]
    for mean in (row["reward"], row["autoflow"]["reward"]):
        assert mean == pytest.approx(sum(rewards) / 8)
    assert row["policies"]["designer"]["sequences"] == 8
    assert summary["policies"].keys() == {"designer"}
    assert summary["designs"]["base"]["valid"] < 1 and "report" in summary
    played = [e for e in Store(tmp_path / "run" / "episodes") if e.kind != "eval"]
    assert {e.kind for e in played} == {"train", "trial"}
    names = {r.name for e in played if e.kind == "train" for r in e.rewards}
    assert names == {"valid"}, "a design has no answer that the run's rewards could score"
    assert not any("exam " in shown(e) for e in played), "no step plays a held-out task"


@pytest.mark.slow
def test_held_out_tasks_teach_nothing(model: Path, tmp_path: Path) -> None:
    """Other held-out tasks, evaluated after every step, leave adapters and choices as they are; and
    no step plays one."""
    known = {}
    for name in ("exam", "other"):
        tasks = {"tasks": digits("train"), "eval_tasks": [
            Task(f"{name}{n}", f"{name} {n}", "x", split="eval") for n in range(3)
        ]}  # fmt: skip
        folder = tmp_path / name
        made = trainer(folder, model, lists=tasks, eval_every=1, max_steps=2)
        made.train()
        told = [row["autoflow"] for row in rows(folder)]
        known[name] = (hashes(made), made.search.state_dict(), told)
        learnt = [e for e in Store(folder / "episodes") if e.kind != "eval"]
        assert learnt and not any(f"{name} " in shown(e) for e in learnt)
    assert known["exam"] == known["other"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_choose", "_learn"])
def test_a_run_that_is_killed_inside_a_step_comes_to_the_same(
    where: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a running baseline, which is remembered too."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings: dict[str, Any] = {"credit": "rae", "max_steps": 2}
    first = trainer(whole, model, **settings)
    first.train()
    method = getattr(AutoFlowTrainer, where)

    def killed(self: AutoFlowTrainer, *args: Any) -> Any:
        result = method(self, *args)
        if self.run.step == 1:
            raise Cut
        return result

    with monkeypatch.context() as patch:
        patch.setattr(AutoFlowTrainer, where, killed)
        with pytest.raises(Cut):
            trainer(cut, model, **settings).train()
    again = trainer(cut, model, resume=True, **settings)
    again.train()
    assert hashes(again) == hashes(first)
    assert again.run.learner.credit_state == first.run.learner.credit_state != {}
    assert facts(cut) == facts(whole)
    assert [row["autoflow"] for row in rows(cut)] == [row["autoflow"] for row in rows(whole)]


def test_evaluating_the_checkpoint_gives_what_the_run_says(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "eval"
    summary = trainer(folder, model, max_steps=2).train()
    argv = ["eval", str(folder / "checkpoints" / "step-000002"), "--trust_checkpoint"]
    argv += ["--system", "tests.trainers.autoflow_run:HashedWorkflow"]
    argv += ["--engine", "transformers", "--output", str(out)]
    assert main(argv) in (0, None)
    result = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        assert result["eval"][when]["accuracy"] == summary["eval"][when]["accuracy"]
    assert result["eval"]["after"]["accuracy"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '<svg class="flow"' in page and "workflows sampled from the designer" in page


# the search in a chat


def test_the_chat_tells_of_every_earlier_workflow_what_came_of_it(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    replies = [flow(2), INVALID, flow(5)]
    talker(folder, model, chat_of(replies), values={"workflow": flow(1)}).train()
    asides = sorted(
        (e for e in Store(folder / "episodes") if e.kind == "aside"), key=lambda e: e.id
    )
    chats = [[m.content for m in e.turns[0].messages] for e in asides]
    opening = "digits\n\nThe example scores 0.1000 on tasks of this kind."
    assert chats[0] == ["You write.", opening]
    assert chats[2] == [
        "You write.",
        opening,
        flow(2),
        "The workflow scores 0.2000 on tasks of this kind. Write a better one.",
        INVALID,
        "The workflow cannot be followed: terminal: no step is one. Write another one.",
    ]
    told = " ".join(text for chat in chats for text in chat)
    assert "question" not in told and "exam " not in told, "the designer sees no task"


def test_the_chat_holds_the_last_workflows(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    talker(folder, model, chat_of([flow(2), flow(3)]), history=1, max_steps=4).train()
    last = max((e for e in Store(folder / "episodes") if e.kind == "aside"), key=lambda e: e.id)
    assert [m.content for m in last.turns[0].messages][2:3] == [flow(3)]
    assert len(last.turns[0].messages) == 4


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (2, "_choose"),
        *(
            pytest.param(step, where, marks=pytest.mark.slow)
            for step, where in [(1, "_asked"), (1, "_choose"), (1, "_remember"), (2, "_remember")]
        ),
    ],
)
def test_a_chat_that_is_cut_off_goes_on(
    step: int, where: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    say = chat_of([flow(2), INVALID, flow(5)])
    talker(whole, model, say).train()
    method = getattr(AutoFlowTrainer, where)

    def killed(self: AutoFlowTrainer, *args: Any) -> Any:
        result = method(self, *args)
        if self.run.step == step - 1:
            raise Cut
        return result

    with monkeypatch.context() as patch:
        patch.setattr(AutoFlowTrainer, where, killed)
        with pytest.raises(Cut):
            talker(cut, model, say).train()
    talker(cut, model, say, resume=True).train()
    assert facts(cut) == facts(whole)


@pytest.mark.parametrize("limit", [150, pytest.param(500, marks=pytest.mark.slow), 900])
def test_a_budget_is_never_exceeded_and_the_run_ends_whole(
    limit: int, model: Path, tmp_path: Path
) -> None:
    summary = talker(
        tmp_path / "run",
        model,
        chat_of([flow(2), flow(5), flow(9)]),
        budget={"tokens": limit},
        max_workflow_length=60,
    ).train()
    assert summary["budget"]["spent"]["tokens"] <= limit and summary["steps"] < 3
    assert summary["done"] == "the budget is spent"
    assert summary["eval"]["after"]["accuracy"] is not None


def test_a_helper_that_cannot_be_asked_leaves_the_chat_as_it_was(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second reply is so long that the third prompt would not fit."""
    made = talker(
        tmp_path / "run",
        model,
        chat_of([flow(2), flow(3) + "\n" * 17_000]),
        max_workflow_length=100,
        history=1,
    )
    made.run.engines.given.answer = lambda *asked: flow(3) + "\n" * 80  # type: ignore[union-attr]
    made.run.engines.given.context = 180  # type: ignore[union-attr]
    made.train()
    told = [row["autoflow"] for row in rows(tmp_path / "run")]
    assert [row["reward"] for row in told][1:] == [None, None]
    assert "no workflow was written: episode: " in capfd.readouterr().err
    assert len(made.chat["turns"]) == 1


# bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 1}, "num_generations: credit 'dr_grpo' compares episodes"),
        ({"credit": "at_grpo"}, "credit: expected one of"),
        ({"reward_weights": {"exact": 2.0}}, "reward_weights: a workflow is worth the mean"),
        ({"max_staleness": 1}, "max_staleness: workflows are sampled by the present designer"),
        ({"episodes": "runs/x"}, "episodes: workflows are sampled by the present designer"),
        ({"num_val_tasks": 0}, "num_val_tasks: expected"),
        ({"history": 0}, "history: expected"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        AutoFlowConfig(**settings)


@pytest.mark.parametrize(
    ("system", "settings", "words"),
    [
        ({}, {"policies": {"designer": {"trainable": False}}}, "policies.designer: the designer's"),
        ({}, {"policies": {"base": {"trainable": False}}, "in_context": True}, "helpers.designer"),
        ({}, {"in_context": True, "helpers": {"designer": {}}}, "helpers.designer: the team has"),
        ({"designer": ""}, {}, "system.designer: missing"),
        ({"agents": ["designer", "reader"]}, {}, "policies.reader: the interpreter is not trained"),
        ({}, {"agents": {"designer": {"sampling": {"top_k": 5}}}}, "its agents sample"),
    ],
)
def test_teams_that_cannot_learn(
    system: dict[str, Any], settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=words):
        AutoFlowTrainer(system=team(**system), args=config(tmp_path / "run", model, **settings))


def test_only_workflows_in_step_language_are_learnt(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"system\.class: AutoFlow writes workflows for a"):
        AutoFlowTrainer(system=Chain(["designer"]), args=config(tmp_path / "run", model))
