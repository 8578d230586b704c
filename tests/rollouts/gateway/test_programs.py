"""Programs of one's own as systems: functions, commands within bounds, results, rewards, and what
does not leak."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.system import System, build_system
from marlora.agents.types import SettingError, Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeLimits, EpisodeRequest, episode_requests
from marlora.rollouts.evaluation.accuracy import evaluation
from marlora.rollouts.gateway.process import ProcessLimits, ProgramError, run_command
from marlora.rollouts.gateway.programs import Command, Function
from marlora.rollouts.rewards.builtin import resolve_rewards
from marlora.rollouts.types import Episode
from tests.conformance import check_system
from tests.rollouts.asking import TASK, Asker, play, played, rollouts

TOKEN = "a-reward-token-of-24-chars"

# The client of a program that has nothing but Python: asks agent `a`, then `b` for what `a` said.
SCRIPT = """
import json, os, sys, urllib.request
def ask(model, text):
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    head = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, head)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
"""


async def two(task: Task, base_url: str, api_key: str) -> str:
    """A function program: `a` reads the task, `b` what `a` said."""
    assert task.answer is None and "_hidden" not in task.meta
    said = task.prompt
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api_key}"}) as session:
        for model in ("a", "b"):
            body = {"model": model, "messages": [{"role": "user", "content": said}]}
            async with session.post(f"{base_url}/chat/completions", json=body) as reply:
                said = (await reply.json())["choices"][0]["message"]["content"]
    return said


def blocking(task: Task, base_url: str, api_key: str) -> str:
    return ""


def function(**settings: Any) -> Function:
    return Function(["a", "b"], main=f"{__name__}:two", **settings)


def command(script: str, **settings: Any) -> Command:
    return Command(["a", "b"], command=[sys.executable, "-c", SCRIPT + script], **settings)


def one(
    system: System, rewards: Any = (), engine: Any = None, limits: EpisodeLimits = EpisodeLimits()
) -> Episode:
    runner = rollouts(engine or ScriptedEngine(lambda *_: "15"), system, rewards)
    runner = dataclasses.replace(runner, limits=limits)
    return asyncio.run(runner.play(EpisodeRequest(TASK, "g")))


# functions


def test_a_function_is_played_like_any_system() -> None:
    system = build_system(
        {
            "class": "marlora.rollouts.gateway.programs:Function",
            "agents": ["a", "b"],
            **function().arguments(),
        }
    )
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: f"{ref.policy}{sampling.seed}")
    first, again = (one(system, engine=engine) for _ in range(2))
    assert (
        first.error is None
        and [t.agent for t in first.turns] == ["a", "b"]
        and first.turns[1].reads == (0,)
    )
    assert (
        first.turns == again.turns and first.output == again.output
    )  # the seed fixes a program that asks in a fixed order
    player = rollouts(engine, system)
    replayed = asyncio.run(player.play(EpisodeRequest(TASK, "g"), given=first.turns[:1]))
    assert (
        replayed.turns == first.turns and len(engine.calls) == 5
    )  # one of the third episode's turns was not asked for


def test_a_program_that_asks_in_a_fixed_order_keeps_what_every_system_must() -> None:
    """Repeatable, replayable turn for turn, what it was shown on record, no gold answer seen,
    rebuilt from its settings."""
    check_system(function(), [TASK, Task("t2", "3+3?", "gold-6")])


def test_many_episodes_at_once_and_greedy_evaluation() -> None:
    tasks = [Task(f"t{i}", str(i), str(i)) for i in range(40)]
    engine = ScriptedEngine(
        lambda prompt, *_: prompt.rpartition("<|user|>")[2].partition("<|end|>")[0], latency=0.01
    )
    player = rollouts(engine, function(), resolve_rewards(["exact"])).greedy()

    async def collected() -> list[Episode]:
        return [e async for e in player.collect(episode_requests(tasks, label="eval"))]

    episodes = asyncio.run(collected())
    assert evaluation(tasks, episodes, "exact").accuracy == 1.0 and {
        t.sampling.temperature for e in episodes for t in e.turns
    } == {0.0}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"main": "nowhere"}, r"main: expected module:function, got 'nowhere'"),
        ({"main": "marlora.nowhere:main"}, r"main 'marlora.nowhere:main': cannot be imported"),
        (
            {"main": f"{__name__}:blocking"},
            r"expected an async function; a program that blocks is run as a Command",
        ),
        ({"models": {"gpt": "c"}}, r"models.gpt: no agent 'c'; expected one of a, b"),
        ({"reward_wait": -1.0}, r"reward_wait, call_timeout: expected seconds, got -1.0 and 600.0"),
        ({"call_timeout": 0.0}, r"reward_wait, call_timeout: expected seconds"),
        (
            {"agents": [{"name": "a", "tools": ["calculator"]}]},
            r"agents.a.tools: a program brings its own tools",
        ),
        ({"host": "0.0.0.0"}, r"host '0.0.0.0': name the address"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Function(**{"agents": ["a", "b"], "main": f"{__name__}:two", **settings})


# commands


def test_a_command_reads_its_task_and_asks_by_its_environment() -> None:
    script = """
