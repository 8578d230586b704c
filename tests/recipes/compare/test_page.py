"""compare.html and the tables: what they say, and that nothing a plan or a model wrote is markup."""

from __future__ import annotations

import asyncio
import copy
import re
from pathlib import Path
from typing import Any

import pytest

from marlora.recipes.compare.page import compare_page
from marlora.recipes.compare.reference import SINGLE, TEAM, VOTES
from marlora.recipes.compare.result import effect, headline
from marlora.recipes.compare.tables import as_markdown, as_text
from tests.browser import Browser, browser

EVIL = "<script>alert(1)</script>|<img src=x onerror=alert(2)>"


def row(name: str, score: float, kind: str = "reference", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "note": "",
        "score": score,
        "ci95": [score - 0.1, score + 0.1],
        "by_seed": {"0": score},
        "num_tasks": 20,
        "tokens_per_task": 30.0,
        "calls_per_task": 2.0,
        "prompt_tokens_per_call": 12.5,
        "spent": {"tokens": 0.0},
        "samples": 1,
        **more,
    }


def arm(name: str, score: float, shown: str, control_of: str = "") -> dict[str, Any]:
    return row(
        name,
        score,
        "control" if control_of else "arm",
        recipe="grpo_team",
        control_of=control_of,
        starts_at=0.5,
        team_there=0.5,
        share_below_team=0.5,
        effect=shown,
        against_votes={VOTES[SINGLE]: "above", VOTES[TEAM]: shown},
        spent={"tokens": 1200.0, "calls": 40.0, "cost": 0.25},
        by_role={
            "first": {"tokens": 1000.0, "cost": 0.0},
            "critic": {"tokens": 200.0, "cost": 0.25},
        },
        by_policy={"first": {"grad_norm": 0.512, "calls_per_episode": 2.0}},
        tokens_trained=77.0,
        seconds=9.0,
        steps=3.0,
        stopped=[],
        system="",
    )


def against(first: str, second: str, difference: float, p: float) -> dict[str, Any]:
    ends = [difference - 0.1, difference + 0.1]
    counts = {"gained": 3, "lost": 1, "by_seed": {"0": difference}, "p": p, "p_holm": p}
    return {"from": first, "to": second, "difference": difference, "ci95": ends, **counts}


RESULT: dict[str, Any] = {
    "plan": "toy",
    "metric": "accuracy",
    "tasks": "sums",
    "model": "tiny",
    "seeds": [0, 1],
    "budget": {"tokens": 5000},
    "headroom": None,
    "noise": {"greedy": {"means": [0.5, 0.52], "sd": 0.0141, "largest_difference": 0.02}},
    "rows": [
        row(TEAM, 0.5),
        row(SINGLE, 0.4),
        row(VOTES[SINGLE], 0.45, note="majority of 3 sampled answers", samples=3),
        row(VOTES[TEAM], 0.55, samples=4),
        arm("good", 0.8, "above"),
        arm("lost", 0.2, "below"),
        arm("still", 0.5, "not shown", control_of="good"),
    ],
    "comparisons": [
        against(TEAM, "good", 0.3, 0.0002),
        against(TEAM, "lost", -0.3, 0.004),
        against(TEAM, "still", 0.0, 1.0),
        against("still", "good", 0.3, 0.03),
    ],
    "bill": [{"what": "reference rows", "calls": 40.0, "tokens": 900.0, "cost": 0.5}],
    "failed": {"edges, seed 0": "the recipe does not take the team: system has no edges"},
    "curves": {
        "good": {
            "held-out": {
                "0": [[0.0, 0.5], [600.0, 0.9], [1200.0, 0.8]],
                "1": [[0.0, 0.5], [600.0, 0.7], [1200.0, 0.6]],
            }
        },
        "lost": {"held-out": {"0": [[0.0, 0.5], [1200.0, 0.2]]}},
    },
}


def test_the_headline_counts_who_won_and_who_lost() -> None:
    assert headline(RESULT) == (
        "Of 2 arms, 1 is shown to be above the team as it is, 1 below it; for 0 no difference is"
        " shown. At the tokens of the dearest arm, 1 is shown to be above self-consistency of both"
        " the team and the single agent, 1 below one of them."
    )
    assert headline({"rows": [row(TEAM, 0.5)]}) == "No arm has a result."


def test_the_headline_knows_rows_that_are_no_vote() -> None:
    """Without the team's vote there is the single agent's; without both there is none."""
    result = copy.deepcopy(RESULT)
    team = next(each for each in result["rows"] if each["name"] == VOTES[TEAM])
    single = next(each for each in result["rows"] if each["name"] == VOTES[SINGLE])
    team["samples"] = 1
    for each in result["rows"]:
        each.get("against_votes", {}).pop(VOTES[TEAM], None)
    assert headline(result).endswith(
        "At the tokens of the dearest arm, 2 are shown to be above self-consistency of the single"
        " agent, 0 below it; there is no other vote."
    )
    assert " At 1,000 tokens per task, 2 are" in headline({**result, "vote_tokens": 1000})
    single["samples"] = 1
    assert headline(result).endswith("pay for no vote of three answers.")


