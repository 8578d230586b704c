"""docs/methods.md and docs/methods/ say what the methods are today, and quote what was measured."""

from __future__ import annotations

import re

import pytest

from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from tests.method_drawing import drawing
from tests.method_pages import (
    FOLDER,
    RESULTS,
    SHOWS,
    TABLE,
    config_of,
    facts,
    methods,
    pages,
    with_table,
    words,
)
from tests.results_tables import numbers


def section(where: str) -> str:
    """The text of RESULTS.md from a heading that begins so to the next of its level."""
    text = RESULTS.read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(where)}.*?(?=^#{{1,2}} |\Z)", text, re.M | re.DOTALL)
    assert found, f"docs/methods.yaml: RESULTS.md has no section that begins {where!r}"
    return found[0]


def test_the_pages_are_todays() -> None:
    paths = [path for path in FOLDER.rglob("*") if path.is_file()]
    found = {str(path.relative_to(FOLDER)): path.read_text(encoding="utf-8") for path in paths}
    assert found == pages(), "run python -m tests.method_pages"


def test_the_table_is_todays() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text == with_table(text), "run python -m tests.method_pages"


def test_every_method_has_its_facts() -> None:
    assert facts().keys() == methods().keys() - set(SHOWS)


@pytest.mark.parametrize("recipe", sorted(facts()))
def test_numbers_are_those_of_the_results(recipe: str) -> None:
    """What a page says was measured stands in the section of RESULTS.md that it names."""
    fact = facts()[recipe]
    known = {"name", "group", "changes", "needs", "formula", "cost"}
    measured = {"result", "command", "failed", "where"}
    assert known <= fact.keys() <= known | measured | {"measured", "paper", "idea"}
    assert not fact.keys() & measured or measured <= fact.keys(), "a result says where it stands"
    text = " ".join(section(where) for where in fact.get("where", ()))
    missing = numbers(f"{fact.get('result', '')} {fact.get('failed', '')}") - numbers(text)
    assert not missing, f"docs/methods.yaml, {recipe}: {missing} do not stand in {fact['where']}"


def test_an_idea_is_five_sentences() -> None:
    for recipe, fact in facts().items():
        sentences = re.findall(r"[.?](?=\s|$)", fact.get("idea", ". . . . ."))
        assert len(sentences) == 5, f"{recipe}: {len(sentences)} sentences"


def test_a_docstring_is_split_into_idea_and_differences() -> None:
    idea, differences = words(GRPOTrainer)
    assert idea.startswith("GRPO for a team:") and differences.startswith("Against the paper")
    assert "accelerate launch" not in differences


def test_the_drawing_says_who_learns_and_who_is_asked() -> None:
    grpo = drawing("GRPO", "weights", config_of("grpo_team"), True)
    assert "all learn (LoRA)" in grpo and "live proof" in grpo and "Helpers" not in grpo
    textgrad = drawing("TextGrad", "prompts", config_of("textgrad_prompts"), False)
    assert "no weight learns" in textgrad and "backward, optimizer" in textgrad
    assert "compared on 50 validation tasks" in textgrad and "live proof" not in textgrad
    flow = drawing("FlowReasoner <x>", "a designer", config_of("flowreasoner"), True)
    assert "learns (LoRA): designer" in flow and "FlowReasoner &lt;x&gt;" in flow
