"""Two roles with the plain `openai` client, as a worker: one process that plays many tasks, so that
it is imported once (`marlora.rollouts.gateway.workers:Workers`)."""

import json
import sys

from openai import OpenAI


def ask(client: OpenAI, role: str, text: str) -> str:
    reply = client.chat.completions.create(
        model=role,
        messages=[{"role": "system", "content": role}, {"role": "user", "content": text}],
    )
    return reply.choices[0].message.content or ""


def solve(client: OpenAI, prompt: str) -> str:
    return ask(client, "last", ask(client, "first", prompt) + "+" + prompt.split("+")[-1])


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)  # task, base_url, api_key, episode
        with OpenAI(base_url=order["base_url"], api_key=order["api_key"]) as client:
            print(json.dumps({"output": solve(client, order["task"]["prompt"])}), flush=True)
