"""Preference training of a small team: two passes give the joint gradient, references stand still,
drafts are drawn anew."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.types import BASE, SettingError, Task
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.episodes.thumbs import give_thumb
from marlora.rollouts.report.curves import numbers
from marlora.rollouts.report.metrics.names import metric_of
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode, TurnKey
from marlora.trainers.batching.samples import samples
from marlora.trainers.credit.pairs import pairs_of, said
from marlora.trainers.methods.preference.components import diffusion_log_ratio
from marlora.trainers.methods.preference.drafts import output, with_drafts
from marlora.trainers.methods.preference.sysdpo import PreferenceConfig, PreferenceTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from marlora.trainers.update.preference_loss import MarginGradient
from tests.repository import ROOT
from tests.trainers import small_run
from tests.trainers.random_models import disturb
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(
    folder: Path, model: Path, system: System | None = None, components: Any = (), **changes: Any
) -> PreferenceTrainer:
    small = {
        field.name: getattr(small_run.config(folder, model), field.name)
        for field in dataclasses.fields(small_run.GRPOConfig)
    }
    known = {field.name for field in dataclasses.fields(PreferenceConfig)} - {"beta", "loss_type"}
    args = PreferenceConfig(
        **{
            **{name: value for name, value in small.items() if name in known},
            "max_steps": 1,
            **changes,
        }
    )
    return PreferenceTrainer(
        system=system or tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:2],
        rewards=[small_run.bytes_mod_7],
        args=args,
        components=components,
    )


def played(made: PreferenceTrainer) -> tuple[Any, list[Episode]]:
    """The run opened, and its first episodes; afterwards its adapters differ from the base."""
    episodes = made.run.open().rollouts.collect(1)
    (base,) = made.run.learner.bases.values()
    disturb(base.adapters)
    return base.adapters, episodes


def logprob(
    adapters: Any, policy: str, prompt: tuple[int, ...], reply: tuple[int, ...]
) -> torch.Tensor:
    """Summed log-probability of one reply by the model's own forward: no packing, no chunks."""
    with adapters.active(policy) as network:
        logits = network(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum()


def every_turn(made: PreferenceTrainer, episodes: list[Episode]) -> dict[TurnKey, torch.Tensor]:
    adapters, policy_of = (
        next(iter(made.run.learner.bases.values())).adapters,
        made.run.learner.policy_of,
    )
    return {
        (e.id, t.index, t.sibling): logprob(adapters, policy_of[t.agent], t.prompt_ids, t.token_ids)
        for e in episodes
        for t in e.turns
        if t.agent in policy_of
    }


@pytest.mark.parametrize("tokens", [24, 8192])
def test_two_passes_give_the_gradient_of_the_joint_loss(
    tmp_path: Path, model: Path, tokens: int
) -> None:
    """One sigmoid over all turns of both agents, backward through all of them at once, against one
    row at a time."""
    made = trainer(tmp_path / "run", model, tokens_per_batch=tokens, max_grad_norm=1e9, beta=0.5)
    adapters, episodes = played(made)
    with made.run:
        pairs = pairs_of(episodes, made.args, made.args.seed + 1)
        assert len(pairs) >= 3 and len({e.id for p in pairs for e in p.episodes}) >= 4
        now = every_turn(made, episodes)
        with torch.no_grad():
            then = {
                (e.id, t.index, 0): logprob(adapters, BASE, t.prompt_ids, t.token_ids)
                for e in episodes
                for t in e.turns
            }
        ratio = {
            e.id: torch.stack([now[k] - then[k] for k in now if k[0] == e.id]).sum()
            for e in episodes
        }
        margins = torch.stack([ratio[p.chosen[0].id] - ratio[p.rejected[0].id] for p in pairs])
        loss = -torch.nn.functional.logsigmoid(0.5 * margins).mean()
        parameters = {name: adapters.parameters(name) for name in ("first", "last")}
        truth = {
            name: torch.autograd.grad(loss, list(own.values()), retain_graph=True)
            for name, own in parameters.items()
        }
        metrics = made.learn(1, episodes)
        assert metrics["preference"]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert metrics["preference"]["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
        (base,) = made.run.learner.bases.values()
        for name, own in parameters.items():
            moments = base.optimizers.of[name].state
            found = torch.cat([moments[p]["exp_avg"].flatten() * 10 for p in own.values()])
            expected = torch.cat([g.flatten() for g in truth[name]])
            assert expected.norm() > 1e-3
            assert (found - expected).norm() / expected.norm() < 1e-5


def test_turns_are_scored_as_wholes_and_siblings_apart(tmp_path: Path, model: Path) -> None:
    made = trainer(tmp_path / "run", model, system=Drafts(["first", "last"]), tokens_per_batch=24)
    _, episodes = played(made)
    with made.run:
        everything = {(e.id, t.index, t.sibling): 1.0 for e in episodes for t in e.turns}
        assert {key[2] for key in everything} == {0, 1, 2}
        found = made.run.learner.turn_logprobs(
            samples(episodes, everything, made.run.learner.policy_of, ratios=False)[0]
        )
        expected = every_turn(made, episodes)
        assert found.keys() == expected.keys()
        assert found == {
            key: pytest.approx(value.item(), abs=1e-4) for key, value in expected.items()
        }


class Drafts(System):
    """`first` drafts three times and goes on with its last draft; `last` reads that."""

    async def run(self, task: Task, team: Team) -> str:
        draft = await team["first"].reply(task.prompt, n=3, choose=lambda turns: 2)
        return (await team["last"].reply(f"{draft}+1", reads=[draft])).text


def test_the_reference_is_what_the_run_began_with(tmp_path: Path, model: Path) -> None:
    """Fresh: the base. From an earlier run's adapter: that adapter, however far the policy has come
    since; its weights of now stay."""
    earlier = trainer(tmp_path / "earlier", model)
    earlier.train()
    init = f"{tmp_path / 'earlier' / 'checkpoints' / 'step-000001'}#first"
    made = trainer(tmp_path / "run", model, policies={"first": {"init": init}})
    with made.run:
        (base,) = made.run.learner.bases.values()
        episodes = made.run.rollouts.collect(1)
        own, _ = made.learner.samples_of(pairs_of(episodes, made.args, 0))
        begun = made.run.learner.turn_logprobs(own)
        disturb(base.adapters)
        hashes = {name: base.adapters.sha256(name) for name in base.policies}
        turned = made.run.learner.turn_logprobs(own)
        assert (
            made.run.learner.turn_logprobs(own, reference=True)
            == begun
            != turned
            == made.run.learner.turn_logprobs(own)
        )
        assert hashes == {name: base.adapters.sha256(name) for name in base.policies}
        base.adapters.check()


def moved(made: PreferenceTrainer) -> dict[str, str]:
    """One step without publishing and evaluating; the hashes of the adapters that it has moved."""
    with made.run as run:
        made.learn(1, run.rollouts.collect(1))
        now = {
            policy: base.adapters.sha256(policy)
            for base in run.learner.bases.values()
            for policy in base.policies
        }
        return {
            policy: sha256 for policy, sha256 in now.items() if sha256 != run.learner.before[policy]
        }


def test_a_stored_run_is_learnt_from_and_its_references_are_computed_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever GRPO has played; three steps that go through the same two tasks."""
    small_run.trainer(tmp_path / "grpo", model, max_steps=1).train()
    stored = [e for e in Store(tmp_path / "grpo" / "episodes") if e.split != "eval"]
    made = trainer(
        tmp_path / "run",
        model,
        episodes=str(tmp_path / "grpo"),
        max_steps=3,
        train_batch_size=2,
        num_train_epochs=2,
    )
    asked: list[set[TurnKey]] = []
    score = type(made.run.learner).turn_logprobs

    def counted(learner: Any, samples: Any, *, reference: bool = False) -> Any:
        if reference:
            asked.append({key for sample in samples for key in sample.keys})
        return score(learner, samples, reference=reference)

    monkeypatch.setattr(type(made.run.learner), "turn_logprobs", counted)
    summary = made.train()
    assert (
        asked[0] <= {(e.id, t.index, t.sibling) for e in stored for t in e.turns}
        and asked[0]
        and not any(asked[1:])
    )
    assert all(
        policy["sha256_before"] != policy["sha256_after"] for policy in summary["policies"].values()
    )
    told = [row["preference"] for row in rows(tmp_path / "run")]
    assert [t["updates"] for t in told] == [2 * math.ceil(t["pairs"] / 2) for t in told]
    assert told[0]["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert told[-1]["loss"] < 0.3 and told[-1]["accuracy"] == 1.0, told
    assert set(told[0]["margins"]) == {"first", "last"}
    assert told[-1]["margin"] == pytest.approx(sum(told[-1]["margins"].values()), abs=1e-6)


@pytest.mark.parametrize("frozen", ["first", "last"])
def test_a_frozen_agent_stands_in_the_team_and_counts_nothing(
    tmp_path: Path, model: Path, frozen: str
) -> None:
    made = trainer(tmp_path / "run", model, policies={frozen: {"trainable": False}})
    learns = {"first", "last"} - {frozen}
    assert moved(made).keys() == learns and set(made.learner.learner.policy_of) == learns


def test_independent_policies_do_not_feel_one_another(tmp_path: Path, model: Path) -> None:
    """An adapter trained beside another is, to the last bit, the one trained alone; trained jointly
    it is not."""
    settings: dict[str, dict[str, Any]] = {
        "independent": {"mode": "independent"},
        "alone": {"mode": "independent", "policies": {"last": {"trainable": False}}},
        "joint": {},
    }
    found = {
        name: moved(trainer(tmp_path / name, model, num_train_epochs=2, **changes))["first"]
        for name, changes in settings.items()
    }
    assert found["independent"] == found["alone"] != found["joint"]


@pytest.mark.parametrize("system", ["chain", "siblings"])
def test_drafts_of_a_task_are_distinct_shared_by_both_sides_and_drawn_anew(
    tmp_path: Path, model: Path, system: str
) -> None:
    made = trainer(
        tmp_path / "run",
        model,
        system=Drafts(["first", "last"]) if system == "siblings" else None,
        mode="sampling",
    )
    _, episodes = played(made)
    with made.run:
        (base,) = made.run.learner.bases.values()
        pairs = pairs_of(episodes, made.args, 0)
        drafted = with_drafts(made.run.rollouts, 1, pairs, 3)
        assert len(drafted) == len(pairs) and [p.gap for p in drafted] == [p.gap for p in pairs]
        for before, after in zip(pairs, drafted, strict=True):
            drafts = [[said(e)[:-1] for e in side] for side in (after.chosen, after.rejected)]
            assert drafts[0] == drafts[1] and len(set(drafts[0])) == len(drafts[0])
            assert 2 <= len(drafts[0]) <= (9 if system == "siblings" else 3)
            for side, own in (
                (after.chosen, before.chosen[0]),
                (after.rejected, before.rejected[0]),
            ):
                for e in side:
                    end = output(e)
                    assert end.token_ids == output(own).token_ids and end.agent == "last"
                    assert end.prompt_ids == tuple(base.tokens.prompt(end.messages, None))
                    assert (
                        e.turns[0].text in end.messages[-1].content
                    )  # asked what this draft leads to
        later = with_drafts(made.run.rollouts, 2, pairs, 3)
        assert [[said(e) for e in p.episodes] for p in later] != [
            [said(e) for e in p.episodes] for p in drafted
        ]
        if system == "siblings":
            assert (
                max(len(p.chosen) for p in drafted) > 3
            )  # what was drafted beside what was taken counts too


def test_sampling_trains_both_agents_and_hears_frozen_ones(tmp_path: Path, model: Path) -> None:
    """A frozen agent has no weight, but among drafts its probabilities say which draft led to the
    output."""
    both = trainer(tmp_path / "both", model, mode="sampling", num_drafts=3, tokens_per_batch=64)
    assert moved(both).keys() == {"first", "last"}
    one = trainer(
        tmp_path / "one",
        model,
        mode="sampling",
        num_drafts=3,
        policies={"last": {"trainable": False}},
    )
    heard: list[MarginGradient[Any]] = []
    update = one.learner.update
    one.learner.update = lambda *given: heard.append((found := update(*given))[1]) or found  # type: ignore[method-assign,func-returns-value]
    assert moved(one).keys() == {"first"} and set(heard[0].by_agent) == {"first", "last"}


def test_drafts_of_an_outside_model_are_refused_at_start(tmp_path: Path, model: Path) -> None:
    """Nobody knows how likely it made them; where only whole runs are compared it stands in the
    team and counts nothing."""
    outside = {"first": {"url": "http://127.0.0.1:9/v1", "base": "wise-1"}}
    with pytest.raises(SettingError, match="mode sampling: agent 'first' is an outside model"):
        trainer(tmp_path / "run", model, mode="sampling", policies=outside)
    assert trainer(tmp_path / "run", model, policies=outside).run.spec.policies["first"].url


class Painter:
    """A tiny denoiser that colours what the last agent wrote: noise is taken from a point that
    depends on the text."""

    name = "painter"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.reference = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        self.reference.load_state_dict(self.net.state_dict())
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.votes: list[torch.Tensor] = []

    def log_ratio(self, episode: Episode, draw: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw)
        image, noise = (
            torch.randn(4, generator=torch.Generator().manual_seed(episode.seed % 2**31)),
            torch.randn(4, generator=generator),
        )
        seen = torch.cat([image + noise, torch.tensor([len(str(episode.output)) / 5, 1.0])])
        errors = [((net(seen) - noise) ** 2).mean() for net in (self.net, self.reference)]
        return diffusion_log_ratio(errors[0][None], errors[1][None].detach(), 20)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_denoiser_learns_in_the_same_sum(tmp_path: Path, model: Path) -> None:
    painter = Painter()
    made = trainer(tmp_path / "run", model, components=[painter], num_train_epochs=6, max_steps=1)
    before = [p.detach().clone() for p in painter.net.parameters()]
    with made.run:
        episodes = made.run.rollouts.collect(1)
        pairs = pairs_of(episodes, made.args, 0)
        draw = (
            made.args.seed + 1000
        )  # of the first update, in which all agents are at the reference: m is the painter's alone
        margins = [
            painter.log_ratio(p.chosen[0], draw) - painter.log_ratio(p.rejected[0], draw)
            for p in pairs
        ]
        loss = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
        truth = torch.autograd.grad(loss, list(painter.net.parameters()))
        gradients: list[list[torch.Tensor]] = []
        step = painter.step

        def noted() -> None:
            gradients.append(
                [p.grad.clone() for p in painter.net.parameters() if p.grad is not None]
            )
            step()

        painter.step = noted  # type: ignore[method-assign]
        told = made.learn(1, episodes)["preference"]
    assert len(gradients) == 6 and truth[0].norm() > 1e-3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], truth, strict=True))
    assert set(told["margins"]) == {"first", "last", "painter"} and told["margins"]["painter"] > 0
    assert told["loss"] < told["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, painter.net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "base"}, "reference: expected one of start, step, got 'base'"),
        ({"train_batch_size": -1}, "train_batch_size: expected at least 0"),
        ({"num_iterations": 2}, "set num_train_epochs instead"),
        ({"num_generations": 1}, "a pair needs two episodes"),
        ({"mode": "sampling", "num_train_epochs": 2}, "drafts are drawn anew for every update"),
        ({"num_drafts": 0}, "num_drafts: expected at least 1"),
        ({"trainer": "trl"}, "mode independent expected, got 'joint'"),
        (
            {"trainer": "trl", "mode": "independent", "max_steps": 2},
            "set reference step, or max_steps 1",
        ),
        ({"trainer": "trl", "mode": "independent", "loss_type": "ipo"}, "set length_normalised so"),
        ({"trainer": "trainer"}, "trainer: expected one of marlora, trl"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        PreferenceConfig(**{"max_steps": 1, **changes})


def test_the_recipes_yaml_holds_known_settings_only() -> None:
    settings = yaml.safe_load((ROOT / "recipes" / "sysdpo.yaml").read_text())
    assert PreferenceConfig(**settings).mode == "joint"


def test_without_a_difference_in_score_nothing_moves_and_it_is_said(
    tmp_path: Path, model: Path
) -> None:
    made = trainer(tmp_path / "run", model, min_gap=5.0)
    summary = made.train()
    assert all(
        policy["sha256_before"] == policy["sha256_after"] for policy in summary["policies"].values()
    )
    assert rows(tmp_path / "run")[0]["preference"] == {
        "pairs": 0,
        "updates": 0,
        "without_drafts": 0,
    }
    assert (
        "no two episodes of a task differ in score"
        in (tmp_path / "run" / "warnings.log").read_text()
    )


def test_best_of_n_is_told_of_the_untrained_team(tmp_path: Path, model: Path) -> None:
    told = trainer(tmp_path / "run", model, max_steps=0, best_of=4).train()
    assert told["best_of"]["n"] == 4 and told["best_of"]["num_tasks"] == 2
    assert told["best_of"]["accuracy"] > told["eval"]["before"]["accuracy"]


def unlisted(folder: Path) -> set[str]:
    """The numbers of a run that are not in the list of metrics."""
    written = {path for row in rows(folder) for path, _ in numbers(row)}
    return {"/".join(path) for path in written - {("step",)} if metric_of(path) is None}


def test_a_team_learns_from_thumbs_against_its_rewards(tmp_path: Path, model: Path) -> None:
    """People like what the reward does not: the pairs are theirs, and held-out tasks are no part
    of them."""
    small_run.trainer(tmp_path / "grpo", model, max_steps=1).train()
    stored = [e for e in Store(tmp_path / "grpo" / "episodes").read(kind="train")]
    tasks = list(dict.fromkeys(e.task.id for e in stored))
    judged = [e for e in stored if e.task.id == tasks[0]]
    low, high = (f(e.reward("bytes_mod_7") for e in judged) for f in (min, max))
    assert low < high
    for episode in judged:
        if (reward := episode.reward("bytes_mod_7")) in (low, high):
            give_thumb(tmp_path / "grpo", episode.id, 1 if reward == low else -1)
    settings = {"episodes": str(tmp_path / "grpo"), "thumbs": True, "max_steps": 3}
    made = trainer(tmp_path / "run", model, **settings)
    seen: list[tuple[float, float]] = []
    learn = made.learner.learn

    def noted(step: int, pairs: Any) -> Any:
        true = {e.id: e.reward("bytes_mod_7") for e in stored}
        seen.extend((true[p.chosen[0].id], true[p.rejected[0].id]) for p in pairs)
        return learn(step, pairs)

    made.learner.learn = noted  # type: ignore[method-assign]
    made.train()
    assert seen and set(seen) == {(low, high)}
    told = [row["preference"] for row in rows(tmp_path / "run")]
    assert told[-1]["loss"] < told[0]["first_loss"] and told[-1]["accuracy"] == 1.0, told
    assert all(0 < row["reward"] < 1 for row in rows(tmp_path / "run")), "the share of thumbs up"
    assert unlisted(tmp_path / "grpo") == unlisted(tmp_path / "run") == set()


def test_thumbs_that_say_nothing_are_told(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None, some of held-out tasks only, and then all up."""
    played = tmp_path / "grpo"
    small_run.trainer(played, model, max_steps=1).train()
    for kind in ("eval", "train"):
        made = trainer(tmp_path / kind, model, episodes=str(played), thumbs=True)
        with pytest.raises(SettingError, match=r"thumbs\.jsonl holds none of a training episode"):
            made.train()
        for episode in Store(played / "episodes").read(kind=kind):
            give_thumb(played, episode.id, 1)
    trainer(tmp_path / "up", model, episodes=str(played), thumbs=True).train()
    assert "no two episodes of a task differ" in capsys.readouterr().err


def test_thumbs_are_of_stored_episodes(tmp_path: Path, model: Path) -> None:
    with pytest.raises(SettingError, match="name the run that was judged"):
        trainer(tmp_path / "run", model, thumbs=True)
