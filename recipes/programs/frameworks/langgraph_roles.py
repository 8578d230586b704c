"""Two nodes of a LangGraph graph, each with a model of its own."""

import json
import sys
from typing import TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph


class State(TypedDict, total=False):
    prompt: str
    sum: str
    answer: str


def ask(role: str, text: str) -> str:
    return str(ChatOpenAI(model=role).invoke([("system", role), ("user", text)]).content)


graph = StateGraph(State)
graph.add_node("add_two", lambda state: {"sum": ask("first", state["prompt"])})
graph.add_node(
    "add_third",
    lambda state: {"answer": ask("last", state["sum"] + "+" + state["prompt"].split("+")[-1])},
)
graph.add_edge(START, "add_two")
graph.add_edge("add_two", "add_third")
graph.add_edge("add_third", END)

print(graph.compile().invoke({"prompt": json.load(sys.stdin)["prompt"]})["answer"])
