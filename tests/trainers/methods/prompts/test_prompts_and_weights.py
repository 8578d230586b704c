"""Prompts and weights from one store: which episodes rank which prompts and which train what; prompts
and adapters that move together, and go on after a kill."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Message, SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import CreditConfig
from marlora.trainers.methods.prompts.prompts_and_weights import (
    PromptsAndWeightsTrainer,
    merged,
    rewards_by_task,
    shares,
    standings,
)
from tests.trainers.forks import two_ranks
from tests.trainers.methods.prompts.prompts_and_weights_run import (
    EPISODES,
    Cut,
    adapters,
    both,
    rows_of,
)
from tests.trainers.outside import Outside

pytestmark = pytest.mark.usefixtures("one_thread")


def prompt_of(episode: Episode) -> str:
    return str(episode.state.values["a.prompt"])


def test_episodes_rank_the_prompt_that_they_were_played_under() -> None:
    found = rewards_by_task(EPISODES, prompt_of, CreditConfig())
    assert found == {
        "x": {"t": [1.0, 0.0], "u": [0.0, 0.0]},
        "y": {"t": [1.0, 1.0], "u": [1.0, 0.0]},  # what could not be scored counts 0
    }
    ranked = standings(found)
    assert [(id, result.accuracy) for id, result in ranked.items()] == [("y", 0.75), ("x", 0.25)]
    assert ranked["y"].scores == {"t": 1.0, "u": 0.5}
    # uncertainty is over tasks: a spread of sqrt(1/8), of two tasks
    low, high = ranked["y"].summary()["ci95"]
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(0.125) / math.sqrt(2))
    assert list(standings({"b": {"t": [1.0]}, "a": {"t": [1.0]}})) == ["b", "a"], "the earlier one"
    both = merged(found, {"y": {"t": [0.0]}, "z": {"t": [1.0]}})
    assert both["y"]["t"] == [1.0, 1.0, 0.0] and both["z"] == {"t": [1.0]}


def test_episodes_train_in_comparison_with_those_of_the_same_prompt_alone() -> None:
    """On task t prompt y is always right and x once in two: x's right answer is better than its
    other, y's are no better than one another, so y's tokens are not praised for their prompt."""
    advantages = credit(EPISODES, CreditConfig(credit="dr_grpo"), {}, set())
    assert advantages == {("x0", 0, 0): 0.5, ("x1", 0, 0): -0.5}


def test_a_steps_episodes_are_split_evenly() -> None:
    assert shares(8, 2) == [4, 4] and shares(8, 3) == [3, 3, 2] and shares(4, 1) == [4]


def hashed(body: dict[str, Any]) -> str:
    """An instruction that follows from the question."""
    text = json.dumps(body["messages"])
    return f"<INSTRUCTION>say {hashlib.sha256(text.encode()).hexdigest()[:6]}</INSTRUCTION>"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Outside(hashed) as outside:
        yield outside.url


def watch(made: PromptsAndWeightsTrainer) -> list[list[TrainingSequence]]:
    """The token sequences of every update."""
    own, seen = made.run.learner.learn, []

    def learn(*args: Any, **settings: Any) -> Any:
        seen.append(list(args[1]))
        return own(*args, **settings)

    made.run.learner.learn = learn  # type: ignore[method-assign]
    return seen


@pytest.fixture(scope="module")
def whole(
    model: Path, url: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PromptsAndWeightsTrainer, list[list[TrainingSequence]]]:
    made = both(tmp_path_factory.mktemp("whole") / "run", model, url)
    seen = watch(made)
    made.train()
    return made, seen


def test_what_is_trained_is_the_prompt_that_a_turn_was_sampled_under(
    whole: tuple[PromptsAndWeightsTrainer, list[list[TrainingSequence]]],
) -> None:
    made, seen = whole
    episodes = {e.id: e for e in made.run.rollouts.store.read(kind="train")}
    (base,) = made.run.learner.bases.values()
    for step, sequences in enumerate(seen, 1):
        states = set()
        for sequence in sequences:
            episode = episodes[sequence.episode]
            (turn,) = episode.trajectory(sequence.policy)
            candidate = made.search[made.candidate_of(episode)]
            assert sequence.ids == turn.prompt_ids + turn.token_ids
            assert sequence.logprobs[len(turn.prompt_ids) :] == turn.logprobs
            prompt = str(candidate.values[f"{turn.agent}.prompt"])
            own = base.tokens.prompt([Message("system", prompt), *turn.messages[1:]])
            assert list(turn.prompt_ids) == list(own)
            states.add(candidate.id)
        assert len(states) == min(step, 2), "both candidates' episodes train"
    for row in rows_of(made.args.folder):
        for policy in row["policies"].values():  # ratios are 1 before the first update
            assert policy["ratio"] == pytest.approx(1, abs=1e-4) and policy["clipped"] == 0


def test_both_move_and_the_checkpoint_is_worth_what_the_run_said(
    whole: tuple[PromptsAndWeightsTrainer, Any], tmp_path: Path
) -> None:
    made, _ = whole
    summary = json.loads((made.args.folder / "summary.json").read_text(encoding="utf-8"))
    assert made.run.values and len(made.search.candidates) == 3
    for policy in summary["policies"].values():
        assert policy["sha256_before"] != policy["sha256_after"]
    argv = ["eval", str(made.args.folder / "checkpoints" / "step-000003"), "--trust_checkpoint"]
    main([*argv, "--engine", "transformers", "--output", str(tmp_path / "eval")])
    result = json.loads((tmp_path / "eval/eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert result[when]["accuracy"] == summary["eval"][when]["accuracy"]
    assert result["before"]["accuracy"] != result["after"]["accuracy"]


@pytest.mark.slow
def test_adapters_and_prompts_go_on_after_a_kill(
    whole: tuple[PromptsAndWeightsTrainer, Any],
    model: Path,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = both(tmp_path / "run", model, url)
    own = killed.step

    def cut(step: int) -> Any:
        result = own(step)
        if step == 2:
            raise Cut
        return result

    monkeypatch.setattr(killed, "step", cut)
    with pytest.raises(Cut):
        killed.train()
    again = both(tmp_path / "run", model, url, resume=True)
    again.train()
    assert again.run.values == whole[0].run.values and adapters(again) == adapters(whole[0])


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_search_and_train_the_same(
    whole: tuple[PromptsAndWeightsTrainer, Any], url: str, tmp_path: Path
) -> None:
    done = two_ranks(
        "tests.trainers.methods.prompts.prompts_and_weights_run",
        tmp_path / "two",
        whole[0].args.model,
        url,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (
        json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    )
    assert first == second and len(first["adapters"]) == 2
    one = [dict(each.values) for each in whole[0].search.candidates]
    assert first["candidates"][:2] == one[:2], "proposed before the first update: as one rank finds"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_candidates": 3}, "num_generations: 4 episodes per task over 3 candidates"),
        ({"num_val_tasks": 0, "gate": "not_worse"}, "num_val_tasks: the gate 'not_worse'"),
        ({"helpers": {}}, "helpers.proposer: missing"),
        ({"modules": ["frist"]}, "modules: no agent 'frist'; did you mean 'first'"),
        ({"credit": "rae"}, "credit: "),
        ({"max_staleness": 1}, "max_staleness: "),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        both(tmp_path / "run", model, "http://127.0.0.1:9/v1", **changes)
