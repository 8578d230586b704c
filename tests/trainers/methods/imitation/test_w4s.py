"""W4S as a run: what is measured, repaired, learnt and remembered; settings, kills, budgets and
checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.programs.program import Program
from marlora.agents.types import AgentSpec, SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.errors import RunError
from marlora.trainers.methods.imitation.w4s import W4SConfig, W4STrainer
from marlora.trainers.methods.imitation.w4s_talk import DesignTalkConfig
from marlora.trainers.testbeds.tiny import tiny_random_model
from marlora.trainers.update.learner import Learner
from tests.trainers.forks import two_ranks
from tests.trainers.outside import Outside
from tests.trainers.searches import FIRST, executed, parts_of
from tests.trainers.w4s_run import BROKEN, fenced, learned, put_words, trainer, vote, w4s

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def stored(folder: Path, kind: str) -> list[Any]:
    return [episode for episode in Store(folder / "episodes") if episode.kind == kind]


def test_an_iteration_designs_repairs_rewards_and_fits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One episode: T = 2 turns of m = 5 candidates; two of each turn are repaired once."""
    learnt: list[TrainingSequence] = []
    update = Learner.learn

    def spy(learner: Learner, step: int, sequences: list[TrainingSequence], *args: Any) -> Any:
        learnt.extend(sequences)
        return update(learner, step, sequences, *args)

    monkeypatch.setattr(Learner, "learn", spy)
    folder = tmp_path / "run"
    made = w4s(folder, model, num_train_epochs=1)
    summary = made.train()

    first, second = made.memory["episodes"][0]["turns"]
    by_id = {each["id"]: each for each in summary["programs"]}
    assert by_id["0"]["note"] == "the team's own" and by_id["0"]["diff"] == [FIRST]
    score = by_id["0"]["score"]
    assert first["accuracy"][0] == score and first["reward"][0] == 0, "the program that was there"
    assert first["repairs"] == second["repairs"] == [0, 0, 0, 1, 1]
    assert first["best"] == first["accuracy"].index(max(first["accuracy"]))
    for accuracy, reward in zip(first["accuracy"], first["reward"], strict=True):
        assert reward == float(accuracy > score)
    best = max([score, *first["accuracy"]])  # context: raised by the first turn
    previous = max(first["accuracy"])
    for accuracy, reward in zip(second["accuracy"], second["reward"], strict=True):
        assert reward == (1.0 if accuracy > best else 0.5 if accuracy > previous else 0.0)
    lost = [each for each in summary["programs"] if each["fault"]]
    assert [each["fault"] for each in lost] == [
        "error: IndexError: list index out of range (line 2: [1][2])"
    ]

    # ten samples, on exactly what was sampled, or on the analysis with the repaired program
    (base,) = made.run.learner.bases.values()
    texts = [base.tokens.show([i for i, m in zip(s.ids, s.mask, strict=True) if m]) for s in learnt]
    right = [
        text
        for first in (3, 5)
        for text in (
            *map(fenced, (FIRST, vote(first), vote(first + 1), vote(first + 2))),
            f"I know nothing better.\n\n```python\n{vote(first)}\n```",
        )
    ]
    assert sorted(texts) == sorted(f"{text}<|end|>" for text in right)
    assert {e.task.source for e in stored(folder, "aside")} == {"design"}
    assert len(stored(folder, "train")) == 4 and len(stored(folder, "aside")) == 8
    one, two = rows(folder)
    assert one["w4s"]["fitted"] and not two["w4s"]["fitted"]
    assert one["policies"]["designer"]["tokens"] and not two["policies"]["designer"]["tokens"]
    policy = summary["policies"]["designer"]
    assert policy["sha256_before"] != policy["sha256_after"]
    best_row = max((e for e in summary["programs"] if not e["fault"]), key=lambda e: e["score"])
    assert made.run.values["program"] == made.search[best_row["id"]].values["program"]
    assert summary["eval"]["after"]["accuracy"] > summary["eval"]["before"]["accuracy"]
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Programs that the designer wrote" in report


