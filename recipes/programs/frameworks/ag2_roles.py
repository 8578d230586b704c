"""Two agents of AG2."""

import asyncio
import json
import sys

from ag2 import Agent
from ag2.config import OpenAIConfig


async def ask(role: str, text: str) -> str:
    agent = Agent(role, role, config=OpenAIConfig(role))
    return (await agent.ask(text)).body or ""


async def solve(prompt: str) -> str:
    return await ask("last", await ask("first", prompt) + "+" + prompt.split("+")[-1])


print(asyncio.run(solve(json.load(sys.stdin)["prompt"])))
