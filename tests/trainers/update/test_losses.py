"""Values and gradients worked by hand, finite differences, and the scale rules of the losses.

The example: two turns of 3 and 2 tokens, advantages +1 and -1. Numbers marked TRL were also given
by its GRPOTrainer.
"""

import dataclasses
import math

import pytest
import torch

from marlora.agents.types import SettingError
from marlora.trainers.batching.samples import Denominators
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.nll import weighted_nll
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss
from marlora.trainers.update.losses.statistics import NotFinite, add_stats, finite_or_raise, summary

OLD = (-1.0, -0.5, -2.0, -0.7, -1.2)
LOGP = (-0.7, -0.6, -2.1, -1.1, -1.0)
REF = (-1.1, -0.4, -2.0, -0.6, -1.5)
SAMPLER = (-1.1, -0.6, -3.3, -0.6, -1.3)
TOTAL = Denominators(5, 2)


@dataclasses.dataclass
class Example:
    behaviour: torch.Tensor
    advantage: torch.Tensor
    sequence: torch.Tensor
    policy: str = "solver"
    turns: tuple[tuple[str, int], ...] = (("e1", 0), ("e2", 3))

    def inputs(
        self,
        logp: torch.Tensor,
        entropy: torch.Tensor,
        total: Denominators,
        reference: torch.Tensor | None = None,
    ) -> LossInputs:
        return LossInputs(
            logp, entropy, self.behaviour, self.advantage, self.sequence, total, reference
        )

    def part(self, *index: int) -> "Example":
        """A smaller batch: turns are renumbered from 0."""
        i = torch.tensor(index)
        numbers = {int(n): k for k, n in enumerate(self.sequence[i].unique())}
        return Example(
            self.behaviour[i],
            self.advantage[i],
            torch.tensor([numbers[int(n)] for n in self.sequence[i]]),
        )


def example(behaviour=OLD, advantage=(1.0, 1.0, 1.0, -1.0, -1.0)) -> Example:
    return Example(torch.tensor(behaviour), torch.tensor(advantage), torch.tensor([0, 0, 0, 1, 1]))


def evaluate(
    terms=None, old=None, ref=None, total=TOTAL, logp=LOGP, **config
) -> tuple[float, list[float]]:
    """Loss and d loss / d logp. The correction is off unless named, as in the sheet's first
    table."""
    x = torch.tensor(logp, requires_grad=True)
    settings = LossConfig(
        **({"vllm_importance_sampling_mode": "off", "max_completion_length": 4} | config)
    )
    old_, ref_ = (None if v is None else torch.tensor(v) for v in (old, ref))
    inputs = (terms or example()).inputs(x, torch.zeros_like(x), total, ref_)
    loss, _ = policy_loss(inputs, settings, old_logp=old_)
    loss.backward()
    return loss.item(), x.grad.tolist()


CASES = [
    # TRL: loss types
    ({"loss_type": "grpo"}, 0.003738, [0, -0.150806, -0.150806, 0, 0.305351]),
    ({"loss_type": "bnpo"}, -0.197654, [0, -0.180967, -0.180967, 0, 0.244281]),
    ({"loss_type": "dapo"}, -0.197654, [0, -0.180967, -0.180967, 0, 0.244281]),
    ({"loss_type": "dr_grpo"}, -0.123534, [0, -0.113105, -0.113105, 0, 0.152675]),
    ({"loss_type": "luspo"}, -0.494136, [0, -0.452419, -0.452419, 0, 0.610701]),
    ({"epsilon_high": 0.28}, -0.213654, [0, -0.180967, -0.180967, 0, 0.244281]),
    ({"epsilon_high": 0.4}, -0.227626, [-0.269972, -0.180967, -0.180967, 0, 0.244281]),
    # TRL: one ratio per turn (GSPO); with the paper's epsilons both turns are clipped
    (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        -0.064529,
        [-0.172316, -0.172316, -0.172316, 0.226209, 0.226209],
    ),
    (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        -0.000350,
        [0, 0, 0, 0, 0],
    ),
    # TRL: constant capped ratios
    (
        {"loss_type": "cispo", "epsilon_high": 5.0},
        0.285841,
        [-0.269972, -0.180967, -0.180967, 0.134064, 0.244281],
    ),
    (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        0.269142,
        [-0.24, -0.180967, -0.180967, 0.134064, 0.24],
    ),
]


