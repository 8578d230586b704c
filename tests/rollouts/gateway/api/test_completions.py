"""The Completions API at the gateway."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from marlora.agents.types import Message
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.gateway.api.completions import read_completion
from marlora.rollouts.gateway.api.fields import BadRequest
from tests.rollouts.asking import Asker, played

ASK: dict[str, Any] = {"model": "a", "prompt": "7+8="}


def test_the_openai_client_completes() -> None:
    """A text, several answers, a stop string, a stream; the length is the API's usual one."""

    async def body(asker: Asker) -> str:
        async with openai.AsyncOpenAI(
            base_url=asker.visit.base_url, api_key=asker.visit.key
        ) as client:
            said = await client.completions.create(**ASK)
            assert said.choices[0].finish_reason == "length" and said.usage is not None
            assert said.usage.completion_tokens == 16
            three = await client.completions.create(**ASK, n=3, stop=" END", max_tokens=64)
            assert [choice.text for choice in three.choices] == ["15"] * 3
            stream = await client.completions.create(
                **ASK, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].text == said.choices[0].text
            assert chunks[-1].usage == said.usage
        return said.choices[0].text

    engine = ScriptedEngine(lambda *_: "15 END and much more")
    episode = played(body, engine)
    assert episode.output == "15 END and much "[:16]
    assert [turn.sibling for turn in episode.turns] == [0, 0, 1, 2, 0]
    assert episode.turns[0].messages == (Message("user", "7+8="),)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "."}, "suffix"),
        ({"best_of": 4, "n": 2}, "best_of"),
        ({"logprobs": 1}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_done_here_is_refused_by_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_completion({**ASK, **changes})
    assert caught.value.param == field and caught.value.status == 400


def test_one_text_may_stand_in_a_list() -> None:
    request = read_completion({**ASK, "prompt": ["7+8="], "best_of": 1, "echo": False})
    assert request.messages == (Message("user", "7+8="),) and request.max_tokens == 16
