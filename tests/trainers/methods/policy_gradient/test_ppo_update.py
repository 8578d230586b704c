"""One update of PPO against a plain one: loops over episodes, the model's own forward, full
logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import BASE, Turn
from tests.trainers.methods.policy_gradient.test_ppo import Twice, trainer
from tests.trainers.random_models import disturb

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_gae(rewards: list[float], values: list[float], lam: float) -> list[float]:
    """Sums of all later deltas, gamma 1."""
    later = [*values[1:], 0.0]
    deltas = [r + n - v for r, n, v in zip(rewards, later, values, strict=True)]
    return [sum(lam**k * deltas[t + k] for k in range(len(deltas) - t)) for t in range(len(deltas))]


def plain_logps(network: Any, turn: Turn) -> torch.Tensor:
    """log p of one reply by the model's own forward: no packing, no chunks."""
    ids = torch.tensor([turn.prompt_ids + turn.token_ids])
    logits = (
        network(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1] / turn.sampling.temperature
    )
    return logits.log_softmax(-1).gather(1, torch.tensor(turn.token_ids)[:, None])[:, 0]


def plain_values(network: Any, head: Any, turn: Turn) -> torch.Tensor:
    hidden = (
        network.get_base_model()
        .model(input_ids=torch.tensor([turn.prompt_ids + turn.token_ids]))
        .last_hidden_state[0]
    )
    return head.linear(hidden[len(turn.prompt_ids) - 1 : -1])[:, 0]


def plain_loss(
    logp: torch.Tensor,
    behaviour: torch.Tensor,
    reference: torch.Tensor,
    white: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The clipped surrogate, and beta times the KL to the reference, each term of which counts by
    its ratio."""
    ratio, away = torch.exp(logp - behaviour), logp - reference
    return (
        torch.maximum(-white * ratio, -white * ratio.clamp(0.8, 1.2))
        + beta * ratio * (torch.exp(-away) + away - 1)
    ).mean()


@pytest.mark.parametrize(
    ("layout", "across", "beta"),
    [("padded", False, 0.0), ("padded", True, 0.5), ("shared", False, 0.5), ("shared", True, 0.0)],
)
def test_one_update_is_that_of_a_plain_implementation(
    layout: str, across: bool, beta: float, tmp_path: Path, model: Path
) -> None:
    """Gradients of both adapters and both critics, from loops over episodes and full logits. KL in
    the rewards, and in the loss (`beta`); two turns in a chat."""
    made = trainer(
        tmp_path / "run",
        model,
        Twice(["first", "last"]),
        layout=layout,
        tokens_per_batch=60,
        across_turns=across,
        num_ppo_epochs=1,
        kl_coef=0.3,
        beta=beta,
        lam=0.8,
        temperature=0.8,
        max_grad_norm=1e9,
    )
    with made.run as run:
        (base,) = run.learner.bases.values()
        disturb(base.adapters)
        for head in base.heads.values():
            for name, p in head.parameters().items():
                p.data += 0.1 * torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(len(name))
                )
        run.sync.advance(0, (), final=False)
        episodes = run.rollouts.collect(1)
        truth: dict[str, tuple[torch.Tensor, ...]] = {}
        for agent in ("first", "last"):
            head, chains = base.heads[agent], []
            for e in episodes:
                taken = [t for t in e.turns if t.agent == agent]
                chains += [(e, taken)] if across else [(e, [t]) for t in taken]
            told, references, values, advantages = [], [], [], []
            for e, turns in chains:
                with base.adapters.active(BASE) as network, torch.no_grad():
                    reference = [plain_logps(network, t) for t in turns]
                references += reference
                with base.adapters.active(head.adapter) as network:
                    said = [plain_values(network, head, t) for t in turns]
                rewards: list[float] = []
                for turn, ref in zip(turns, reference, strict=True):
                    rewards += [
                        -0.3 * (p - float(r)) for p, r in zip(turn.logprobs, ref, strict=True)
                    ]
                    rewards[-1] += e.rewards[0].value if turn is turns[-1] or not across else 0.0
                values.append(torch.cat(said))
                advantages += slow_gae(rewards, values[-1].tolist(), 0.8)
                with base.adapters.active(agent) as network:
                    told.append(torch.cat([plain_logps(network, t) for t in turns]))
            logp, value = torch.cat(told), torch.cat(values)
            raw = torch.tensor(advantages)
            white = (raw - raw.mean()) / raw.std()
            behaviour = torch.tensor([p for _, turns in chains for t in turns for p in t.logprobs])
            loss = plain_loss(logp, behaviour, torch.cat(references), white, beta)
            value_loss = 0.5 * ((value - (raw + value.detach())) ** 2).mean()
            assert len(white) > 12 and white.abs().max() > 1
            truth[agent] = torch.autograd.grad(loss, list(base.adapters.parameters(agent).values()))
            truth[head.adapter] = torch.autograd.grad(value_loss, list(head.parameters().values()))
        metrics = made.learn(1, episodes)
        assert metrics["policies"]["first"]["kl_reward"] > 0.05 and metrics["dropped"] == {}
        for agent in ("first", "last"):
            head = base.heads[agent]
            for name, optimizer, parameters in (
                (agent, base.optimizers.of[agent], base.adapters.parameters(agent)),
                (head.adapter, head.optimizer, head.parameters()),
            ):
                found = torch.cat(
                    [optimizer.state[p]["exp_avg"].flatten() * 10 for p in parameters.values()]
                )
                expected = torch.cat([g.flatten() for g in truth[name]])
                assert expected.norm() > 1e-3
                assert (found - expected).norm() / expected.norm() < 1e-4, name
