"""SiriuS as a run: nothing learnt has seen the answer, empty libraries, resumption, iterations, and
that it learns."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.patterns.actor_critic import ActorCritic
from marlora.agents.types import SettingError, Task
from marlora.recipes.launch import settings
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.collection.derived_episodes import is_derived
from marlora.trainers.errors import RunError
from marlora.trainers.methods.imitation import sirius
from marlora.trainers.methods.imitation.correction import CORRECTION
from marlora.trainers.methods.imitation.sft import SFTConfig, SFTTrainer
from marlora.trainers.methods.imitation.sirius import SiriusConfig, SiriusTrainer
from marlora.trainers.update.learner import Learner
from tests.repository import ROOT
from tests.trainers.distributed.test_ranks import ACCELERATE, start
from tests.trainers.forks import two_ranks
from tests.trainers.sirius_run import GOLD, learn, trainer

pytestmark = pytest.mark.timeout(1800)
torch.set_num_threads(1)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_nothing_learnt_has_seen_the_answer(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[TrainingSequence] = []
    update = Learner.learn

    def spy(learner: Learner, step: int, samples: list[TrainingSequence], *args: Any) -> Any:
        learnt.extend(samples)
        return update(learner, step, samples, *args)

    monkeypatch.setattr(Learner, "learn", spy)
    made = trainer(tmp_path / "run", model, max_iterations=2, library="all")
    summary = made.train()
    (base,) = made.run.learner.bases.values()
    stored = [e for e in Store(tmp_path / "run" / "episodes") if not e.group.startswith("eval-")]
    told = [t for e in stored for t in e.turns if GOLD in base.tokens.show(t.prompt_ids)]
    assert told and all(t.saw_gold and t.agent == "feedback" for t in told), (
        "only the feedback agent was told"
    )
    regenerated = {t.prompt_ids for e in stored for t in e.turns if t.saw_gold}
    assert len(regenerated) > len(told), "others read what it said, and are marked"
    written = {
        (t.prompt_ids, t.token_ids) for e in stored for t in e.turns if t.source == "written"
    }
    original = {t.prompt_ids for e in stored if e.parent is None for t in e.turns}
    assert written and {prompt for prompt, _ in written} <= original, (
        "a mended turn stands under its original prompt"
    )
    assert learnt
    for sample in learnt:
        text = base.tokens.show(sample.ids)
        assert GOLD not in text and "Feedback" not in text and "Rewrite" not in text
        assert not any(sample.ids[: len(prompt)] == prompt for prompt in regenerated)
    assert any(tuple(s.ids) == prompt + ids for s in learnt for prompt, ids in written), (
        "and the mended turns are learnt"
    )
    first, second = metrics(tmp_path / "run")
    assert first["repairs"]["mended"] and first["repairs"]["talks"] > 0
    for agent in ("first", "last"):
        assert sum(second["selection"][agent]["kept"].values()) > sum(
            first["selection"][agent]["kept"].values()
        ), "the library grows"
    assert summary["steps"] == 2


def scripted(prompt: str, *_: Any) -> str:
    """An actor that is right when it answers again, a judge that knows sums, and a critic."""
    last = prompt.rsplit("<|user|>", 1)[1].removesuffix("<|end|><|assistant|>")
    if "Rewrite the text below" in last:
        return last.rsplit("\n\n", 1)[1]
    a, b = map(int, re.search(r"(\d)\+(\d)", prompt).groups())  # type: ignore[union-attr]
    if "Is the answer right or wrong?" in last:
        return "Verdict: right" if f"to this:\n{a + b}\n" in last else "Verdict: wrong"
    if "It was judged wrong" in last:
        return "count again"
    return str(a + b) if "judged wrong" in last else "0"


def test_actor_judge_and_critic_each_learn_what_they_did_well(tmp_path: Path, model: Path) -> None:
    """Every actor is wrong at first, mended by its own second answer; its judge is right twice, its
    critic has helped."""
    tasks = [Task(f"{n}", f"{n}+1", str(n + 1)) for n in range(1, 6)]
    args = SiriusConfig(
        output_dir=str(tmp_path / "run"),
        model=str(model),
        num_eval_tasks=1,
        tasks_per_step=4,
        num_generations=1,
        lora_r=4,
        lora_target_modules=["q_proj", "v_proj"],
        learning_rate=1e-2,
        rewards=["exact", "marlora.rollouts.rewards.actor_critic:roles"],
    )
    system = ActorCritic(["actor", "judge", "critic"], max_rounds=1)
    made = SiriusTrainer(
        system=system,
        tasks=tasks[:4],
        eval_tasks=tasks[4:],
        engine=ScriptedEngine(scripted),
        args=args,
    )
    with made.run as run:
        (base,) = run.learner.bases.values()
        metrics = made.learn(1, made.collect(1))
        moved = {
            name for name in base.policies if base.adapters.sha256(name) != run.learner.before[name]
        }
    assert moved == {"actor", "judge", "critic"}
    kept = {agent: of["kept"] for agent, of in metrics["selection"].items()}
    assert kept == {
        "actor": {"success": 4, "repaired": 4},
        "judge": {"success": 8},
        "critic": {"success": 4},
    }
    assert metrics["selection"]["actor"]["dropped"] == {"no success": 4} and metrics["repairs"][
        "mended"
    ] == {"actor": 4}


def test_an_empty_library_stops_clearly_and_leaves_the_store(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(
        tmp_path / "run", model, success_threshold=2.0, repair="unsolved", max_regenerations=1
    )
    with pytest.raises(SystemExit) as stopped:
        settings.run(made.train)
    assert stopped.value.code == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        told.startswith("error: step 1: no turn was kept (first: kept 0; dropped ")
        and "no success" in told
    )
    assert told.endswith("the episodes are stored, no adapter was changed")
    stored = [e for e in Store(tmp_path / "run" / "episodes") if not e.group.startswith("eval-")]
    assert sum(e.parent is None for e in stored) == 6 and any(
        is_derived(e, CORRECTION) for e in stored
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert {
        p: b.adapters.sha256(p) for b in made.run.learner.bases.values() for p in b.policies
    } == made.run.learner.before


def test_what_was_mended_before_a_kill_is_not_mended_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapters(folder: Path) -> dict[str, str]:
        return {
            p: found["sha256_after"]
            for p, found in json.loads((folder / "summary.json").read_text())["policies"].items()
        }

    trainer(tmp_path / "whole", model).train()
    with monkeypatch.context() as patch:
        patch.setattr(sirius, "fit_turns", lambda *_: (_ for _ in ()).throw(RunError("cut off")))
        with pytest.raises(RunError, match="cut off"):
            trainer(tmp_path / "cut", model).train()
    shutil.copytree(tmp_path / "cut", tmp_path / "torn")
    before = [e.id for e in Store(tmp_path / "cut" / "episodes")]
    trainer(tmp_path / "cut", model, resume=True).train()
    after = [e.id for e in Store(tmp_path / "cut" / "episodes")]
    assert after[: len(before)] == before and all(
        name.startswith("eval-") for name in after[len(before) :]
    )
    assert adapters(tmp_path / "cut") == adapters(tmp_path / "whole")
    (path,) = (tmp_path / "torn" / "episodes").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if f"/{CORRECTION}/" in line)
    parent = json.loads(lines[last])["parent"]
    path.write_text("".join(line for line in lines if json.loads(line)["parent"] != parent))
    trainer(tmp_path / "torn", model, resume=True).train()
    assert adapters(tmp_path / "torn") == adapters(tmp_path / "whole")
    assert sorted(e.id for e in Store(tmp_path / "torn" / "episodes")) == sorted(after)


def test_an_iteration_may_begin_at_the_base(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the second iteration learns, adapters are those of the start; with `last` they are
    those of the first."""
    seen: dict[str, list[dict[str, str]]] = {}
    imitate = sirius.fit_turns

    def spy(learner: Learner, *args: Any) -> Any:
        seen.setdefault(learner.config.output_dir, []).append(learner.hashes())
        return imitate(learner, *args)

    monkeypatch.setattr(sirius, "fit_turns", spy)
    for begin in ("base", "last"):
        trainer(tmp_path / begin, model, max_iterations=2, start_from=begin, repair="none").train()
    base, last = seen[str(tmp_path / "base")], seen[str(tmp_path / "last")]
    assert base[0] == base[1] == last[0] and all(last[1][p] != last[0][p] for p in last[0])


