"""Token fidelity: a call through the gateway is recorded as a direct call of the engine would be.

Two witnesses. The engine itself, asked again for each recorded turn with its prompt and sampling,
gives the same completion; and the same conversation, played by agents of ours without the gateway,
leaves the same turns.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.concurrency import gather
from marlora.agents.seeds import derive_seed
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.tools.tools import calculator
from marlora.agents.types import AgentSpec, Message, Sampling, Task, Turn
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import samples
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.rollouts.asking import TASK, Asker, played

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "7+8"}}\n</tool_call>'
# answers that would not come back the same if their text were encoded again
ODD = ["plain", "<|assistant|>forged<|end|>", "\U0001f642\U0001f643", "", "x\ufffdy", " \n "]
SAMPLING = Sampling(max_tokens=160)
TOOL = calculator.schema()


def odd(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """An answer that follows from all that was asked; the first one of an agent with tools calls
    one."""
    if "# Tools" in prompt and "<tool_response>" not in prompt.partition("# Tools")[2]:
        return CALL
    return ODD[derive_seed(prompt, sampling.seed, k) % len(ODD)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    folder = tmp_path_factory.mktemp("model")
    tiny_random_model(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**settings, "max_position_embeddings": 4096})
    )  # room for schemas in bytes
    engine = TransformersEngine(folder, threads=1)
    yield engine
    asyncio.run(engine.close())


def answered(reply: Any) -> dict[str, Any]:
    return reply["choices"][0]["message"]


async def chats(asker: Asker) -> None:
    """Two agents, each with a chat that goes on; one call is streamed."""
    first = {"role": "user", "content": "7+8?"}
    said = answered(await asker.ask("a", first))
    await asker.post(
        "/chat/completions",
        {"model": "b", "messages": [{"role": "user", "content": "go"}], "stream": True},
    )
    await asker.ask("a", first, said, "and now?")


async def parallel(asker: Asker) -> None:
    """Three calls at once and four answers to one, then one of the four is gone on with."""
    await asyncio.gather(*(asker.ask("a", f"number {i}") for i in range(3)))
    reply = await asker.ask("b", "pick", n=4)
    await asker.ask("b", "pick", reply["choices"][2]["message"], "why?")


async def tools(asker: Asker) -> None:
    system, ask = {"role": "system", "content": "Count."}, {"role": "user", "content": "7+8?"}
    said = answered(await asker.ask("a", system, ask, tools=[TOOL]))
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "15"}
        for call in said.get("tool_calls", ())
    ]
    await asker.ask("a", system, ask, said, *(results or ["go on"]), tools=[TOOL])


async def retries(asker: Asker) -> None:
    """Each call is sent twice: by key, by header, and because the first try broke off."""
    for headers in ({"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}):
        assert await asker.ask("a", f"by {headers}", headers=headers) == await asker.ask(
            "a", f"by {headers}", headers=headers
        )
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asker.ask("a", "broken off"), 0.001)
    await asker.ask("a", "broken off")


SCENES = [chats, parallel, tools, retries]


def direct(engine: Any, turn: Turn, n: int) -> Any:
    made = asyncio.run(
        engine.generate(turn.prompt_ids, ModelRef(turn.policy, turn.version), turn.sampling, n)
    )
    return made[turn.sibling]


def check(engine: Any, episode: Episode, folder: Path) -> None:
    """Every turn is what a direct call gives; the prompt is what the chat's messages encode to; the
    store keeps it; training reads it."""
    assert episode.turns
    for turn in episode.turns:
        n = sum(t.index == turn.index for t in episode.turns)
        again = direct(engine, turn, n)
        assert replace(again, logprobs=()) == replace(turn.completion, logprobs=())
        assert again.logprobs == pytest.approx(
            turn.logprobs, abs=1e-4
        )  # batches of another width round otherwise
        before = [
            t
            for t in episode.turns
            if (*t.messages, Message("assistant", t.text)) == turn.messages[: len(t.messages) + 1]
        ]
        chat = [
            t
            for t in before
            if t.agent == turn.agent
            and t.prompt_ids + t.token_ids == turn.prompt_ids[: len(t.prompt_ids + t.token_ids)]
        ]
        assert len(turn.messages) <= 2 or chat or turn.messages[-2].role == "system"
        assert turn.prompt_ids == engine.tokens.prompt(turn.messages, chat[-1] if chat else None)
    with Store(folder) as store:
        store.append(episode)
    (stored,) = Store(folder).read()
    assert stored == episode
    made, dropped = samples(
        [episode],
        {(episode.id, t.index, t.sibling): 1.0 for t in episode.turns},
        {"a": "a", "b": "b"},
    )
    assert not dropped
    trained = sorted(
        i for sample in made for i, m in zip(sample.ids, sample.mask, strict=True) if m
    )
    assert trained == sorted(i for turn in episode.turns for i in turn.token_ids)


@pytest.mark.parametrize("scene", SCENES)
def test_the_record_is_what_a_direct_call_gives(scene: Any, tmp_path: Path) -> None:
    engine = ScriptedEngine(odd, latency=0.02)
    episode = played(scene, engine, sampling=SAMPLING)
    asked = [(ids, ref, sampling) for ids, ref, sampling, _ in engine.calls]
    taken = {
        t.index: (t.prompt_ids, ModelRef(t.policy, t.version), t.sampling) for t in episode.turns
    }
    assert asked == [
        taken[index] for index in sorted(taken)
    ]  # one engine call a turn, in the order of arrival
    check(engine, episode, tmp_path)


@pytest.mark.parametrize("scene", SCENES)
def test_the_same_with_a_model(scene: Any, real: TransformersEngine, tmp_path: Path) -> None:
    check(real, played(scene, real, sampling=replace(SAMPLING, max_tokens=24)), tmp_path)


@dataclass
class Chats(System):
    async def run(self, task: Task, team: Team) -> str:
        await team["a"].reply("7+8?")
        await team["b"].reply("go")
        await team["a"].reply("and now?")
        return ""


@dataclass
class Parallel(System):
    async def run(self, task: Task, team: Team) -> str:
        await gather(team["a"].fresh().reply(f"number {i}") for i in range(3))
        await team["b"].reply("pick", n=4, choose=lambda turns: 2)
        await team["b"].reply("why?")
        return ""


@dataclass
class Tools(System):
    async def run(self, task: Task, team: Team) -> str:
        await team["a"].reply("7+8?")
        return ""


TWINS: list[tuple[Any, type[System], AgentSpec]] = [
    (chats, Chats, AgentSpec("a")),
    (parallel, Parallel, AgentSpec("a")),
    (tools, Tools, AgentSpec("a", prompt="Count.", tools=("calculator",))),
]


@pytest.mark.parametrize(("scene", "native", "spec"), TWINS)
def test_agents_without_a_door_leave_the_same_turns(
    scene: Any, native: type[System], spec: AgentSpec
) -> None:
    engine = ScriptedEngine(odd)
    found = {name: EngineCompleter(engine, engine.tokens, name) for name in "ab"}
    without = asyncio.run(
        EpisodeRunner(native([spec, "b"]), found, sampling=SAMPLING).play(EpisodeRequest(TASK, "g"))
    )
    through = played(scene, ScriptedEngine(odd), sampling=SAMPLING)
    facts = [
        [(t.index, t.agent, t.sibling, t.taken, t.sampling, t.completion) for t in each.turns]
        for each in (without, through)
    ]
    assert without.error is None and len(facts[0]) > 1 and facts[0] == facts[1]
