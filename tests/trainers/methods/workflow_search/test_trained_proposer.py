"""Searches whose proposer is a model, on tiny-edits: a proposer that reads what failed finds better
programs than one that does not, for as many tokens; so do programs than votes on the first one. In
`make test` its teacher stands for the model."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.system import build_system
from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.trainers.methods.workflow_search.adas import ADASConfig, ADASTrainer
from marlora.trainers.methods.workflow_search.aflow import AFlowConfig, AFlowTrainer
from marlora.trainers.methods.workflow_search.debflow import DebFlowConfig, DebFlowTrainer
from marlora.trainers.testbeds.edits import (
    ANOTHER,
    BEST,
    BROKEN,
    COMPARE,
    DECIDE,
    EDIT,
    FIRST,
    INVENT,
    KNOWS,
    MEND,
    Failure,
    asked,
    drawn,
    edited,
    edits,
    invention,
    program,
    reply_of,
    tiny_edits_model,
    unread,
    verdicts,
)
from marlora.trainers.testbeds.programs import execute, tiny_programs_model
from tests.repository import ROOT
from tests.trainers.searches import parts_of

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: dict[str, tuple[Any, Any]] = {
    "adas": (ADASTrainer, ADASConfig),
    "aflow": (AFlowTrainer, AFlowConfig),
    "debflow": (DebFlowTrainer, DebFlowConfig),
}
# settings of the same search, whose proposer is shown no failure; an inventor: always the first
# program instead of the best
UNREAD: dict[str, dict[str, Any]] = {
    "adas": {"prompts": {"invent": asked(ANOTHER, FIRST).replace("{", "{{").replace("}", "}}")}},
    "aflow": {"max_failures": 0},
    "debflow": {"max_failures": 0},
}
VOTES = f"""from collections import Counter
answers = [{FIRST} for n in range(5)]
Counter(answers).most_common(1)[0][0]"""


def searching(
    name: str,
    folder: Path,
    model: Path,
    proposer: Path | None = None,
    answer: Any = None,
    **changes: Any,
) -> Any:
    """A run of `recipes/NAME_tiny.yaml` with other settings; of its prompts these are changed."""
    text = (ROOT / "recipes" / f"{name}_tiny.yaml").read_text(encoding="utf-8")
    own = yaml.safe_load(text)
    settings = {**own, "output_dir": str(folder), "model": str(model), **changes}
    if "prompts" in own:
        settings["prompts"] = {**own["prompts"], **changes.get("prompts", {})}
    for helper in settings["helpers"].values():
        helper["base"] = str(proposer or model)
    trainer, config = METHODS[name]
    system = build_system(settings.pop("system"))
    if answer is not None:
        del settings["engine"]
    engine = ScriptedEngine(answer) if answer else None
    return trainer(system=system, engine=engine, args=config(**settings))


def spent(summary: dict[str, Any]) -> int:
    """Tokens of learning."""
    return int(summary["budget"]["spent"]["tokens"])


def taught(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The teachers of both models as an engine."""
    role, text = parts_of(prompt)
    rng = random.Random(f"{sampling.seed} {prompt}")
    if role == INVENT:
        return invented(prompt, text, rng)
    if role not in (EDIT, COMPARE, DECIDE):
        said = execute(text[:-4], text[-4:])
        return max(said, key=said.__getitem__)
    told = re.search(r"Question: (\w+)\nRight answer: (\d)\nAnswer of the program: (\d)", text)
    failure = Failure(told[1], int(told[2]), int(told[3])) if told else None
    if role != EDIT:
        pair = re.findall(r"<modification>(.{3})</modification>", text)
        mends = [failure is not None and edit == failure.fix for edit in pair]
        return drawn(rng, verdicts(mends, decisive=role == DECIDE))
    edit = drawn(rng, edits(failure))
    return reply_of(edit, edited(letters_in(text), edit)[1])