def test_who_may_give_feedback(tmp_path: Path, model: Path) -> None:
    with pytest.raises(
        SettingError,
        match=r"feedback_agent\.policy: 'wise' is neither base nor a policy of the team",
    ):
        trainer(
            tmp_path / "run",
            model,
            feedback_agent={"policy": "wise"},
            policies={"wise": {"trainable": False}},
        )
    outside = {"wise": {"url": "http://127.0.0.1:9/v1", "base": "wise-1"}}
    made = trainer(tmp_path / "run", model, feedback_agent={"policy": "wise"}, policies=outside)
    assert made.run.spec.policies["wise"].url and made.run.spec.agents_of["wise"] == []
    with pytest.raises(SettingError, match="library: all is of the run's own iterations"):
        trainer(tmp_path / "run", model, library="all", episodes="elsewhere")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("sirius*.yaml")), ids=lambda path: path.stem
)
def test_every_setting_of_the_recipe_can_be_built(path: Path) -> None:
    made = SiriusTrainer(args=settings.parse(SiriusConfig, path, []))
    assert (
        made.args.max_steps == made.args.max_iterations >= 1
        and made.run.spec.tasks
        and made.run.spec.eval_tasks
    )


# learning


def check_learning(folder: Path, seed: int) -> None:
    """One iteration on the tiny model: the loss on kept turns falls for every agent, and held-out
    accuracy rises over the base, and over as much learning from as many turns of the same episodes
    drawn at random."""
    given = yaml.safe_load((ROOT / "recipes" / "sirius_problem_solving.yaml").read_text())
    given |= {
        "tasks_per_step": 48,
        "num_generations": 2,
        "num_eval_tasks": 100,
        "ablate_adapters": False,
        "seed": seed,
    }
    mended = SiriusTrainer(
        args=SiriusConfig(**{**given, "output_dir": str(folder / "sirius")})
    ).train()
    (row,) = metrics(folder / "sirius")
    share = sum(sum(of["kept"].values()) for of in row["selection"].values()) / (2 * 96)
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    args = {key: value for key, value in given.items() if key in known}
    args |= {
        "output_dir": str(folder / "random"),
        "episodes": str(folder / "sirius"),
        "select": "random",
        "keep_share": share,
    }
    control = SFTTrainer(args=SFTConfig(**{**args, "max_steps": 1})).train()
    before, after = mended["eval"]["before"]["accuracy"], mended["eval"]["after"]["accuracy"]
    random = control["eval"]["after"]["accuracy"]
    print(
        f"seed {seed}: base {before}, random turns {random}, SiriuS {after}; {row['selection']}"
        f" {row['repairs']}"
    )
    for policy in ("first", "last"):
        assert (
            row["policies"][policy]["nll_after"] < 0.75 * row["policies"][policy]["nll_before"]
        ), row["policies"][policy]
    assert after - before >= 0.2 and mended["eval"]["paired"]["ci95"][0] > 0.1
    assert after - random >= 0.2
    assert row["repairs"]["mended"], "some failures were mended"


