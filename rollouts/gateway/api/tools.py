"""Tools and structured output of a request: functions that a model may call, which of them it has
to, its calls, and the grammar of a reply. Shared by both APIs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .fields import (
    BadRequest,
    brief,
    flag,
    items,
    mapping,
    one_of,
    optional_mapping,
    optional_text,
    text,
    wrong,
)

GRAMMARS = (
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
)  # of `structured_outputs`, as vLLM names them


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions of a chat request."""
    tools = []
    for i, each in enumerate(items(value, "tools")):
        if mapping(each, f"tools[{i}]").get("type") != "function":
            problem = "expected an object of type function; others cannot be shown to a model here"
            raise BadRequest(400, f"tools[{i}]: {problem}", param=f"tools[{i}].type")
        where = f"tools[{i}].function"
        tools.append(read_function(mapping(each.get("function"), where), where))
    return tuple(tools)


def read_function(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A function that a model may call, as its schema."""
    described = {
        "name": text(data.get("name"), f"{where}.name"),
        "description": optional_text(data.get("description"), f"{where}.description") or "",
    }
    given = optional_mapping(data.get("parameters"), f"{where}.parameters")
    parameters = given or {"type": "object", "properties": {}}
    flag(data.get("strict"), f"{where}.strict")
    return {"type": "function", "function": {**described, "parameters": parameters}}


def read_grammar(body: Mapping[str, Any]) -> str:
    """The structured output of a request, as JSON of vLLM's vocabulary; "" if it names none."""
    form = read_form(body.get("response_format"), "response_format")
    if body.get("structured_outputs") is None:
        return form
    given = mapping(body["structured_outputs"], "structured_outputs")
    if len(given) != 1 or next(iter(given)) not in GRAMMARS:
        problem = f"expected an object with one of {', '.join(GRAMMARS)}"
        raise wrong("structured_outputs", problem)
    ((kind, value),) = given.items()
    where = f"structured_outputs.{kind}"
    if kind == "json_object":
        if value is not True:
            raise wrong(where, f"expected true, got {brief(value)}")
    elif kind == "choice":
        for i, each in enumerate(items(value, where)):
            text(each, f"{where}[{i}]")
        if not value:
            raise wrong(where, "expected at least one")
    elif kind != "json" or not isinstance(value, dict):
        text(value, where)
    return json.dumps(given, sort_keys=True)


def read_form(value: Any, where: str) -> str:
    """The grammar of a `response_format`, or of a `text.format`, which has no object of its own for
    the schema."""
    if value is None:
        return ""
    kind = mapping(value, where).get("type")
    if not isinstance(kind, str) or kind not in ("text", "json_object", "json_schema"):
        problem = "expected type text, json_object, or json_schema with a schema"
        raise BadRequest(400, f"{where}: {problem}, got {brief(kind)}", param=f"{where}.type")
    if kind == "text":
        return ""
    if kind == "json_object":
        return json.dumps({"json_object": True})
    if "json_schema" in value:
        value, where = mapping(value["json_schema"], f"{where}.json_schema"), f"{where}.json_schema"
    optional_text(value.get("name"), f"{where}.name")
    optional_text(value.get("description"), f"{where}.description")
    flag(value.get("strict"), f"{where}.strict")
    return json.dumps({"json": mapping(value.get("schema"), f"{where}.schema")}, sort_keys=True)


def read_choice(value: Any) -> str:
    """`tool_choice`: `auto`, `none`, or `required` (naming one tool is `required` too)."""
    if value is None:
        return "auto"
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            problem = f"expected auto, none, required or a tool, got {brief(value)}"
            raise wrong("tool_choice", problem)
        return value
    if not isinstance(value, dict):
        raise wrong("tool_choice", f"expected auto, none, required or a tool, got {brief(value)}")
    one_of(value.get("type"), "tool_choice.type", ("function",))
    if "function" in value:
        function = mapping(value["function"], "tool_choice.function")
        text(function.get("name"), "tool_choice.function.name")
    else:
        text(value.get("name"), "tool_choice.name")
    return "required"


def read_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call of an assistant message."""
    kind = mapping(call, where).get("type", "function")
    one_of(kind, f"{where}.type", ("function",))
    function = mapping(call.get("function"), f"{where}.function")
    return {
        "id": optional_text(call.get("id"), f"{where}.id") or "",
        "name": text(function.get("name"), f"{where}.function.name"),
        "arguments": (
            optional_text(function.get("arguments"), f"{where}.function.arguments") or "{}"
        ),
    }


def call_json(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as Chat Completions writes it."""
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": call["name"], "arguments": call["arguments"]},
    }
