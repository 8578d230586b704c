"""Evaluators: a rule's words, a judge's, and those of several with a role each."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from marlora.agents.types import Reward
from marlora.trainers.feedback.evaluators import Judges, RuleWords
from marlora.trainers.feedback.helpers import Question
from tests.trainers.feedback_cases import ScriptedHelpers, chain_of, episode, operation, turn

PROMPTS = {"judge_system": "You judge {role}.", "judge": "{case}"}
ROLES = ("logic", "syntax", "readability", "redundancy", "correctness", "runtime")


def test_a_rule_says_the_metric_and_the_answer_without_a_call() -> None:
    helpers = ScriptedHelpers({}, lambda q: "never")
    rule = RuleWords("right", "1 if the sum is right")
    (judged,) = rule.judge(helpers, [chain_of("t", "a", score=0.5)])
    assert judged.text == "right: 0.5\nThe expected output is: 7" and judged.score == 0.5
    assert judged.saw_gold and helpers.asked == []
    assert "<PURPOSE>\n1 if the sum is right\n</PURPOSE>" in judged.conversation
    assert "<PREDICTION>\na on t\n</PREDICTION>" in judged.conversation
    (hidden,) = RuleWords("right", show_answer=False).judge(helpers, [chain_of("t", "a")])
    assert hidden.text == "right: 0" and not hidden.saw_gold and "7" not in hidden.conversation


def test_a_reward_with_words_and_an_episode_that_failed() -> None:
    helpers = ScriptedHelpers({}, lambda q: "never")
    worded = dataclasses.replace(
        chain_of("t", "a"), rewards=(Reward("right", math.nan, "no number in it"),)
    )
    (judged,) = RuleWords("right", show_answer=False).judge(helpers, [worded])
    assert judged.text == "right: could not be scored (no number in it)"
    assert math.isnan(judged.score)
    failed = episode(turn(0, "a", "x"), error="ZeroDivisionError: by zero")
    (judged,) = RuleWords("right", show_answer=False).judge(helpers, [failed])
    assert judged.score == 0 and "ZeroDivisionError: by zero" in judged.text


@pytest.mark.parametrize(
    ("count", "share"), [(1, 3600), (2, 1800), (3, 1200), (4, 900), (5, 720), (6, 600)]
)
def test_the_budget_of_judges_is_shared(count: int, share: int) -> None:
    """Fact U1 of AIME; the number of calls is the first part of U2."""
    helpers = ScriptedHelpers(PROMPTS, lambda q: "ok")
    judges = Judges("right", roles=ROLES[:count], max_tokens=3600)
    judges.judge(helpers, [chain_of("t1", "a"), chain_of("t2", "a")])
    assert [q.max_tokens for q in helpers.asked] == [share] * 2 * count
    assert helpers.batches == [2 * count]


def test_what_judges_say_is_joined_in_the_order_of_roles() -> None:
    """Fact U3 of AIME is `abc`: here each text stands under its role, on lines of its own."""
    helpers = ScriptedHelpers(PROMPTS, lambda q: q.about[10:].split("/")[0][:1])
    judged = Judges("right", roles=("b", "a", "c")).judge(helpers, [chain_of("t", "x")])
    assert judged[0].text == "b: b\n\na: a\n\nc: c"
    assert judged[0].parts == (("b", "b"), ("a", "a"), ("c", "c"))
    assert [q.system for q in helpers.asked] == ["You judge b.", "You judge a.", "You judge c."]


def test_a_judge_that_fails_does_not_drop_the_others() -> None:
    """Fact U6 of AIME."""

    def reply(question: Question) -> str | None:
        return None if "syntax" in question.about else "bad"

    helpers = ScriptedHelpers(PROMPTS, reply)
    judged = Judges("right", roles=("logic", "syntax", "runtime")).judge(
        helpers, [chain_of("t", "x")]
    )
    assert judged[0].text == "logic: bad\n\nruntime: bad" and len(judged[0].parts) == 2
    lost = ScriptedHelpers(PROMPTS, lambda q: None)
    assert Judges("right").judge(lost, [chain_of("t", "x")])[0].text == "", "nothing flows then"


def test_only_a_judge_that_is_shown_the_answer_saw_it() -> None:
    for shown in (True, False):
        helpers = ScriptedHelpers(PROMPTS, lambda q: "bad")
        judged = Judges("right", show_answer=shown).judge(helpers, [chain_of("t", "x")])
        assert helpers.asked[0].saw_gold == judged[0].saw_gold == shown
        assert ("<EXPECTED>\n7\n" in helpers.asked[0].text) == shown


def test_an_operation_that_failed_is_said() -> None:
    """An exception is feedback (Trace)."""
    failed = dataclasses.replace(operation(1, "extract", "", [0]), error="error: IndexError: empty")
    (judged,) = RuleWords("right").judge(
        ScriptedHelpers({}, lambda q: "never"), [episode(turn(0, "a", "x"), failed, output="")]
    )
    assert "Operation 'extract' failed: error: IndexError: empty" in judged.text


@pytest.mark.parametrize(
    ("chances", "union"), [((0.2, 0.3, 0.4), 0.664), ((0.5,) * 6, 0.984375), ((0.4,), 0.4)]
)
def test_several_judges_find_what_one_misses(chances: tuple[float, ...], union: float) -> None:
    """Fact U4 of AIME: over all outcomes of independent judges, the joint text names a defect with
    the chance of their union; a single judge has its own chance alone."""
    total = 0.0
    for outcome in itertools.product((True, False), repeat=len(chances)):
        finds = dict(zip(ROLES, outcome, strict=False))
        helpers = ScriptedHelpers(
            PROMPTS,
            lambda q, finds=finds: "a defect" if finds[q.about[10:].split("/")[0]] else "ok",
        )
        judges = Judges("right", roles=ROLES[: len(chances)])
        (judged,) = judges.judge(helpers, [chain_of("t", "x")])
        weight = math.prod(p if hit else 1 - p for p, hit in zip(chances, outcome, strict=True))
        total += weight * ("defect" in judged.text)
    assert total == pytest.approx(union, abs=1e-12)


def test_a_role_stands_for_its_criterion() -> None:
    prompts = {"judge_system": "{role}: {criterion}", "judge": "{case}\n{role}, {criterion}"}
    helpers = ScriptedHelpers(prompts, str)
    judges = Judges("right", roles=("logic", "rhyme"), criteria={"logic": "whether it follows"})
    judges.judge(helpers, [chain_of("t", "x")])
    assert [q.system for q in helpers.asked] == ["logic: whether it follows", "rhyme: rhyme"]
    assert helpers.asked[0].text.endswith("\nlogic, whether it follows")
