"""Tool calls in a reply's text, and the thoughts in which a call is only thought of.

A reasoning model drafts calls while it thinks. Its own server runs those after the thought alone:
what stands between `<think>` and `</think>` is no call, nor what follows a thought that was cut
off. Some templates open the thought themselves, so a reply may begin in the middle of one.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# marks of a thought in the field: Qwen, DeepSeek and most others, Magistral, Cohere, Kimi, Seed,
# gpt-oss's channel
_START = (
    r"<(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|<\|START_THINKING\|>|◁think▷"
    r"|<\|channel\|>analysis(?:[^<]*)<\|message\|>"
)
_STOP = r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷"
_STEP = re.compile(
    f"(?P<start>{_START})|(?P<stop>{_STOP})|(?P<call>{re.escape(OPEN)})", re.IGNORECASE
)
_ANY_STOP = re.compile(_STOP, re.IGNORECASE)
_CHANNEL_STOP = re.compile(r"<\|end\|>")
_THOUGHT = re.compile(f"{_START}|{_STOP}", re.IGNORECASE)
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


class CallSpan(NamedTuple):
    """A tool call in a text: where its opening tag stands, and what stands between its tags."""

    start: int
    body: str


def call_spans(text: str) -> list[CallSpan]:
    """The tool calls of a reply in order, without those in thoughts. A call whose closing tag is
    missing is none: the reply was cut off."""
    ends = [match.start() for match in re.finditer(re.escape(CLOSE), text)]
    thoughts = [match.start() for match in _THOUGHT.finditer(text)]
    spans: list[CallSpan] = []
    at = 0
    while (step := _STEP.search(text, at)) is not None:
        at = step.end()
        if step["start"] is not None:
            stop = (_CHANNEL_STOP if "channel" in step[0] else _ANY_STOP).search(text, at)
            if stop is None:
                break  # cut off while it thought
            at = stop.end()
        elif step["stop"] is not None:  # of a thought that the prompt opened
            spans.clear()
        elif (end := _call_end(text, at, ends, thoughts)) is not None:
            spans.append(CallSpan(step.start(), text[at:end]))
            at = end + len(CLOSE)
    return spans


def _call_end(text: str, start: int, ends: Sequence[int], thoughts: Sequence[int]) -> int | None:
    """Where the closing tag of a call stands whose body begins at `start`; None if there is none.

    A body that is JSON may hold any marks in its texts; one that is not ends before the next mark
    of a thought. `ends`, `thoughts`: places of closing tags, and of marks of thoughts.
    """
    number = bisect.bisect_left(ends, start)
    if number == len(ends):
        return None
    try:
        _, after = _DECODER.raw_decode(text, _after_space(text, start))
        after = _after_space(text, after)
        if text.startswith(CLOSE, after):
            return after
    except (ValueError, RecursionError):
        pass  # no JSON: `parse_calls` tells the model so
    mark = bisect.bisect_left(thoughts, start)
    return ends[number] if mark == len(thoughts) or thoughts[mark] > ends[number] else None


def _after_space(text: str, start: int) -> int:
    """The place of the first character at or after `start` that is no space."""
    match = _SPACE.match(text, start)
    return match.end() if match else start
