"""What the roles of the toy model `tiny-critic` are asked and say: one distribution over replies to
a chat's system message and message. It can also answer for a scripted engine.

The tasks are those of `tiny-programs` of one kind: `c472` asks for the last digit plus an amount,
which nobody tells. All texts are in the form in which the methods of feedback in words put them
(`runs.py` has the prompts), so a method reads them with its own parser.

- **Worker** (system prompt `c1`: the amount that it adds). Told `c472` it gives the last digit plus
  1 in `STEADY` of its samples, else one more.
- **Judge** (`judge`): told what to look at, a task, a prediction and the expected output. Looking
  at `amounts` it says `2>9+7`: from 2 to 9 it is 7 more; looking at anything else it says `ok`.
- **Critic** (`say`): told a task and the metric's words on its output, it says the same, right in
  `RIGHT` of its samples, else one too much. It says `ok` of a right output, and guesses if it is
  not told what was expected. Told what was said of an output, it repeats the amount, `+7`.
- **Editor** (`edit`): told a value and feedback, it gives the value that the feedback names, one of
  several, and one too much in the share of `CARELESS` that belongs to its system prompt. Told
  nothing, or as `guess` whatever it is told, it draws a value. Told the metric's words, it says
  first what a critic says, of one of them, and gives the value of that.
- **Meta** (`meta`): asked for another system prompt of the editor, it draws one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from ....agents.text.tags import between, inside

KIND = "c"  # of all problems

STEADY, RIGHT = 0.9, 0.7
CARELESS = {"edit": 0.3, "edit!": 0.0, "edit?": 0.6}  # system prompts of an editor
GUESS, SAY, JUDGE, META = "guess", "say", "judge", "meta"  # other system prompts
PROPOSED = {"edit!": 0.5, "edit": 0.25, "edit?": 0.25}  # what `meta` makes of an editor's prompt
OK = "ok"
ROLES = ("amounts", "wording")  # what judges look at
START, ANSWER = "c1", "c7"  # the first prompt of a worker, and the one that is right
VALUE, AMOUNT = re.compile(rf"{KIND}\d"), re.compile(r"\+\d")
VALUES = [f"{KIND}{amount}" for amount in range(10)]  # prompts of a worker
AMOUNTS = [f"+{amount}" for amount in range(10)]  # what critics name
EXPECTED = "The expected output is: "


Replies = Mapping[str, float]  # replies and their shares


def replies(system: str, text: str) -> Replies:
    """The replies to a message, and their shares. Raises `ValueError` at a chat that none of the
    roles is asked."""
    worked = re.fullmatch(rf"(?:\[\w+/\w+\]\n)?({VALUE.pattern})?{KIND}\d\d(\d)", text)
    if worked and (VALUE.fullmatch(system) or worked[1]):
        return _worked(worked[1] or system, int(worked[2]))
    if system == META:
        return {f"<IMPROVED_VARIABLE>{name}</IMPROVED_VARIABLE>": p for name, p in PROPOSED.items()}
    if system == JUDGE:
        return _judged(text)
    if system == SAY:
        return _said(text)
    if system in CARELESS or system == GUESS:
        return _edited(system, text)
    raise ValueError(f"nobody is asked this: {system!r}, {text!r}")


def _worked(value: str, last: int) -> Replies:
    right = (last + int(value[1])) % 10
    return {str(right): STEADY, str((right + 1) % 10): 1 - STEADY}


def named(problem: str, words: str) -> Replies:
    """What a critic says of a problem, by the metric's words: `2>9+7`, from the last digit to the
    expected output it is 7 more."""
    if "exact: 1" in words:
        return {OK: 1.0}
    told = re.search(rf"{EXPECTED}(\d)", words)
    if told is None:
        return dict.fromkeys(AMOUNTS, 0.1)
    head, right = f"{problem[-1]}>{told[1]}", (int(told[1]) - int(problem[-1])) % 10
    return {head + AMOUNTS[right]: RIGHT, head + AMOUNTS[(right + 1) % 10]: 1 - RIGHT}


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
    value, (head, tail), reasons = _form(text)
    said = _feedback(text)
    if system == GUESS or not said:
        return {
            f"{_reason(reasons, amount)}{head}{value}{tail}": 0.1
            for amount, value in zip(AMOUNTS, VALUES, strict=True)
        }
    chances: dict[str, float] = {}  # of what it is told or finds out itself
    for problem, words in said:
        for name, p in (named(problem, words) if reasons else {words: 1.0}).items():
            chances[name] = chances.get(name, 0.0) + p / len(said)
    amounts = {name: p for name, p in chances.items() if AMOUNT.search(name)}
    if not amounts:
        return {f"{_reason(reasons, OK)}{head}{value}{tail}": 1.0}
    slips = 0.0 if reasons else CARELESS[system]
    shares: dict[str, float] = {}
    for name, p in amounts.items():
        for more, part in ((0, 1 - slips), (1, slips)):
            if part:
                put = VALUES[(int(name[-1]) + more) % 10]
                reply = f"{_reason(reasons, name)}{head}{put}{tail}"
                shares[reply] = shares.get(reply, 0.0) + part * p / sum(amounts.values())
    return shares


def _reason(form: str | None, name: str) -> str:
    return "" if form is None else form.replace("R", name)


def _form(text: str) -> tuple[str, tuple[str, str], str | None]:
    """The value that a question to an editor is about, what stands around it in the reply, and, if
    the reply names an amount first, what stands there, with R for it."""
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
    found: list[tuple[str, str]] = []
    for number in itertools.count(1):
        given = between(text, f"FEEDBACK_{number}")
        if given is None:
            return found
        words = inside(given, "TEXT")
        if words is not None:
            asked = (inside(given, "INPUT") or inside(given, "TASK") or "")[-4:]
            found.append((asked, words))
    raise AssertionError("unreachable")
