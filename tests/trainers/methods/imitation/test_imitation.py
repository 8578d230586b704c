"""Imitation against numbers worked out by hand: the loss of one turn, SiriuS's tabular iteration,
and TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.evaluation.statistics import Evaluation
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.batching.batches import Batch, pack
from marlora.trainers.batching.samples import denominators, samples
from marlora.trainers.credit.filtering import SelectionConfig, filter_turns
from marlora.trainers.methods.imitation.imitation import (
    ImitationConfig,
    IterationConfig,
    encoded,
    nll_loss,
)
from marlora.trainers.methods.imitation.sft import SFTConfig, SFTTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from marlora.trainers.update.losses.inputs import LossInputs
from tests.trainers.reading import rows
from tests.trainers.small_run import bytes_mod_7
from tests.trainers.test_template_variables import dated_model

torch.set_num_threads(1)
TASK = Task("t", "?", "20")
POLICY = {"one": "one", "two": "two"}


def turn(
    index: int, agent: str, prompt: tuple[int, ...], reply: tuple[int, ...], **fields: Any
) -> Turn:
    chat = (Message("system", "s"), Message("user", "u"))
    return Turn(
        index,
        agent,
        chat,
        prompt_ids=prompt,
        token_ids=reply,
        **{"logprobs": (-1.0,) * len(reply), **fields},
    )


def learn_from(
    episodes: list[Episode], mass: dict[str, float] | None = None
) -> tuple[dict[str, Batch], float]:
    """The batch of each policy from what selection keeps, every turn weighted by its episode's
    mass; and the mass that was kept."""
    selection = filter_turns(episodes, SelectionConfig())
    weights = {
        key: weight * (mass or {}).get(key[0], 1.0) for key, weight in selection.weights.items()
    }
    found, dropped = samples(episodes, weights, POLICY, ratios=False)
    assert not dropped
    batches = {batch.policy: batch for batch in pack(found, max_tokens=10_000, layout="padded")}
    return batches, sum((mass or {}).get(k.key[0], 1.0) for k in selection.kept if k.agent == "one")


def test_the_loss_is_the_mean_over_the_agents_own_tokens() -> None:
    """Probabilities .5, .25, .8: -(log .5 + log .25 + log .8) / 3 = 0.767528. System, user and the
    other agent do not count."""
    one = Episode(
        "e",
        "g",
        TASK,
        turns=(turn(0, "one", (2, 9, 3, 8), (5, 6, 1)),),
        rewards=(Reward("r", 1.0),),
    )
    batches, _ = learn_from([one])
    logp = torch.tensor([0.5, 0.25, 0.8], dtype=torch.float64).log()
    assert batches["one"].num_terms == 3 and batches["one"].target.tolist() == [5, 6, 1]
    counts = denominators(samples([one], {("e", 0, 0): 1.0}, POLICY, ratios=False)[0])["one"]
    loss, stats = nll_loss(LossInputs.of(batches["one"], logp, logp, counts))
    assert loss.item() == pytest.approx(0.767528, abs=1e-6) and float(stats["tokens"]) == 3


# the tabular iteration: two agents choose 0 or 1 in turn, success has the probability S[a1][a2]

S = [[0.1, 0.3], [0.5, 0.9]]
ROUNDS = [
    (0.450000, 0.777778, 0.750000, 0.642857),
    (0.644444, 0.913793, 0.900000, 0.764151),
    (0.760345, 0.968254, 0.964286, 0.853630),
    (0.824036, 0.988718, 0.987805, 0.913025),
    (0.858806, 0.996091, 0.995902, 0.949738),
]


def outcomes(
    p1: float, p2: list[float], augmented: float = 0.0
) -> tuple[list[Episode], dict[str, float]]:
    """Every way an episode can go, with its probability. `augmented`: share of failures that are
    mended to (1, 1) and played again."""
    episodes, mass, failed = [], {}, 0.0

    def add(
        name: str, a1: int, a2: int, good: bool, weight: float, source: str = "sampled"
    ) -> None:
        logprobs = {} if source == "sampled" else {"logprobs": ()}
        first = turn(0, "one", (3,), (5 + a1,), source=source, **logprobs)
        rewards = (Reward("r", float(good)),)
        episodes.append(
            Episode(
                name,
                name,
                TASK,
                turns=(first, turn(1, "two", (4, 5 + a1), (5 + a2,))),
                rewards=rewards,
            )
        )
        mass[name] = weight

    for a1 in (0, 1):
        for a2 in (0, 1):
            chance = (p1 if a1 else 1 - p1) * (p2[a1] if a2 else 1 - p2[a1])
            add(f"good {a1}{a2}", a1, a2, True, chance * S[a1][a2])
            add(f"bad {a1}{a2}", a1, a2, False, chance * (1 - S[a1][a2]))
            failed += chance * (1 - S[a1][a2])
    if augmented:
        add("mended", 1, 1, True, failed * augmented * S[1][1], "written")
        add("mended in vain", 1, 1, False, failed * augmented * (1 - S[1][1]), "written")
    return episodes, mass


def fit(batch: Batch, total: float) -> tuple[dict[int, float], float, float]:
    """p(1) in every context after training to convergence, and the mean loss on what was kept,
    before and after."""
    table = torch.zeros(10, 2, dtype=torch.float64, requires_grad=True)
    context, choice = batch.input_ids[batch.row, batch.column], batch.target - 5
    counts = type("Counts", (), {"tokens": total})()
    optimizer = torch.optim.LBFGS(
        [table],
        lr=1,
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logp = table.log_softmax(-1)[context, choice]
        loss, _ = nll_loss(LossInputs.of(batch, logp, logp, counts))
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    return (
        {c: table.softmax(-1)[c, 1].item() for c in set(context.tolist())},
        before,
        closure().item(),
    )


def accuracy(p1: float, p2: list[float]) -> float:
    return sum(mass for name, mass in outcomes(p1, p2)[1].items() if name.startswith("good"))


def test_imitating_successes_is_conditioning_on_success_round_after_round() -> None:
    p1, p2 = 0.5, [0.5, 0.5]
    for number, (team, after, low, high) in enumerate(ROUNDS):
        assert accuracy(p1, p2) == pytest.approx(team, abs=2e-6)
        episodes, mass = outcomes(p1, p2)
        batches, kept = learn_from(episodes, mass)
        assert kept == pytest.approx(team, abs=2e-6)
        first, first_before, first_after = fit(batches["one"], kept)
        second, second_before, second_after = fit(batches["two"], kept)
        p1, p2 = first[3], [second[5], second[6]]
        assert (p1, *p2) == pytest.approx((after, low, high), abs=2e-6)
        if number == 0:
            assert (first_before, first_after) == pytest.approx((0.693147, 0.529706), abs=2e-6)
            assert (second_before, second_after) == pytest.approx((0.693147, 0.631885), abs=2e-6)
            assert p1 == pytest.approx((0.5 + 0.9) / (0.1 + 0.3 + 0.5 + 0.9), abs=2e-6)


def test_mended_failures_add_to_what_is_learnt() -> None:
    episodes, mass = outcomes(0.5, [0.5, 0.5], augmented=0.4)
    batches, kept = learn_from(episodes, mass)
    assert kept == pytest.approx(0.648, abs=1e-6)
    first, *_ = fit(batches["one"], kept)
    second, *_ = fit(batches["two"], kept)
    assert accuracy(first[3], [second[5], second[6]]) == pytest.approx(0.722531, abs=2e-6)


def test_published_accuracies_are_shares_of_their_test_sets() -> None:
    physics = Evaluation({str(i): float(i < 36) for i in range(107)}).accuracy
    chemistry = Evaluation({str(i): float(i < 39) for i in range(65)}).accuracy
    assert (100 * physics, 100 * chemistry) == pytest.approx((33.644860, 60.0), abs=1e-6)
    assert physics / (35 / 107) == pytest.approx(1.028571, abs=1e-6) and chemistry / (
        32 / 65
    ) == pytest.approx(1.218750)


# in a run


def trainer(folder: Path, model: Path, **changes: Any) -> SFTTrainer:
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        num_eval_tasks=2,
        max_steps=1,
        tasks_per_step=4,
        num_generations=2,
        max_completion_length=4,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        success_threshold=0.5,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
        proof_every=3,
        train_batch_size=3,
    )
    tasks, held_out = tiny_tasks()[:40], tiny_tasks("eval")[:2]
    return SFTTrainer(
        system=tiny_chain(),
        tasks=tasks,
        eval_tasks=held_out,
        rewards=[bytes_mod_7],
        args=SFTConfig(**{**small, **changes}),
    )


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return {
        a.name: load_file(a / "adapter_model.safetensors") for a in (last / "adapters").iterdir()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> SFTTrainer:
    made = trainer(tmp_path_factory.mktemp("trained") / "run", model, num_train_epochs=3)
    made.train()
    return made


def test_a_step_tells_what_it_kept_and_how_the_loss_on_it_fell(trained: SFTTrainer) -> None:
    (row,) = rows(Path(trained.args.output_dir))
    for agent in ("first", "last"):
        kept = row["selection"][agent]["kept"]["success"]
        assert kept + row["selection"][agent]["dropped"]["no success"] == 8
        learnt = row["policies"][agent]
        assert learnt["sequences"] == 3 * kept and learnt["nll_after"] < learnt["nll_before"] - 0.05
        assert learnt["moved"] > 1e-3
    assert trained.run.log.tokens["trained"] == sum(
        row["policies"][agent]["tokens"] for agent in ("first", "last")
    )


def test_mean_nll_is_that_of_the_tokens_as_sampled_and_of_other_speakers(
    trained: SFTTrainer,
) -> None:
    with trained.run as run:
        episodes = run.rollouts.collect(2)
        weights = filter_turns(episodes, SelectionConfig(select="all")).weights
        found, _ = samples(episodes, weights, run.learner.policy_of, ratios=False)
        learner = run.learner
        own, base = learner.mean_nll(found), learner.mean_nll(found, {"first": "base"})
        sampled = {
            p: [
                x
                for s in found
                if s.policy == p
                for x, m in zip(s.logprobs, s.mask, strict=True)
                if m
            ]
            for p in own
        }
        assert own == pytest.approx({p: -sum(x) / len(x) for p, x in sampled.items()}, abs=1e-4)
        assert abs(base["first"] - own["first"]) > 1e-3 and base["last"] == pytest.approx(
            own["last"], abs=1e-6
        )


def test_written_text_without_tokens_is_encoded_for_its_prompt_and_sampled_tokens_never(
    trained: SFTTrainer,
) -> None:
    with trained.run as run:
        episode, *_ = run.rollouts.collect(3)
        first, last = episode.turns
        text = dataclasses.replace(
            first, source="written", text="12", prompt_ids=(), token_ids=(), logprobs=()
        )
        made = encoded(run.learner, dataclasses.replace(episode, turns=(text, last)))
        assert made.turns[0].prompt_ids == first.prompt_ids and made.turns[1] is last
        assert (
            run.learner.bases[run.spec.config.model].tokens.show(made.turns[0].token_ids)
            == "12<|end|>"
        )
        assert made.turns[0].logprobs == () and encoded(run.learner, episode) is episode
        untold = dataclasses.replace(
            episode, turns=(dataclasses.replace(first, token_ids=()), last)
        )
        assert encoded(run.learner, untold) is untold, (
            "a sampled turn that lost its tokens is not made up"
        )


def test_restart_gives_back_what_init_gave(trained: SFTTrainer) -> None:
    run, (base,) = trained.run, trained.run.learner.bases.values()
    moved = {p: base.adapters.sha256(p) for p in ("first", "last")}
    assert all(moved[p] != run.learner.before[p] for p in moved)
    run.learner.reset(["first"])
    assert (
        base.adapters.sha256("first") == run.learner.before["first"]
        and base.adapters.sha256("last") == moved["last"]
    )
    assert not base.optimizers.of["first"].state and base.optimizers.of["last"].state


@pytest.mark.slow  # importing TRL's trainer takes longer than all other tests of this file together
@pytest.mark.parametrize("day", ["", "01 Feb 2025"], ids=["", "variables of the template"])
def test_trl_makes_the_same_update(tmp_path: Path, model: Path, day: str) -> None:
    """One batch, one epoch: the same loss, and the same adapters after AdamW's step, also on
    prompts that hold what `chat_template_kwargs` says."""
    more = {"chat_template_kwargs": {"date_string": day}} if day else {}
    model = dated_model(tmp_path / "model") if day else model
    for name in ("marlora", "trl"):
        made = trainer(
            tmp_path / name, model, trainer=name, num_train_epochs=1, train_batch_size=64, **more
        )
        made.train()
        (base,) = made.run.learner.bases.values()
        prompts = [t.prompt_ids for e in Store(tmp_path / name / "episodes") for t in e.turns]
        assert all(base.tokens.show(ids).startswith(f"{day}<|") for ids in prompts)
    ours, theirs = adapters(tmp_path / "marlora"), adapters(tmp_path / "trl")
    (row,), (their_row,) = rows(tmp_path / "marlora"), rows(tmp_path / "trl")
    for agent in ("first", "last"):
        assert row["policies"][agent]["loss"] == pytest.approx(
            row["policies"][agent]["nll_before"], abs=1e-6
        )
        assert row["policies"][agent]["loss"] == pytest.approx(
            their_row["policies"][agent]["loss"], abs=1e-4
        )
        assert row["policies"][agent]["grad_norm"] == pytest.approx(
            their_row["policies"][agent]["grad_norm"], rel=1e-4
        )
        for key, tensor in ours[agent].items():
            assert torch.allclose(tensor, theirs[agent][key], atol=1e-5), key
        assert row["policies"][agent]["nll_after"] == pytest.approx(
            their_row["policies"][agent]["nll_after"], abs=1e-4
        )


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SettingError, match="num_train_epochs: expected at least 1"):
        ImitationConfig(num_train_epochs=0)
    with pytest.raises(SettingError, match="trainer: expected one of marlora, trl"):
        SFTConfig(trainer="other")
    with pytest.raises(SettingError, match="start_from: expected one of last, base"):
        IterationConfig(start_from="middle")
    with pytest.raises(SettingError, match="max_steps: an iteration is a step"):
        IterationConfig(max_iterations=2, max_steps=5)
    assert IterationConfig(max_iterations=3).max_steps == 3