def test_the_designer_sees_validation_tasks_alone_and_held_out_ones_are_played_at_the_ends(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "run", trainer(tmp_path / "run", model, num_episodes=2)
    put_words(made)
    val = {task.id for task in made.spec.val_tasks}
    held_out = {task.prompt for task in made.spec.eval_tasks}
    before: list[int] = []
    measure = made.measure

    def spy(candidate: Any) -> Any:
        before.append(sum(e.kind == "eval" for e in Store(folder / "episodes")))
        return measure(candidate)

    monkeypatch.setattr(made, "measure", spy)
    made.train()
    assert set(before) == {len(held_out)}, "played before the first measurement, then at the end"
    assert {e.task.id for e in stored(folder, "trial")} <= val
    designed = [*stored(folder, "train"), *stored(folder, "aside")]
    chats = ["\n".join(m.content for m in t.messages) for e in designed for t in e.turns]
    assert all("Question: train" in chat for chat in chats)
    assert not any(prompt in chat for prompt in held_out for chat in chats)
    # the third prompt shows the last program of the episode before
    third = stored(folder, "train")[2].task.prompt
    assert FIRST in third and "ensemble" in third


@pytest.mark.slow
def test_carry_over_best_of_and_examples_say_what_a_chat_begins_with(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    made = w4s(
        folder,
        model,
        num_episodes=2,
        max_iterations=1,
        carry_over=False,
        best_of="start",
        examples=["self-consistency"],
        num_candidates=2,
    )
    made.train()
    firsts = [e.task.prompt for e in stored(folder, "train")][::2]
    assert all(prompt.count("Accuracy") == 2 and "range(5)" in prompt for prompt in firsts)
    assert firsts[0].partition("Question")[0] == firsts[1].partition("Question")[0]
    (_, second), _ = (episode["turns"] for episode in made.memory["episodes"])
    start = max(c.mean for c in made.search.candidates if c.proposer == "start")
    for accuracy, reward in zip(second["accuracy"], second["reward"], strict=True):
        assert (reward == 1.0) == (accuracy > start), "not raised by the first turn"


def test_what_cannot_be_used_is_left_out_and_ends_its_episode(model: Path, tmp_path: Path) -> None:
    """No candidate works: nothing is learnt, with a warning, and the team keeps its program."""
    folder = tmp_path / "run"
    made = w4s(folder, model, lambda chat, k: fenced(BROKEN), max_iterations=1, num_repairs=2)
    summary = made.train()
    (turn,) = made.memory["episodes"][0]["turns"]
    assert turn["reward"] == [None] * 5 and turn["repairs"] == [2] * 5 and turn["best"] is None
    (row,) = rows(folder)
    assert row["w4s"]["usable"] == 0 and row["w4s"]["reward"] is None
    policy = summary["policies"]["designer"]
    assert policy["sha256_before"] == policy["sha256_after"]
    warnings = (folder / "warnings.log").read_text(encoding="utf-8")
    assert "no candidate could be used; nothing to learn from" in warnings
    assert made.run.values["program"] == FIRST


@pytest.mark.slow
def test_a_program_that_solves_too_little_is_left_out(model: Path, tmp_path: Path) -> None:
    wrong = fenced("await custom('x')\n'none'")
    made = w4s(tmp_path / "run", model, lambda chat, k: wrong, max_iterations=1)
    made.train()
    (turn,) = made.memory["episodes"][0]["turns"]
    assert turn["accuracy"] == [0.0] * 5 and turn["reward"] == [None] * 5
    assert turn["repairs"] == [0] * 5, "it works, and is no good"


def test_a_designer_that_cannot_be_asked_ends_the_run(model: Path, tmp_path: Path) -> None:
    def fails(chat: str, k: int) -> str:
        raise RuntimeError("no words")

    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"step 1: every episode failed; the first one: .*no words"):
        w4s(folder, model, fails, max_iterations=1, num_episodes=2).train()
    warnings = (folder / "warnings.log").read_text(encoding="utf-8")
    assert "design-000001-000-1: RuntimeError: no words" in warnings


def agents(*names: str) -> list[AgentSpec]:
    return [AgentSpec(name, policy="" if name == "designer" else "base") for name in names]


@pytest.mark.parametrize(
    ("team", "settings", "message"),
    [
        (agents("executor", "other"), {}, "designer: expected one of several agents of the team"),
        (agents("designer"), {}, "designer: expected one of several agents"),
        (agents("designer", "executor"), {}, "system.executors: 'designer' is the designer"),
        (
            agents("executor", "designer"),
            {"policies": {"designer": {"trainable": False}}},
            "policies.designer: the designer's policy has to be trainable",
        ),
        (
            [AgentSpec("executor"), AgentSpec("designer")],
            {},
            "policies.executor: W4S trains the designer alone",
        ),
        (agents("executor", "designer"), {"trainer": "trl"}, "trainer: W4S imitates with weights"),
        (agents("executor", "designer"), {"episodes": "x"}, "episodes: this method plays"),
        (agents("executor", "designer"), {"tau": 0.0}, "tau"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    team: list[AgentSpec], settings: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        fields = {"model": str(model), "output_dir": str(tmp_path), "num_val_tasks": 4, **settings}
        W4STrainer(
            system=Program(team),
            args=W4SConfig(tasks="tests.trainers.searches:numbers", rewards=["exact"], **fields),
        )


def test_an_example_that_the_team_cannot_run_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="examples: 'code generation' cannot be used: name"):
        team = {"operators": ["custom", "ensemble"]}
        trainer(tmp_path, model, examples=["code generation"], team=team)


def test_the_default_prompts_name_their_facts() -> None:
    talk = DesignTalkConfig()
    fields = {"role": "adds", "operators": "- f()", "max_nodes": 7, "num_tasks": 12}
    text = talk.prompt("instruction", **fields, archive="ARCHIVE", cases="CASES", example="")
    assert all(word in text for word in ("adds", "- f()", "at most 7", "on 12", "ARCHIVE", "CASES"))
    assert "{" not in text and "```python\n...\n```" in text
    fields = {"accuracy": "0.5", "previous": "0.4", "best": "0.6", "trend": "higher than"}
    text = talk.prompt("feedback", **fields, cases="CASES", cases_right=1, num_cases=2, program="P")
    assert "0.5, higher than" in text and "(0.4)" in text and "0.6" in text and "CASES" in text
    assert "error: X" in talk.prompt("repair", fault="error: X", program="P")


@pytest.mark.slow
def test_an_outside_model_executes(model: Path, tmp_path: Path) -> None:
    with Outside(lambda body: executed(body["messages"][-1]["content"])) as outside:
        strong = {"executor": "strong", "policies": {"strong": {"url": outside.url}}}
        made = w4s(tmp_path / "run", model, max_iterations=1, **strong)
        summary = made.train()
    assert len(outside.bodies) > 20 and summary["ledger"]["trial"]["executor"]["calls"]
    assert made.run.state.outside.keys() == {"strong"}
    assert summary["eval"]["after"]["accuracy"] > summary["eval"]["before"]["accuracy"]


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for row in [r for by_agent in summary["ledger"].values() for r in by_agent.values()]:
        del row["seconds"]
    path = folder / "checkpoints" / f"step-{summary['steps']:06d}" / "trainer" / "state.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    episodes = sorted((e.id, e.output, e.kind) for e in Store(folder / "episodes"))
    keys = ("eval", "ledger", "budget", "done", "state", "steps", "programs", "policies")
    return {**{key: summary[key] for key in keys}, "parts": parts, "stored": episodes}


class Cut(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    w4s(folder, model, num_fits=2).train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("at", [9, 14, 20, 28])
def test_a_run_that_is_killed_in_an_iteration_comes_to_the_same(
    at: int, whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After repairs, after a measurement, and after the fits of both iterations."""
    cut = tmp_path / "cut"
    killed, calls = w4s(cut, model, num_fits=2), list[int]()

    def cutting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            answer = function(*args, **settings)
            calls.append(at)
            if len(calls) == at:
                raise Cut
            return answer

        return call

    for name in ("play", "ask_all"):
        own = getattr(killed.run.rollouts, name)
        monkeypatch.setattr(killed.run.rollouts, name, cutting(own))
    monkeypatch.setattr(killed, "fit", cutting(killed.fit))
    with pytest.raises(Cut):
        killed.train()
    w4s(cut, model, num_fits=2, resume=True).train()
    assert facts(cut) == facts(whole)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2500, 9000])
def test_a_budget_ends_the_run_whole(limit: int, model: Path, tmp_path: Path) -> None:
    summary = w4s(tmp_path / "run", model, budget={"tokens": limit}).train()
    spent = summary["budget"]["spent"]["tokens"]
    assert summary["done"] == "the budget is spent" and 0 < spent <= limit
    assert summary["steps"] == 0 and summary["eval"]["after"] == summary["eval"]["before"]


def test_a_checkpoint_is_evaluated_with_its_program(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    def answer(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
        role, text = parts_of(prompt)
        assert role == "execute", "the designer is not asked"
        return executed(text)

    async def start_engine(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(answer, context=100_000)

    monkeypatch.setattr(team, "start_engine", start_engine)
    folder = tmp_path / "run"
    summary = w4s(folder, model, max_iterations=1, num_eval_tasks=12).train()
    checkpoint = folder / "checkpoints" / "step-000001"
    assert (checkpoint / "adapters" / "designer" / "adapter_model.safetensors").is_file()
    values = json.loads((checkpoint / "values" / "values.json").read_text(encoding="utf-8"))
    assert values["program"].startswith("await ensemble(")
    out = tmp_path / "eval"
    assert main(["eval", str(checkpoint), "--trust_checkpoint", "--output", str(out)]) in (0, None)
    again = json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert again[when]["accuracy"] == summary["eval"][when]["accuracy"]


@pytest.mark.process
def test_two_ranks_design_and_fit_what_one_does(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    done = two_ranks("tests.trainers.w4s_run", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = json.loads(json.dumps(learned(tmp_path / "one", model)))
    two = [
        json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    ]
    assert two[0] == two[1]
    for key in ("values", "parts"):
        assert two[0][key] == one[key]
