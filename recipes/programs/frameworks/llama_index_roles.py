"""Two steps of a LlamaIndex workflow, each with a model of its own."""

import asyncio
import json
import os
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step
from llama_index.llms.openai_like import OpenAILike


async def ask(role: str, text: str) -> str:
    llm = OpenAILike(
        model=role,
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
        is_chat_model=True,
    )
    reply = await llm.achat([ChatMessage(role, role="system"), ChatMessage(text, role="user")])
    return reply.message.content or ""


class Added(Event):
    text: str


class TwoRoles(Workflow):
    @step
    async def add_two(self, start: StartEvent) -> Added:
        third = start.prompt.split("+")[-1]
        return Added(text=await ask("first", start.prompt) + "+" + third)

    @step
    async def add_third(self, added: Added) -> StopEvent:
        return StopEvent(result=await ask("last", added.text))


async def main() -> str:
    workflow = TwoRoles(
        timeout=600
    )  # seconds; an agent's reply may wait for those of many episodes
    return str(await workflow.run(prompt=json.load(sys.stdin)["prompt"]))


print(asyncio.run(main()))
