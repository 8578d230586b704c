"""Two agents of agno."""

import json
import os
import sys

from agno.agent import Agent
from agno.models.openai import OpenAIChat


def ask(role: str, text: str) -> str:
    model = OpenAIChat(id=role, base_url=os.environ["OPENAI_BASE_URL"])
    return str(Agent(model=model, system_message=role, telemetry=False).run(text).content)


prompt = json.load(sys.stdin)["prompt"]
print(ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1]))
