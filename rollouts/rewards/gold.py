"""Gold answers that no reply can match, found before a run: the rewards that compare with them
would be 0 without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...agents.text.answers import extract, same
from ...agents.types import SettingError, Task
from .actor_critic import roles
from .builtin import EXPLICIT, GRADERS, close, correct, em, exact, f1, is_mathematical, right
from .scoring import RewardFn, fn_name, is_missing

# rewards that compare a reply with `task.answer`. The first ones read the answer out of a reply,
# and tasks that `GRADERS` knows are graded by their own set.
READING = (correct, right, roles, close)
COMPARING = (*READING, exact, em, f1)
ADVICE = {
    "worked": (
        "the gold answer is a worked solution that ends in a mark of its own; task_args.extract"
        " says where its answer stands (gsm8k, boxed or a regular expression), or"
        " task_args.fields.answer names another column"
    ),
    "missing": (
        "there is no gold answer; name the column that holds it with task_args.fields.answer, or"
        " take a reward that needs none"
    ),
    "type": (
        "the gold answer is neither a text, a number, a bool, nor a list of them; store it as a"
        " text, or several right ones as a list of texts"
    ),
}


def check_answers(tasks: Sequence[Task], rewards: Sequence[RewardFn], split: str) -> list[str]:
    """Warnings of tasks whose gold answer no reply can match under one of the rewards. Raises
    `SettingError` if that is so of every task of the split."""
    warnings = []
    for fn in rewards:
        if fn not in COMPARING:
            continue
        lost = [(task, why) for task in tasks if (why := _problem(task, fn))]
        if not lost:
            continue
        task, why = lost[0]
        text = (
            f"tasks: no reply can earn reward {fn_name(fn)!r} in {len(lost)} of {len(tasks)}"
            f" {split} tasks, such as {task.id!r} with answer {task.answer!r:.80}: {ADVICE[why]}"
        )
        if len(lost) == len(tasks):
            raise SettingError(text)
        warnings.append(text)
    return warnings


def _problem(task: Task, fn: RewardFn) -> str:
    """A key of `ADVICE` if no reply can match the task's answer under this reward; "" if one
    can."""
    if fn in (correct, right, roles) and any(key in task.meta for key in GRADERS):
        return ""
    if fn in (em, f1) and "_scorer" in task.meta:
        return ""  # HotpotQA's and DROP's answers have their own form
    if fn in (exact, close):
        return _of_gold(task.answer, fn)
    golds = task.answer if isinstance(task.answer, (list, tuple)) else [task.answer]
    problems = [_of_gold(gold, fn) for gold in golds] or ["missing"]
    return "" if "" in problems else problems[0]


def _of_gold(gold: Any, fn: RewardFn) -> str:
    text = str(gold)
    if is_missing(gold) or (fn is not exact and not text.strip()):
        return "missing"
    nested = isinstance(gold, (list, tuple, set)) and fn in READING and not is_mathematical(text)
    if nested or isinstance(gold, (Mapping, bytes)):
        return "type"
    return "worked" if fn in (*READING, em) and _worked(text, fn) else ""


def _worked(gold: str, fn: RewardFn) -> bool:
    r"""Whether a gold answer says its own answer in so many words (`... #### 72`,
    `... \boxed{5}`): from a reply only that is read, and it is not the whole text. Mathematics is
    compared by value, however it is written."""
    if not EXPLICIT.search(gold) or (fn in (correct, right, roles) and is_mathematical(gold)):
        return False
    said = extract(gold)
    return said is not None and not same(said, gold)
