"""Lookup of functions that settings name: shipped ones by a short name, others as
`module:function`, and `maker(text)` for what a function makes of a text.

Settings of a user's own may name anything. A checkpoint may come from a stranger, so its names are
looked up under `only_trusted()`: there the one rule below decides, before anything is imported.

The rule: the name is a shipped short name, or `module:name` of a file of this package whose object
carries the mark of `@trusted(KIND)` (or stands in the table of shipped ones). `maker(text)` needs
the mark `KIND maker`: its text is a stranger's.

Names of 0.1 stand in settings and checkpoints for good: `RENAMED` says what they are called now.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from .types import SettingError, nearest

T = TypeVar("T")

AGREE = "give --trust_checkpoint if you know where it comes from"
ROOMS = ("agents", "rollouts", "trainers")  # where something may be marked
_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).resolve().parents[1]
# (kind, id) -> the object; holding it keeps its id from being used again
_MARKED: dict[tuple[str, int], Any] = {}
_ONLY_TRUSTED: ContextVar[bool] = ContextVar("only_trusted", default=False)

_MOVED = (  # module of 0.1, module now, names; `old=new` where the name changed too
    ("agents.actor_critic", "agents.patterns.actor_critic", "ActorCritic"),
    ("agents.chain", "agents.patterns.chain", "Chain"),
    ("agents.collaboration", "agents.patterns.collaboration", "Collaboration"),
    ("agents.debate", "agents.patterns.debate", "Debate"),
    ("agents.flowreasoner", "agents.programs.flowreasoner", "FlowReasoner"),
    ("agents.games.game", "agents.games.base", "Game"),
    (
        "agents.operators",
        "agents.programs.operators",
        "custom answer_generate ensemble review revise programmer test",
    ),
    ("agents.repair", "agents.patterns.self_correction", "Repair=SelfCorrection"),
    ("agents.team", "agents.system", "System"),
    ("agents.tools", "agents.tools.tools", "calculator"),
    ("agents.verifiers", "agents.tools.verifiers", "calculator"),
    ("agents.vote", "agents.patterns.vote", "Vote"),
    ("agents.workflow", "agents.programs.workflow", "Workflow"),
    ("rollouts.actor_critic", "rollouts.rewards.actor_critic", "roles"),
    ("rollouts.coding", "rollouts.tasks.code", "humaneval mbpp"),
    ("rollouts.games", "rollouts.rewards.games", "payoff won first_payoff second_payoff deal"),
    ("rollouts.games", "rollouts.tasks.games", "ultimatum trade exchange"),
    ("rollouts.own_programs", "rollouts.gateway.programs", "Command Function"),
    ("rollouts.own_programs", "rollouts.gateway.programs", "Program=ExternalProgram"),
    ("rollouts.reading", "rollouts.tasks.qa", "hotpotqa drop"),
    (
        "rollouts.rewards",
        "rollouts.rewards.builtin",
        "correct exact close em f1 format_ok graded length passed_tests posted returned right"
        " verified workflow",
    ),
    ("rollouts.rows", "rollouts.tasks.datasets", "gsm8k math hub file"),
    ("rollouts.tasks", "rollouts.tasks.registry", "arithmetic reasoning_gym"),
    ("trainers.tiny", "rollouts.tasks.toy", "tiny_tasks"),
    ("trainers.tiny_pair", "rollouts.tasks.toy", "pair_tasks"),
    ("trainers.tiny_programs", "rollouts.tasks.toy", "program_tasks"),
    ("trainers.tiny_talk", "rollouts.tasks.toy", "digit_tasks"),
    ("trainers.verifier", "trainers.methods.reward_model.verifier", "learned=trained"),
)
RENAMED: Mapping[str, str] = {
    f"{_PACKAGE}.{old}:{name.partition('=')[0]}": f"{_PACKAGE}.{new}:{name.rpartition('=')[2]}"
    for old, new, names in _MOVED
    for name in names.split()
}


class Untrusted(SettingError):
    """A name that a checkpoint may not use unless its reader agrees. `kind` and `name` say
    which."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {name}; {AGREE}")
        self.kind, self.name = kind, name


def trusted(*kinds: str) -> Callable[[T], T]:
    """Mark what follows as something that a checkpoint may name without its reader's agreement.

    Args:
        kinds: what it may be named as: `system`, `tasks`, `reward`, `tool`, `verifier`, `operator`,
            or one of these and ` maker`, for a function that a checkpoint may call with a text of
            its own. Nothing that is marked may run, import or fetch what its arguments say.
    """

    def mark(item: T) -> T:
        for kind in kinds:
            _MARKED[kind, id(item)] = item
        return item

    return mark


