"""Reading answers out of texts, comparing them, and counting votes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlora.agents.text.answers import extract, majority, normalise, same
from marlora.agents.types import Turn


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{7}, no: \\boxed{8}. Answer: 9", "8"),  # the last box comes first
        ("\\boxed{7} and then \\boxed{8", "7"),  # cut off
        ("\\boxed{ } 5", "5"),
        ("**Answer:** 42.", "42"),
        ("Answer:\n42", "42"),
        ("Answer: 3\nOn second thought,\nAnswer: 4", "4"),
        ("The final answer is: **Paris**. Good bye 7", "Paris"),
        ("Answer: 3.5", "3.5"),
        ("12 apples\n#### 1,234", "1,234"),
        ("7+8=15", "15"),
        ("3-5", "5"),
        ("it is -5.", "-5"),
        ("that makes $1,234.50.", "1,234.50"),
        ("one half, 1/2", "1/2"),
        ("1,2,3", "3"),
        ("2.5e-3", "2.5e-3"),
        ("50%", "50"),
        ("version v2", None),
        ("Answer:", None),
        ("nothing", None),
        ("\\boxed{", None),
        ("", None),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("answer", "spelling"),
    [
        ("1,000.50", "2001/2"),
        ("0.5", "1/2"),
        ("$\\frac{1}{2}$", "1/2"),
        ("2/4", "1/2"),
        ("007", "7"),
        ("+3.0", "3"),
        ("−4", "-4"),
        ("-0", "0"),
        ("1e3", "1000"),
        ("50%", "50"),
        ("\\$18.00", "18"),
        ("\\text{Paris}.", "paris"),
        ("  New   York ", "new york"),
        ("x = 5", "x=5"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("1,2", "1,2"),
        ("1/0", "1/0"),
        ("1e999999999", "1e999999999"),
    ],
)
def test_normalise(answer: str, spelling: str) -> None:
    assert normalise(answer) == spelling
    assert normalise(spelling) == spelling


def test_same_needs_two_answers() -> None:
    assert same("0.50", "1/2") and not same("1", "2")
    assert not same(None, None) and not same("1", None) and not same(None, "1")


def test_majority_counts_readings_and_keeps_the_first_spelling() -> None:
    rng = random.Random(0)
    assert majority([Turn(0, "a", text="Answer: 0.50"), "so 1/2", "3", None, ""], rng) == "0.50"
    assert (
        majority(["Paris", "paris.", "London"], rng) == "Paris"
    )  # a word or three stands for itself
    assert majority(["I will not answer this one"], rng) == ""
    assert majority([], rng) == "" and majority([None, "", "  "], rng) == ""


def test_no_draw_without_a_tie() -> None:
    rng = random.Random(0)
    before = rng.getstate()
    majority(["1", "1", "2"], rng)
    assert rng.getstate() == before


def test_ties_are_drawn_by_the_seed_with_equal_chances() -> None:
    drafts = ["5", "4", "4", "5", "3"]
    picks = [majority(drafts, random.Random(seed)) for seed in range(200)]
    assert picks == [majority(drafts, random.Random(seed)) for seed in range(200)]
    assert set(picks) == {"4", "5"}
    assert 70 <= Counter(picks)["4"] <= 130  # binomial, 4 standard deviations


@given(st.text(st.characters(codec=None), max_size=300))
def test_any_text_can_be_read(text: str) -> None:
    answer = extract(text)
    assert answer is None or answer.strip()
    assert normalise(normalise(text)) is not None
    assert isinstance(majority([text, text], random.Random(0)), str)


@given(st.fractions(), st.integers(1, 50))
def test_equal_numbers_are_the_same(value: object, scale: int) -> None:
    assert same(str(value), f" {value} .".replace(" .", ".")) and same(f"{scale}/{scale}", "1")


@pytest.mark.parametrize(
    "part",
    [
        "\\boxed{",
        "answer ",
        "answer: ",
        "9",
        "1,",
        "\\frac{",
        "[1 ",
        "*",
        "1.1",
        "-",
        " ",
        "\n#### ",
        "\ud800",
    ],
)
def test_a_megabyte_is_read_quickly(part: str) -> None:
    # Under the suite's time limit only if no pattern is quadratic: a quadratic one takes minutes
    # here.
    text = part * (1_000_000 // len(part))
    extract(text), normalise(text), majority([text], random.Random(0))