@pytest.mark.parametrize(("config", "value", "gradient"), CASES)
def test_hand_numbers(config, value, gradient):
    for old in (
        None,
        OLD,
    ):  # without a correction, behaviour as old and a given old are the same loss
        loss, grad = evaluate(old=old, **config)
        assert loss == pytest.approx(value, abs=1e-6)
        assert grad == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "value", "gradient"),
    [  # TRL, cap 3: engine, old and current log-probs all differ
        ("off", -0.197654, [0, -0.180967, -0.180967, 0, 0.244281]),
        ("token_truncate", -0.593398, [0, -0.2, -0.542902, 0, 0.269972]),
        ("token_mask", -0.050495, [0, -0.2, 0, 0, 0.269972]),
        ("sequence_truncate", -1.401524, [0, -0.542902, -0.542902, 0, 0.244281]),
        ("sequence_mask", 0.404281, [0, 0, 0, 0, 0.244281]),
    ],
)
def test_engine_correction_with_given_old_log_probs(mode, value, gradient):
    loss, grad = evaluate(example(SAMPLER), old=OLD, vllm_importance_sampling_mode=mode)
    assert loss == pytest.approx(value, abs=1e-6)
    assert grad == pytest.approx(gradient, abs=1e-6)


def test_without_old_log_probs_one_ratio_is_clipped_and_its_weight_bounded():
    """A = -1 and ratios e^0.4, e^1.2, e^2, e^-0.5: PPO's clip bounds none of them from above,
    clip_max 3 bounds the two large."""
    terms = example((-1.1, -1.8, -4.1, -0.6, -0.7), (-1.0,) * 5)
    rho = [math.exp(x) for x in (0.4, 1.2, 2.0, -0.5, -0.3)]
    loss, grad = evaluate(terms, vllm_importance_sampling_mode="token_truncate")
    weights = [rho[0], 3.0, 3.0, 0.8, 0.8]
    assert loss == pytest.approx(sum(weights) / 5, abs=1e-6)
    assert grad == pytest.approx([rho[0] / 5, 3 / 5, 3 / 5, 0, 0], abs=1e-6)
    loss, grad = evaluate(terms, vllm_importance_sampling_mode="token_mask")
    assert grad == pytest.approx([rho[0] / 5, 0, 0, 0, 0], abs=1e-6)
    product = math.exp(3.6)
    loss, grad = evaluate(terms, vllm_importance_sampling_mode="sequence_truncate")
    assert grad == pytest.approx([x / 5 * 3 / product for x in rho[:3]] + [0, 0], abs=1e-6)
    loss, grad = evaluate(terms, vllm_importance_sampling_mode="sequence_mask")
    assert grad == [0] * 5 and loss == pytest.approx(1.6 / 5, abs=1e-6)
    loss, grad = evaluate(
        terms, loss_type="cispo", epsilon_high=5.0, vllm_importance_sampling_mode="token_truncate"
    )
    assert grad == pytest.approx([x / 5 for x in (rho[0], 3, 3, rho[3], rho[4])], abs=1e-6)
    assert evaluate(
        terms,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=None,
    ) == evaluate(terms)


def test_one_ratio_and_the_product_of_two_give_the_same_gradient_inside_all_bounds():
    """What the missing forward would have given on the first update: old = current weights, times
    current over engine."""
    terms = example(tuple(x + d for x, d in zip(LOGP, (0.1, -0.1, 0.15, -0.05, 0.02), strict=True)))
    for mode in ("token_truncate", "token_mask"):
        one = evaluate(terms, vllm_importance_sampling_mode=mode)
        two = evaluate(terms, old=LOGP, vllm_importance_sampling_mode=mode)
        assert one[0] == pytest.approx(two[0], abs=1e-7) and one[1] == pytest.approx(
            two[1], abs=1e-7
        )


