"""Two agents of Pydantic AI."""

import json
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel


def ask(role: str, text: str) -> str:
    return Agent(OpenAIChatModel(role), system_prompt=role).run_sync(text).output


prompt = json.load(sys.stdin)["prompt"]
print(ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1]))