def is_trusted(kind: str, item: Any) -> bool:
    """Is this very object marked? A subclass, a copy or a wrapper of a marked one is not."""
    return _MARKED.get((kind, id(item)), _MARKED) is item


@contextlib.contextmanager
def only_trusted(on: bool = True) -> Iterator[None]:
    """Inside, in this task and those it starts, names are looked up as a stranger's. `on` False
    changes nothing."""
    token = _ONLY_TRUSTED.set(on or _ONLY_TRUSTED.get())
    try:
        yield
    finally:
        _ONLY_TRUSTED.reset(token)


def needs_trust(kind: str, name: str) -> None:
    """Raise `Untrusted` under `only_trusted()`: for what is never to be done on a stranger's word,
    such as running a command."""
    if _ONLY_TRUSTED.get():
        raise Untrusted(kind, name)


def renamed(kind: str, name: str) -> str:
    """What `module:name` is called now. Warns (`FutureWarning`) of a name of 0.1."""
    new = RENAMED.get(name, name)
    if new != name:
        warnings.warn(
            f"{kind} {name} is now {new}; write the new name where you can", FutureWarning, 2
        )
    return new


def load_function(
    kind: str, name: str, shipped: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The function that a setting names. `maker(text)` is what the function named `maker` makes of
    the text.

    Raises `SettingError` with `kind`, the name, and the nearest shipped one; `Untrusted` under
    `only_trusted()`.
    """
    if not isinstance(name, str):
        raise SettingError(f"{kind} {name!r:.80}: expected a name, got a {type(name).__name__}")
    function, text = _named(kind, name, shipped)
    if not callable(function):
        raise SettingError(
            f"{kind} {name!r}: expected a function, found a {type(function).__name__}"
        )
    return function if text is None else function(text)


def check_name(kind: str, name: str, shipped: Mapping[str, Callable[..., Any]]) -> None:
    """Judge a name that is looked up later: raises `Untrusted` now, where the lookup would. Calls
    no maker."""
    if _ONLY_TRUSTED.get():
        _named(kind, name, shipped)


def object_named(kind: str, name: str, expected: str = "module:function") -> Any:
    """What `module:name` names. Raises `SettingError` if it cannot be imported; `Untrusted` under
    `only_trusted()`."""
    return _imported(kind, kind, name, {}, name, expected)


def _named(kind: str, name: str, shipped: Mapping[str, Any]) -> tuple[Any, str | None]:
    """What a name means: the shipped or imported object, and the text in brackets after a maker's
    name, None if there is none."""
    maker, bracket, text = name.partition("(")
    if bracket and text.endswith(")"):
        mark, short, argument = f"{kind} maker", maker, text[:-1]
    else:
        mark, short, argument = kind, name, None
    if short in shipped:
        item = shipped[short]
        if mark != kind and _ONLY_TRUSTED.get() and not is_trusted(mark, item):
            raise Untrusted(kind, name)
        return item, argument
    module, colon, attribute = short.partition(":")
    if not (colon and module and attribute):
        raise SettingError(
            f"{kind} {name!r}: no such {kind}; {nearest(short, shipped)}; your own are named"
            " module:function"
        )
    return _imported(kind, mark, short, shipped, name, "module:function"), argument


def _imported(
    kind: str, mark: str, name: str, shipped: Mapping[str, Any], given: str, expected: str
) -> Any:
    """The object at `module:name`. `given`: the name as it stands in the setting, for errors."""
    module, _, attribute = renamed(kind, name).partition(":")
    strict = _ONLY_TRUSTED.get()
    if strict and not (attribute.isidentifier() and _is_ours(module)):
        raise Untrusted(kind, given)
    try:
        item = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingError(
            f"{kind} {given!r}: cannot be imported ({error}); expected {expected}"
        ) from error
    in_table = mark == kind and any(each is item for each in shipped.values())
    if strict and not (in_table or is_trusted(mark, item)):
        raise Untrusted(kind, given)
    return item


def _is_ours(module: str) -> bool:
    """Is `module` a file of this package, and the file that Python would import, or has imported,
    for that name?

    Folders without `__init__.py` can be continued anywhere on the path, so the beginning of a name
    says nothing.
    """
    package, *parts = module.split(".")
    if package != _PACKAGE or len(parts) < 2 or parts[0] not in ROOMS:
        return False
    if not all(part.isascii() and part.isidentifier() for part in parts):
        return False
    file = _ROOT.joinpath(*parts).with_suffix(".py")
    if not file.is_file():
        return False
    loaded = sys.modules.get(module)
    spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(module)
    return (
        spec is not None
        and spec.origin is not None
        and Path(spec.origin).resolve() == file.resolve()
    )
