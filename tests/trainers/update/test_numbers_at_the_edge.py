"""Numbers at the edge: zeros that are meant, log-ratios beyond float32, rewards that are not
finite, and what the KL is measured against."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import AdapterSpec, Message, PolicySpec, Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import Denominators, samples
from marlora.trainers.config import OptimizerSettings
from marlora.trainers.credit.group import standard_deviation
from marlora.trainers.credit.pairs import PairConfig, pairs_of
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import RULE_NAMES, CreditConfig
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.imitation.sft import SFTConfig
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from marlora.trainers.methods.preference.sysdpo import PreferenceConfig
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.update.initial_policy import initial_weights
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import CORRECTIONS, LossConfig, policy_loss
from marlora.trainers.update.optimizer_step import (
    Optimizers,
    UpdateOptions,
    UpdateResult,
    optimizer_step,
    update,
)
from marlora.trainers.update.scalar_heads import HeadSpec, ScalarHead
from tests.trainers.random_models import disturb, random_model

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = AdapterSpec(r=2, alpha=4, targets=("q_proj", "v_proj"))


def adapters(*policies: PolicySpec) -> Adapters:
    return Adapters(random_model(), policies, seed=0, base_name="tiny")


# settings of 0


@pytest.mark.parametrize(("own", "rate"), [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_a_learning_rate_of_0_is_a_rate(own: float | None, rate: float) -> None:
    made = adapters(PolicySpec("a", adapter=SHAPE, learning_rate=own))
    config = GRPOConfig(learning_rate=0.25)
    assert Optimizers(made, config).peak == {"a": rate}
    head = ScalarHead(made, HeadSpec("h", None, SHAPE, own), config)
    assert head.peak == rate


def test_max_grad_norm_0_does_not_clip() -> None:
    found = {}
    for bound in (0.0, 1.0, 1e9):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        result = UpdateResult({}, 0.0, 1, 1, 1.0)

        def backward(weight: torch.nn.Parameter = weight) -> tuple[dict, str]:
            (weight * torch.tensor([3.0, 4.0])).sum().backward()
            return {}, ""

        optimizer_step(optimizer, backward, result, Ranks(), bound)
        assert result.grad_norm == pytest.approx(5) and result.applied
        found[bound] = weight.tolist()
    assert found[0.0] == found[1e9] == [-3.0, -4.0]
    assert found[1.0] == pytest.approx([-0.6, -0.8], rel=1e-5)


# log-ratios beyond float32


LOSSES: list[dict[str, Any]] = [
    {"loss_type": kind, "importance_sampling_level": level, "vllm_importance_sampling_mode": mode}
    for kind, level, mode in itertools.product(
        ("dapo", "grpo", "cispo"), ("token", "sequence"), CORRECTIONS
    )
]


def gradient(log_ratio: float, advantage: float, dtype: torch.dtype, **how: Any) -> torch.Tensor:
    """Of three tokens of two turns, the first of which has this log-ratio."""
    more = {"epsilon_high": 5.0} if how.get("loss_type") == "cispo" else {}
    away = torch.tensor([log_ratio, 0.1, -0.1], dtype=dtype)
    behaviour = torch.tensor([-1.0 - max(log_ratio, 0.0), -1.0, -1.0], dtype=dtype)
    logp = (behaviour + away).requires_grad_()
    inputs = LossInputs(
        logp=logp,
        entropy=torch.zeros(3, dtype=dtype),
        behaviour=behaviour,
        advantage=torch.tensor([advantage, 1.0, -1.0], dtype=dtype),
        sequence=torch.tensor([0, 1, 1]),
        total=Denominators(3, 2),
    )
    loss, stats = policy_loss(inputs, LossConfig(**how, **more))
    assert all(torch.isfinite(value).all() for value in stats.values())
    assert torch.isfinite(loss)
    return torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("log_ratio", [-800.0, -120.0, -95.0, 60.0, 89.0, 120.0, 300.0])
@pytest.mark.parametrize("how", LOSSES, ids=lambda how: "-".join(how.values()))
def test_log_ratios_beyond_float32(how: dict[str, Any], log_ratio: float) -> None:
    """The gradient is that of float64, where the loss bounds it."""
    for advantage in (1.0, -1.0):
        found = gradient(log_ratio, advantage, torch.float32, **how)
        assert torch.isfinite(found).all(), (how, advantage)
        bounded = how["vllm_importance_sampling_mode"] != "off" or advantage > 0
        if bounded or how["loss_type"] == "cispo" or log_ratio < 0:
            right = by_hand(log_ratio, advantage, how)
            assert float(found[0]) == pytest.approx(right, rel=1e-4, abs=1e-5), (how, advantage)


def by_hand(log_ratio: float, advantage: float, how: dict[str, Any]) -> float:
    """Derivative by the first token, alone in its turn: of three tokens, or of two turns."""
    cap, share = 3.0, 1 / 2 if how["loss_type"] == "grpo" else 1 / 3
    mode, high = how["vllm_importance_sampling_mode"], log_ratio > 0
    if how["loss_type"] == "cispo":
        used = 5.0 if high else 0.0
        if mode == "off":
            factor = 1.0
        elif mode.startswith("sequence"):  # of the turn's whole ratio, not of the capped one
            factor = 0.0 if high else 1.0
        else:
            factor = (cap / 5.0 if mode.endswith("truncate") else 0.0) if high else 1.0
        return -advantage * used * factor * share
    if not high or advantage > 0:  # a ratio of 0, or clipped
        return 0.0
    return 0.0 if mode.endswith("mask") else -advantage * cap * share


# rewards that are not finite


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_reward_is_one_that_could_not_be_given(rule: str, bad: float) -> None:
    """The same advantages as with NaN in its place, all of them finite."""
    found = []
    for value in (bad, math.nan):
        batch = []
        for n, reward in enumerate((0.0, 1.0, value)):
            turn = Turn(0, "a", token_ids=(1,), logprobs=(-1.0,))
            other = Turn(0, "a", token_ids=(2,), logprobs=(-1.0,), sibling=1, taken=False)
            of_turn = [
                Reward(name, reward * k, "", "a", 0, k - 1)
                for k in (1, 2)
                for name in ("counterfactual", "s")
            ]
            of_team = [] if rule == "at_grpo" else [Reward("r", reward)]
            batch.append(
                Episode(
                    f"e{n}", "g", Task("t", "?"), turns=(turn, other), rewards=(*of_team, *of_turn)
                )
            )
        found.append(credit(batch, CreditConfig(credit=rule)))
    assert found[0] == found[1] and all(map(math.isfinite, found[0].values()))
    assert not any(episode == "e2" for episode, _, _ in found[0]), found[0]


def test_weighted_rewards_beyond_floats_cannot_be_compared() -> None:
    batch = [
        Episode(f"e{n}", "g", Task("t", "?"), turns=(Turn(0, "a"),), rewards=(Reward("r", value),))
        for n, value in enumerate((1e308, 0.0, 1.0))
    ]
    config = CreditConfig(reward_weights={"r": 10.0})
    assert set(credit(batch, config)) == {("e1", 0, 0), ("e2", 0, 0)}
    assert standard_deviation([1e200, -1e200]) == pytest.approx(math.sqrt(2) * 1e200)


def test_rounding_prefers_nothing() -> None:
    batch = [
        Episode(
            f"e{n}",
            "g",
            Task("t", "?"),
            turns=(Turn(0, "a", text=str(n)),),
            rewards=tuple(Reward(f"r{k}", part) for k, part in enumerate(parts)),
        )
        for n, parts in enumerate(((0.1, 0.2), (0.3, 0.0)))
    ]
    assert pairs_of(batch, PairConfig(), 0) == []


# what saw the answer, where a chat does not extend to the token


GOLD: dict[str, Any] = {"prompt_ids": (1, 2, 3, 9), "token_ids": (4,), "logprobs": (-1.0,)}


@pytest.mark.parametrize(
    ("later", "trained"),
    [
        ({"prompt_ids": (1, 2, 3, 9, 4, 5)}, False),  # extends it
        ({"prompt_ids": (1, 2, 3, 9, 7, 5)}, False),  # its reply is written otherwise
        ({"prompt_ids": (1, 2, 3, 9)}, False),  # the same call once more
        ({"prompt_ids": (1, 2, 3, 8, 7)}, True),  # another chat
        ({"prompt_ids": (1, 2)}, True),
    ],
)
@pytest.mark.parametrize("taken", [True, False])
def test_a_fork_of_a_chat_that_saw_the_answer_has_seen_it(
    later: dict[str, Any], trained: bool, taken: bool
) -> None:
    turns = (
        Turn(0, "a", prompt_ids=(1,), token_ids=(2,), logprobs=(-1.0,)),
        Turn(1, "a", **GOLD, saw_gold=True, taken=taken),
        Turn(2, "a", token_ids=(6,), logprobs=(-1.0,), **later),
    )
    episode = Episode("e", "g", Task("t", "?"), turns=turns)
    for ratios in (True, False):
        found, dropped = samples(
            [episode], {("e", n, 0): 1.0 for n in range(3)}, {"a": "a"}, ratios=ratios
        )
        assert {key[1] for s in found for key in s.keys} == ({0, 2} if trained else {0})
        assert dropped == {("a", "saw the answer"): 1 if trained else 2}


def test_by_messages_where_a_template_writes_the_prompt_otherwise() -> None:
    asked = (Message("user", "?"), Message("assistant", "x"), Message("user", "It is 4."))
    turns = (
        Turn(0, "a", messages=asked, prompt_ids=(1, 2, 8), token_ids=(4,), logprobs=(-1.0,)),
        Turn(1, "a", prompt_ids=(1, 2, 7), token_ids=(4,), logprobs=(-1.0,), messages=asked[:1]),
        Turn(
            2,
            "a",
            messages=(*asked, Message("assistant", "4"), Message("user", "Sure?")),
            prompt_ids=(1, 2, 9, 9),
            token_ids=(4,),
            logprobs=(-1.0,),
        ),
    )
    turns = (dataclasses.replace(turns[0], saw_gold=True), *turns[1:])
    episode = Episode("e", "g", Task("t", "?"), turns=turns)
    found, _ = samples([episode], {("e", n, 0): 1.0 for n in range(3)}, {"a": "a"})
    assert {key[1] for s in found for key in s.keys} == {1}


# the reference


def test_the_kl_s_reference_is_the_policy_as_the_run_began(tmp_path: Path) -> None:
    """Of a policy with an `init` its adapter, of a fresh one the base; after it has moved too."""
    before = adapters(PolicySpec("a", adapter=SHAPE))
    disturb(before)
    before.save("a", tmp_path / "a")
    warm = PolicySpec("warm", adapter=SHAPE, init=str(tmp_path / "a"))
    made = adapters(warm, PolicySpec("cold", adapter=SHAPE))
    turn = Turn(0, "x", prompt_ids=(1, 2), token_ids=(3, 4, 5), logprobs=(-1.0,) * 3)
    episode = Episode("e", "g", Task("t", "?"), turns=(turn,))
    optimizers = Optimizers(made, OptimizerSettings(learning_rate=0.0, layout="padded"))

    def kl(policy: str) -> float:
        found, _ = samples([episode], {("e", 0, 0): 1.0}, {"x": policy})
        done = update(
            optimizers,
            found,
            lambda inputs: policy_loss(inputs, LossConfig(beta=1.0, use_bias_correction_kl=False)),
            1,
            Ranks(),
            UpdateOptions(reference=True),
        )
        return done[policy].stats["kl"]

    assert kl("warm") == pytest.approx(0, abs=1e-7) and kl("cold") == pytest.approx(0, abs=1e-7)
    disturb(made)
    moved = {name: made.sha256(name) for name in ("warm", "cold")}
    assert kl("warm") > 1e-4 and kl("cold") > 1e-4
    with initial_weights(made, "warm"):
        assert made.sha256("warm") == before.sha256("a")
    assert moved == {name: made.sha256(name) for name in ("warm", "cold")}


# what TRL would ignore


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (PreferenceConfig, {"label_smoothing": 0.1}, "label_smoothing"),
        (SFTConfig, {"num_iterations": 2}, "num_iterations"),
    ],
)
def test_trainer_trl_refuses_what_trl_ignores(
    config: Any, settings: dict[str, Any], words: str
) -> None:
    usual = {"mode": "independent", "max_steps": 1} if config is PreferenceConfig else {}
    config(**usual, **settings)
    config(**usual, trainer="trl")
    with pytest.raises(SettingError, match=words):
        config(**usual, **settings, trainer="trl")
    if config is PreferenceConfig:
        config(**usual, **settings, trainer="trl", loss_type="robust")


@pytest.mark.parametrize(
    "name", ["vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "delta"]
)
def test_bounds_of_ratios_are_checked_at_start(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        LossConfig(**{name: -0.5})
    LossConfig(**{name: None})
    LossConfig(**{name: 2.0})