task = json.load(sys.stdin)
assert "answer" not in task and "_hidden" not in task["meta"], task
print("thinking aloud", file=sys.stderr)
print(ask("b", ask("a", task["prompt"]) + "+" + str(task["meta"]["c"])))
"""
    episode = one(command(script))
    assert (episode.error, episode.output) == (None, "15")
    assert [(t.agent, t.messages[0].content) for t in episode.turns] == [
        ("a", "7+8+5"),
        ("b", "15+5"),
    ]


def test_only_named_variables_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MARLORA_REWARD_TOKEN", TOKEN)
    monkeypatch.setenv("MINE", "passed")
    script = "print(json.dumps({'output': json.dumps(sorted(os.environ))}))"
    seen = json.loads(str(one(command(script, environment=["PATH", "MINE"])).output))
    assert set(seen) - {"LC_CTYPE", "PWD", "SHLVL", "_"} == {
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_BASE_URL",
        "MARLORA_EPISODE",
        "MINE",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "PATH",
        "TMPDIR",
    }
    with pytest.raises(SettingError, match="MARLORA_REWARD_TOKEN is not for programs"):
        command("", environment=["PATH", "MARLORA_REWARD_TOKEN"])


@pytest.mark.parametrize(
    ("script", "settings", "problem"),
    [
        ("sys.exit('no luck')", {}, r"exit code 1: no luck"),
        ("os.kill(os.getpid(), 9)", {}, r"ended by signal 9: nothing on stderr"),
        (
            "import time; time.sleep(60)",
            {"timeout": 0.5},
            r"not done after 0.5 s \(system.timeout\)",
        ),
        ("x = bytearray(3 << 30)", {"memory": 2048}, r"MemoryError"),
        ("while True: pass", {"cpu_seconds": 1, "timeout": 60.0}, r"ended by signal"),
        ("print('x' * 5_000_000)", {}, r"the program wrote more than 4194304 bytes to stdout"),
        (
            "print(json.dumps({'output': 1, 'reward': 'good'}))",
            {},
            r"the program returned a reward: expected a finite number",
        ),
    ],
)
def test_a_command_that_fails_is_a_failed_episode(
    script: str, settings: dict[str, Any], problem: str
) -> None:
    episode = one(command(script, **settings), resolve_rewards(["exact"]))
    assert episode.stop_reason == "error" and episode.output is None and episode.rewards == ()
    assert re.search(problem, str(episode.error)), episode.error


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [
        ("no luck", "no luck"),
        ("\n\n", "nothing on stderr"),
        (
            "Traceback:\n  line 3\nValueError: no number in 'eh'\n\n",
            "ValueError: no number in 'eh'\nstderr before it:\nTraceback:\n  line 3",
        ),
    ],
)
def test_the_last_line_of_stderr_stands_first(stderr: str, shown: str) -> None:
    episode = one(command(f"sys.stderr.write({stderr!r}); sys.exit(3)"))
    assert str(episode.error).partition("exit code 3: ")[2].startswith(shown)


RAISES = """
reply = ask("a", json.load(sys.stdin)["prompt"])
raise ValueError(f"no number in {reply!r}")
"""


async def raises(task: Task, base_url: str, api_key: str) -> str:
    await two(task, base_url, api_key)
    raise ValueError("no number")


class Raises(Chain):
    """A system, no program, that raises after its turns."""

    async def run(self, task: Task, team: Any) -> str:
        await super().run(task, team)
        raise ValueError("no number")


def failing(kind: str, **settings: Any) -> System:
    if kind == "command":
        return command(RAISES, **settings)
    if kind == "function":
        return Function(["a", "b"], main=f"{__name__}:raises", **settings)
    return Raises(["a", "b"])


@pytest.mark.parametrize("kind", ["command", "function", "system"])
def test_on_error_zero_gives_the_turns_that_were_taken_reward_0(kind: str) -> None:
    rewards = resolve_rewards(["exact", "length"])
    dropped = one(failing(kind), rewards)
    assert dropped.failed and "no number" in str(dropped.error) and dropped.rewards == ()
    zero = one(failing(kind), rewards, limits=EpisodeLimits(on_error="zero"))
    assert zero.turns == dropped.turns and zero.turns
    assert (zero.error, zero.stop_reason, zero.failed, zero.output) == (None, "error", True, "")
    assert [(r.name, r.value) for r in zero.rewards] == [("exact", 0.0), ("length", 0.0)]
    assert all("on_error: zero" in r.text and "no number" in r.text for r in zero.rewards)


def test_a_programs_own_on_error_wins_over_the_runs() -> None:
    rewards = resolve_rewards(["exact"])
    assert one(failing("command", on_error="zero"), rewards).error is None
    limits = EpisodeLimits(on_error="zero")
    assert one(failing("function", on_error="drop"), rewards, limits=limits).error is not None
    with pytest.raises(SettingError, match="on_error: expected drop or zero, got 'nil'"):
        failing("function", on_error="nil")


def test_a_program_that_fails_before_it_asks_has_nothing_to_train() -> None:
    limits = EpisodeLimits(on_error="zero")
    episode = one(command("sys.exit('broken')"), resolve_rewards(["exact"]), limits=limits)
    assert episode.failed and "broken" in str(episode.error) and episode.rewards == ()


def test_a_command_that_is_not_there_and_settings_of_commands() -> None:
    episode = one(Command(["a"], command=["no-such-program"]))
    assert "exit code 127" in str(episode.error) and "no-such-program" in str(episode.error)
    for settings, problem in (
        ({"command": "python x.py"}, "command: expected a list"),
        ({"command": []}, "command: expected a list"),
        ({"environment": "PATH"}, "environment: expected a list"),
        ({"timeout": 0.0}, "expected a timeout above 0"),
        ({"folder": "/no/such/folder"}, "no such folder"),
    ):
        with pytest.raises(SettingError, match=problem):
            Command(**{"agents": ["a"], "command": ["true"], **settings})


def test_what_a_command_starts_ends_with_it(tmp_path: Path) -> None:
    """A child left behind holds the pipes open; neither it nor its files in TMPDIR outlive the
    episode."""
    script = f"""
