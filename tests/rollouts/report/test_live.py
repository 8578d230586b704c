"""The live report's server: nothing without its token, and thumbs that are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.episodes.thumbs import read_thumbs
from marlora.rollouts.report.live import MAX_THUMB, LiveReport
from marlora.rollouts.types import Episode

TRAIN, HELD_OUT, FAILED, CHILD = (
    "train-000001/t/0",
    f"eval-{'a' * 16}/t/0",
    "train-000001/t/1",
    "train-000001/t/0/mend/0",
)


def episode(id: str, **more: Any) -> Episode:
    turn = Turn(0, "solver", (Message("user", "?"),), text="7")
    group = id.rpartition("/")[0]
    rewards = (Reward("exact", 1.0),)
    return Episode(id, group, Task("t", "?"), step=1, turns=(turn,), rewards=rewards, **more)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rewards": ["exact"]}))
    with Store(tmp_path / "episodes", fsync=False) as store:
        store.append(episode(TRAIN))
        store.append(episode(HELD_OUT, kind="eval", split="eval"))
        store.append(episode(FAILED, error="boom", stop_reason="error"))
        store.append(episode(CHILD, parent=TRAIN))
    return tmp_path


def serve(run: Path, work: Callable[[aiohttp.ClientSession, str], Awaitable[None]]) -> None:
    async def go() -> None:
        follow = LiveReport([run])
        url = await follow.start()
        try:
            async with aiohttp.ClientSession() as session:
                async with session.get(url) as reply:
                    assert reply.status == 200 and "thumb up" in await reply.text()
                await work(session, url)
        finally:
            await follow.close()

    asyncio.run(go())


def test_a_thumb_is_kept_and_told(run: Path) -> None:
    async def work(session: aiohttp.ClientSession, url: str) -> None:
        for thumb, standing in ((1, {f"0:{TRAIN}": 1}), (-1, {f"0:{TRAIN}": -1}), (0, {})):
            sent = {"name": f"0:{TRAIN}", "thumb": thumb}
            async with session.post(url + "thumb", json=sent) as reply:
                assert reply.status == 200 and await reply.json() == standing
            async with session.get(url + "thumbs") as reply:
                assert await reply.json() == standing
            assert list(read_thumbs(run).values()) == list(standing.values())

    serve(run, work)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"json": {"name": f"0:{HELD_OUT}", "thumb": 1}}, 400),
        ({"json": {"name": f"0:{FAILED}", "thumb": 1}}, 400),
        ({"json": {"name": f"0:{CHILD}", "thumb": 1}}, 400),
        ({"json": {"name": "0:../../x", "thumb": 1}}, 400),
        ({"json": {"name": f"1:{TRAIN}", "thumb": 1}}, 400),
        ({"json": {"name": [TRAIN], "thumb": 1}}, 400),
        ({"json": {"name": f"0:{TRAIN}", "thumb": 2}}, 400),
        ({"json": {"name": f"0:{TRAIN}", "thumb": True}}, 400),
        ({"json": {"name": f"0:{TRAIN}"}}, 400),
        ({"json": [1]}, 400),
        ({"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": f'{{"name": "0:{TRAIN}", "thumb": 1}}'}, 400),  # as a form of another page would
        ({"json": {"name": "x" * MAX_THUMB, "thumb": 1}}, 413),
    ],
)
def test_what_is_no_thumb_is_refused_and_nothing_written(
    run: Path, sent: dict[str, Any], status: int
) -> None:
    async def work(session: aiohttp.ClientSession, url: str) -> None:
        async with session.post(url + "thumb", **sent) as reply:
            assert reply.status == status
        assert not (run / "thumbs.jsonl").exists()

    serve(run, work)


def test_without_the_token_there_is_nothing(run: Path) -> None:
    async def work(session: aiohttp.ClientSession, url: str) -> None:
        root, wrong = url.rsplit("/", 2)[0], {"name": f"0:{TRAIN}", "thumb": 1}
        for path in ("/", "/thumb", "/wrong/thumb"):
            async with session.post(root + path, json=wrong) as reply:
                assert reply.status in (404, 405)
        async with session.get(root + "/wrong/thumbs") as reply:
            assert reply.status == 404
        assert not (run / "thumbs.jsonl").exists()

    serve(run, work)