def test_on_policy_all_corrections_agree_and_the_gradient_is_minus_advantage():
    expected = [-0.2, -0.2, -0.2, 0.2, 0.2]
    for mode in ("off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        loss, grad = evaluate(logp=OLD, vllm_importance_sampling_mode=mode)
        assert grad == pytest.approx(expected) and loss == pytest.approx(-0.2)


def test_long_turns_far_off_policy_stay_finite():
    terms = Example(torch.full((400,), -2.0), torch.ones(400), torch.zeros(400, dtype=torch.long))
    for shift in (-1.0, 1.0):
        for mode in ("sequence_truncate", "sequence_mask"):
            for old in (None, [-2.0 + shift] * 400):
                loss, grad = evaluate(
                    terms, old=old, logp=[-2.0 + shift] * 400, vllm_importance_sampling_mode=mode
                )
                assert math.isfinite(loss) and all(math.isfinite(g) for g in grad)


def test_two_sided_clipping_caps_the_ratio():
    terms = Example(torch.zeros(1), torch.tensor([-1.0]), torch.tensor([0]))
    for delta, loss, grad in ((None, 6.0, 6.0), (4.0, 4.0, 0.0)):
        found = evaluate(terms, logp=[math.log(6)], total=Denominators(1, 1), delta=delta)
        assert found[0] == pytest.approx(loss, abs=1e-5) and found[1] == pytest.approx(
            [grad], abs=1e-5
        )


def test_kl_to_the_reference():
    plain, grad = evaluate(ref=REF, beta=0.04, use_bias_correction_kl=False)
    assert plain == pytest.approx(-0.194837, abs=1e-6) and grad[0] == pytest.approx(
        0.002637, abs=1e-6
    )
    corrected, grad = evaluate(ref=REF, beta=0.04)
    assert corrected == pytest.approx(-0.194864, abs=1e-6) and grad[0] == pytest.approx(
        0.004320, abs=1e-6
    )
    inputs = example().inputs(torch.tensor(LOGP), torch.zeros(5), TOTAL, torch.tensor(REF))
    _, stats = policy_loss(inputs, LossConfig(beta=0.04))
    assert summary(stats)["kl"] == pytest.approx(0.070429, abs=1e-6)
    with pytest.raises(SettingError, match="beta"):
        evaluate(beta=0.04)
    garbage = example((-60.0, *OLD[1:]))
    assert (
        abs(
            evaluate(garbage, ref=REF, beta=0.04, vllm_importance_sampling_mode="token_truncate")[0]
        )
        < 10
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("old", [None, OLD])
def test_gradients_by_finite_differences(loss_type, level, old):
    """Everything on but truncation, whose factor is a constant for the gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, generator=generator, dtype=torch.float64) * 0.3 - 1
    terms = Example(
        *(torch.tensor(v, dtype=torch.float64) for v in (SAMPLER, (1.0, -0.5, 2.0, -1.0, 0.3))),
        torch.tensor([0, 0, 1, 1, 1]),
    )
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        entropy_coef=0.05,
        vllm_importance_sampling_clip_max=None,
    )

    def f(x: torch.Tensor) -> torch.Tensor:
        old_ = None if old is None else torch.tensor(old, dtype=torch.float64)
        reference = torch.tensor(REF, dtype=torch.float64)
        inputs = terms.inputs(x, torch.sin(x), TOTAL, reference)
        return policy_loss(inputs, config, old_logp=old_)[0]

    if old is None:
        assert torch.autograd.gradcheck(f, x.requires_grad_())
        return
    config = dataclasses.replace(
        config, vllm_importance_sampling_mode="token_mask", vllm_importance_sampling_clip_max=1.15
    )
    assert torch.autograd.gradcheck(f, x.requires_grad_())


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo"])
def test_the_scale_does_not_depend_on_batches_or_on_other_agents(loss_type):
    config = {"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else None}
    whole, grad = evaluate(**config)
    parts = [
        evaluate(example().part(*i), logp=[LOGP[k] for k in i], **config)
        for i in ((0, 1, 2), (3, 4))
    ]
    assert sum(p[0] for p in parts) == pytest.approx(whole, abs=1e-7)
    assert parts[0][1] + parts[1][1] == pytest.approx(grad, abs=1e-7)
    swapped, _ = evaluate(
        example().part(3, 4, 0, 1, 2), logp=[LOGP[k] for k in (3, 4, 0, 1, 2)], **config
    )
    assert swapped == pytest.approx(whole, abs=1e-7)
    # a step twice as large, half of it dropped for zero advantage on another rank: the caller's
    # denominators decide, nothing else
    doubled, _ = evaluate(total=Denominators(10, 4), **config)
    assert doubled == pytest.approx(whole / 2, abs=1e-7)


def test_equal_lengths_make_grpo_and_dapo_equal_and_zero_advantage_gives_zero():
    terms = example().part(0, 1, 3, 4)
    logp, total = [LOGP[i] for i in (0, 1, 3, 4)], Denominators(4, 2)
    grpo, dapo = (evaluate(terms, logp=logp, total=total, loss_type=t) for t in ("grpo", "dapo"))
    assert grpo[0] == pytest.approx(dapo[0], abs=1e-7) and grpo[1] == pytest.approx(
        dapo[1], abs=1e-7
    )
    assert evaluate(example(advantage=(0.0,) * 5))[1] == [0] * 5


def test_entropy_bonus_is_its_mean_over_the_step():
    x = torch.tensor(LOGP)
    entropy = torch.tensor([1.0, 2, 3, 4, 5], requires_grad=True)
    inputs = example().inputs(x, entropy, Denominators(10, 4))
    plain, _ = policy_loss(inputs, LossConfig())
    bonus, _ = policy_loss(inputs, LossConfig(entropy_coef=0.1))
    assert (plain - bonus).item() == pytest.approx(0.1 * 15 / 10)
    bonus.backward()
    assert entropy.grad.tolist() == pytest.approx([-0.01] * 5)


def test_statistics_are_sums_that_add_up():
    def stats(*index: int) -> dict:
        logp = torch.tensor([LOGP[i] for i in index])
        inputs = example().part(*index).inputs(logp, torch.ones(len(index)), TOTAL)
        return policy_loss(inputs, LossConfig())[1]

    whole, joined = summary(stats(0, 1, 2, 3, 4)), summary(add_stats(stats(3, 4), stats(0, 1, 2)))
    assert whole == pytest.approx(joined)
    assert whole["tokens"] == 5 and whole["sequences"] == 2 and whole["entropy"] == 1
    assert whole["dlogp"] == pytest.approx((0.3 + 0.1 + 0.1 + 0.4 + 0.2) / 5)
    assert whole["max_dlogp"] == pytest.approx(0.4) and whole["p99_dlogp"] == pytest.approx(
        0.4, rel=0.16
    )
    assert whole["ratio_outside"] == pytest.approx(
        3 / 5
    )  # 1.35, .67 and 1.22; .905 twice is inside
    assert whole["ratio"] == pytest.approx(
        (1.349859 + 2 * 0.904837 + 0.670320 + 1.221403) / 5, abs=1e-6
    )
    assert whole["mismatch_kl"] == pytest.approx(
        sum(math.exp(b - a) - (b - a) - 1 for a, b in zip(OLD, LOGP, strict=True)) / 5, abs=1e-6
    )
    assert (whole["clip_high"], whole["clip_low"], whole["corrected"]) == (0.2, 0.2, 0)
    assert whole["loss"] == pytest.approx(-0.197654, abs=1e-6)


def test_p99_is_read_off_the_histogram():
    x = torch.zeros(1000)
    terms = Example(torch.linspace(1e-4, 0.1, 1000), torch.ones(1000), torch.arange(1000))
    inputs = terms.inputs(x, x, Denominators(1000, 1000))
    assert summary(policy_loss(inputs, LossConfig())[1])["p99_dlogp"] == pytest.approx(
        0.099, rel=0.16
    )


def test_weighted_nll():
    """The sheet's weighted SFT: tau .4, rewards (1, 0), cross entropies 1.133333 and 1.05 per
    turn."""
    w = [math.exp(1 / 0.4)] * 3 + [1.0] * 2
    per_turn = torch.tensor([x / n for x, n in zip(w, (3, 3, 3, 2, 2), strict=True)])
    x = torch.tensor(LOGP, requires_grad=True)
    loss, stats = weighted_nll(x, per_turn, 2.0)
    assert loss.item() == pytest.approx(7.428413, abs=1e-5)
    loss.backward()
    assert x.grad.tolist() == pytest.approx((-per_turn / 2).tolist())
    assert summary(stats)["nll"] == pytest.approx(1.1)
    halves = [
        weighted_nll(torch.tensor(LOGP[i:j]), per_turn[i:j], 2.0)[0].item()
        for i, j in ((0, 2), (2, 5))
    ]
    assert sum(halves) == pytest.approx(7.428413, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(bad):
    logp = torch.tensor(LOGP)
    finite_or_raise("log-prob", logp, "solver", example())
    logp[4] = bad
    with pytest.raises(
        NotFinite, match="log-prob of policy 'solver' is not finite: episode e2 turn 3; no step"
    ) as caught:
        finite_or_raise("log-prob", logp, "solver", example())
    assert caught.value.turns == (("e2", 3),) and caught.value.policy == "solver"
    with pytest.raises(NotFinite, match="episode e1 turn 0, episode e2 turn 3"):
        finite_or_raise("loss", torch.tensor(bad), "solver", example())
    with pytest.raises(NotFinite, match="gradient of policy 'solver'"):
        finite_or_raise("gradient", [torch.ones(2), torch.tensor([1.0, bad])], "solver")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type: expected one of grpo"),
        ({"loss_type": "cispo"}, "epsilon_high: cispo needs it"),
        (
            {"vllm_importance_sampling_mode": "tis"},
            "vllm_importance_sampling_mode: expected one of token_truncate",
        ),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level"),
        ({"beta": -1.0}, "beta: expected a number from 0, got -1.0"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(SettingError, match=message):
        LossConfig(**config)


# a policy's calls in an episode


def divided(calls: list[float], **config) -> tuple[float, list[float]]:
    """Loss and d loss / d logp where nothing has moved, with terms of 2 calls and of 1."""
    x = torch.tensor(OLD, requires_grad=True)
    inputs = example().inputs(x, -x, TOTAL, torch.tensor(REF))
    loss, _ = policy_loss(
        dataclasses.replace(inputs, calls=torch.tensor(calls)),
        LossConfig(**({"normalize_by_calls": True, "max_completion_length": 4} | config)),
    )
    loss.backward()
    return loss.item(), x.grad.tolist()


@pytest.mark.parametrize(
    ("config", "loss", "gradient"),
    [
        # terms -1/2 three times and +1 twice: (-3/2 + 2) / 5
        ({"loss_type": "dapo"}, 0.1, [-0.1] * 3 + [0.2] * 2),
        # means of turns -1/2 and +1, over two turns
        ({"loss_type": "grpo"}, 0.25, [-0.5 / 6] * 3 + [0.25] * 2),
        # over two turns of four tokens
        ({"loss_type": "dr_grpo"}, 0.0625, [-0.0625] * 3 + [0.125] * 2),
        # -A x log-prob: (3.5 / 2 - 1.9) / 5
        ({"loss_type": "cispo", "epsilon_high": 5.0}, -0.03, [-0.1] * 3 + [0.2] * 2),
    ],
)
def test_terms_are_divided_by_the_calls_of_their_episode(
    config: dict, loss: float, gradient: list[float]
) -> None:
    """The first turn's episode has two calls, the second one's one; by hand, ratio 1."""
    value, found = divided([2.0, 2.0, 2.0, 1.0, 1.0], **config)
    assert value == pytest.approx(loss, abs=1e-6) and found == pytest.approx(gradient, abs=1e-6)


def test_kl_and_entropy_are_divided_too_and_one_call_changes_nothing() -> None:
    """With twice the calls everywhere, loss and gradient are half of those with one."""
    rich = {"beta": 0.3, "entropy_coef": 0.1}
    once, twice = divided([1.0] * 5, **rich), divided([2.0] * 5, **rich)
    assert twice[0] == pytest.approx(once[0] / 2, abs=1e-6)
    assert twice[1] == pytest.approx([g / 2 for g in once[1]], abs=1e-6)
    assert once == divided([1.0] * 5, **rich, normalize_by_calls=False)
    assert once == divided([7.0] * 5, **rich, normalize_by_calls=False)
    x = torch.tensor(OLD)
    with pytest.raises(SettingError, match=r"normalize_by_calls: needs LossInputs\.calls"):
        policy_loss(example().inputs(x, -x, TOTAL), LossConfig(normalize_by_calls=True))
