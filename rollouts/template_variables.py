"""Variables of a chat template: what a user may set, and today's date, which no prompt may depend
on.

A template that writes today's date gives other prompts tomorrow, under one name and one hash. So
every rendering that asks for the date is done twice, under two dates, and refused if they differ,
until the user sets the date.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from typing import Any

from ..agents.types import SettingError, nearest

SETTING = "chat_template_kwargs"
CLOCK = "strftime_now"  # the function by which a template asks for the date
TWO_DATES = (datetime(2001, 2, 3, 4, 5, 6), datetime(2032, 11, 25, 17, 48, 39))
EXAMPLE = datetime(2024, 7, 26)
ABOUT_TIME = re.compile(r"date|time|today|now|year|month|day", re.IGNORECASE)
BUILT_IN = ("messages", "tools", "documents", "raise_exception", CLOCK)  # the renderer gives these
_KEYWORDS = (
    "and as block break call continue do elif else endblock endcall endfilter endfor endgeneration"
    " endif endmacro endset filter for generation if import in include is loop macro not or"
    " recursive set true false none True False None namespace range"
)
KEYWORDS = frozenset(_KEYWORDS.split())
NOT_VARIABLES = (".", "|", "is", "set", "for", "macro", "filter", "call")  # stand before others
Render = Callable[[Mapping[str, Any]], str]  # the text of a chat with these variables


class ReadsClock(SettingError):
    """A template's text depends on the day on which it is rendered."""


class TemplateVariables:
    """The variables that a chat template is rendered with.

    Args:
        source: the template.
        settings: values by name, such as `enable_thinking`. `strftime_now` is a date in ISO form:
            the template then sees that day as today.
        tokenizer: its `apply_chat_template` has parameters of its own, which are no variables.

    Raises `SettingError` at a name that the template does not read.
    """

    def __init__(self, source: str, settings: Mapping[str, Any], tokenizer: Any) -> None:
        self.settings = dict(settings)
        self.names = names_of(source)
        self._pinned: datetime | None = None
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        for name, value in self.settings.items():
            if name == CLOCK and CLOCK in self.names:
                self._pinned = _date(value)
            elif name in parameters or name in BUILT_IN[:-1]:
                raise SettingError(
                    f"{SETTING}.{name}: set by the renderer, not by users; expected a variable of"
                    " the chat template"
                )
            else:
                check_read([name], [self.names])

    def render(self, render: Render) -> str:
        """The text that `render` gives with these variables. Raises `ReadsClock` where it depends
        on today's date."""
        if self._pinned is not None:
            return render({**self.settings, CLOCK: self._pinned.strftime})
        first, second = (_Clock(day) for day in TWO_DATES)
        text = render({**self.settings, CLOCK: first})
        if first.formats and text != render({**self.settings, CLOCK: second}):
            raise ReadsClock(
                "chat template writes today's date, so the same chat would be another prompt"
                f" tomorrow; set {self._remedy(render, first.formats[0])}"
            )
        return text

    def _remedy(self, render: Render, form: str) -> str:
        """The setting that takes the date out: a variable of the template's own, if it has one."""
        value = EXAMPLE.strftime(form)
        for name in sorted(self.names - set(BUILT_IN)):
            if ABOUT_TIME.search(name) and name not in self.settings:
                texts = [
                    _try(render, {**self.settings, name: value, CLOCK: _Clock(day)})
                    for day in TWO_DATES
                ]
                if texts[0] is not None and texts[0] == texts[1]:
                    return f'{SETTING}: {{{name}: "{value}"}} (any date that stays)'
        return f'{SETTING}: {{{CLOCK}: "{EXAMPLE:%Y-%m-%d}"}} (any date that stays)'


class _Clock:
    """A day that never ends, and the formats in which a template asked for it."""

    def __init__(self, day: datetime) -> None:
        self._day, self.formats = day, list[str]()

    def __call__(self, form: str) -> str:
        self.formats.append(form)
        return self._day.strftime(form)


def names_of(source: str) -> frozenset[str]:
    """Names that a template reads as variables, by its source."""
    from jinja2 import Environment
    from jinja2.exceptions import TemplateSyntaxError

    try:
        tokens = list(Environment().lex(source))
    except TemplateSyntaxError as error:
        raise SettingError(f"chat template: {error}") from error
    words = [(kind, value) for _, kind, value in tokens if kind != "whitespace"]
    before = [("", ""), *words]
    return frozenset(
        value
        for (kind, value), (_, last) in zip(words, before, strict=False)
        if kind == "name" and value not in KEYWORDS and last not in NOT_VARIABLES
    )


def for_template(source: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a template reads, for teams whose bases have different templates."""
    names = names_of(source)
    return {name: value for name, value in settings.items() if name in names}


def check_read(settings: Iterable[str], read: Iterable[frozenset[str]]) -> None:
    """Raise `SettingError` at a setting that no template reads. `read`: the names that each
    does."""
    known = frozenset[str]().union(*read)
    for name in settings:
        if name not in known:
            raise SettingError(
                f"{SETTING}.{name}: the chat template reads no such variable;"
                f" {nearest(name, sorted(known - set(BUILT_IN)))}"
            )


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `chat_template_kwargs` as JSON values: a date of YAML is its ISO text."""
    return {
        name: value.isoformat() if isinstance(value, date) else value
        for name, value in settings.items()
    }


def _try(render: Render, variables: Mapping[str, Any]) -> str | None:
    try:
        return render(variables)
    except SettingError:  # the template refuses this value
        return None


def _date(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{SETTING}.{CLOCK}: expected a date such as 2024-07-26, got {value!r:.80}"
        ) from error
