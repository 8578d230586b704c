"""MAPoRL and the learned verifier on the tiny pair, with the settings of their recipes:
collaboration is learnt, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.types import Reward, Task
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.maporl import MAPoRLConfig, MAPoRLTrainer
from marlora.trainers.methods.reward_model.verifier import VerifierConfig, VerifierTrainer
from tests.repository import ROOT

pytestmark = pytest.mark.timeout(1800)
torch.set_num_threads(1)


def settings(recipe: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        **yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text()),
        "output_dir": str(folder),
        "save_every": 1000,
        **changes,
    }


def train(folder: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and metrics of a run of recipes/maporl.yaml."""
    summary = MAPoRLTrainer(args=MAPoRLConfig(**settings("maporl", folder, **changes))).train()
    return summary, [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row["critics"]["pair-together"][key] for row in rows]
    return sum(values) / len(values)


def half(task: Task, text: str) -> float:
    """A verifier that says the same of everything."""
    return 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_learn_to_believe_the_signs(tmp_path: Path, seed: int) -> None:
    """The second round is as good as the first before, and better after; the first round is frozen,
    to the last bit."""
    summary, rows = train(tmp_path / "run", seed=seed)
    told = summary["collaboration"]
    print(
        seed,
        told,
        [
            (r["rounds"], mean([r], "explained_variance"), mean([r], "value_loss"))
            for r in rows[::5]
        ],
    )
    assert abs(told["before"]["gain"]) < 0.06 and told["after"]["gain"] > 0.12
    assert told["after"]["accuracy"][0] == pytest.approx(told["before"]["accuracy"][0], abs=0.08)
    changes = told["after"]["changes"][0]
    assert changes["wrong_right"] > 3 * changes["right_wrong"]
    policies = summary["policies"]
    assert policies["pair-alone"]["sha256_before"] == policies["pair-alone"]["sha256_after"]
    assert policies["pair-together"]["sha256_before"] != policies["pair-together"]["sha256_after"]
    assert mean(rows[-5:], "explained_variance") > mean(rows[:1], "explained_variance") + 0.1
    assert mean(rows[-5:], "value_loss") < 0.5 * mean(rows[:1], "value_loss")
    assert all(
        row["policies"]["pair-together"]["kl_reward"] < 1.0 for row in rows
    )  # nat per token from the base
    assert summary["live_proof"]["failed"] == 0


@pytest.mark.slow
def test_a_constant_reward_teaches_nothing(tmp_path: Path) -> None:
    summary, _ = train(tmp_path / "run", verifier=f"{__name__}:half", max_steps=4, kl_coef=0.0)
    assert all(
        entry["sha256_before"] == entry["sha256_after"] for entry in summary["policies"].values()
    )


def odd(task: Task, episode: Episode) -> list[Reward]:
    """A label that depends on the answer alone. Of the pair's two answers to a sum one is odd, so
    every task has a right and a wrong one."""
    return [
        Reward("odd", float(turn.text in tuple("13579")), turn=turn.index) for turn in episode.turns
    ]


@pytest.mark.slow
def test_a_learned_verifier_is_calibrated_and_teaches(tmp_path: Path) -> None:
    """It learns on some sums that odd answers are the right ones, knows it of others, and makes two
    that hear nothing of it prefer them."""
    own = {"rewards": ["exact", f"{__name__}:odd"], "label": "odd"}
    summary = VerifierTrainer(
        args=VerifierConfig(**settings("verifier", tmp_path / "verifier", **own))
    ).train()
    found = summary["verifier"]["calibration"]
    print(found)
    assert (
        found["ranked"] > 0.95
        and found["brier"] < 0.4 * found["brier_constant"]
        and found["ece"] < 0.15
    )
    name = f"marlora.trainers.methods.reward_model.verifier:trained({tmp_path / 'verifier' / 'verifier'})"
    _, rows = train(tmp_path / "run", verifier=name, feedback=False, max_steps=10)
    values = [row["critics"]["pair-together"]["value"] for row in rows]
    print(values)
    assert (
        values[-1] > 0.6
    )  # what the critic expects of a second answer: about .5 as long as nothing is learnt