def invented(prompt: str, text: str, rng: random.Random) -> str:
    """An inventor's reply: a program; asked again, the same without broken calls."""
    said = re.findall(r"<\|assistant\|>(.+?)<\|end\|>", prompt, re.DOTALL)
    if said:
        return str(said[-1]).replace("wizard", "custom")
    letters = letters_in(text)
    if text.endswith(MEND):
        return invention(BROKEN, program(letters))
    edit = drawn(rng, unread(KNOWS))
    return invention(edit, edited(letters, edit)[1])


def letters_in(text: str) -> str:
    """The letters of the last program in a text."""
    return str(re.findall(r"(?:custom|wizard)\('([ABC]{3})'", text)[-1])


def mean_gains(name: str, folder: Path, seeds: int, **settings: Any) -> tuple[float, float]:
    """What is gained on held-out tasks, over seeds: by a proposer that reads, and by one that is
    shown nothing new, for as many tokens."""
    gains = []
    for seed in range(seeds):
        read, control = [folder / f"{kind}-{seed}" for kind in ("read", "unread")]
        first = searching(name, read, seed=seed, **settings).train()
        others = {"budget": {"tokens": spent(first)}, "max_steps": 40, **UNREAD[name]}
        second = searching(name, control, seed=seed, **{**settings, **others}).train()
        assert second["done"] == "the budget is spent"
        gains.append([each["eval"]["paired"]["difference"] for each in (first, second)])
    means = [sum(column) / seeds for column in zip(*gains, strict=True)]
    return means[0], means[1]


def copying(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """A proposer of copies of the first program, with the executor's teacher."""
    if parts_of(prompt)[0] != EDIT:
        return taught(prompt, ref, sampling, k)
    number = random.Random(f"{sampling.seed} {prompt}").randrange(10**6)
    return reply_of(f"copy {number}", f"{FIRST}  # {number}")


def test_a_proposer_that_reads_failures_finds_more_than_copies(model: Path, tmp_path: Path) -> None:
    """At equal tokens: the best of several copies of the first program is the first program."""
    sizes: dict[str, Any] = {"num_val_tasks": 12, "num_eval_tasks": 24}
    read = searching("aflow", tmp_path / "read", model, answer=taught, max_steps=4, **sizes).train()
    budget = {"tokens": spent(read)}
    copies = searching(
        "aflow", tmp_path / "copies", model, answer=copying, budget=budget, max_steps=40, **sizes
    ).train()
    assert read["eval"]["paired"]["ci95"][0] > 0.2, read["eval"]
    assert copies["done"] == "the budget is spent" and len(copies["programs"]) > 2
    assert copies["eval"]["paired"]["difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seeds", "rounds"), [("aflow", 3, 3), ("debflow", 1, 8), ("adas", 4, 20)]
)
def test_a_teacher_that_reads_finds_more_than_one_that_guesses(
    name: str, seeds: int, rounds: int, model: Path, tmp_path: Path
) -> None:
    sizes = {"num_val_tasks": 12, "num_eval_tasks": 16, "max_steps": rounds}
    read, unread = mean_gains(name, tmp_path, seeds, model=model, answer=taught, **sizes)
    assert read > 0.35 and read > unread + 0.15, (read, unread)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "rounds"), [("aflow", 4), ("debflow", 3)])
def test_a_trained_proposer_learns_and_one_that_reads_nothing_finds_less(
    name: str, rounds: int, tmp_path: Path
) -> None:
    models = {"model": tiny_programs_model(), "proposer": tiny_edits_model()}
    read, unread = mean_gains(name, tmp_path, 1, **models, max_steps=rounds)
    assert read > 0.25 and read > unread, (read, unread)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_votes_of_the_first_program_are_no_better_program(tmp_path: Path) -> None:
    """Self-consistency, for five times as many tokens per task: it is what the first program says
    most often, and that is wrong for two kinds of three."""
    made = searching("aflow", tmp_path / "run", tiny_programs_model(), tiny_edits_model())
    with made.run as run:
        tasks = made.spec.eval_tasks
        votes, best = (
            run.evaluator.measure(run.state.with_values({"program": text}), tasks, greedy=greedy)
            for text, greedy in ((VOTES, False), (BEST, True))
        )
    assert 0.15 < votes.accuracy < 0.45 and best.accuracy > 0.95, (votes, best)
