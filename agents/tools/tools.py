"""Tools: typed functions with a schema in the prompt, calls parsed from a reply, results as text.

The text format is the one Hermes and Qwen models were trained on: schemas in the system message,
calls as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, results as
`<tool_response>...</tool_response>`. What a model writes can be anything, so whatever is wrong with
a call becomes a sentence for the model, never an exception of ours.

    @tool
    def area(width: float, height: float = 1.0) -> float:
        '''Area of a rectangle.

        Args:
            width, height: in metres.
        '''
        return width * height
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..concurrency import from_outside
from ..execution import Execute, ExecutionResult, Externals, Limits, SandboxError
from ..lookup import load_function
from ..types import SettingError, nearest
from .calculator import evaluate
from .calls import call_spans

MAX_RESULT = 4000  # characters of a result that the model is shown
MAX_CALLS = 8  # calls of one reply that are run; the others are answered with an error

_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}


class _WrongArguments(ValueError):
    """Arguments that do not fit the schema; the message is shown to the model."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Args:
        name, description, parameters: stand in the model's prompt; `parameters` is a JSON schema of
            type object.
        function: sync or async. A sync function runs on the event loop: make a slow one async.
        hints: the type of each parameter, against which arguments are checked.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    hints: Mapping[str, Any] = field(default_factory=dict)

    async def __call__(self, arguments: Mapping[str, Any] | str) -> str:
        """Run with arguments as the model wrote them. A wrong argument or an exception comes back
        as an error in words, whatever its class."""
        caller = asyncio.current_task()
        try:
            result = self.function(**self._checked(arguments))
            text = _as_text(await result if inspect.isawaitable(result) else result)
        except _WrongArguments as wrong:
            text = f"error: {self.name}: {wrong}"
        except SandboxError:
            raise  # it concerns the whole run
        except BaseException as failure:  # an answer to the model, not the end of the episode
            if from_outside(failure, caller):
                raise
            text = f"error: {self.name}: {type(failure).__name__}: {failure}"
        return response(text)

    def schema(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}

    def _checked(self, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
        if isinstance(arguments, str):  # some models write the arguments as a JSON string
            arguments = _loads(arguments)
        if not isinstance(arguments, Mapping):
            raise _WrongArguments(f"arguments: expected a JSON object, got {_short(arguments)}")
        for key in arguments:
            if key not in self.hints:
                raise _WrongArguments(
                    f"unknown argument {_short(key)}; {nearest(str(key)[:80], self.hints)}"
                )
        for key in self.parameters["required"]:
            if key not in arguments:
                raise _WrongArguments(f"argument {key!r} is missing")
        return {key: _fit(self.hints[key], value, key) for key, value in arguments.items()}


def response(text: str) -> str:
    """A result as the model reads it: at most `MAX_RESULT` characters, encodable, unable to end its
    own frame."""
    if len(text) > MAX_RESULT:
        text = f"{text[:MAX_RESULT]}\n[cut: {len(text)} characters in all]"
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    return (
        "<tool_response>\n" + re.sub(r"<(?=/?tool_response>)", "&lt;", text) + "\n</tool_response>"
    )


def tool(function: Callable[..., Any]) -> Tool:
    """Make a tool of a function. Each parameter needs a type of str, int, float, bool, Literal,
    list[...], dict[str, ...], `X | None` or Any; the first paragraph of the docstring and its
    `Args:` tell the model what it is for.

    Raises `SettingError` naming function and parameter if a type is missing or cannot be written as
    a JSON schema.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise SettingError(f"tool {function!r}: expected a named function")
    description, notes = _docstring(function)
    hints, properties, required = typing.get_type_hints(function), {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise SettingError(
                f"tool {name!r}: parameter {key!r} cannot be given by name; use plain parameters"
            )
        if key not in hints:
            raise SettingError(f"tool {name!r}: parameter {key!r} has no type; annotate it")
        properties[key] = _schema(hints[key], f"tool {name!r}: parameter {key!r}")
        if key in notes:
            properties[key]["description"] = notes[key]
        if parameter.default is parameter.empty:
            required.append(key)
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool(name, description, parameters, function, {key: hints[key] for key in properties})


def resolve_tools(names: Iterable[str], given: Mapping[str, Tool] = {}) -> dict[str, Tool]:
    """Tools by name: `given` ones, shipped ones, or `module:function`. Raises `SettingError` naming
    the one that cannot be found."""
    tools: dict[str, Tool] = {}
    for name in names:
        each = given.get(name) or _imported(name)
        if each.name in tools:
            raise SettingError(
                f"tools: {name!r} is the second tool called {each.name!r}; a model could not tell"
                " them apart"
            )
        tools[each.name] = each
    return tools


def tool_prompt(tools: Mapping[str, Tool]) -> str:
    """The part of the system message that lists the tools; "" if there are none."""
    return schemas_prompt([each.schema() for each in tools.values()])


def schemas_prompt(schemas: Iterable[Mapping[str, Any]]) -> str:
    """The same for schemas as `Tool.schema` gives them, for tools that a program runs itself."""
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in schemas)
    if not lines:
        return ""
    return (
        "# Tools\n\nYou may call these functions to help with the"
        f" task:\n<tools>\n{lines}\n</tools>\n\nTo call one, write its name and arguments as a"
        ' JSON object between these tags, then wait for the result:\n<tool_call>\n{"name":'
        ' <function name>, "arguments": <JSON object of the arguments>}\n</tool_call>'
    )


def parse_calls(text: str) -> list[dict[str, Any]]:
    """The tool calls in a reply, in order, each `{"name": str, "arguments": ...}`.

    A call that cannot be read, or that is one too many, has an `error` (words for the model)
    instead of arguments. A call in a thought is none, nor one whose closing tag is missing: the
    reply was cut off.
    """
    calls: list[dict[str, Any]] = []
    for number, span in enumerate(call_spans(text)):
        if number == MAX_CALLS:
            calls.append(
                {
                    "name": "",
                    "error": f"at most {MAX_CALLS} calls in one reply; the others were not run",
                }
            )
            break
        try:
            data = _loads(span.body)
            if not isinstance(data, dict) or not isinstance(data.get("name"), str):
                raise _WrongArguments('expected a JSON object with "name" and "arguments"')
            calls.append({"name": data["name"], "arguments": data.get("arguments") or {}})
        except _WrongArguments as wrong:
            calls.append({"name": "", "error": f"this tool call cannot be read: {wrong}"})
    return calls


async def run_call(request: Mapping[str, Any], tools: Mapping[str, Tool]) -> str:
    """Answer one parsed call with a `<tool_response>`, whatever the call says."""
    if request.get("error"):
        return response(f"error: {request['error']}")
    name = str(request.get("name"))[:80]
    if name not in tools:
        return response(f"error: no tool {name!r}; {nearest(name, tools)}")
    return await tools[name](request.get("arguments") or {})


def _imported(name: str) -> Tool:
    function = load_function("tool", name, SHIPPED)
    return function if isinstance(function, Tool) else tool(function)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of opening brackets
        raise _WrongArguments(f"not valid JSON ({str(error)[:100]})") from error


def _short(value: Any) -> str:
    text = (
        repr(value)
        if isinstance(value, (str, int, float, bool, type(None)))
        else f"a {type(value).__name__}"
    )
    return text if len(text) <= 80 else text[:77] + "..."


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """First paragraph, and what `Args:` says of each parameter (`a, b: words` tells of both)."""
    text = inspect.getdoc(function) or ""
    head, _, rest = text.partition("\nArgs:\n")
    notes: dict[str, str] = {}
    names: list[str] = []
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        match = re.match(r" {1,4}([\w, ]+):\s*(.*)", line)
        if match and not line.startswith(" " * 5):
            names = [part.strip() for part in match[1].split(",")]
            notes |= dict.fromkeys(names, match[2])
        elif line.strip():
            notes |= {name: f"{notes[name]} {line.strip()}" for name in names}
    return " ".join(head.strip().split("\n\n")[0].split()), notes


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _JSON_NAMES:
        return {"type": _JSON_NAMES[hint]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {
            "anyOf": [
                {"type": "null"} if arg is type(None) else _schema(arg, where) for arg in args
            ]
        }
    if hint is list or origin in (list, Sequence):
        return {"type": "array"} | ({"items": _schema(args[0], where)} if args else {})
    if hint is dict or (origin in (dict, Mapping) and args[0] is str):
        return {"type": "object"} | (
            {"additionalProperties": _schema(args[1], where)} if args else {}
        )
    raise SettingError(
        f"{where} has type {hint!r}; expected str, int, float, bool, Literal, list, dict[str, ...],"
        " X | None or Any"
    )


def _fit(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type says, whole numbers and floats exchanged where nothing is lost."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or type(value) is hint:
        return value
    if hint is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if origin is Literal and any(type(value) is type(arg) and value == arg for arg in args):
        return value
    if origin in (typing.Union, types.UnionType):
        return _first_fit(args, value, where)
    if (hint is list or origin in (list, Sequence)) and isinstance(value, list):
        return (
            [_fit(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
            if args
            else value
        )
    if (hint is dict or origin in (dict, Mapping)) and isinstance(value, dict):
        return (
            {key: _fit(args[1], item, f"{where}.{key[:20]}") for key, item in value.items()}
            if args
            else value
        )
    expected = _JSON_NAMES.get(hint) or json.dumps(_schema(hint, where))
    raise _WrongArguments(f"argument {where!r}: expected {expected}, got {_short(value)}")


def _first_fit(hints: Sequence[Any], value: Any, where: str) -> Any:
    wrong: list[str] = []
    for hint in hints:
        if hint is type(None):
            if value is None:
                return None
            continue
        try:
            return _fit(hint, value, where)
        except _WrongArguments as error:
            wrong.append(str(error))
    raise _WrongArguments(" or ".join(wrong))


@tool
def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: numbers, + - * / // % **, brackets, pi, e, and sqrt, abs, round, min, max,
            floor, ceil, log, exp, sin, cos, tan.
    """
    return evaluate(expression)


def python_tool(execute: Execute) -> Tool:
    """The tool `python`: programs go to `execute`, and the model reads what they print and how they
    end."""

    @tool
    async def python(program: str) -> str:
        """Run a Python 3 program and read what it prints. Standard library only; no files, network,
        threads or other programs.

        Args:
            program: the whole program; nothing is kept from one run to the next.
        """
        outcome = await execute(program)
        return (
            outcome.output
            if outcome.ok
            else f"{outcome.output}\n{outcome.status}: {outcome.error}".lstrip()
        )

    return python


async def _nowhere(
    program: str, externals: Externals | None = None, limits: Limits = Limits()
) -> ExecutionResult:
    raise SandboxError("the tool 'python' needs a team: its programs run where the team's do")


SHIPPED: Mapping[str, Tool] = {"calculator": calculator, "python": python_tool(_nowhere)}
