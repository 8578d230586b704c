"""The policy loss against TRL's own `GRPOTrainer._compute_loss` on the same random tensors, one
agent, one batch."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from marlora.trainers.batching.samples import Denominators
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss

pytestmark = (
    pytest.mark.slow
)  # importing the trainer takes longer than all other tests of this room together

SETTINGS = [
    {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": beta,
        "use_bias_correction_kl": corrected,
        "delta": delta,
    }
    for loss_type, level, (beta, corrected), delta in itertools.product(
        ("grpo", "dapo", "dr_grpo", "luspo", "cispo"),
        ("token", "sequence"),
        ((0.0, True), (0.04, True), (0.04, False)),
        (None, 1.3),
    )
]
MODES = ("off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def trl_ratio(
    old: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, config: LossConfig
) -> torch.Tensor | None:
    """`importance_sampling_ratio` as `_generate_and_score_completions` makes it from the same
    settings."""
    mode, high = config.vllm_importance_sampling_mode, config.vllm_importance_sampling_clip_max
    low = config.vllm_importance_sampling_clip_min
    if mode == "off":
        return None
    difference = (old - sampler) * mask
    ratio = torch.exp(
        difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference
    )
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=low, max=high)
    return ratio.masked_fill(
        (ratio < (low or -math.inf)) | (ratio > (math.inf if high is None else high)), 0.0
    )


def trl_loss(logp: torch.Tensor, data: dict[str, torch.Tensor], config: LossConfig) -> torch.Tensor:
    from trl import GRPOTrainer

    ratio = trl_ratio(data["old"], data["sampler"], data["mask"], config)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        importance_sampling_level=config.importance_sampling_level,
        beta=config.beta,
        loss_type=config.loss_type,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        args=SimpleNamespace(
            use_bias_correction_kl=config.use_bias_correction_kl,
            delta=config.delta,
            steps_per_generation=1,
        ),
        use_vllm=ratio is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=config.max_completion_length,
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        _metrics={"train": defaultdict(list)},
    )
    prompt = torch.ones(len(logp), 1, dtype=torch.long)
    return GRPOTrainer._compute_loss(
        stub,
        None,
        {
            "prompt_ids": prompt,
            "prompt_mask": prompt,
            "completion_ids": torch.ones_like(logp).long(),
            "completion_mask": data["mask"],
            "advantages": data["advantages"],
            "old_per_token_logps": data["old"],
            "ref_per_token_logps": data["ref"],
            "importance_sampling_ratio": ratio,
            "num_items_in_batch": data["mask"].sum(),
        },
    )


@pytest.mark.parametrize("per_turn", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equals_trl(mode, per_turn):
    """`per_turn`: advantages of shape [B, T], as for several turns in one row."""
    alive = 0
    for number, settings in enumerate(SETTINGS):
        generator = torch.Generator().manual_seed(number)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        old = -draw(4, 6).abs() - 0.2
        data = {
            "old": old,
            "sampler": old + 0.3 * draw(4, 6),
            "ref": old + 0.3 * draw(4, 6),
            "advantages": draw(4, 6) if per_turn else draw(4),
        }
        data["mask"] = (torch.arange(6)[None] < torch.tensor([6, 1, 4, 2])[:, None]).to(
            torch.float64
        )
        more = {"epsilon_high": 1.3} if settings["loss_type"] == "cispo" else {}
        config = LossConfig(
            **settings,
            **more,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_max=1.4,
            max_completion_length=6,
        )
        logp = (old + 0.25 * draw(4, 6)).requires_grad_()
        expected = trl_loss(logp, data, config)
        (truth,) = torch.autograd.grad(expected, logp)

        keep = data["mask"].bool()
        advantages = data["advantages"] if per_turn else data["advantages"][:, None].expand(4, 6)
        inputs = LossInputs(
            logp=logp[keep],
            entropy=torch.zeros(13),
            behaviour=data["sampler"][keep],
            advantage=advantages[keep],
            sequence=torch.arange(4)[:, None].expand(4, 6)[keep],
            total=Denominators(13, 4),
            reference=data["ref"][keep],
        )
        loss, _ = policy_loss(inputs, config, old_logp=data["old"][keep])
        (grad,) = torch.autograd.grad(loss, logp)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6), settings
        assert torch.allclose(grad, truth, atol=1e-6), settings
        alive += bool(truth.abs().sum() > 1e-3)
    assert alive > 0.9 * len(SETTINGS)  # zeros against zeros would prove nothing
