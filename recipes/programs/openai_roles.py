"""Two roles with the plain `openai` client: as a command (`python openai_roles.py < task.json`) or
as a function (`main`)."""

import asyncio
import json
import sys
from typing import Any

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, role: str, text: str) -> str:
    reply = await client.chat.completions.create(
        model=role,
        messages=[{"role": "system", "content": role}, {"role": "user", "content": text}],
    )
    return reply.choices[0].message.content or ""


async def solve(client: AsyncOpenAI, prompt: str) -> str:
    return await ask(
        client, "last", await ask(client, "first", prompt) + "+" + prompt.split("+")[-1]
    )


async def main(task: Any, base_url: str, api_key: str) -> str:
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        return await solve(client, task.prompt)


if __name__ == "__main__":
    print(asyncio.run(solve(AsyncOpenAI(), json.load(sys.stdin)["prompt"])))