def test_an_effect_is_shown_at_five_percent_corrected() -> None:
    for p, difference, shown in ((0.049, 1, "above"), (0.049, -1, "below"), (0.05, 1, "not shown")):
        assert effect({"p_holm": p, "difference": difference}) == shown


def test_the_markdown_has_every_row_and_number() -> None:
    lines = as_markdown(RESULT).splitlines()
    (good,) = (line for line in lines if line.startswith("| good | 0.800"))
    assert good == (
        "| good | 0.800 | 0.700 .. 0.900 | +0.300 (+0.200 .. +0.400), p < .001 |  |  | 50% |"
    )
    assert "| good | 1,200 | 0.25 | 77 | 30.0 | 12.5 | 9 |" in lines
    assert "| good | 1,000 | 200 (0.25) |" in lines
    assert "| good: first | 0.512 | 2.00 |" in lines
    assert "| good | 0.500 | 0.800 | 0.700 | -0.100 |" in lines  # the peak of the curve, its end
    assert not [line for line in lines if line.startswith("| lost | 0.500 |")]  # two points only
    assert "- single agent, self-consistency: majority of 3 sampled answers" in lines
    assert "| reference rows | 40 | 900 | 0.5 |" in lines
    assert "| good - still | 1 | +0.300 | +0.200 .. +0.400 | 0.030 |" in lines
    assert "| noise floor, greedy | 0.500 0.520 | 0.0141 | 0.020 |" in lines
    assert (
        "- no result: edges, seed 0: the recipe does not take the team: system has no edges"
        in lines
    )
    assert "corrected for 4 comparisons (Holm)" in as_markdown(RESULT)


def test_runs_without_a_result_for_one_reason_stand_together() -> None:
    failed = {"a, seed 0": "late", "b, seed 0": "no edges", "a, seed 1": "late"}
    lines = as_markdown({**RESULT, "failed": failed}).splitlines()
    assert lines[-2:] == [
        "- no result: a, seed 0; a, seed 1: late",
        "- no result: b, seed 0: no edges",
    ]
    assert "a, seed 0; a, seed 1" in compare_page({**RESULT, "failed": failed})


def test_the_text_has_the_same_rows() -> None:
    shown = as_text(RESULT)
    assert (
        "Arms against their controls and each other" in shown
        and "no result: edges, seed 0" in shown
    )
    for each in RESULT["rows"]:
        assert each["name"].split(",")[0] in shown


def hostile() -> dict[str, Any]:
    """The same with every text as markup."""
    result = copy.deepcopy(RESULT)
    result |= {"plan": EVIL, "tasks": EVIL, "metric": EVIL, "failed": {EVIL: EVIL}}
    names = {each["name"]: each["name"] for each in result["rows"]} | {"good": EVIL}
    for each in result["rows"]:
        each["name"] = names[each["name"]]
        each["note"] = EVIL
    for each in result["comparisons"]:
        each["from"], each["to"] = names[each["from"]], names[each["to"]]
    result["curves"][EVIL] = result["curves"].pop("good")
    result["headroom"] = {
        "tasks": 3,
        "team": 0.1,
        "best_of": {"samples": 2, "score": 0.5},
        "detectable": 0.3,
        "summary": EVIL,
    }
    return result


def test_nothing_that_a_plan_or_model_wrote_is_markup() -> None:
    page = compare_page(hostile())
    assert "<img" not in page and "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy and "script-src 'none'" in policy
    assert "unsafe" not in policy and " style=" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    rows = [line for line in as_markdown(hostile()).splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in rows if "img" in line]
    assert widths == [8, 6, 8, 4, 4, 6]  # a bar in a name opens no cell


def test_the_page_names_what_it_measured() -> None:
    page = compare_page(RESULT)
    assert "starts at" not in page
    moved = copy.deepcopy(RESULT)
    moved["rows"][4]["starts_at"] = 0.53  # beyond the noise floor of .02
    assert "grpo_team; starts at 0.530, so not as the team does" in compare_page(moved)
    moved["rows"][4]["system"] = "mine:Swarm"
    assert "grpo_team; a system of its own, mine:Swarm; starts" in compare_page(moved)
    assert "- good has a system of its own: mine:Swarm" in as_markdown(moved)
    assert "majority of 3 sampled answers" in page and "grpo_team, control of good" in page
    assert 'class="good">p &lt; .001' in page and 'class="bad">p 0.004' in page
    assert 'class="soft">p 1.000' in page
    assert "thousand tokens 1.2, seed 0 0.8" in page  # a point of a curve


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """At 1440 and 390 pixels: no error, nothing fetched, no page wider than the screen."""
    path = tmp_path / "compare.html"
    path.write_text(compare_page(hostile()), encoding="utf-8")

    async def check(page: Browser) -> None:
        for width in (1440, 390):
            await page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=width < 500,
            )
            await page.call("Page.navigate", url=path.as_uri())
            await page.until("document.readyState === 'complete' && !!document.querySelector('h1')")
            assert await page.run("document.documentElement.scrollWidth") <= width
            assert await page.run("document.querySelectorAll('figure').length") == 2
        assert not page.errors and {url for url in page.requests} == {path.as_uri()}

    async def work() -> None:
        async with browser(tmp_path / "profile") as page:
            await check(page)

    asyncio.run(work())
