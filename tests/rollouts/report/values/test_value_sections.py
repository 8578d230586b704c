"""The page of a run that learnt values: texts as diffs, mappings, logits, archives, the ledger; and
nothing of it where there is nothing to show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from marlora.rollouts.report.report import write_report
from marlora.rollouts.report.run_data import RunData
from marlora.rollouts.report.values.history import ValueHistory
from marlora.rollouts.report.values.value_sections import values_over_time
from tests.rollouts.report.learnt_values import write_run
from tests.rollouts.report.test_report import EVIL, Page, words_of

HEADS = ("Values", "Candidates", "What the method remembers", "What was spent")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def source_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_shows_what_was_learnt_beside_weights(run: Path) -> None:
    source = source_of(run)
    words = words_of(Page(source))
    for expected in (
        *HEADS,
        "step first.policy 0 base 3 adds",
        "first.prompt 2 changes step 1 proposed by optimizer why steps help the gate said better:"
        " 0.5000 against 0.2500 on 4 tasks Solve the task step by step .",
        "1 value never changed",
        "4 candidates, 3 of them adopted, 1 lost",
        "history tried",
        "aside optimizer 3 300 30 0 2 0.2500",
        "train all 24 2,400 240 0 12 0.0000",
        "has spent 2,970 of 3,000 tokens, 27 calls, 0.25 of cost. The budget ended the run:"
        " budget.tokens is 3000",
        "ended early the budget is spent",
    ):
        assert expected in words, expected
    titles = re.findall(r"<figcaption>([^<]+) <small>", source)
    for expected in ("temperature", "a0-&gt;b0", "tokens spent", "cost spent"):
        assert expected in titles, expected
    assert "step 3, limit 3,000" in source and "step 2, spent 1,980" in source
    assert "budget, step 3" not in words and "measured" not in words


def test_links_lead_to_the_sections_and_to_every_candidate(run: Path) -> None:
    page = Page(source_of(run))
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    links = {str(a["href"]) for tag, a in page.tags if tag == "a" and "=" not in str(a["href"])}
    assert {link.removeprefix("#") for link in links} <= set(names)
    assert {"#values-0", "#candidates-0", "#cost-0", "#c0-0-2"} <= links
    trials = [a["href"] for _, a in page.tags if str(a.get("href")).startswith("#kind=trial")]
    assert trials == [f"#kind=trial&q=trial-{n:016d}/" for n in (1, 3)], "those with its values"


def test_several_runs_have_anchors_of_their_own(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", edges=36)
    page = Page(write_report(run, other, output=tmp_path / "both.html").read_text())
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names)) and {"c0-0-1", "c1-0-1"} <= set(names)


def test_what_a_candidate_says_is_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "evil", evil=EVIL)
    page = Page(source_of(run))
    assert any("<script src=" in word for word in page.words)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "link"} == set()
    assert not any("style" in a or any(n.startswith("on") for n in a) for _, a in page.tags)


def test_a_run_without_values_shows_none_of_it(run: Path) -> None:
    rows = [{"step": step, "reward": 0.5} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    for name in ("ledger", "ledger_by_policy", "budget"):
        del summary[name]
    (run / "summary.json").write_text(json.dumps(summary))
    parts = run / "checkpoints" / "step-000003" / "trainer" / "parts"
    for path in parts.glob("*/state.json"):
        path.unlink()
    words = words_of(Page(source_of(run)))
    assert not [head for head in HEADS if head in words]


def test_before_the_first_step_there_is_no_history(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    assert values_over_time(ValueHistory.read(RunData.read(run)), []) == ""


def test_a_run_that_has_not_ended_counts_its_episodes(run: Path) -> None:
    """Of every kind, as their lines say, and what the checkpoint's ledger holds beside them."""
    (run / "summary.json").unlink()
    unstored = {"kind": "aside", "agent": "optimizer", "policy": "p", "calls": 2}
    state = {"step": 3, "ledger": {"unstored": [unstored]}}
    trainer = run / "checkpoints" / "step-000003" / "trainer"
    (trainer / "state.json").write_text(json.dumps(state))
    found = RunData.read(run).summary
    calls = {kind: {a: r["calls"] for a, r in own.items()} for kind, own in found["ledger"].items()}
    assert calls == {
        "eval": {"first": 8, "second": 8},
        "train": {"first": 12, "second": 12},
        "trial": {"first": 12, "second": 12},
        "aside": {"optimizer": 3 + 2},
    }
    assert found["budget"]["limit"] == {"tokens": 3000}
    assert found["budget"]["spent"]["tokens"] == 2970
    assert "2,970 of 3,000 tokens" in words_of(Page(source_of(run)))
