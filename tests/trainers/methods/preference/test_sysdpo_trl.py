"""DPO of one agent against TRL's own `DPOTrainer` on the same tokens, and `--trainer trl` in a
run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.trainers.credit.pairs import agent_pairs, pairs_of
from marlora.trainers.methods.trl_control import TRLExample, learn_with_trl
from tests.trainers.methods.preference.test_sysdpo import played, trainer

# Importing the trainer takes longer than all other tests of preferences together.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {"loss_type": "hinge", "beta": 0.5},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo", "length_normalised": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_dpo_of_one_agent_equals_trl(tmp_path: Path, model: Path, name: str) -> None:
    """Loss, gradient and step of `first`, whose prompts are equal within a task, from an adapter
    that is not the base; reference: the step."""
    changes = {
        "mode": "independent",
        "reference": "step",
        "max_grad_norm": 1e9,
        "policies": {"last": {"trainable": False}},
    }
    ours, theirs = (
        trainer(tmp_path / who, model, **changes, **SETTINGS[name]) for who in ("ours", "theirs")
    )
    gradients, losses, stepped = [], [], []
    for made in (ours, theirs):
        adapters, episodes = played(made)
        with made.run:
            pairs = [p for p in pairs_of(episodes, made.args, 0) if agent_pairs([p], ["first"])[0]]
            (base,) = made.run.learner.bases.values()
            before = {key: p.detach().clone() for key, p in adapters.parameters("first").items()}
            if made is ours:
                own, _ = made.learner.samples_of(pairs)
                done, pushed = made.learner.update(
                    1, 0, pairs, own, made.learner.reference_scores(own)
                )
                losses.append(pushed.loss)
                moments = base.optimizers.of["first"].state
                gradients.append(
                    {
                        key: moments[p]["exp_avg"] * 10
                        for key, p in adapters.parameters("first").items()
                    }
                )
            else:
                rows, _ = agent_pairs(pairs, ["first"])
                assert len(rows) == len(pairs) >= 3
                kept: list[Any] = []

                def make(*given: Any, made: Any = made, kept: list[Any] = kept) -> Any:
                    kept.append(made.dpo_trainer(*given))
                    return kept[0]

                done = learn_with_trl(made.run.learner, 1, {"first": TRLExample(rows, 0)}, make)
                losses.append(kept[0].state.log_history[0]["loss"])
                named = {
                    n.replace(".default", ""): p
                    for n, p in kept[0].model.named_parameters()
                    if ".default." in n
                }
                gradients.append(
                    {key: kept[0].optimizer.state[named[key]]["exp_avg"] * 10 for key in before}
                )
            assert done["first"].applied
            stepped.append(
                {key: p.detach() - before[key] for key, p in adapters.parameters("first").items()}
            )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, other, bound in ((*gradients, 1e-5), (*stepped, 1e-3)):
        mine, trls = (
            torch.cat([t.flatten() for _, t in sorted(side.items())]) for side in (one, other)
        )
        assert trls.norm() > 1e-4 and (mine - trls).norm() / trls.norm() < bound


def test_a_run_with_trl_publishes_and_proves_what_trl_trained(tmp_path: Path, model: Path) -> None:
    """Two steps; `last` learns from those pairs alone in which it was asked the same."""
    made = trainer(
        tmp_path / "run",
        model,
        trainer="trl",
        mode="independent",
        reference="step",
        max_steps=2,
        train_batch_size=2,
        tasks_per_step=4,
        num_generations=4,
    )
    summary = made.train()
    first = summary["policies"]["first"]
    assert (
        first["sha256_before"] != first["sha256_after"]
        and summary["live_proof"]["failed"] == 0 < summary["live_proof"]["passed"]
    )
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert row["preference"]["rows"]["first"] > 0 and row["policies"]["first"]["tokens"] > 0
        assert row["policies"]["first"]["loss"] > 0
    assert any("last: was asked different things" in row["dropped"] for row in rows)
    (base,) = made.run.learner.bases.values()
    assert base.adapters.sha256("first") == first["sha256_after"]
