"""Two agents of CrewAI. It wraps role and task in prompts of its own, and prints what it does: the
output is the last line."""

import json
import os
import sys

os.environ["OTEL_SDK_DISABLED"] = "true"  # before the import: no telemetry,
os.environ["CREWAI_TRACING_ENABLED"] = "false"  # nor a question whether to share traces

from crewai import LLM, Agent


def ask(role: str, text: str) -> str:
    llm = LLM(model=f"openai/{role}", base_url=os.environ["OPENAI_BASE_URL"])
    agent = Agent(role=role, goal="add digits", backstory="You add.", llm=llm)
    return str(agent.kickoff(text).raw)


prompt = json.load(sys.stdin)["prompt"]
output = ask("last", ask("first", prompt) + "+" + prompt.split("+")[-1])
print(json.dumps({"output": output}))
