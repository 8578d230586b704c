"""Reads and writes that leave their encoding to the machine's locale, found in source text."""

from __future__ import annotations

import ast

TEXT_MODE = set("rwaxt+U")
# functions -> the place of their mode and of their encoding among positional arguments
OPENERS = {
    "open": (1, 3),
    "fdopen": (1, 3),
    "NamedTemporaryFile": (0, 3),
    "TemporaryFile": (0, 3),
    "SpooledTemporaryFile": (1, 4),
}
BINARY = ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile")  # unless a mode is given
ALWAYS_TEXT = {"read_text": 0, "write_text": 1, "TextIOWrapper": 1, "FileHandler": 2, "input": 9}
# our own `open` methods, which open no file
OWN_OPEN = (
    "self",
    "self.run",
    "self.log",
    "self.rollouts",
    "self.engines",
    "self.sync",
    "self._log",
    "page",
)


def without_encoding(source: str) -> list[ast.Call]:
    """The calls in a source text that read or write text without naming its encoding."""
    return [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _lacks(node)
    ]


def _lacks(call: ast.Call) -> bool:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:
        return False
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    receiver = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if any(_true(keywords.get(word)) for word in ("text", "universal_newlines")):
        return name in ("run", "Popen", "check_output", "check_call", "call")
    if name in ALWAYS_TEXT and name != "input":
        return len(call.args) <= ALWAYS_TEXT[name] and bool(receiver or name == "TextIOWrapper")
    if name not in OPENERS or (receiver == "os" and name == "open"):
        return False
    if name == "open" and receiver in OWN_OPEN and not _text(call.args[:1]):
        return False
    at, encoding = OPENERS[name]
    if name == "open" and receiver not in ("", "io", "gzip", "bz2", "lzma"):
        at, encoding = at - 1, encoding - 1  # a method of a path
    if len(call.args) > encoding:
        return False
    mode = keywords.get("mode") or (call.args[at] if len(call.args) > at else None)
    if mode is None:
        return name not in BINARY and receiver not in ("gzip", "bz2", "lzma")
    return not isinstance(mode, ast.Constant) or not (
        isinstance(mode.value, str) and "b" in mode.value
    )


def _text(args: list[ast.expr]) -> bool:
    return any(isinstance(each, ast.Constant) and isinstance(each.value, str) for each in args)


def _true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True
