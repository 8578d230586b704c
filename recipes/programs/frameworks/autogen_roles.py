"""Two agents of AutoGen."""

import asyncio
import json
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelFamily, ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient

PLAIN = ModelInfo(
    vision=False,
    function_calling=False,
    json_output=False,
    structured_output=False,
    family=ModelFamily.UNKNOWN,
)


async def ask(role: str, text: str) -> str:
    client = OpenAIChatCompletionClient(model=role, model_info=PLAIN)
    result = await AssistantAgent(role, client, system_message=role).run(task=text)
    return str(result.messages[-1].content)


async def solve(prompt: str) -> str:
    return await ask("last", await ask("first", prompt) + "+" + prompt.split("+")[-1])


print(asyncio.run(solve(json.load(sys.stdin)["prompt"])))
