"""What the roles of the toy model `tiny-critic` are asked and say: one distribution over replies to
a chat's system message and message. It can also answer for a scripted engine.

The tasks are those of `tiny-programs`: `c472` asks for the last digit plus an amount that belongs
to the kind `c`. All texts are in the form in which the methods of feedback in words put them
(`runs.py` has the prompts), so a method reads them with its own parser.

- **Worker** (system prompt `a4b7c1`: the amount that it adds for each kind). Told `c472` it gives
  the last digit plus 1 in `STEADY` of its samples, else one more.
- **Judge** (`judge`): told what to look at, a task, a prediction and the expected output. Looking
  at `amounts` it names the amount that the kind should have, `c7`; looking at anything else it says
  `ok`.
- **Critic** (`say`): told a task and the metric's words on its output, it names the amount, right
  in `RIGHT` of its samples, else one too much. It says `ok` of a right output, and guesses if it is
  not told what was expected. Told what was said of an output, it repeats it.
- **Editor** (`edit`): told a value and feedback, it puts the amounts that the feedback names into
  the value, each one too much in the share of `CARELESS` that belongs to its system prompt. Told
  nothing, or as `guess` whatever it is told, it draws one amount of one kind.
- **Meta** (`meta`): asked for another system prompt of the editor, it draws one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from ....agents.text.tags import between, inside
from ....rollouts.tasks.toy import KINDS

STEADY, RIGHT = 0.9, 0.7
CARELESS = {"edit": 0.3, "edit!": 0.0, "edit?": 0.6}  # system prompts of an editor
GUESS, SAY, JUDGE, META = "guess", "say", "judge", "meta"  # other system prompts
PROPOSED = {"edit!": 0.5, "edit": 0.25, "edit?": 0.25}  # what `meta` makes of an editor's prompt
OK = "ok"
ROLES = ("amounts", "wording")  # what judges look at
START = "a4b7c1"  # all wrong
ANSWER = "a1b4c7"
VALUE = re.compile(r"a\db\dc\d")
AMOUNT = re.compile(r"[abc]\d")
EXPECTED = "The expected output is: "


Replies = Mapping[str, float]  # replies and their shares


def replies(system: str, text: str) -> Replies:
    """The replies to a message, and their shares. Raises `ValueError` at a chat that none of the
    roles is asked."""
    worked = re.fullmatch(rf"(?:\[\w+/\w+\]\n)?({VALUE.pattern})?([abc])\d\d(\d)", text)
    if worked and (VALUE.fullmatch(system) or worked[1]):
        return _worked(worked[1] or system, worked[2], int(worked[3]))
    if system == META:
        return {f"<IMPROVED_VARIABLE>{name}</IMPROVED_VARIABLE>": p for name, p in PROPOSED.items()}
    if system == JUDGE:
        return _judged(text)
    if system == SAY:
        return _said(text)
    if system in CARELESS or system == GUESS:
        return _edited(system, text)
    raise ValueError(f"nobody is asked this: {system!r}, {text!r}")


def _worked(value: str, kind: str, last: int) -> Replies:
    right = (last + amounts(value)[kind]) % 10
    return {str(right): STEADY, str((right + 1) % 10): 1 - STEADY}


def amounts(value: str) -> dict[str, int]:
    """The amounts of a value, or those that a text names, by kind; of several the last."""
    return {named[0]: int(named[1]) for named in AMOUNT.findall(value)}


def named(problem: str, words: str) -> Replies:
    """What a critic says of a problem, by the metric's words."""
    if "exact: 1" in words:
        return {OK: 1.0}
    told = re.search(rf"{EXPECTED}(\d)", words)
    if told is None:
        return {f"{problem[0]}{amount}": 0.1 for amount in range(10)}
    right = (int(told[1]) - int(problem[-1])) % 10
    return {f"{problem[0]}{right}": RIGHT, f"{problem[0]}{(right + 1) % 10}": 1 - RIGHT}


def _judged(text: str) -> Replies:
    role, task, said, expected = (
        text.partition("\n")[0],
        *(inside(text, tag) or "" for tag in ("TASK", "PREDICTION", "EXPECTED")),
    )
    if role != ROLES[0] or said == expected:
        return {OK: 1.0}
    return named(task, f"{EXPECTED}{expected}")