def test_one_iteration_learns_more_than_random_turns_teach(tmp_path: Path) -> None:
    check_learning(tmp_path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_one_iteration_learns_with_other_seeds(tmp_path: Path, seed: int) -> None:
    check_learning(tmp_path, seed)


@pytest.mark.slow
def test_the_recipe_runs_as_it_is_launched(tmp_path: Path) -> None:
    command = [*ACCELERATE, "recipes/sirius.py", "--config", "recipes/sirius_problem_solving.yaml"]
    done = start([*command, "--max_iterations", "1", "--output_dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        summary["recipe"] == "sirius"
        and summary["steps"] == 1
        and summary["live_proof"]["failed"] == 0
    )
    assert summary["eval"]["paired"]["ci95"][0] > 0.2 and set(summary["adapters"]) == {
        "first",
        "last",
    }
    for alone in summary["adapters"].values():
        assert alone["accuracy"] < summary["eval"]["after"]["accuracy"] - 0.1, (
            "with the other agent back on the base it is worse"
        )


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path) -> None:
    """Mending, an experience library of two iterations, and the loss measured on it: shared by
    ranks, the same on both."""
    done = two_ranks("tests.trainers.sirius_run", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    learn(tmp_path / "one", model)
    ranks = [json.loads(Path(f"{tmp_path / 'two'}.rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["selection"] for row in one] == [row["selection"] for row in two] and one[0][
        "repairs"
    ] == two[0]["repairs"]
    for ours, theirs in zip(one, two, strict=True):
        for policy in ("first", "last"):
            for key in ("nll_before", "nll_after"):
                assert ours["policies"][policy][key] == pytest.approx(
                    theirs["policies"][policy][key], abs=1e-4
                )
