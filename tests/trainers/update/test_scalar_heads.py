"""Scalar heads: what they read, that they learn alone, and that they survive on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.trainers.batching.batches import pack
from marlora.trainers.batching.samples import Denominators, TrainingSequence
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from marlora.trainers.model.adapters import Adapters, active_adapters
from marlora.trainers.update.losses.statistics import Stats
from marlora.trainers.update.scalar_heads import HeadSpec, ScalarHead, after
from tests.trainers.random_models import disturb, random_model

SHAPE = AdapterSpec(r=2, alpha=4.0, targets=("q_proj", "v_proj"))
FAMILIES = [
    "llama",
    "gemma2",
    "cohere",
]  # cohere scales its logits, so its head is not lm_head(hidden)


def sample(number: int, prompt: int = 3, reply: int = 3, policy: str = "a") -> TrainingSequence:
    """A prompt that is common to all, and a reply of its own."""
    ids = (*range(5, 5 + prompt), *(11 + (7 * number + k) % 29 for k in range(reply)))
    rest = [(0,) * prompt, (0.0,) * prompt, (0.0,) * prompt, (1.0,) * prompt, (-1,) * prompt]
    own = [(1,) * reply, (-3.0,) * reply, (1.0,) * reply, (1.0,) * reply, (0,) * reply]
    return TrainingSequence(
        policy, f"e{number}", ids, *(a + b for a, b in zip(rest, own, strict=True))
    )  # type: ignore[arg-type]


SAMPLES = [sample(k, reply=2 + k % 3) for k in range(6)]


def make(family: str = "llama", seed: int = 0, name: str = "critic", **settings: Any) -> ScalarHead:
    adapters = Adapters(
        random_model(family),
        [PolicySpec("a", adapter=SHAPE), PolicySpec("b", adapter=SHAPE)],
        seed=seed,
    )
    disturb(adapters)
    return ScalarHead(
        adapters, HeadSpec(name, adapter=SHAPE), GRPOConfig(learning_rate=1e-2, **settings)
    )


def squares(scores: torch.Tensor, targets: Any, counts: Denominators) -> tuple[torch.Tensor, Stats]:
    loss = ((scores - targets["wanted"]) ** 2).sum() / counts.tokens
    return loss, {
        "loss": loss.detach().double(),
        "tokens": torch.tensor(float(scores.numel())).double(),
    }


def wanted(samples: list[TrainingSequence] = SAMPLES) -> torch.Tensor:
    return torch.cat([0.5 + torch.arange(s.num_trained) for s in samples])


def read(head: ScalarHead, samples: list[TrainingSequence] = SAMPLES) -> list[torch.Tensor]:
    return list(head.read(samples, Ranks()).split([s.num_trained for s in samples]))


def teach(head: ScalarHead, steps: int = 3) -> list[float]:
    done = [
        head.learn(SAMPLES, {"wanted": wanted()}, squares, step, Ranks())
        for step in range(1, steps + 1)
    ]
    assert all(
        d.applied and d.grad_norm > 0 and d.tokens == sum(s.num_trained for s in SAMPLES)
        for d in done
    )
    return [d.stats["loss"] for d in done]


def by_hand(head: ScalarHead, s: TrainingSequence, shift: int = -1) -> torch.Tensor:
    """w . h + b from the plain model's hidden states of one sample alone, at each trained token
    (`shift` 0) or before it (-1)."""
    at = [i + shift for i, trained in enumerate(s.mask) if trained]
    with head.adapters.active(head.adapter) as model, torch.no_grad():
        decoder = model.get_base_model().get_decoder()
        hidden = decoder(input_ids=torch.tensor([s.ids]), use_cache=False).last_hidden_state[0, at]
    return hidden @ head.linear.weight.detach()[0] + head.linear.bias.detach()


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_reads_the_state_before_each_trained_token(family: str, layout: str) -> None:
    head = make(family, layout=layout, tokens_per_batch=25)
    assert not head.read(SAMPLES, Ranks()).any(), "untrained, it says 0"
    teach(head)
    for found, s in zip(read(head), SAMPLES, strict=True):
        assert torch.allclose(found, by_hand(head, s), atol=1e-5) and found.abs().max() > 0.01
    assert all(
        torch.equal(a, b) for a, b in zip(read(head, SAMPLES[::-1]), read(head)[::-1], strict=True)
    )


def test_after_it_reads_the_state_of_the_token_itself() -> None:
    head = make()
    teach(head)
    shifted = [after(s) for s in SAMPLES]
    assert shifted[0].mask == (0, 0, 0, 0, 1, 1) and shifted[0].ids[:5] == SAMPLES[0].ids
    for found, s in zip(read(head, shifted), SAMPLES, strict=True):
        assert torch.allclose(found, by_hand(head, s, shift=0), atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_terms_know_their_place_among_the_samples(layout: str) -> None:
    """Also where one sample is there twice."""
    samples = [SAMPLES[3], SAMPLES[0], SAMPLES[3], SAMPLES[5]]
    tokens = [
        token for s in samples for token, trained in zip(s.ids, s.mask, strict=True) if trained
    ]
    found = [-1] * len(tokens)
    for batch in pack(samples, max_tokens=15, layout=layout):  # type: ignore[arg-type]
        for place, target in zip(batch.token_index.tolist(), batch.target.tolist(), strict=True):
            found[place] = target
    assert found == tokens


def test_a_head_learns_lora_and_linear_layer_and_nothing_else_moves() -> None:
    head = make()
    adapters = head.adapters
    base, policies, before = (
        adapters.base_sha256(),
        {p: adapters.sha256(p) for p in "ab"},
        head.sha256(),
    )
    parameters = {name: p.detach().clone() for name, p in head.parameters().items()}
    losses = teach(head, 20)
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, parameters[name]) for name, p in head.parameters().items()), (
        "each tensor is trained"
    )
    assert head.sha256() != before
    assert base == adapters.base_sha256() and policies == {p: adapters.sha256(p) for p in "ab"}
    assert (sorted(adapters.policies), adapters.trainable) == (["a", "b"], ("a", "b")), (
        "a head is no policy"
    )
    assert active_adapters(adapters.model) != (head.adapter,)


def test_learning_does_not_depend_on_batches_nor_on_the_order_of_samples() -> None:
    whole, small = make(), make(tokens_per_batch=12)
    teach(whole, 3)
    for step in (1, 2, 3):
        small.learn(SAMPLES[::-1], {"wanted": wanted(SAMPLES[::-1])}, squares, step, Ranks())
    for name, p in whole.parameters().items():
        assert torch.allclose(p, small.parameters()[name], atol=1e-5), name


def test_two_heads_and_seeds() -> None:
    one = make()
    two = ScalarHead(one.adapters, HeadSpec("other", adapter=SHAPE), GRPOConfig())
    other = two.sha256()
    teach(one)
    assert two.sha256() == other != one.sha256()
    assert make().sha256() == make().sha256() != make(seed=1).sha256()
    assert make(name="x").sha256() != make(name="y").sha256()
    with pytest.raises(ValueError, match="name of its own"):
        ScalarHead(one.adapters, HeadSpec("other", adapter=SHAPE), GRPOConfig())
    with pytest.raises(SettingError, match="head name 'a/b'"):
        HeadSpec("a/b")


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = make(), make(), make()
    teach(whole, 4)
    teach(first, 2)
    first.save(tmp_path / "head")
    second.load(tmp_path / "head")
    second.load_state(first.state())
    assert second.sha256() == first.sha256() != whole.sha256()
    for step in (3, 4):
        second.learn(SAMPLES, {"wanted": wanted()}, squares, step, Ranks())
    assert second.sha256() == whole.sha256()
    assert {p.name for p in (tmp_path / "head").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
    }
    with pytest.raises(SettingError, match=r"no .*head\.safetensors"):
        second.load(tmp_path)
    wide = ScalarHead(
        make().adapters,
        HeadSpec("wide", adapter=AdapterSpec(4, 4.0, ("q_proj", "v_proj"))),
        GRPOConfig(),
    )
    with pytest.raises(SettingError, match=r"set the head's adapter\.r"):
        wide.load(tmp_path / "head")


def test_a_head_alone_on_a_model_without_policies() -> None:
    """As a verifier of its own: there is no other adapter, and the base is the bare model."""
    adapters = Adapters(random_model(), [], seed=0)
    head = ScalarHead(adapters, HeadSpec("verifier", adapter=SHAPE), GRPOConfig(learning_rate=1e-2))
    losses = teach(head, 20)
    assert losses[-1] < 0.5 * losses[0] and adapters.base_sha256() == make().adapters.base_sha256()


def test_what_is_not_finite_changes_nothing() -> None:
    head = make()
    teach(head)
    before, targets = head.sha256(), wanted()
    targets[2] = float("nan")
    done = head.learn(SAMPLES, {"wanted": targets}, squares, 1, Ranks())
    assert not done.applied and "loss of policy 'head@critic' is not finite" in done.problem
    assert head.sha256() == before


def test_a_foreign_tensor_in_its_optimizer_is_found() -> None:
    head = make()
    head.optimizer.param_groups[0]["params"].append(
        next(iter(head.adapters.parameters("a").values()))
    )
    with pytest.raises(RuntimeError, match="optimizer of head 'critic'"):
        teach(head)
