"""The report in a headless Chromium, opened from disk and served live: no errors, nothing fetched,
and everything works."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.episodes.thumbs import read_thumbs
from marlora.rollouts.report.episode_index import crc
from marlora.rollouts.report.live import LiveReport
from marlora.rollouts.report.report import write_report
from marlora.rollouts.types import Episode
from tests.browser import Browser, browser
from tests.rollouts.report.learnt_values import write_run

pytestmark = pytest.mark.slow
EVIL = '<script>document.title = "owned"</script><img src=x onerror="document.title = 1">'


def episode(step: int, n: int, said: str = "7", **more: Any) -> Episode:
    told = (Message("user", f"solve {n}"),)
    turns = (
        Turn(0, "solver", told, text="3", token_ids=(5,), logprobs=(-0.1,), taken=False),
        Turn(0, "solver", told, text=said, sibling=1, token_ids=(1, 2), logprobs=(-0.5, -2.0)),
        Turn(
            1,
            "critic",
            (Message("user", f"check {said}"),),
            reads=(0,),
            text="fine",
            token_ids=(3,),
            logprobs=(-0.1,),
        ),
        Turn(
            2,
            "solver",
            told,
            reads=(1,),
            text=said,
            token_ids=(1, 2),
            logprobs=(-0.5, -2.0),
            finish_reason="length",
        ),
    )
    label = f"train-{step:06d}"
    rewards = (
        Reward("correct", float(n % 2), "the last line is wrong"),
        Reward("kind", 0.5, agent="critic"),
    )
    return Episode(
        f"{label}/t{n}/0",
        f"{label}/t{n}",
        Task(f"t{n}", f"task {n}", "7"),
        step=step,
        turns=turns,
        output=said,
        rewards=rewards,
        **more,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model": "tiny", "max_steps": 2, "rewards": ["correct"]})
    )
    rows = [
        {
            "step": s,
            "reward": 0.5,
            "policies": {"solver": {"loss": 0.1 * s}, "critic": {"loss": 0.2}},
        }
        for s in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned = {
        "step": 1,
        "policy": "solver",
        "episode": "train-000001/t0/0",
        "turn": 0,
        "ids": crc((1, 2)),
        "advantage": -1,
        "ratio": [1.0, 1.9],
    }
    (folder / "learned.jsonl").write_text(json.dumps(learned) + "\n")
    with Store(folder / "episodes", fsync=False) as store:
        store.extend([episode(s, n) for s in (1, 2) for n in range(4)])
        failed = dataclasses.replace(
            episode(2, 9, EVIL), error=EVIL, rewards=(), output=None, stop_reason="error"
        )
        store.append(dataclasses.replace(failed, task=Task("t9", EVIL, EVIL)))
    return folder


def look(work: Callable[[Browser], Awaitable[None]], folder: Path) -> None:
    async def go() -> None:
        async with browser(folder / "profile") as page:
            await work(page)
            assert page.errors == []

    asyncio.run(go())


ROWS = 'document.querySelectorAll("#rows tr").length'
TITLE = 'document.querySelector("#episode h2")?.textContent'


def test_opened_from_disk_it_works_and_fetches_nothing(run: Path, tmp_path: Path) -> None:
    path = write_report(run, pieces=lambda policy, ids: [f"<{i}>" for i in ids])

    async def work(page: Browser) -> None:
        await page.open(path.as_uri())
        assert await page.run(ROWS) == 9
        assert await page.run('document.querySelectorAll("figure svg").length') >= 2
        await page.run('document.querySelector("#rows a").click()')
        await page.until(f'{TITLE} === "train-000001/t0/0"')
        lanes = (
            'document.querySelectorAll(".lane").length',
            'document.querySelectorAll(".lanes .arrows path").length',
        )
        await page.until(f"{lanes[1]} === 2", "an arrow for each turn that was read")
        assert await page.run(lanes[0]) == 2
        rows = (
            '[...document.querySelectorAll(".cell")].map((c) => [c.className,'
            " c.style.gridRowStart])"
        )
        assert await page.run(rows) == [["cell l1", "2"], ["cell l2", "3"], ["cell l1", "4"]]
        assert (
            await page.run('document.querySelector(".siblings summary").textContent')
            == "1 sibling not taken"
        )
        assert "the last line is wrong" in await page.run(
            'document.querySelector("#episode").textContent'
        )
        tokens = (
            '[...document.querySelector(".cell .turn").querySelectorAll(".t")].map((t) =>'
            " [t.textContent, t.className, t.title])"
        )
        assert await page.run(tokens) == [
            ["<1>", "t m2", "advantage -1, ratio 1, log-prob -0.500"],
            ["<2>", "t m2", "advantage -1, ratio 1.90, log-prob -2"],
        ]
        await page.press("r")
        assert [each[1] for each in await page.run(tokens)] == ["t", "t p4"]
        await page.press("n")
        assert await page.run('document.querySelector(".cell .said").textContent') == "7"
        await page.press("j")
        await page.until(f'{TITLE} === "train-000001/t1/0"')
        await page.press("k")
        await page.until(f'{TITLE} === "train-000001/t0/0"')
        await page.press("Escape")
        await page.until('document.querySelector("#episode").hidden')
        await page.press("/")
        assert await page.run("document.activeElement.id") == "q"
        outside = [url for url in page.requests if not url.startswith(("file:", "data:"))]
        assert outside == []

    look(work, tmp_path)


def test_filters_and_deep_links(run: Path, tmp_path: Path) -> None:
    with Store(run / "episodes", fsync=False) as store:
        store.append(
            dataclasses.replace(
                episode(2, 3), id="train-000002/t3/0/mend/0", parent="train-000002/t3/0", rewards=()
            )
        )
    path = write_report(run)

    async def choose(page: Browser, name: str, value: str) -> int:
        box = f'document.querySelector("#{name}")'
        await page.run(
            f'{box}.value = {json.dumps(value)}; {box}.dispatchEvent(new Event("input", {{bubbles:'
            " true}))"
        )
        return int(await page.run(ROWS))

    async def work(page: Browser) -> None:
        await page.open(path.as_uri())
        assert await choose(page, "outcome", "right") == 4
        assert await choose(page, "q", "TASK 3") == 2
        assert await page.run("location.hash") == "#q=TASK%203&outcome=right"
        assert await choose(page, "outcome", "f") == 0
        assert await choose(page, "q", "") == 1
        assert await choose(page, "outcome", "") == 10
        await choose(page, "outcome", "k")
        assert await page.run(ROWS) == 1, "the child"
        await page.run('document.querySelector("#rows a").click()')
        await page.until(f'{TITLE} === "train-000002/t3/0/mend/0"')
        await page.run(
            '[...document.querySelectorAll("#episode a")].find((a) =>'
            ' a.textContent.includes("follows from")).click()'
        )
        await page.until(f'{TITLE} === "train-000002/t3/0"')
        await page.run(
            '[...document.querySelectorAll("#episode a")].find((a) =>'
            ' a.textContent.includes("followed")).click()'
        )
        await page.until(
            f"{ROWS} === 1 && document.querySelector('#q').value === 'train-000002/t3/0'"
        )
        await page.run('document.querySelector("#filters").reset()')
        await page.until(f"{ROWS} === 10")
        assert await choose(page, "low", "0.5") == 4
        assert await choose(page, "low", "") == 10
        assert await choose(page, "high", "0") == 4
        await page.run('document.querySelector("#filters").reset()')
        await page.until(f"{ROWS} === 10")
        labels = await page.run(
            '[...document.querySelector("#label").options].map((o) => o.textContent)'
        )
        assert labels == ["any time", "train-000001", "train-000002"]
        assert (
            await choose(
                page, "agent", await page.run('document.querySelector("#agent").options[2].value')
            )
            == 10
        )
        await page.call("Page.navigate", url="about:blank")
        await page.open(path.as_uri() + "#e=0:train-000002/t9/0")
        await page.until(f'{TITLE} === "train-000002/t9/0"')
        assert EVIL in await page.run('document.querySelector("#episode .bad").textContent')
        assert await page.run("document.title") == "run: run"
        assert (
            await page.run('document.querySelectorAll("#episode img, #episode script").length') == 0
        )
        await page.call("Page.navigate", url="about:blank")
        await page.open(path.as_uri() + "#q=task%203&outcome=right")
        await page.until(f"{ROWS} === 2")
        await page.call("Page.navigate", url="about:blank")
        await page.open(path.as_uri() + "#e=0:nobody")
        assert "no such episode" in await page.run('document.querySelector("#episode").textContent')

    look(work, tmp_path)


def test_operations_decisions_and_asides_are_readable(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", evil=EVIL))
    box = 'document.querySelector("#episode")'

    async def work(page: Browser) -> None:
        await page.open(path.as_uri())
        kinds = '[...document.querySelector("#kind").options].map((o) => o.value)'
        assert await page.run(kinds) == ["", "eval", "train", "trial", "aside"]
        select = 'document.querySelector("#kind")'
        await page.run(
            f'{select}.value = "aside"; {select}.dispatchEvent(new Event("input", {{bubbles: true}}))'
        )
        assert await page.run(ROWS) == 3 and await page.run("location.hash") == "#kind=aside"
        await page.run('document.querySelector("#rows a").click()')
        await page.until(f'{TITLE} === "aside-000001/0001-ab/0"')
        assert "step by step" in await page.run(f'{box}.querySelector(".said").textContent')
        await page.run(
            f'[...{box}.querySelectorAll("a")].find((a) => a.textContent.includes("follows")).click()'
        )
        await page.until(f'{TITLE} === "train-000001/t0/0"')
        assert "a0->b0: on (0.607)" in await page.run(f"{box}.textContent")
        rows = '[...document.querySelectorAll(".cell")].map((c) => [c.className, c.style.gridRowStart])'
        assert await page.run(rows) == [["cell l1", "2"], ["cell all", "3"], ["cell l2", "4"]]
        reads = '[...document.querySelectorAll(".reads")].map((r) => r.textContent)'
        assert await page.run(reads) == ["read first (turn 0)", "read majority (operation 1)"]
        await page.run(
            f'[...{box}.querySelectorAll("a")].find((a) => a.textContent.includes("followed")).click()'
        )
        await page.until(
            f'{ROWS} === 1 && document.querySelector("#q").value === "train-000001/t0/0"'
        )

    look(work, tmp_path)


@pytest.mark.parametrize("width", [390, 1280])
def test_values_fit_the_page_and_candidates_are_linked(tmp_path: Path, width: int) -> None:
    path = write_report(write_run(tmp_path / "run", edges=36, evil=EVIL))

    async def work(page: Browser) -> None:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        await page.call("Emulation.setDeviceMetricsOverride", **screen)
        await page.open(path.as_uri())
        assert await page.run("document.documentElement.scrollWidth") <= width
        assert await page.run('document.querySelectorAll(".heat rect").length') == 36 * 4
        await page.run('document.querySelector(".tree a.lost circle").parentNode.focus()')
        await page.press("Enter")
        await page.until('location.hash === "#c0-0-2"')
        entry = 'document.querySelector("details:target")'
        await page.until(f"{entry}.open")
        assert EVIL in await page.run(f"{entry}.textContent")
        assert await page.run(f'{entry}.querySelectorAll("img, script").length') == 0
        assert await page.run("document.title") == "search_prompts: run"

    look(work, tmp_path)


def test_ten_thousand_episodes_stay_small(run: Path, tmp_path: Path) -> None:
    with Store(run / "episodes", fsync=False) as store:
        store.extend([episode(3 + n // 1000, n) for n in range(10_000)])
    path = write_report(run)
    assert path.stat().st_size < 8 << 20

    async def work(page: Browser) -> None:
        await page.open(path.as_uri())
        assert (
            await page.run(ROWS) == 100
            and await page.run('document.querySelectorAll("*").length') < 3000
        )
        assert "10009 of 10009 episodes" in await page.run(
            'document.querySelector("#count").textContent'
        )
        assert "A sample: run: 10009 episodes, the whole text of 2000" in await page.run(
            'document.querySelector("#sampled").textContent'
        )
        await page.run('document.querySelector("#next").click()')
        assert (
            await page.run('document.querySelector("#where").textContent') == "101 to 200 of 10009"
        )

    look(work, tmp_path)


async def thumbs_are_given(page: Browser, run: Path) -> None:
    """Up in the list, down by a key for the open episode, and back again; none for what failed."""
    pressed = (
        '[...document.querySelectorAll("#rows tr")].map((row) => [row.querySelector("a").textContent,'
        ' [...row.querySelectorAll(".thumbs button")].map((b) => b.getAttribute("aria-pressed"))])'
    )

    async def standing() -> dict[str, list[str]]:
        return dict(await page.run(pressed))

    await page.until('document.querySelectorAll("#rows .thumbs button").length === 18')
    assert (await standing())["train-000002/t9/0"] == [], "it failed"
    button = '[...document.querySelectorAll("#rows tr")][0].querySelector(".thumbs button")'
    await page.run(f"{button}.click()")
    await page.until(f'{button}.getAttribute("aria-pressed") === "true"')
    assert await page.run("location.hash") == "#e=0:train-000001/t2/0", "no episode was opened"
    await page.press("d")
    await page.until('document.querySelector("#thumbs").textContent.includes("1 up, 1 down")')
    assert read_thumbs(run) == {"train-000001/t0/0": 1, "train-000001/t2/0": -1}
    await page.press("d")
    await page.until('document.querySelector("#thumbs").textContent.includes("1 up, 0 down")')
    assert read_thumbs(run) == {"train-000001/t0/0": 1}
    known = await standing()
    assert known["train-000001/t0/0"] == ["true", "false"]
    assert known["train-000001/t2/0"] == ["false", "false"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_three_groups_fit_every_screen(tmp_path: Path, dark: bool) -> None:
    """Long words of a model, wide tables and warnings scroll or break; the page does not move
    sideways."""
    folder = write_run(tmp_path / "run", evil=EVIL + "x" * 3000)
    (folder / "warnings.log").write_text("step 1: " + "y" * 3000 + "\n")
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    told = [{**row, "policies": {EVIL: {"entropy": row["step"], "clipped": 0.0}}} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    path = write_report(folder)
    heads = '[...document.querySelectorAll(".group > h2")].map((h) => h.textContent)'
    columns = 'getComputedStyle(document.querySelector(".sides")).gridTemplateColumns.split(" ")'

    async def work(page: Browser) -> None:
        await page.dark(dark)
        for width, sides in ((390, 1), (1440, 2)):
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
            await page.call("Emulation.setDeviceMetricsOverride", **screen)
            await page.open(path.as_uri())
            assert await page.run(heads) == [
                "Does it learn?",
                "Is it healthy?",
                "Where did time and tokens go?",
            ]
            await page.run(
                'document.querySelectorAll("details").forEach((d) => { d.open = true; })'
            )
            assert await page.run("document.documentElement.scrollWidth") <= width
            assert await page.run(f"{columns}.length") == sides
            assert await page.run('document.querySelector(".warnings li").scrollWidth') < width
            assert await page.run('document.querySelectorAll("main img").length') == 0
            background = await page.run("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(20, 23, 26)" if dark else "rgb(251, 251, 250)")

    look(work, tmp_path)


def test_a_running_run_is_followed_behind_its_token(run: Path, tmp_path: Path) -> None:
    async def go() -> None:
        follow = LiveReport([run], lambda policy, ids: [f"<{i}>" for i in ids], max_episodes=3)
        url = await follow.start()
        try:
            root = url.rsplit("/", 2)[0]
            async with aiohttp.ClientSession() as session:
                for path in (
                    "/",
                    "/wrong/",
                    "/wrong/version",
                    "/wrong/episode?name=0:train-000001/t0/0",
                ):
                    async with session.get(root + path) as reply:
                        assert reply.status == 404, path
                async with session.get(url + "episode?name=7:x") as reply:
                    assert reply.status == 404
                async with session.get(url) as reply:
                    assert (
                        reply.headers["Referrer-Policy"] == "no-referrer"
                        and "connect-src 'self'" in await reply.text()
                    )
            async with browser(tmp_path / "profile") as page:
                await page.open(url + "#e=0:train-000001/t2/0")
                await page.until(
                    'document.querySelector(".cell .said")?.textContent === "<1><2>"',
                    "an episode that is fetched",
                )
                assert await page.run(ROWS) == 9
                await page.until('document.querySelector("#live").textContent === "live"')
                with Store(run / "episodes") as store:
                    store.append(episode(2, 5))
                await page.until(f"{ROWS} === 10", "the new episode")
                assert await page.run("location.hash") == "#e=0:train-000001/t2/0"
                await thumbs_are_given(page, run)
                assert page.errors == []
        finally:
            await follow.close()

    asyncio.run(go())
