"""Learning from a store that another run has filled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.evaluation.variants import asked
from marlora.rollouts.renderer import ChatRenderer
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode, Kind
from marlora.trainers.collection.stored_episodes import OfflineEpisodes, training
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.loop import checks
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_tokenizer
from tests.repository import ROOT
from tests.trainers import small_run


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("played") / "run"
    small_run.trainer(folder, model, max_steps=2).train()
    return folder


def test_a_run_learns_from_the_store_of_another_without_playing(
    tmp_path: Path, model: Path, played: Path
) -> None:
    learner = small_run.trainer(tmp_path / "run", model, max_steps=2, episodes=str(played))
    summary = learner.train()
    assert summary["tokens"]["trained"] > 0
    assert all(
        entry["sha256_before"] != entry["sha256_after"] for entry in summary["policies"].values()
    )
    assert {e.group.split("-")[0] for e in Store(tmp_path / "run" / "episodes")} == {"eval"}


def test_given_episodes_are_those_trained_on_in_whole_groups(played: Path) -> None:
    given = OfflineEpisodes(played, tiny_chain().specs)
    assert len(given.episodes) == 2 * small_run.EPISODES
    first, again = given.of(1, 0, 1), given.of(1, 0, 1)
    assert [e.id for e in first] == [e.id for e in again] and len(first) == 3
    assert len({e.group for e in first}) == 1
    tasks = {e.task.id for step in range(1, 5) for e in given.of(1, 0, step)}
    assert tasks == {e.task.id for e in given.episodes}, "an epoch visits every task"


def test_stores_that_cannot_be_learnt_from_are_named(
    tmp_path: Path, model: Path, played: Path
) -> None:
    with pytest.raises(SettingError, match=r"episodes '.*nowhere'.*no such folder"):
        OfflineEpisodes(tmp_path / "nowhere", tiny_chain().specs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="holds no training episode"):
        OfflineEpisodes(tmp_path / "empty", tiny_chain().specs)
    with pytest.raises(SettingError, match=r"its agents are first, last, this team's are other"):
        OfflineEpisodes(played, Chain(["other"]).specs)
    trained_on = [e.task for e in OfflineEpisodes(played, tiny_chain().specs).episodes]
    args = small_run.config(tmp_path / "leak", model, max_steps=1, episodes=str(played))
    others = [t for t in tiny_tasks() if t.id not in {task.id for task in trained_on}]
    learner = GRPOTrainer(
        system=tiny_chain(),
        tasks=others,
        eval_tasks=trained_on[:2],
        rewards=[small_run.bytes_mod_7],
        args=args,
    )
    with pytest.raises(SettingError, match="held-out tasks are also trained on"):
        learner.train()


def test_episodes_of_another_tokenizer_are_refused(played: Path) -> None:
    """The ids of `played` shifted by one: other words, though every id is known."""
    given, tokens = OfflineEpisodes(played, tiny_chain().specs), ChatRenderer(tiny_tokenizer())
    given.check_tokens({"first": tokens, "last": tokens})
    turns = [
        dataclasses.replace(t, token_ids=tuple(i - 1 for i in t.token_ids))
        for t in given.episodes[0].turns
    ]
    given.episodes[0] = dataclasses.replace(given.episodes[0], turns=tuple(turns))
    with pytest.raises(
        SettingError,
        match=(
            r"a turn of 'first' says .* but its tokens read .* expected episodes that were sampled"
        ),
    ):
        given.check_tokens({"first": tokens, "last": tokens})
    given.check_tokens({"nobody": tokens})


KINDS: tuple[Kind, ...] = ("train", "trial", "aside", "eval")


def test_only_what_was_played_to_learn_from_is_learnt_from(tmp_path: Path) -> None:
    """A candidate's trials and an optimizer's talk are of the same tasks, agents and split."""
    turns = (Turn(0, "first", text="7", policy="first"),)
    with Store(tmp_path / "episodes") as store:
        for kind in KINDS:
            for n in range(2):
                group = f"{kind}/t"
                task = Task("t", "?", "7", split="train")
                store.append(
                    Episode(f"{group}/{n}", group, task, kind=kind, split="train", turns=turns)
                )
        found = training(store)
    assert [episode.id for episode in found] == ["train/t/0", "train/t/1"]
    given = OfflineEpisodes(tmp_path, tiny_chain().specs)
    assert given.episodes == found == given.of(1, 0, 1)
    assert asked(Store(tmp_path / "episodes")) == {"t": "?"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "train"])
def test_a_store_of_other_kinds_alone_holds_nothing_to_learn_from(
    tmp_path: Path, kind: Kind
) -> None:
    turns = (Turn(0, "first", text="7", policy="first"),)
    with Store(tmp_path / "episodes") as store:
        store.append(Episode("g/0", "g", Task("t", "?"), kind=kind, split="train", turns=turns))
    with pytest.raises(SettingError, match="holds no training episode"):
        OfflineEpisodes(tmp_path, tiny_chain().specs)


def test_of_a_store_of_0_1_evaluations_and_corrections_are_not_learnt_from() -> None:
    found = training(Store(ROOT / "tests" / "data" / "store-0.1"))
    assert [episode.id for episode in found] == ["train-000003/t1/0", "train-000003/t1/1"]


@pytest.mark.parametrize("where", ["prompt_ids", "token_ids"])
@pytest.mark.parametrize("wrong", [10**6, -1])
def test_tokens_without_an_embedding_are_one_line_that_names_turn_and_id(
    where: str, wrong: int, tmp_path: Path, model: Path, played: Path
) -> None:
    """In the last turn of the last episode, which no look at the first few turns would find."""
    episodes = list(Store(played / "episodes").read(kind="train"))
    *others, last = episodes[-1].turns
    ids = (*getattr(last, where), wrong)
    torn = dataclasses.replace(last, **{where: ids, "logprobs": (0.0,) * len(last.token_ids)})
    if where == "token_ids":
        torn = dataclasses.replace(torn, logprobs=(0.0,) * len(ids))
    episodes[-1] = dataclasses.replace(episodes[-1], turns=(*others, torn))
    with Store(tmp_path / "store") as store:
        store.extend(episodes)
    learner = small_run.trainer(
        tmp_path / "run", model, max_steps=1, episodes=str(tmp_path / "store")
    )
    with pytest.raises(SettingError) as raised:
        learner.train()
    told = str(raised.value)
    assert f"turn {last.index} of 'last' in episode {episodes[-1].id!r}" in told
    assert f"holds the token id {wrong}," in told and str(model) in told and "\n" not in told


def test_agents_that_do_not_learn_may_have_spoken_in_other_tokens(
    tmp_path: Path, model: Path, played: Path
) -> None:
    """What is frozen is not computed in the update."""
    frozen = small_run.trainer(
        tmp_path / "run",
        model,
        max_steps=1,
        episodes=str(played),
        policies={"last": {"trainable": False}},
    )
    run = frozen.run
    run.learner.load(Ranks())
    episodes = [
        dataclasses.replace(
            e,
            turns=tuple(
                dataclasses.replace(t, prompt_ids=(10**6,)) if t.agent == "last" else t
                for t in e.turns
            ),
        )
        for e in OfflineEpisodes(played, tiny_chain().specs).episodes
    ]
    checks.check_ids("runs/x", episodes, tiny_chain().specs, run.learner.bases)
