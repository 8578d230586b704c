"""Two agents of Strands Agents; it streams."""

import json
import sys

from strands import Agent
from strands.models.openai import OpenAIModel


def ask(role: str, text: str) -> str:
    agent = Agent(model=OpenAIModel(model_id=role), system_prompt=role, callback_handler=None)
    return str(agent(text)).strip()


prompt = json.load(sys.stdin)["prompt"]
print(ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1]))
