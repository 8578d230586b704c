"""Two agents of CrewAI. It wraps role and task in prompts of its own, and prints what it does, also
when it has ended: that goes to stderr, so that stdout is the output."""

import json
import os
import sys

os.environ["OTEL_SDK_DISABLED"] = "true"  # before the import: no telemetry,
os.environ["CREWAI_TRACING_ENABLED"] = "false"  # nor a question whether to share traces

from crewai import LLM, Agent

stdout, sys.stdout = sys.stdout, sys.stderr


def ask(role: str, text: str) -> str:
    llm = LLM(model=f"openai/{role}", base_url=os.environ["OPENAI_BASE_URL"])
    agent = Agent(role=role, goal="add digits", backstory="You add.", llm=llm)
    return str(agent.kickoff(text).raw)


prompt = json.load(sys.stdin)["prompt"]
print(ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1]), file=stdout)