import subprocess, tempfile
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "facts")!r}, "w").write(json.dumps([child.pid, tempfile.mkdtemp()]))
print("done")
"""
    episode = one(command(script))
    pid, folder = json.loads((tmp_path / "facts").read_text())
    assert episode.output == "done" and not Path(folder).exists()
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_cancelled_command_is_ended() -> None:
    async def main() -> int:
        task = asyncio.create_task(
            run_command(["sleep", "600"], "", dict(os.environ), None, ProcessLimits(600))
        )
        await asyncio.sleep(0.3)
        children = [
            int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        ]
        mine = [p for p in children if "sleep" in Path(f"/proc/{p}/cmdline").read_text()]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(mine) == 1
        return mine[0]

    assert not alive(asyncio.run(main()))


def test_a_command_that_ignores_the_wish_to_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlora.rollouts.gateway.process.GRACE", 0.2)
    script = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    with pytest.raises(ProgramError, match="not done after 1 s"):
        asyncio.run(
            run_command(
                [sys.executable, "-c", script], "", dict(os.environ), None, ProcessLimits(1.0)
            )
        )
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


# rewards


def test_a_returned_reward_counts_if_the_run_asks_for_it() -> None:
    script = (
        'said = ask("a", "x")\nprint("chatter")\nprint(json.dumps({"output": said, "reward":'
        " 0.25}))"
    )
    (reward,) = one(command(script), resolve_rewards(["returned"])).rewards
    assert (reward.name, reward.value, reward.agent, reward.source) == (
        "returned",
        0.25,
        None,
        "returned",
    )
    (exact,) = one(command(script), resolve_rewards(["exact"])).rewards
    assert (exact.name, exact.value) == (
        "exact",
        0.0,
    )  # the program does not grade itself unless asked to
    (silent,) = one(command('print(ask("a", "x"))'), resolve_rewards(["returned"])).rewards
    assert math.isnan(silent.value) and silent.text.endswith("no reward was returned")


def test_returned_rewards_may_be_about_agents_and_turns() -> None:
    async def body(asker: Asker) -> Any:
        await asker.say("a", "x", n=2)
        told = [
            {"value": 1, "name": "style", "agent": "b"},
            {"value": 0.5, "turn": 0, "sibling": 1, "text": "brief"},
        ]
        return {"output": "done", "rewards": told}

    style, brief = played(body, rewards=resolve_rewards(["returned"])).rewards
    assert (style.name, style.agent, style.turn, style.value) == ("style", "b", None, 1.0)
    assert (brief.name, brief.agent, brief.turn, brief.sibling, brief.text) == (
        "returned",
        "a",
        0,
        1,
        "brief",
    )


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        (math.nan, "expected a finite number"),
        (True, "expected a finite number"),
        ({"value": 1, "agent": "c"}, "reward.agent 'c': no such agent"),
        ({"value": 1, "turn": 9}, "reward.turn 9: the episode has no such turn"),
        ({"value": 1, "turn": 0, "sibling": 5}, "reward.sibling 5"),
        ({"value": 1, "points": 2}, "reward.points: not understood"),
    ],
)
def test_rewards_that_cannot_be_read(told: Any, problem: str) -> None:
    async def body(asker: Asker) -> Any:
        await asker.say("a", "x")
        return {"output": "", "reward": told}

    assert problem in str(play(body).error)


def test_a_posted_reward_needs_a_token_that_the_program_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MARLORA_REWARD_TOKEN", TOKEN)
    refused: list[int] = []

    async def body(asker: Asker) -> str:
        url = asker.visit.base_url.removesuffix("/v1") + "/rewards"
        await asker.say("a", "x")
        for key in (asker.visit.key, ""):
            refused.append((await asker.post(url, 1.0, key=key))[0])
        refused.append(
            (await asker.post("/chat/completions", {"model": "a", "messages": []}, key=TOKEN))[0]
        )

        async def scorer() -> None:
            await asyncio.sleep(0.2)
            async with aiohttp.ClientSession() as session:
                assert (
                    await Asker(asker.visit, session).post(
                        url, {"value": 0.75, "turn": 0}, key=TOKEN
                    )
                )[0] == 200

        scorers.append(asyncio.create_task(scorer()))
        return "done"

    scorers: list[asyncio.Task[None]] = []
    episode = played(body, rewards=resolve_rewards(["posted"]), program={"reward_wait": 30.0})
    assert refused == [401, 401, 401]
    assert [(r.name, r.value, r.agent, r.turn, r.source) for r in episode.rewards] == [
        ("posted", 0.75, "a", 0, "posted")
    ]


def test_without_a_token_nobody_posts_and_a_short_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(asker: Asker) -> str:
        url = asker.visit.base_url.removesuffix("/v1") + "/rewards"
        status, error = await asker.post(url, 1.0, key="")
        assert status == 403 and "set MARLORA_REWARD_TOKEN" in error["error"]["message"]
        return "done"

    monkeypatch.delenv("MARLORA_REWARD_TOKEN", raising=False)
    played(body)
    monkeypatch.setenv("MARLORA_REWARD_TOKEN", "short")
    with pytest.raises(SettingError, match="at least 16 characters expected, got 5"):
        play(body)


def test_a_reward_that_never_comes_is_a_failed_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(asker: Asker) -> str:
        return await asker.say("a", "x")

    episode = play(body, rewards=resolve_rewards(["posted"]), program={"reward_wait": 0.1})
    assert episode.stop_reason == "error" and "no reward was posted in 0.1 s" in str(episode.error)


def test_programs_are_systems() -> None:
    assert (
        issubclass(Command, System)
        and Command(["a"], command=["true"]).arguments()["timeout"] == 600.0
    )
