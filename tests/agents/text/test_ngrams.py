"""Hashed n-grams: fixed numbers, alike for alike texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from marlora.agents.text.ngrams import SIZE, ngrams


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_a_word_adds_one_at_the_place_of_each_term() -> None:
    """`a` has the terms `word a`, `a`, `^a`, `a$` and `^a$`."""
    found = ngrams("a")
    assert len(found) == SIZE and cosine(found, found) == pytest.approx(1.0)
    unit = min(abs(x) for x in found if x)
    counts = [round(x / unit, 6) for x in found if x]
    assert all(count == round(count) for count in counts) and sum(map(abs, counts)) == 5


def test_the_numbers_are_those_of_any_process() -> None:
    """Python's own hash of a text differs from process to process."""
    assert [n for n, x in enumerate(ngrams("a")) if x] == [1, 3, 8, 31, 43]


def test_alike_texts_have_alike_numbers() -> None:
    sums = ngrams("What is 12 + 7?"), ngrams("What is 93 + 41?")
    prose = ngrams("Name the author of this play.")
    assert cosine(*sums) > 0.6 > 0.4 > cosine(sums[0], prose)
    assert ngrams("Add") == ngrams("add") and ngrams("add it") != ngrams("it")


def test_texts_without_a_word() -> None:
    assert ngrams("") == [0.0] * SIZE == ngrams(" \n")
    assert cosine(ngrams("\ud800"), ngrams("\ud800")) == pytest.approx(1.0)
