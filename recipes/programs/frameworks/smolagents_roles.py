"""Two models of smolagents. Its agents ask for code or tool calls in a form of their own, which a
small model cannot keep to, so the roles are asked as models."""

import json
import os
import sys

from smolagents import OpenAIModel


def ask(role: str, text: str) -> str:
    model = OpenAIModel(
        role, api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
    )
    reply = model([{"role": "system", "content": role}, {"role": "user", "content": text}])
    return str(reply.content or "")


prompt = json.load(sys.stdin)["prompt"]
print(ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1]))
