"""PPO of a small team: its losses, epochs, critics that learn and are kept, and what teaches
nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.files import adapter_sha256, file_sha256
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import Denominators
from marlora.trainers.loop.run import RunError
from marlora.trainers.methods.policy_gradient import ppo
from marlora.trainers.methods.policy_gradient.critics import sequences
from marlora.trainers.methods.policy_gradient.ppo import PPOConfig, PPOTrainer, turn_rewards
from marlora.trainers.model.adapter_files import WEIGHTS
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss
from marlora.trainers.update.losses.value import value_loss
from tests.trainers import small_run
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Twice(System):
    """`first` answers, `last` answers that, and `first` answers again in the same chat."""

    async def run(self, task: Task, team: Team) -> str:
        draft = await team["first"].reply(task.prompt)
        told = await team["last"].reply(f"{draft}+1", reads=[draft])
        return (await team["first"].reply(f"{told}!", reads=[told])).text


def always(task: Task, episode: Episode) -> float:
    return 0.7


def trainer(
    folder: Path,
    model: Path,
    system: System | None = None,
    reward: Any = small_run.bytes_mod_7,
    **changes: Any,
) -> PPOTrainer:
    small = dataclasses.asdict(small_run.config(folder, model))
    known = {field.name for field in dataclasses.fields(PPOConfig)} - {"credit"}
    args = PPOConfig(
        **{**{name: value for name, value in small.items() if name in known}, **changes}
    )
    made = system or tiny_chain()
    if system is not None:
        made = system.with_agents(tiny_chain().specs)
    return PPOTrainer(
        system=made,
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:2],
        rewards=[reward],
        args=args,
    )


# losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(1.3, 1, -1.2), (0.7, -1, 0.8), (1.3, -1, 1.3), (0.7, 1, -0.7)]
)
def test_the_clipped_policy_loss(ratio: float, advantage: float, loss: float) -> None:
    inputs = LossInputs(
        logp=torch.tensor([-1.0 + math.log(ratio)]),
        entropy=torch.zeros(1),
        behaviour=torch.tensor([-1.0]),
        advantage=torch.tensor([float(advantage)]),
        sequence=torch.tensor([0]),
        total=Denominators(1, 1),
    )
    found, _ = policy_loss(inputs, LossConfig())
    assert float(found) == pytest.approx(loss)


def test_the_clipped_value_loss() -> None:
    def loss(
        value: float, old: float, returned: float, clip: float | None
    ) -> tuple[float, float, float]:
        v = torch.tensor([value], requires_grad=True)
        found, stats = value_loss(
            v, torch.tensor([old]), torch.tensor([returned]), clip, Denominators(1, 1)
        )
        found.backward()
        return float(found.detach()), float(v.grad), float(stats["value_clipped"])

    assert loss(0.9, 0.5, 1.0, 0.2) == pytest.approx(
        (0.045, 0.0, 1.0)
    )  # held at 0.7, and no gradient there
    assert -1.2 + 0.1 * loss(0.9, 0.5, 1.0, 0.2)[0] == pytest.approx(-1.1955)
    assert loss(0.6, 0.5, 1.0, 0.2) == pytest.approx((0.08, -0.4, 0.0))
    assert loss(0.9, 0.5, 1.0, None) == pytest.approx((0.005, -0.1, 0.0))
    assert loss(0.9, 0.5, 0.0, 0.2) == pytest.approx((0.405, 0.9, 0.0))  # the way back is open
    whole = value_loss(
        torch.tensor([0.9, 0.6]), torch.full((2,), 0.5), torch.ones(2), 0.2, Denominators(2, 1)
    )[0]
    assert float(whole) == pytest.approx((0.045 + 0.08) / 2)


# updates


def test_epochs_and_minibatches(tmp_path: Path, model: Path) -> None:
    """Six episodes in minibatches of two, three passes: nine updates of each policy and of each
    critic."""
    made = trainer(tmp_path / "run", model, max_steps=1, num_ppo_epochs=3, num_mini_batches=3)
    made.train()
    (row,) = rows(tmp_path / "run")
    with made.run as run:
        (base,) = run.learner.bases.values()
        for name in ("first", "last"):
            assert row["policies"][name]["updates"] == 9
            assert row["critics"][name]["tokens"] == row["policies"][name]["tokens"] > 3 * 6
            moments = [base.optimizers.state(name), base.heads[name].state()]
            assert [float(m["0.step"]) for m in moments] == [9.0, 9.0]


def test_a_policy_that_has_gone_far_enough_stops_and_its_critic_does_not(
    tmp_path: Path, model: Path
) -> None:
    made = trainer(tmp_path / "run", model, max_steps=2, num_ppo_epochs=6, target_kl=0.002)
    made.train()
    for row in rows(tmp_path / "run"):
        for policy in row["policies"].values():
            assert 1 < policy["updates"] < 6 and policy["mismatch_kl"] > 0.002
    with made.run as run:
        assert {
            float(h.state()["0.step"]) for b in run.learner.bases.values() for h in b.heads.values()
        } == {12.0}


# critics


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer(folder, model, num_ppo_epochs=2, num_mini_batches=2, kl_coef=0.1).train()
    return folder


def weights(folder: Path) -> dict[str, str]:
    last = folder / "checkpoints" / "step-000003"
    return {str(path.relative_to(last)): file_sha256(path) for path in last.rglob("*.safetensors")}


def test_every_tensor_of_a_critic_is_trained_and_kept(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    assert sorted(weights(undisturbed)) == [
        "adapters/first/adapter_model.safetensors",
        "adapters/last/adapter_model.safetensors",
        "trainer/first.safetensors",
        *(
            f"trainer/heads/{name}/{file}.safetensors"
            for name in ("first", "last")
            for file in ("adapter_model", "head", "optimizer")
        ),
        "trainer/last.safetensors",
    ]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert all(
        entry["sha256_before"] != entry["sha256_after"] for entry in summary["heads"].values()
    )
    # r = 4 on q and v of 32 x 32 in two layers, and 32 + 1 of the linear layer
    assert {name: entry["trainable_parameters"] for name, entry in summary["heads"].items()} == {
        "first": 1057,
        "last": 1057,
    }
    assert set(summary["policies"]) == {"first", "last"} and summary["live_proof"]["failed"] == 0
    system = json.loads((undisturbed / "checkpoints/step-000003/system.json").read_text())
    assert set(system["adapters"]) == set(system["policies"]) == {"first", "last"}, (
        "a critic is no policy"
    )
    with trainer(tmp_path / "fresh", model).run as run:
        (base,) = run.learner.bases.values()
        before = {
            n: {k: p.detach().clone() for k, p in h.parameters().items()}
            for n, h in base.heads.items()
        }
    with trainer(
        undisturbed, model, num_ppo_epochs=2, num_mini_batches=2, kl_coef=0.1, resume=True
    ).run as run:
        (base,) = run.learner.bases.values()
        for name, head in base.heads.items():
            assert all(
                not torch.equal(p, before[name][key]) for key, p in head.parameters().items()
            )
            assert summary["heads"][name]["sha256_after"] == head.sha256()
            assert adapter_sha256(
                undisturbed / f"checkpoints/step-000003/trainer/heads/{name}" / WEIGHTS
            ) == base.adapters.sha256(head.adapter)


def test_the_metrics_tell_what_the_critics_know(undisturbed: Path) -> None:
    for row in rows(undisturbed):
        for name in ("first", "last"):
            policy, critic = row["policies"][name], row["critics"][name]
            assert policy["value_loss"] == critic["value_loss"] > 0
            assert policy["updates"] == 4 and critic["grad_norm"] > 0 and critic["applied"]
            assert {
                "explained_variance",
                "value",
                "kl_reward",
                "clipped",
                "mismatch_kl",
                "entropy",
            } <= set(policy)
    first, *_, last = rows(undisturbed)
    assert first["policies"]["first"]["value"] == 0 and last["policies"]["first"]["value"] > 0.1
    assert (
        abs(first["policies"]["first"]["kl_reward"]) < 1e-4 < last["policies"]["first"]["kl_reward"]
    )
    report = (undisturbed / "report.html").read_text()
    assert all(re.search(name, report) for name in ("explained.variance", "value.loss"))


def test_resumed_from_stored_episodes_it_ends_the_same_to_the_last_bit(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for path in [folder / "checkpoints/step-000003", folder / "summary.json"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = file_sha256(folder / "episodes/episodes-00000.jsonl")
    trainer(folder, model, num_ppo_epochs=2, num_mini_batches=2, kl_coef=0.1, resume=True).train()
    assert weights(folder) == weights(undisturbed)
    assert file_sha256(folder / "episodes/episodes-00000.jsonl") == before, (
        "nothing was played again"
    )
    for mine, theirs in zip(rows(folder), rows(undisturbed), strict=True):
        assert (mine["policies"], mine["critics"]) == (theirs["policies"], theirs["critics"])


def test_a_checkpoint_without_these_critics_is_refused(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    with pytest.raises(SettingError, match="holds no head 'first-0'"):
        trainer(folder, model, value_heads="turn", resume=True).run.open()
    small_run.trainer(tmp_path / "grpo", model, max_steps=1).train()
    with pytest.raises(SettingError, match="holds no head 'first'"):
        trainer(tmp_path / "grpo", model, resume=True).run.open()


def test_a_critic_per_agent_and_turn(model: Path, tmp_path: Path) -> None:
    """`first` speaks twice and has two critics; `last` speaks once, so its second one has nothing
    to judge and stays as it was."""
    made = trainer(
        tmp_path / "run", model, Twice(["first", "last"]), max_steps=1, value_heads="turn"
    )
    summary = made.train()
    moved = {
        name: entry["sha256_before"] != entry["sha256_after"]
        for name, entry in summary["heads"].items()
    }
    assert moved == {"first-0": True, "first-1": True, "last-0": True, "last-1": False}
    (row,) = rows(tmp_path / "run")
    judged = {name: critic["tokens"] for name, critic in row["critics"].items()}
    assert judged["first-0"] + judged["first-1"] == row["policies"]["first"]["tokens"]


def test_a_critic_on_each_of_two_bases(model: Path, tmp_path: Path) -> None:
    other = tiny_random_model(tmp_path / "other", layers=1, seed=9)
    folder = tmp_path / "run"
    made = trainer(folder, model, policies={"last": {"base": str(other)}}, kl_coef=0.1, max_steps=2)
    summary = made.train()
    assert {name: entry["trainable_parameters"] for name, entry in summary["heads"].items()} == {
        "first": 1057,
        "last": 545,
    }
    assert all(
        entry["sha256_before"] != entry["sha256_after"]
        for part in ("heads", "policies")
        for entry in summary[part].values()
    )
    assert [list(base.heads) for base in made.run.learner.bases.values()] == [["first"], ["last"]]
    told = [
        (row["step"], name, row["policies"][name]["kl_reward"])
        for row in rows(folder)[1:]
        for name in ("first", "last")
    ]
    assert all(abs(kl) > 1e-5 for _, _, kl in told), told


def test_a_policy_that_only_a_value_names_has_a_critic(model: Path, tmp_path: Path) -> None:
    settings = {"policies": {"late": {"base": str(model)}}, "values": {"last.policy": "late"}}
    summary = trainer(tmp_path / "run", model, max_steps=1, **settings).train()
    for part in ("heads", "policies"):
        moved = {
            name for name, of in summary[part].items() if of["sha256_before"] != of["sha256_after"]
        }
        assert moved == {"first", "late"} and summary[part].keys() == {"first", "last", "late"}


# what teaches nothing


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_constant_reward_teaches_the_critics_only(
    kl_coef: float, model: Path, tmp_path: Path
) -> None:
    made = trainer(tmp_path / "run", model, reward=always, max_steps=4, kl_coef=kl_coef)
    summary = made.train()
    assert all(
        entry["sha256_before"] == entry["sha256_after"] for entry in summary["policies"].values()
    )
    assert summary["live_proof"]["untrained"] > 0 and summary["live_proof"]["passed"] == 0
    assert summary["tokens"]["trained"] == 0
    first, *_, last = rows(tmp_path / "run")
    for name in ("first", "last"):
        assert first["policies"][name]["tokens"] == 0 and first["policies"][name]["updates"] == 0
        assert last["policies"][name]["value_loss"] < 0.25 * first["policies"][name]["value_loss"]
        assert last["policies"][name]["value"] == pytest.approx(0.7, abs=0.35)


def test_with_learning_rate_0_nothing_moves(model: Path, tmp_path: Path) -> None:
    summary = trainer(tmp_path / "run", model, max_steps=1, learning_rate=0.0).train()
    assert all(
        entry["sha256_before"] == entry["sha256_after"]
        for part in ("heads", "policies")
        for entry in summary[part].values()
    )
    assert summary["tokens"]["trained"] > 0


def test_three_steps_that_are_not_finite_end_the_run_however_many_updates_they_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ppo.value_loss

    def broken(*args: Any) -> Any:
        loss, stats = real(*args)
        return loss * math.nan, stats

    monkeypatch.setattr(ppo, "value_loss", broken)
    made = trainer(tmp_path / "run", model, max_steps=9)
    with pytest.raises(RunError, match=r"three steps in a row were not finite.*step-000003\.json"):
        made.train()
    dumped = json.loads((tmp_path / "run/dumps/step-000002.json").read_text())
    assert set(dumped["problems"]) == {"head@last"} and dumped["samples"]
    second = rows(tmp_path / "run")[1]
    assert second["policies"]["first"]["updates"] == 4 and second["policies"]["first"]["applied"], (
        "the policies went on"
    )
    assert not second["critics"]["first"]["applied"]


# rewards of turns


def told(*agents: str, rewards: list[Reward], name: str = "e") -> Episode:
    turns = tuple(
        Turn(index, agent, prompt_ids=(1,), token_ids=(2,), logprobs=(-1.0,))
        for index, agent in enumerate(agents)
    )
    return Episode(name, name, Task("t", "?"), turns=turns, rewards=tuple(rewards))


def test_rewards_of_turns_by_hand(tmp_path: Path) -> None:
    team, own, turn = (
        Reward("r", 1.0),
        Reward("o", 0.5, agent="a"),
        Reward("t", 0.25, agent="a", turn=0),
    )
    e = told("a", "b", "a", rewards=[team, own])
    found = {}
    for across in (False, True):
        for credit in ("agent", "team"):
            given = turn_rewards([e], PPOConfig(credit=credit, across_turns=across, discount=0.9))
            found[credit, across] = [given["e", n, 0] for n in range(3)]
    assert found["agent", False] == [0.5, 1.0, 0.5] and found["agent", True] == [0.0, 1.0, 0.5]
    assert found["team", False] == pytest.approx([0.81, 0.9, 1.0]) and found["team", True] == [
        0.0,
        1.0,
        1.0,
    ]
    scored = told("a", "b", "a", rewards=[team, turn])
    given = turn_rewards([scored], PPOConfig(credit="turn"))
    assert [given["e", n, 0] for n in range(3)] == [1.25, 1.0, 1.0]
    given = turn_rewards([scored], PPOConfig(credit="turn", across_turns=True))
    assert [given["e", n, 0] for n in range(3)] == [0.25, 1.0, 1.0]
    assert turn_rewards([told("a", rewards=[Reward("r", math.nan)])], PPOConfig()) == {}


def test_turns_in_sequence_by_hand() -> None:
    e = told("a", "b", "a", "a", rewards=[])
    left = dataclasses.replace(e.turns[2], sibling=1, taken=False)
    e = dataclasses.replace(e, turns=(*e.turns[:3], left, e.turns[3]))
    spans = {
        ("e", 0, 0): range(1),
        ("e", 1, 0): range(1),
        ("e", 2, 0): range(1),
        ("e", 2, 1): range(1),
        ("e", 3, 0): range(1),
    }
    assert sequences([e], spans, False) == [[key] for key in spans]
    assert sequences([e], spans, True) == [
        [("e", 0, 0), ("e", 2, 0), ("e", 3, 0)],
        [("e", 1, 0)],
        [("e", 2, 1)],
    ]
    del spans["e", 2, 0]  # not trained on: the sequence goes on over it
    assert sequences([e], spans, True)[0] == [("e", 0, 0), ("e", 3, 0)]


def test_a_turn_without_reward_is_not_learnt_from_and_one_with_reward_0_is(
    model: Path, tmp_path: Path
) -> None:
    made = trainer(tmp_path / "run", model)
    with made.run as run:
        episodes = run.rollouts.collect(1)
        rewards = {
            (e.id, t.index, 0): float(n % 2)
            for n, e in enumerate(episodes)
            for t in e.turns
            if t.agent == "first"
        }
        rewards[episodes[0].id, 0, 0] = math.nan
        metrics = ppo.ppo_step(made, 1, episodes, rewards)
        assert metrics["policies"]["last"]["tokens"] == 0 and "last" not in metrics["critics"]
        trained = sum(len(e.turns[0].token_ids) for e in episodes[1:])
        assert metrics["policies"]["first"]["tokens"] == 4 * trained


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"credit": "grpo"}, "credit: expected one of agent, team, turn, got 'grpo'"),
        ({"num_iterations": 2}, "repeats its updates by num_ppo_epochs"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"lam": 1.5}, "lam: expected a number from 0 to 1"),
        ({"value_heads": "agent"}, "value_heads: expected one of policy, turn"),
        ({"cliprange_value": 0.0}, "cliprange_value"),
        ({"value_turns": 0}, "value_turns"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        PPOConfig(**settings)
