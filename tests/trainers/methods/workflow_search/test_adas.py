"""ADAS: fitness in the sheet's numbers, replies that are read strictly, and generations of a
proposer that goes wrong in every way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.programs.program import Program
from marlora.agents.types import SettingError
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.workflow_search.adas import ADASConfig, ADASTrainer
from marlora.trainers.methods.workflow_search.fitness import fitness
from marlora.trainers.methods.workflow_search.reflection import read_json
from marlora.trainers.methods.workflow_search.seeds import NEEDS, SEEDS
from tests.trainers.searches import random_words, search

pytestmark = pytest.mark.usefixtures("one_thread")

VOTE = "await ensemble([await custom(str(n)) for n in range(7)])"
LOOP = "while True:\n    pass\nawait custom('x')"
WRONG = "await custom('x')\n'wrong'"
TWO = 2 * "async def workflow():\n    return await custom('x')\n"


def test_fitness_is_the_sheets() -> None:
    """U1, U2."""
    half = fitness([1.0] * 64 + [0.0] * 64)
    assert (half.low, half.high, half.median) == (41.40625, 58.59375, 50.0)
    assert str(half) == "95 % bootstrap interval: (41.4 %, 58.6 %), median: 50.0 %"
    few = fitness([1, 1, 1, 0])
    assert (few.low, few.high, few.median) == (25.0, 100.0, 75.0)
    with pytest.raises(ValueError, match="no scores"):
        fitness([])


def reply(name: str, code: str, **more: str) -> str:
    return json.dumps({"thought": f"try {name}", "name": name, "code": code, **more})


def test_a_reply_is_a_json_object_with_all_its_keys() -> None:
    good = read_json(f"Here it is: {reply('vote', VOTE)} Good luck.")
    assert (good.note, good.program, good.fault) == ("vote: try vote", VOTE, "")
    assert read_json(f"```json\n{reply('vote', VOTE)}\n```").program == VOTE
    fixed = read_json(json.dumps({"debug_thought": "oh", "name": "vote", "code": VOTE}))
    assert fixed.note == "vote: oh" and not fixed.fault
    for text, fault in (
        ("no idea", "missing: no JSON object"),
        ('{"thought": "x", "name": "y"}', "missing: 'code'"),
        ('{"thought": "x", "name": "y", "code": ["1"]}', "missing: 'code'"),
        ('{"name": "y", "code": "1"}', "missing: 'thought'"),
    ):
        assert read_json(text).fault.startswith(fault), text


def test_seeds_are_valid_programs_of_the_operators_that_they_name() -> None:
    assert SEEDS.keys() == NEEDS.keys() and len(SEEDS) == 7
    for name, program in SEEDS.items():
        assert Program(["executor"], program=program, operators=sorted(NEEDS[name])), name
        for operator in NEEDS[name]:
            assert f"await {operator}(" in program


def generations(*codes: str, repairs: dict[str, str] | None = None) -> Any:
    """A proposer of these programs, one per generation; `repairs` by faulty program."""

    def propose(role: str, prompt: str) -> str:
        if "This program went wrong:" in prompt:
            broken = prompt.split("went wrong:\n\n")[1].split("\n\nThe error:")[0]
            return reply("repaired", (repairs or {})[broken], debug_thought="I see")
        known = len(re.findall(r"\"name\": \"own", prompt.split("<|assistant|>")[0]))
        return reply(f"own {known}", codes[min(known, len(codes) - 1)], reflection="fine")

    return propose


def adas(folder: Path, model: Path, propose: Any, **changes: Any) -> ADASTrainer:
    settings: dict[str, Any] = {"seeds": ["chain of thought"], "max_steps": 1, **changes}
    made: ADASTrainer = search(
        folder, model, propose, cls=ADASTrainer, config=ADASConfig, **settings
    )
    return made


def asked(folder: Path) -> list[int]:
    """Turns of every talk, in order."""
    return [len(e.turns) for e in Store(folder / "episodes") if e.kind == "aside"]


def test_a_generation_proposes_reflects_twice_and_its_program_joins_the_archive(
    model: Path, tmp_path: Path
) -> None:
    """U4: three calls where nothing is to be repaired."""
    folder = tmp_path / "run"
    made = adas(folder, model, generations(VOTE), num_val_tasks=10, num_eval_tasks=10)
    summary = made.train()
    assert asked(folder) == [3]
    start, seed, new = summary["programs"]
    assert (seed["note"], new["note"], new["round"]) == ("chain of thought", "own 0: try own 0", 1)
    assert new["score"] > start["score"] and new["verdict"].startswith("best by validation")
    (talk,) = [e for e in Store(folder / "episodes") if e.kind == "aside"]
    prompt = talk.turns[0].messages[-1].content
    assert '"name": "chain of thought"' in prompt and "bootstrap interval" in prompt
    tasks = [*made.spec.val_tasks, *made.spec.eval_tasks]
    assert not any(task.prompt in prompt for task in tasks), "the proposer sees no task"


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("import nothing\nawait custom('x')", "error:"),
        pytest.param(TWO, "answer: it defines workflow more than once", marks=pytest.mark.slow),
        pytest.param(WRONG, "score: 0.0000 is below 0.01", marks=pytest.mark.slow),
        pytest.param(LOOP, "time:", marks=pytest.mark.slow),
    ],
)
def test_what_is_repaired_enters_with_its_own_scores(
    broken: str, fault: str, model: Path, tmp_path: Path
) -> None:
    """U4: one repair is a fourth call. The broken program stays, lost, with its reason."""
    folder = tmp_path / "run"
    made = adas(
        folder, model, generations(broken, repairs={broken.strip(): VOTE}), team={"seconds": 0.1}
    )
    made.train()
    assert asked(folder) == [3, 1]
    *_, lost, repaired = made.search.candidates
    assert lost.fault.startswith(fault) and lost.values["program"] == broken.strip()
    assert repaired.parents == (lost.id,) and repaired.values["program"] == VOTE
    assert repaired.scores and lost not in made.search.pool()


@pytest.mark.slow
def test_attempts_end_and_nothing_worthless_enters(model: Path, tmp_path: Path) -> None:
    """U4, U6: three measurements; the reply to the last error is not asked for. U3: a lost
    generation is one entry less."""
    folder = tmp_path / "run"
    bad = [f"await custom('x')\n'wrong {n}'" for n in range(3)]
    propose = generations(bad[0], repairs={bad[0]: bad[1], bad[1]: bad[2]})
    made = adas(folder, model, propose)
    made.train()
    assert asked(folder) == [3, 1, 1] and len(made.search.pool()) == 2
    lost = [c for c in made.search.candidates if c.fault]
    assert [c.values["program"] for c in lost] == bad and all(c.mean == 0 for c in lost)
    assert made.search.current.mean > 0  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_reply_that_cannot_be_read_ends_the_talk(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = adas(folder, model, random_words, seeds=[])
    made.train()
    assert asked(folder) == [1]
    assert made.search.candidates[-1].fault.startswith("missing: no JSON object")


def test_a_seed_without_its_operators_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="seeds: 'self-refine' cannot be used: it calls 'review"):
        adas(
            tmp_path / "run",
            model,
            random_words,
            seeds=["self-refine"],
            team={"operators": ["custom"]},
        )
    with pytest.raises(SettingError, match="seeds"):
        adas(tmp_path / "other", model, random_words, seeds=["tree of thoughts"])


@pytest.mark.slow
def test_it_learns_and_its_control_does_not(model: Path, tmp_path: Path) -> None:
    """Control: generations of other words for the first program."""
    sizes = {"num_val_tasks": 20, "num_eval_tasks": 40, "max_steps": 3}
    votes = [VOTE.replace("7", str(count)) for count in (3, 5, 7)]
    words = [f"await custom('word {n}')" for n in range(3)]
    gains = {}
    for name, codes in (("votes", votes), ("words", words)):
        summary = adas(tmp_path / name, model, generations(*codes), **sizes).train()
        gains[name] = summary["eval"]["paired"]["ci95"][0]
    assert gains["votes"] > 0.05 and gains["words"] < 0.05, gains


def test_its_prompts_can_be_changed(model: Path, tmp_path: Path) -> None:
    prompts = {"invent": "Better than {best}?", "novelty": "New?", "mistakes": "{sure}?"}
    folder = tmp_path / "run"
    sizes = {"num_val_tasks": 2, "num_eval_tasks": 2, "seeds": []}
    adas(folder, model, generations(VOTE), prompts=prompts, **sizes).train()
    (talk,) = [e for e in Store(folder / "episodes") if e.kind == "aside"]
    asked = [turn.messages[-1].content for turn in talk.turns]
    assert asked == ['Better than await custom("Think.")?', "New?", "{sure}?"]
    for wrong, words in (
        ({"invents": "x"}, "prompts.invents: this method has no such prompt"),
        ({"invent": 7}, "prompts.invent: expected a text"),
    ):
        with pytest.raises(SettingError, match=words):
            ADASConfig(prompts=wrong)
