"""MAPoRL: what an answer is worth in stored debates, which rounds learn when, what may be shown,
and a run from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.patterns.collaboration import Collaboration
from marlora.agents.patterns.debate import Debate
from marlora.agents.system import build_system
from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.rewards.builtin import exact, reward_name, right
from marlora.rollouts.rewards.scoring import fn_name
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.summary import write_config
from marlora.trainers.methods.policy_gradient.maporl import (
    MAPoRLConfig,
    MAPoRLTrainer,
    answer_rewards,
    scheduled,
)
from marlora.trainers.methods.reward_model.verifier import VerifierConfig
from marlora.trainers.testbeds.pair import PAIR
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.repository import ROOT

torch.set_num_threads(1)

MEMBERS = {"a": "a", "b": "b"}
SCORES = [[0.2, 0.9], [0.6, 0.8], [0.9, 0.7]]
RIGHT = [[0, 1], [1, 1], [1, 1]]


def config(**changes: Any) -> MAPoRLConfig:
    return MAPoRLConfig(**{"model": "m", "verifier": "calculator", **changes})


def debate(texts: dict[int, str] | None = None, **tables: list[list[float]]) -> Episode:
    """Two members and three rounds; `tables` give the values of rewards by round and member."""
    turns = tuple(
        Turn(n, "ab"[n % 2], text=(texts or {}).get(n, f"\\boxed{{{n}}}")) for n in range(6)
    )
    rewards = tuple(
        Reward(name, rows[n // 2][n % 2], turn=n) for name, rows in tables.items() for n in range(6)
    )
    return Episode("e", "g", Task("t", "?"), turns=turns, rewards=rewards)


def worth(episode: Episode, config: MAPoRLConfig, **how: Any) -> list[float | None]:
    found = answer_rewards([episode], config, MEMBERS, **{"rounds": 3, **how})
    return [found.get(("e", n, 0)) for n in range(6)]


def test_influence_of_stored_debates():
    expected = [0.346763, 0.850360, 0.646154, 0.8, 0.9, 0.7]
    assert worth(debate(verifier=SCORES, right=RIGHT), config()) == pytest.approx(
        expected, abs=1e-6
    )


def test_without_a_verifier_the_gold_answer_scores():
    assert worth(debate(right=RIGHT), config(verifier=""))[0] == pytest.approx(
        (0 + 0.3 + 0.09) / 1.39
    )


def test_shaping_is_added():
    given = debate(verifier=SCORES, right=RIGHT)
    plain, shaped = (
        worth(given, config(shaping=sign, shaping_weights=[1.0, 2.0, 0.5, 0.25]))
        for sign in ("none", "code_sign")
    )
    assert [s - p for s, p in zip(shaped, plain, strict=True)] == pytest.approx(
        [0, 0, 1.0, 0, 0, 0]
    )


def test_an_invalid_answer_is_punished():
    given = debate({3: "no box"}, verifier=SCORES, right=RIGHT)
    plain = worth(debate(verifier=SCORES, right=RIGHT), config())
    own = worth(given, config(boxed=True, penalty=-10.0))
    assert own == pytest.approx([*plain[:3], (-10 + 0.3 * 0.8) / 1.3, *plain[4:]])
    assert worth(given, config(boxed=True, penalty=-10.0, share_penalty=True))[0] == pytest.approx(
        -0.818705, abs=1e-6
    )
    assert worth(given, config(boxed=True, penalty=-10.0), frozen=["b"]) == pytest.approx(plain)
    assert worth(given, config()) == pytest.approx(plain)


def test_a_score_that_is_missing_leaves_out_what_depends_on_it():
    rows = [[0.2, 0.9], [math.nan, 0.8], [0.9, 0.7]]
    found = worth(debate(verifier=rows, right=RIGHT), config())
    assert [math.isnan(value) for value in found] == [True, True, True, False, False, False]


def test_rounds_take_turns():
    """Two warm steps train round 1, then blocks of two: 3, 2, 1, 3, ..."""
    assert [scheduled(step, 4, 2, 2) for step in range(1, 11)] == [
        {1},
        {1},
        {3},
        {3},
        {2},
        {2},
        {1},
        {1},
        {3},
        {3},
    ]
    assert [scheduled(step, 3, 2, 0) for step in range(1, 5)] == [{1}, {1}, None, None]
    assert scheduled(1, 3, 0, 0) is None and scheduled(1, 1, 5, 5) is None
    given = debate(verifier=SCORES, right=RIGHT)
    found = worth(given, config(warm_steps=1, block_steps=1), step=2)
    assert [value is not None for value in found] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"feedback": True, "verifier": ""},
            "verifier: empty means the gold answer, and what knows that cannot be shown",
        ),
        ({"verifier": "right"}, "what knows that cannot be shown"),
        ({"horizon": "all"}, "horizon: expected one of discounted_sum"),
        ({"share": "none"}, "share: expected one of all"),
        ({"shaping": "paper"}, "shaping: expected one of none, paper_sign"),
        ({"shaping_weights": [1.0]}, "shaping_weights: expected four"),
        ({"influence_discount": 2.0}, "influence_discount: expected a number from 0 to 1"),
        ({"across_turns": True}, "credit, across_turns: MAPoRL has a reward"),
        ({"block_steps": -1}, "block_steps: expected at least 0"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], match: str):
    with pytest.raises(SettingError, match=match):
        config(**changes)


def test_settings_say_all_that_is_played(tmp_path: Path):
    """Of the run, not those that were given: the method's rewards and the verifier are in its
    settings, once."""
    system = {"class": "marlora.agents.patterns.collaboration:Collaboration", "agents": ["a", "b"]}
    given = config(output_dir=str(tmp_path), system=system, feedback=True, rewards=["exact"])
    tasks: dict[str, Any] = dict(tasks=tiny_tasks()[:20], eval_tasks=tiny_tasks("eval")[:4])
    spec = MAPoRLTrainer(args=given, **tasks).spec
    assert given.rewards == ["exact"] and given.system == system
    made = spec.config
    assert made.rewards == ["exact", "right", "verified(calculator)"]
    assert made.system == {**system, "verifier": "calculator"}
    assert isinstance(spec.system, Collaboration) and spec.system.verifier == "calculator"
    write_config(spec)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written.pop("recipe") == spec.recipe  # which says whose settings they are
    assert written["rewards"] == made.rewards and written["system"]["verifier"] == "calculator"
    again = MAPoRLTrainer(args=MAPoRLConfig(**written), **tasks).spec
    assert again.config.rewards == made.rewards and again.system.arguments() == (
        spec.system.arguments()
    )
    assert [fn_name(fn) for fn in spec.rewards] == [fn_name(fn) for fn in again.rewards]
    functions = MAPoRLTrainer(args=given, rewards=[exact, right], **tasks).spec
    assert [reward_name(fn) for fn in functions.rewards] == [reward_name(fn) for fn in spec.rewards]


@pytest.mark.parametrize(
    ("recipe", "config_class"), [("maporl", MAPoRLConfig), ("verifier", VerifierConfig)]
)
def test_the_recipes_settings_hold(recipe: str, config_class: type[RunConfig]):
    found = sorted((ROOT / "recipes").glob(f"{recipe}*.yaml"))
    assert len(found) == 2
    for path in found:
        made = config_class(**yaml.safe_load(path.read_text()))
        system = build_system(made.system)  # type: ignore[arg-type]
        assert isinstance(system, Collaboration) and set(made.policies) <= {
            spec.policy for spec in system.specs
        }


# a run

UNEVEN = f"{__name__}:uneven"


def uneven(task: Task, text: str) -> float:
    """A verifier whose word differs between answers that know nothing."""
    return sum(text.encode()) % 7 / 6


def train(folder: Path, model: Path, system: Collaboration, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        rewards=["exact"],
        verifier=UNEVEN,
        num_eval_tasks=4,
        max_steps=2,
        tasks_per_step=6,
        max_completion_length=3,
        lora_r=2,
        lora_alpha=4.0,
        learning_rate=1e-2,
        num_ppo_epochs=2,
        lora_target_modules=["q_proj", "v_proj"],
        proof_every=10,
    )
    trainer = MAPoRLTrainer(
        system=system,
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:4],
        args=MAPoRLConfig(**{**settings, **changes}),
    )
    return trainer.train()


def moved(summary: dict[str, Any]) -> dict[str, bool]:
    return {
        name: entry["sha256_before"] != entry["sha256_after"]
        for name, entry in summary["policies"].items()
    }


def test_two_bases_and_a_frozen_first_round(model: Path, tmp_path: Path):
    """`a` stands on one base, `b` on another; the first round's adapters stay as they were, to the
    last bit."""
    other = tiny_random_model(tmp_path / "other", hidden_size=64, seed=7)
    policies: dict[str, Any] = {name: {"trainable": False} for name in ("a-alone", "b-alone")}
    for name in ("b-alone", "b-together"):
        policies.setdefault(name, {})["base"] = str(other)
    system = Collaboration(["a", "b"], separation="collaboration", verifier=UNEVEN, **PAIR)
    summary = train(tmp_path / "run", model, system, policies=policies)
    assert moved(summary) == {
        "a-alone": False,
        "b-alone": False,
        "a-together": True,
        "b-together": True,
    }
    told = summary["collaboration"]
    assert set(told) == {"before", "after"} and told["before"]["answers"] == [8, 8]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [len(row["rounds"]) for row in rows] == [2, 2] and set(rows[0]["critics"]) == {
        "a-together",
        "b-together",
    }
    assert summary["live_proof"]["failed"] == 0


def test_every_round_its_own_policy_and_its_turn_to_learn(model: Path, tmp_path: Path):
    system = Collaboration(["a"], rounds=3, separation="turn", verifier=UNEVEN, **PAIR)
    summary = train(tmp_path / "run", model, system, warm_steps=1, block_steps=1)
    assert moved(summary) == {
        "a-1": False,
        "a-2": True,
        "a-3": True,
    }  # step 1: the second round; step 2: the last


def test_with_a_constant_reward_nothing_is_learnt(model: Path, tmp_path: Path):
    """Nobody's sum is right, so the calculator says 0 of every answer: critics learn that, and no
    policy moves by a bit."""
    summary = train(
        tmp_path / "run",
        model,
        Collaboration(["a", "b"], verifier="calculator", **PAIR),
        verifier="calculator",
    )
    assert moved(summary) == {"a": False, "b": False}


def test_feedback_needs_the_verifier_in_the_system(model: Path, tmp_path: Path):
    with pytest.raises(
        SettingError, match="feedback: the system was built with verifier ''; expected"
    ):
        train(tmp_path / "run", model, Collaboration(["a", "b"], **PAIR), feedback=True)


def test_only_a_collaboration_is_trained(model: Path, tmp_path: Path):
    with pytest.raises(SettingError, match="Collaboration, got a Debate"):
        train(tmp_path / "run", model, Debate(["a", "b"]))  # type: ignore[arg-type]
