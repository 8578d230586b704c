"""Texts as diffs: words within lines that are alike, whole lines else; all of it escaped."""

from __future__ import annotations

import re

from marlora.rollouts.report.values.texts import MAX_DIFF, text_diff, whole_text


def put_and_taken(made: str) -> tuple[list[str], list[str]]:
    return re.findall(r"<ins>(.*?)</ins>", made), re.findall(r"<del>(.*?)</del>", made)


def test_lines_that_are_alike_are_compared_word_by_word() -> None:
    made = text_diff("Answer with a number.\nBe brief.", "Answer with one number.\nBe brief.")
    assert put_and_taken(made) == ([" one"], [" a"])
    assert made == (
        '<pre class="diff">Answer with<del> a</del><ins> one</ins> number.\nBe brief.</pre>'
    )


def test_lines_that_are_not_alike_stand_below_one_another() -> None:
    made = text_diff("same\nSolve it.", "same\nThink hard, then check twice.")
    assert put_and_taken(made) == (["Think hard, then check twice."], ["Solve it."])
    assert put_and_taken(text_diff("", "new\nlines")) == (["new", "lines"], [])
    assert put_and_taken(text_diff("old", "")) == ([], ["old"])


def test_unchanged_lines_far_away_are_counted() -> None:
    lines = [f"line {n}" for n in range(20)]
    changed = [*lines[:10], "something else here", *lines[11:]]
    made = text_diff("\n".join(lines), "\n".join(changed))
    assert "… 8 unchanged lines …" in made and "… 7 unchanged lines …" in made
    assert "line 8\nline 9\n" in made and "line 7" not in made
    assert "… 1 unchanged line …" in text_diff("a\nb\nc\nd", "a\nb\nc\nzz")


def test_a_change_of_line_ends_is_told() -> None:
    assert "only their ends differ" in text_diff("a\nb", "a\nb\n")


def test_a_whole_text_is_shown_as_it_is() -> None:
    assert whole_text("a\n<b>") == "<pre>a\n&lt;b&gt;</pre>" and "(empty)" in whole_text("")


def test_only_so_much_is_compared() -> None:
    made = text_diff("a" * MAX_DIFF + "b", "a" * MAX_DIFF + "c")
    assert "only the first 8,000 characters are compared" in made and "<ins>" not in made


def test_text_is_never_markup() -> None:
    evil = '<script>alert("1")</script>\x00'
    for made in (
        text_diff("x", evil),
        text_diff(f"{evil} a b c", f"{evil} a b d"),
        whole_text(evil),
    ):
        assert "<script" not in made and "&lt;script&gt;" in made and "\x00" not in made
