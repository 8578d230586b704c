"""Two agents of Haystack."""

import json
import sys

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage


def ask(role: str, text: str) -> str:
    agent = Agent(chat_generator=OpenAIChatGenerator(model=role), system_prompt=role)
    return agent.run(messages=[ChatMessage.from_user(text)])["last_message"].text or ""


prompt = json.load(sys.stdin)["prompt"]
print(ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1]))
