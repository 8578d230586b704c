"""MAS-GPT as a run: systems are scored once, queries are assigned one, a helper fits it, and what
is learnt is reasoning and program. A kill anywhere comes to the same.

The network knows nothing. What it says is put into its mouth; what it learns from is real.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import program_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.methods.imitation.mas_gpt.mas_gpt import MASGPTConfig, MASGPTTrainer
from tests.trainers.mas_gpt_run import POOL, trainer, words_put
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {task.id: task for task in program_tasks()[:12]}
KIND = {name: task.meta["kind"] for name, task in TASKS.items()}


def played(folder: Path, kind: str) -> list[Episode]:
    return [e for e in Store(folder / "episodes") if e.kind == kind]


WHOLE: dict[str, Any] = {"refiner": True, "num_val_tasks": 4}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MASGPTTrainer]:
    """A run with a helper and validation tasks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    made = words_put(folder, model, **WHOLE)
    made.train()
    return folder, made


def test_systems_are_scored_and_the_designer_imitates_the_best_of_each_cluster(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    made = words_put(folder, model)
    summary = made.train()
    memory = made.memory
    assert memory["systems"] == list(POOL) and memory["clusters"] == KIND
    # A is right about a, B about b, and a crash or a doubt about nothing
    assert memory["scores"] == {
        name: [int(kind == "a"), int(kind == "b"), 0, 0] for name, kind in KIND.items()
    }
    assert len(played(folder, "trial")) == 4 * 12 and not played(folder, "train")
    (row,) = rows(folder)
    told = row["mas_gpt"]
    count = {kind: list(KIND.values()).count(kind) for kind in "abc"}
    pool = told["pool"]
    assert pool["crash"] == {"score": 0.0, "calls": 1.0, "crashed": 12, "unscored": 0}
    assert pool["a"] == {"score": count["a"] / 12, "calls": 1.0, "crashed": 0, "unscored": 0}
    # no system knows c: the first of the pool, and learnt all the same
    assert told["clusters"] == {"a": "a", "b": "b", "c": "a"}
    assert told["triples"] == 12 and told["score"] == 1 - count["c"] / 12
    assert told["any_system"] == told["score"] and told["val_nll"] == [None, None]
    triples = {each["query"]: each for each in memory["triples"]}
    assert {q: each["program"] for q, each in triples.items()} == {
        q: POOL["b" if kind == "b" else "a"] for q, kind in KIND.items()
    }
    assert {each["reasoning"] for each in triples.values()} == {"a by a", "b by b", "c by a"}
    policy = summary["policies"]["designer"]
    assert policy["sha256_before"] != policy["sha256_after"]
    learnt = row["policies"]["designer"]
    assert learnt["sequences"] == 12 and learnt["nll_after"] < learnt["nll_before"]
    assert row["proof"]["designer"]["status"] == "passed"
    # the prompt is the designer's own and is not trained on; reasoning, program and end are
    shown = re.search(r"<\|system\|>design(.*?)‸(.*?)‸", capfd.readouterr().err, re.DOTALL)
    assert shown is not None
    query = re.fullmatch(r"<\|end\|><\|user\|>(.*)<\|end\|><\|assistant\|>", shown[1])
    assert query is not None
    learnt_text = triples[query[1]]
    program = f"```python\n{learnt_text['program']}\n```"
    assert shown[2] == f"{learnt_text['reasoning']}\n\n{program}<|end|>"
    check_report(folder, summary)


def check_report(folder: Path, summary: dict[str, Any]) -> None:
    """Replies without a program are counted, and the best single system is compared with."""
    told = summary["mas_gpt"]
    best = next(name for name in told if name.startswith("best single system: "))
    assert list(told) == ["designer before", best, "designer after"]
    after = told["designer after"]
    assert (after["extractable"], after["runnable"], after["fallback"]) == (0, 0, 1)
    assert after["cost"] == 1.5, "half a call for the generation, one of the fallback"
    assert told[best]["last_against_it"]["difference"] == pytest.approx(
        after["accuracy"] - told[best]["accuracy"]
    )
    assert main(["report", str(folder)]) in (0, None)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Score table" in page and "share of a cluster" in page
    assert re.search(r"<title>2: b, b \(\d\): 1\.000</title>", page)
    assert "What the designer wrote for them" in page and "12 triples" in page


def test_a_helper_fits_systems_to_queries_and_the_gate_keeps_what_is_not_worse(
    whole: tuple[Path, MASGPTTrainer],
) -> None:
    """All four verdicts: (1, 0) keeps the base with the reasoning, (1, 1), (0, 1) and (0, 0) take
    the rewritten program; what changes more than texts is refused, and no reasoning is no triple."""
    folder, made = whole
    seen = set()
    triples = {each["query"]: each for each in made.memory["triples"]}
    for query, kind in KIND.items():
        even = int(query[-1]) % 2 == 0
        if (kind, even) == ("b", False):
            assert query not in triples
            continue
        each = triples[query]
        assert each["reasoning"] == f"{query} needs care"
        base = 0 if kind == "c" else 1
        if kind == "b":
            expected = (POOL["b"], None, False)
            assert each["fault"].startswith("structure:")
        elif kind == "a":
            expected = (POOL["a"], 0, False) if even else ('await custom("A!")', 1, True)
        else:
            expected = (f'await custom("{"C" if even else "B"}")', int(even), True)
        assert (each["program"], each["refined"], each["accepted"]) == expected, query
        assert each["base"] == base
        seen.add((kind, even))
    assert len(seen) == 5
    without = sum(kind == "b" and int(q[-1]) % 2 for q, kind in KIND.items())
    assert made.memory["left_out"] == {"no reasoning": without}
    (row,) = rows(folder)
    told, train = row["mas_gpt"], [t for t in triples.values() if t["split"] == "train"]
    assert told["rewritten"] == sum(each["refined"] is not None for each in train)
    assert told["accepted"] == sum(each["accepted"] for each in train)
    assert told["refused"] == sum(bool(each["fault"]) for each in train)
    asked = played(folder, "aside")
    assert len(asked) == 12 and all(e.task.answer is None for e in asked)
    # the pool, and one program for each query that was rewritten
    rewritten = sum(each["refined"] is not None for each in triples.values())
    assert len([e for e in played(folder, "trial") if "designer" not in e.usage]) == (
        4 * 12 + rewritten
    )


@pytest.mark.slow
def test_queries_that_their_system_fails_can_be_left_out(tmp_path: Path, model: Path) -> None:
    made = words_put(tmp_path / "run", model, keep_wrong=False)
    made.train()
    assert {each["cluster"] for each in made.memory["triples"]} == {"a", "b"}
    count = list(KIND.values()).count("c")
    assert made.memory["left_out"] == {"its system fails it": count}


@pytest.mark.slow
def test_the_ablation_draws_a_right_system_for_each_query(tmp_path: Path, model: Path) -> None:
    pool = {**POOL, "a again": 'await custom("A!")'}
    made = words_put(tmp_path / "run", model, assign="random", pool=pool)
    made.train()
    systems = {each["query"]: each["system"] for each in made.memory["triples"]}
    assert set(systems) == {q for q, kind in KIND.items() if kind != "c"}
    assert {systems[q] for q in systems if KIND[q] == "a"} == {"a", "a again"}
    assert all(each["base"] == 1 for each in made.memory["triples"])
    assert made.memory["left_out"] == {"no system answers it": list(KIND.values()).count("c")}


def test_the_loss_on_triples_of_other_queries_is_measured_and_not_learnt(
    whole: tuple[Path, MASGPTTrainer],
) -> None:
    folder, made = whole
    val = {task.id for task in made.spec.val_tasks}
    triples = made.memory["triples"]
    assert len(val) == 4
    assert {t["query"] for t in triples if t["split"] == "val"} == val & {
        t["query"] for t in triples
    }
    (row,) = rows(folder)
    before, after = row["mas_gpt"]["val_nll"]
    assert after < before
    count = sum(t["split"] == "train" for t in triples)
    assert row["mas_gpt"]["triples"] == count == row["policies"]["designer"]["sequences"]


class Cut(BaseException):
    """Stands for a kill."""


def cut_at(made: MASGPTTrainer, name: str, at: int) -> None:
    """Let the run die at the `at`-th call of this method of the rollout manager, after it."""
    real, calls = getattr(made.run.rollouts, name), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls[0] += 1
        if calls[0] == at:
            raise Cut
        return result

    setattr(made.run.rollouts, name, dying)


def facts(folder: Path, made: MASGPTTrainer) -> dict[str, Any]:
    """What a run came to, times aside."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for table in (*summary["ledger"].values(), *summary["ledger_by_policy"].values()):
        for row in table.values():
            del row["seconds"]
    kept = ("eval", "ledger", "budget", "done", "state", "steps", "policies", "mas_gpt")
    return {
        **{name: summary[name] for name in kept},
        "memory": made.memory.state_dict(),
        "stored": sorted((e.id, e.output, e.kind) for e in Store(folder / "episodes")),
    }


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("ask_all", 1),
        pytest.param("play", 3, marks=pytest.mark.slow),
        pytest.param("play", 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_comes_to_the_same(
    name: str, at: int, whole: tuple[Path, MASGPTTrainer], tmp_path: Path, model: Path
) -> None:
    """Between two systems of the pool, after the helper's replies, and before the fit; nothing is
    played, asked or counted twice."""
    folder = tmp_path / "run"
    killed = words_put(folder, model, **WHOLE)
    cut_at(killed, name, at)
    with pytest.raises(Cut):
        killed.train()
    again = words_put(folder, model, resume=True, **WHOLE)
    again.train()
    assert facts(folder, again) == facts(*whole)


@pytest.mark.slow
def test_a_finished_run_is_not_played_again(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "run"
    first = words_put(folder, model)
    first.train()
    more = words_put(folder, model, resume=True, max_steps=2)
    before = len(played(folder, "trial"))
    more.train()
    assert len(played(folder, "trial")) == before, "the same queries again cost nothing"
    assert more.memory["scores"] == first.memory["scores"]


def test_a_budget_is_never_exceeded_and_nothing_is_learnt_from_a_part(
    tmp_path: Path, model: Path
) -> None:
    summary = words_put(tmp_path / "run", model, budget={"calls": 20}).train()
    assert summary["budget"]["spent"]["calls"] <= 20 and summary["done"] == "the budget is spent"
    policy = summary["policies"]["designer"]
    assert summary["steps"] == 0 and policy["sha256_before"] == policy["sha256_after"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pool": {"x": "1 +"}}, "pool.x: .*no valid program.*leave it out"),
        ({"pool": {"x": 'await review("1")'}}, "pool.x: .*'review' is no operator"),
        ({"pool": {"x": 7}}, "pool.x: expected the text of a program"),
        ({"reply": "{reasoning}"}, "reply: .*does not hold the program of pool.a"),
        ({"reply": "```\n{program}\n```"}, "reply: .*does not hold the program of pool.a"),
        ({"reply": "{answer}"}, "reply: unknown field"),
        ({"reasoning": "{answer}"}, "reasoning: unknown field"),
        ({"cluster_by": []}, "cluster_by: expected source, text or fields of meta"),
        ({"assign": "best"}, "assign"),
        ({"episodes": "runs/x"}, "episodes: this method plays its systems itself"),
        ({"helpers": {"critic": {}}}, "helpers.refiner: missing"),
        ({"policies": {"designer": {"trainable": False}}}, "policies.designer: .*trainable"),
        ({"agents": {"executor": {"policy": "executor"}}}, "policies.executor: MAS-GPT trains"),
        ({"team": Chain(["designer"])}, "system.class: Chain does not write one program"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], problem: str, tmp_path: Path, model: Path
) -> None:
    with pytest.raises(SettingError, match=f"(?s){problem}"):
        trainer(tmp_path / "run", model, **changes)


def test_a_field_that_no_task_has_is_named_before_anything_is_played(
    tmp_path: Path, model: Path
) -> None:
    with pytest.raises(
        SettingError, match=r"cluster_by: task '.*' has no meta\.level; it has kind"
    ):
        trainer(tmp_path / "run", model, cluster_by=["level"])


def test_defaults() -> None:
    config = MASGPTConfig()
    assert (config.num_train_epochs, config.train_batch_size, config.max_steps) == (3, 32, 1)
    assert len(config.pool or ()) > 20 and not config.helpers
