"""The toy critic: its teacher, its tokenizer, its lessons against what the methods ask, and what it
has learnt."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.episodes.store import Store
from marlora.trainers.testbeds.critic.lessons import Lessons, Questions, critic_tokenizer
from marlora.trainers.testbeds.critic.model import (
    ALIKE,
    COUNTS,
    abilities,
    critic_chain,
    helped,
    on_circles,
    tiny_critic_model,
)
from marlora.trainers.testbeds.critic.runs import METHODS, critic_run, teacher_engine
from marlora.trainers.testbeds.critic.teacher import ANSWER, EXPECTED, START, replies

DIGITS, KIND = re.compile(r"\d+(?:\.\d+)?"), re.compile(r"[abc](?=0)")
TEXTGRAD = "<VARIABLE>\nc1\n</VARIABLE>\n"


def said(words: str, number: int = 1) -> str:
    """A feedback as an editor is shown it."""
    turn = "<INPUT>\nc472\n</INPUT>\n<OUTPUT>\n3\n</OUTPUT>"
    inner = f"<CONVERSATION>\n{turn}\n</CONVERSATION>\n<TEXT>\n{words}\n</TEXT>"
    return f"<FEEDBACK_{number}>\n{inner}\n</FEEDBACK_{number}>"


def form(question: tuple[str, str]) -> str:
    """A question with `0` for all numbers and `?` for the kinds before them."""
    return KIND.sub("?", DIGITS.sub("0", " | ".join(question)))


def near(shares: dict[str, float]) -> object:
    return pytest.approx(shares)


def test_the_worker_goes_by_its_prompt() -> None:
    assert replies(START, "c472") == near({"3": 0.9, "4": 0.1})
    assert replies(ANSWER, "c472") == near({"9": 0.9, "0": 0.1})
    assert replies("", f"[worker/worker]\n{ANSWER}c002") == near({"9": 0.9, "0": 0.1})
    with pytest.raises(ValueError, match="nobody is asked"):
        replies("solve", "c472")
    (spec,) = critic_chain().specs
    assert spec.prompt == START and spec.policy == "base"
    assert max(replies(START, "c472")) != max(replies(ANSWER, "c472")), "wrong at the start"


def test_the_critic_names_the_amount_that_was_wanted() -> None:
    case = "<CONVERSATION>\n<TASK>\nc472\n</TASK>\n<RESULT>\n{}\n</RESULT>\n</CONVERSATION>"
    wrong, right = f"exact: 0\n{EXPECTED}9", f"exact: 1\n{EXPECTED}9"
    assert replies("say", case.format(wrong)) == near({"2>9+7": 0.7, "2>9+8": 0.3})
    assert replies("say", case.format(right)) == {"ok": 1.0}
    assert len(replies("say", case.format("exact: 0"))) == 10, "it guesses"
    assert replies("say", f"{case}\n<FEEDBACK>\n2>9+8\n</FEEDBACK>") == {"+8": 1.0}
    judged = "amounts\n<TASK>\nc472\n</TASK>\n<PREDICTION>\n3\n</PREDICTION>\n<EXPECTED>\n9\n"
    assert replies("judge", f"{judged}</EXPECTED>") == near({"2>9+7": 0.7, "2>9+8": 0.3})
    assert replies("judge", f"{judged}</EXPECTED>".replace("amounts", "wording")) == {"ok": 1.0}


def test_the_editor_puts_in_what_it_is_told() -> None:
    tags = "<IMPROVED_VARIABLE>{}</IMPROVED_VARIABLE>"
    assert replies("edit!", TEXTGRAD + said("+7")) == {tags.format("c7"): 1.0}
    slips = {tags.format("c7"): 0.7, tags.format("c8"): 0.3}
    assert replies("edit", TEXTGRAD + said("+7")) == near(slips)
    assert replies("edit", TEXTGRAD + said("2>9+7")) == near(slips)
    both = replies("edit!", f"{TEXTGRAD}{said('+7')}\n{said('+2', 2)}")
    assert both == near({tags.format("c7"): 0.5, tags.format("c2"): 0.5})
    assert replies("edit", TEXTGRAD + said("ok")) == {tags.format(START): 1.0}
    for guessed in (replies("edit", TEXTGRAD), replies("guess", TEXTGRAD + said("+7"))):
        assert guessed == near({tags.format(f"c{amount}"): 0.1 for amount in range(10)})
    wrong = f"exact: 0\n{EXPECTED}"
    direct = replies("edit", f"prompt\n{TEXTGRAD}{said(f'{wrong}9')}")
    assert direct == near({"2>9+7<PROMPT>c7</PROMPT>": 0.7, "2>9+8<PROMPT>c8</PROMPT>": 0.3})
    two = replies("edit", f"prompt\n{TEXTGRAD}{said(f'{wrong}9')}\n{said(f'{wrong}0', 2)}")
    one_of_both = {"2>9+7": 0.35, "2>9+8": 0.15, "2>0+8": 0.35, "2>0+9": 0.15}
    assert two == near({f"{e}<PROMPT>c{e[-1]}</PROMPT>": p for e, p in one_of_both.items()})
    right = replies("edit", f"prompt\n{TEXTGRAD}{said(f'exact: 1{chr(10)}{EXPECTED}3')}")
    assert right == {f"ok<PROMPT>{START}</PROMPT>": 1.0}, "what is right stays"


def test_digits_begin_where_sums_modulo_ten_are_products() -> None:
    """cos of a sum is cos cos - sin sin: the point of 7 + 8 is that of 5."""
    seven, eight, five = (on_circles()[digit] for digit in (7, 8, 5))
    for cos, sin in zip(range(0, 10, 2), range(1, 10, 2), strict=True):
        assert seven[cos] * eight[cos] - seven[sin] * eight[sin] == pytest.approx(five[cos])
        assert seven[sin] * eight[cos] + seven[cos] * eight[sin] == pytest.approx(five[sin])


def test_its_tokenizer_knows_tags_amounts_and_problems_as_words() -> None:
    tokenizer = critic_tokenizer()
    assert len(tokenizer.encode(f"<VARIABLE>\n{START}\n</VARIABLE>")) == 4
    assert len(tokenizer.encode("c472")) == 1 and len(tokenizer.encode(f"{ANSWER}c472")) == 2
    assert {*ALIKE[0], *ALIKE[1], *ALIKE[2]} == {*COUNTS}
    rng = random.Random(0)
    questions, lessons = Questions(rng), Lessons(rng)
    for question in [getattr(questions, name)() for name in COUNTS for _ in range(20)]:
        for text in (*question, *replies(*question)):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        lesson = lessons.of(question)
        for token, shares in zip(lesson.reply, lesson.targets, strict=True):
            assert shares[token] > 0 and sum(shares.values()) == pytest.approx(1)


def test_a_lesson_has_the_shares_of_what_may_stand_at_each_place() -> None:
    lessons = Lessons(random.Random(0))
    lesson = lessons.of((START, "c472"))
    three, four, end = lessons.tokenizer.encode("34<|end|>")
    assert lesson.targets == [near({three: 0.9, four: 0.1}), {end: 1.0}]
    assert lesson.reply in ([three, end], [four, end])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recipe", METHODS)
def test_what_a_method_asks_is_what_it_is_taught(recipe: str, model: Path, tmp_path: Path) -> None:
    """Every question of a run has the form of a lesson, numbers and kinds aside."""
    questions = Questions(random.Random(0))
    known = {form(getattr(questions, name)()) for name in COUNTS for _ in range(2000)}
    folder = tmp_path / "run"
    critic_run(
        recipe, folder, engine=teacher_engine(), model=str(model), max_steps=2, num_eval_tasks=3
    ).train()
    asked = {
        form((system, turn.messages[-1].content))
        for episode in Store(folder / "episodes")
        for turn in episode.turns
        for system in [turn.messages[0].content if turn.messages[0].role == "system" else ""]
        if system != "meta"
    }
    assert not asked - known
    assert any(each.startswith("edit") for each in asked) and len(asked) >= 2


@pytest.fixture(scope="module")
def network() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_critic_model())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_them(network: Any) -> None:
    found = abilities(network, 60)
    print(found)
    harder = {"judged": (0.6, 0.6), "reasoned_by_two": (2.0, 0.25)}  # drawn ones are below 0.2
    for role in COUNTS:
        most, least = harder.get(role, (0.5, 0.8))
        assert found[f"{role}, nats"] < most and found[f"{role}, known"] > least, found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_words_help_where_they_are_of_the_task(network: Any) -> None:
    """Of fresh wrong answers; the teacher's own critiques are right in 0.7, its rewrites of them in
    0.49, and what is drawn in 0.1."""
    own, *controls = (helped(network, feedback) for feedback in ("own", "shuffled", "none"))
    print(own, controls)
    assert own["critiques"] >= 0.5 and own["rewrites"] >= 0.3
    for found in controls:
        assert found["critiques"] <= 0.25 and found["rewrites"] <= 0.25
        assert own["rewrites"] >= 2 * found["rewrites"]