def _said(text: str) -> Replies:
    conversation = between(text, "CONVERSATION")
    given = inside(text, "FEEDBACK")
    if conversation is None:  # a state of a pipeline
        said = named(inside(text, "PREVIOUS", "TASK") or "", given or "")
        return {f"<SUGGESTION>{each}</SUGGESTION>": p for each, p in said.items()}
    if given is None and (result := inside(conversation, "RESULT")) is not None:
        return named(inside(conversation, "TASK") or "", result)
    # of a judge's conversation, or of a turn's with feedback: the amount that is named
    found = AMOUNT.findall(given if given is not None else inside(conversation, "OUTPUT") or "")
    return {found[-1] if found else OK: 1.0}


def _edited(system: str, text: str) -> Replies:
    value, (head, tail), direct = _form(text)
    said = _feedback(text)
    if system == GUESS or not said:
        drawn = {f"{kind}{amount}": 1 / 30 for kind in KINDS for amount in range(10)}
        if direct is None:
            return _sum(_put(value, [each], head, tail, share) for each, share in drawn.items())
        return _sum(
            _put(value, [each], direct.replace("R", each) + head, tail, share)
            for each, share in drawn.items()
        )
    if direct is not None:  # it names the amounts first
        found: dict[str, float] = {}
        for each in itertools.product(*(named(problem, words).items() for problem, words in said)):
            share = math.prod(p for _, p in each)
            reason = direct.replace("R", "".join(name for name, _ in each))
            for reply, p in _put(value, [name for name, _ in each], reason + head, tail).items():
                found[reply] = found.get(reply, 0.0) + share * p
        return found
    return _put(value, [words for _, words in said], head, tail, slips=CARELESS[system])


def _put(
    value: str, said: Sequence[str], head: str, tail: str, share: float = 1.0, slips: float = 0.0
) -> dict[str, float]:
    """The value with the amounts that were said; of several of one kind any."""
    options: list[list[tuple[str, float]]] = []
    for kind, amount in amounts(value).items():
        own = [int(each[1]) for each in said if each[0] == kind and AMOUNT.fullmatch(each)]
        chances: dict[int, float] = {} if own else {amount: 1.0}
        for each in own:
            for put, p in ((each, 1 - slips), ((each + 1) % 10, slips)):
                chances[put] = chances.get(put, 0.0) + p / len(own)
        options.append([(f"{kind}{put}", p) for put, p in chances.items() if p])
    return {
        f"{head}{''.join(text for text, _ in each)}{tail}": share * math.prod(p for _, p in each)
        for each in itertools.product(*options)
    }


def _sum(parts: Iterator[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for reply, share in part.items():
            total[reply] = total.get(reply, 0.0) + share
    return total


def _form(text: str) -> tuple[str, tuple[str, str], str | None]:
    """The value that a question to an editor is about, what stands around it in the reply, and, if
    the reply names the amounts first, what stands there, with R for them."""
    role = inside(text, "ROLE")
    if role is not None:
        return _value(role), ('<RESULT>{"instruction": "', '"}</RESULT>'), None
    value = inside(text, "VALUE")
    if value is not None:
        named_in = re.search(r"^(\w+\.prompt): ", text, re.M)
        name = named_in[1] if named_in else ""
        around = f'", "suggestion": {{"{name}": "', '"}}</SUGGESTION>'
        return value, around, '<SUGGESTION>{"reasoning": "R'
    value = inside(text, "VARIABLE") or ""
    if text.startswith("prompt\n"):
        return value, ("<PROMPT>", "</PROMPT>"), "R"
    return value, ("<IMPROVED_VARIABLE>", "</IMPROVED_VARIABLE>"), None


def _value(text: str) -> str:
    found = VALUE.search(text)
    if found is None:
        raise ValueError(f"no value in {text!r}")
    return found[0]


def _feedback(text: str) -> list[tuple[str, str]]:
    """(problem, what was said) of each feedback that an editor is shown."""
    found = []
    for number in itertools.count(1):
        given = between(text, f"FEEDBACK_{number}")
        if given is None:
            return found
        words = inside(given, "TEXT")
        if words is not None:
            asked = (inside(given, "INPUT") or inside(given, "TASK") or "")[-4:]
            found.append((asked, words))
    raise AssertionError("unreachable")
