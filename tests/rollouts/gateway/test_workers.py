"""Commands that play many tasks each: few processes, failures that end one episode alone, nothing
left behind."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.system import build_system
from marlora.agents.types import SettingError, Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeRequest
from marlora.rollouts.gateway.workers import Workers
from marlora.rollouts.types import Episode
from tests.repository import ROOT
from tests.rollouts.asking import rollouts

# A program that has nothing but Python: agent `a` reads the task; what to do stands in the prompt.
SCRIPT = """
import json, os, sys, time, urllib.request
print("import of everything, once")
for line in sys.stdin:
    order = json.loads(line)
    task = order["task"]
    assert "answer" not in task and "OPENAI_API_KEY" not in os.environ
    if task["prompt"] == "die":
        sys.exit("no more")
    if task["prompt"] == "hang":
        time.sleep(600)
    if task["prompt"] == "long":
        print("x" * (5 << 20), flush=True)
    if task["prompt"] == "fail":
        print(json.dumps({"error": "cannot do this one"}), flush=True)
        continue
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": task["prompt"]}]})
    head = {"Authorization": "Bearer " + order["api_key"], "Content-Type": "application/json"}
    request = urllib.request.Request(order["base_url"] + "/chat/completions", body.encode(), head)
    said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    print("noise", json.dumps({"not": "a result"}))
    print(json.dumps({"note": "nor this"}))
    print(json.dumps({"output": f"{said} by {os.getpid()}"}), flush=True)
"""


def system(**settings: Any) -> Workers:
    return Workers(["a"], command=[sys.executable, "-c", SCRIPT], **settings)


def play(made: Workers, *prompts: str, at_once: bool = True) -> list[Episode]:
    runner = rollouts(ScriptedEngine(lambda prompt, *_: "15"), made)

    async def one(number: int, prompt: str) -> Episode:
        return await runner.play(EpisodeRequest(Task(f"t{number}", prompt, "gold"), f"g{number}"))

    async def all_of_them() -> list[Episode]:
        played = [one(number, prompt) for number, prompt in enumerate(prompts)]
        if at_once:
            return list(await asyncio.gather(*played))
        return [await each for each in played]

    return asyncio.run(all_of_them())


def pids(episodes: list[Episode]) -> list[int]:
    return [int(str(e.output).rpartition(" ")[2]) for e in episodes if e.error is None]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_process_plays_many_tasks_and_ends_with_the_last() -> None:
    episodes = play(system(workers=2), *"abcdefgh")
    assert [e.error for e in episodes] == [None] * 8
    assert [str(e.output).startswith("15 by ") for e in episodes] == [True] * 8
    assert len(set(pids(episodes))) == 2 and all(map(gone, pids(episodes)))
    assert [[turn.agent for turn in e.turns] for e in episodes] == [["a"]] * 8


def test_where_nothing_is_played_nothing_lives() -> None:
    one, two = play(system(workers=2), "a", "b", at_once=False)
    assert pids([one]) != pids([two]) and gone(pids([one])[0])


def test_a_failure_ends_its_episode_alone() -> None:
    prompts = ["a", "die", "b", "fail", "c", "long", "d"]
    made = system(workers=1)
    episodes = play(made, *prompts)
    told = {p: e.error for p, e in zip(prompts, episodes, strict=True) if e.error is not None}
    assert set(told) == {"die", "fail", "long"}
    assert "exit code 1: no more" in told["die"] and "cannot do this one" in told["fail"]
    assert "a line of more than" in told["long"]
    a, b, c, d = pids(episodes)
    assert a != b == c != d, "an error that is told keeps the process, an end does not"
    assert not made._pools


def test_a_process_that_is_not_done_in_time_is_ended() -> None:
    start = time.monotonic()
    hung, fine = play(system(workers=1, timeout=5.0), "hang", "a")
    assert "not done after 5 s (system.timeout)" in str(hung.error) and fine.error is None
    assert time.monotonic() - start < 300


def test_an_episode_that_is_called_off_ends_its_process(tmp_path: Path) -> None:
    noted = (
        f"import os, pathlib; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    )
    command = [sys.executable, "-c", f"{noted}\n{SCRIPT}"]
    made = Workers(["a"], command=command, workers=1)
    runner = rollouts(ScriptedEngine(lambda prompt, *_: "15"), made)

    async def called_off() -> None:
        task = asyncio.create_task(runner.play(EpisodeRequest(Task("t", "hang", ""), "g")))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="utf-8"):
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(called_off())
    assert gone(int((tmp_path / "pid").read_text(encoding="utf-8"))) and not made._pools


def test_it_is_named_by_settings_and_asks_for_trust() -> None:
    named = {
        "class": "marlora.rollouts.gateway.workers:Workers",
        "agents": ["a"],
        "command": ["python", "x.py"],
        "workers": 3,
    }
    made = build_system(named)
    assert isinstance(made, Workers) and made.workers == 3
    with pytest.raises(SettingError, match="workers: expected a whole number of at least 1"):
        system(workers=0)


def test_the_example_with_the_openai_client_is_a_worker() -> None:
    script = ROOT / "recipes" / "programs" / "openai_worker.py"
    made = Workers(["first", "last"], command=[sys.executable, str(script)], workers=1)
    for episode in play(made, "1+2", "3+4"):
        assert episode.error is None and episode.output == "15"
        assert [turn.agent for turn in episode.turns] == ["first", "last"]
