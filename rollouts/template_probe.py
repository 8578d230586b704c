"""How a chat template behaves, found by rendering placeholders once at start: which messages it
keeps, trims or rewrites, and where its end-of-turn token stands.

The text of a template around the contents is a *shape*: pieces of structure and, between them,
numbers of messages. Comparing shapes shows whether a template keeps system and tool messages, trims
contents, or rewrites earlier turns, and which token ends an answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..agents.types import SettingError
from .template_variables import ReadsClock, TemplateVariables

MARK = "\ue000slot"  # a private-use character: not whitespace, in no template
# marks of a thought are no role: a text may hold them, as tokens
THOUGHT = re.compile(r"</?\w*think\w*>")
TWICE = {  # chats with two messages of a role in a row
    "system": ("system", "system", "user"),
    "user": ("user", "assistant", "user", "user"),
    "assistant": ("user", "assistant", "assistant", "user"),
}
Slot = tuple[str, str, str]  # role, text before and after the content that the template gets to see
Shape = list[str | int]


class Tokenizer(Protocol):
    """The methods of a tokenizer that are used here; every fast tokenizer of transformers has them,
    and `scripted.ByteTokenizer`."""

    eos_token_id: int | None
    bos_token_id: int | None
    added_tokens_decoder: Mapping[int, Any]  # id -> object with `content` and `special`

    def get_chat_template(self) -> str: ...
    def convert_ids_to_tokens(self, ids: int) -> Any: ...
    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **settings: Any
    ) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> Any: ...


class ChatTemplate:
    """The chat template of a tokenizer with its settings (variables such as `enable_thinking`).

    Attributes:
        hash: of the template and its settings, 16 hex digits; a checkpoint keeps it.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
        self.tokenizer, self.settings = tokenizer, dict(settings)
        source = template_text(tokenizer)
        self.variables = TemplateVariables(source, settings, tokenizer)
        text = source + json.dumps(self.settings, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._shapes: dict[tuple[Slot, ...], Shape] = {}

    def render(self, chat: list[dict[str, str]], *, ends: bool = False) -> str:
        """The text of a chat, generation prompt included unless the chat `ends`. Raises
        `SettingError` where the template refuses it, or writes today's date."""

        def with_variables(variables: Mapping[str, Any]) -> str:
            try:
                return self.tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=not ends, **variables
                )
            except Exception as error:  # templates raise whatever jinja gives them
                roles = ", ".join(m["role"] for m in chat)
                raise SettingError(
                    f"chat template refuses a chat of the roles ({roles}): {error}"
                ) from error

        return self.variables.render(with_variables)

    def shape(self, slots: Sequence[Slot]) -> Shape:
        """The template's text around the contents: pieces of structure and, between them, numbers
        of messages."""
        key = tuple(slots)
        if key not in self._shapes:
            chat = [
                {"role": role, "content": f"{pre}{MARK}{i};{post}"}
                for i, (role, pre, post) in enumerate(slots)
            ]
            pieces: Shape = list(re.split(f"{MARK}(\\d+);", self.render(chat)))
            pieces[1::2] = [int(number) for number in pieces[1::2]]
            for i, (role, _, _) in enumerate(slots):
                if i not in pieces[1::2]:
                    raise SettingError(
                        f"chat template drops the {role} message at place {i} of {len(slots)}"
                    )
            self._shapes[key] = pieces
        return self._shapes[key]

    def after_answer(self, slots: Sequence[Slot]) -> list[Any]:
        """The shape of what follows an answer: `slots`, then the generation prompt. Message numbers
        count from 2."""
        pieces = self.shape([("user", "", ""), ("assistant", "", ""), *slots])
        return pieces[pieces.index(1) + 1 :]

    def last_answer(self) -> str:
        """The structure that follows an answer where nothing else does, not even a generation
        prompt."""
        chat = [{"role": role, "content": f"{MARK}{role};"} for role in ("user", "assistant")]
        return self.render(chat, ends=True).partition(f"{MARK}assistant;")[2]

    def structure(self) -> str:
        """All structure of the shapes so far, as one text."""
        return "".join(
            piece for shape in self._shapes.values() for piece in shape if isinstance(piece, str)
        )


@dataclass(frozen=True)
class Ending:
    """The end of an answer.

    Args:
        sampled: the token with which a model ends its reply; None if the template has no such
            token.
        written: the token that stands in its place where the chat goes on; most templates write
            the same one.
        before: the text that the template writes between an answer and `written`.
    """

    sampled: int | None
    written: int | None
    before: str


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does with messages.

    Args:
        system_kept, tool_kept: it accepts and writes messages of this role.
        single: roles of which it refuses two messages in a row.
        late_system: it takes a system message after an answer.
        trims: per role, whether it strips whitespace at the left and at the right of contents.
        rewrites: why a later prompt does not begin with an earlier prompt and its answer; "" if it
            does.
        ending: what it writes after an answer.
        eos_ids: tokens that end an answer: `ending.sampled` and the tokenizer's eos.
        forbidden: spellings that no content may turn into a token, and their ids: all special
            tokens, and whatever else the template writes as a token.
    """

    system_kept: bool
    tool_kept: bool
    single: frozenset[str]
    late_system: bool
    trims: Mapping[str, tuple[bool, bool]]
    rewrites: str
    ending: Ending
    eos_ids: tuple[int, ...]
    forbidden: Mapping[str, int]

    @property
    def append_only(self) -> bool:
        """A later prompt contains an earlier prompt and its answer unchanged."""
        return not self.rewrites


class TemplateProbe:
    """Renders probe chats and reads off the `TemplateFacts`. Raises `SettingError` if nothing ends
    an answer."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.tokenizer = template, template.tokenizer

    def run(self) -> TemplateFacts:
        """Probe the template once."""
        system_kept = self._keeps("system", [("system", "", ""), ("user", "", "")])
        tool_kept = self._keeps("tool", [("user", "", ""), ("assistant", "", ""), ("tool", "", "")])
        single = frozenset(role for role, chat in TWICE.items() if not self._takes(chat))
        late_system = self._takes(("user", "assistant", "system", "user"))
        trims = {role: self._trim(role, system_kept) for role in ("system", "user", "assistant")}
        rewrites = self._rewrites(system_kept)
        ending = self._ending()
        ends = (ending.sampled, self.tokenizer.eos_token_id)
        eos_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
        if not eos_ids:
            raise SettingError(
                "tokenizer: no eos token, and its chat template ends answers with none; a reply"
                " would never stop"
            )
        return TemplateFacts(
            system_kept,
            tool_kept,
            single,
            late_system,
            trims,
            rewrites,
            ending,
            eos_ids,
            self._forbidden(),
        )

    def _ending(self) -> Ending:
        """What ends an answer: the token that the template writes both before a next message and
        where the chat ends.

        Some templates write one token in the middle of a chat and another at its end (gpt-oss):
        only the latter ends a reply, the former may stand within one.
        """
        after = self.template.after_answer([("user", "", "")])[0]
        try:
            last = self.template.last_answer()
        except ReadsClock:
            raise
        except SettingError:  # it refuses a chat that ends with an answer
            last = after
        glue, end = self._encode(after), self._encode(last)
        shared = self._added(glue[: _agreement(glue, end)])
        sampled: int | None
        written: int | None
        if shared:
            sampled = written = self._eos_or_first(shared)
        elif self._added(end):
            sampled = self._eos_or_first(self._added(end))
            written = next(iter(self._added(glue)), None)
        else:  # the next role's token ends the answer, if it follows at once
            sampled = written = next(iter(self._added(glue[:1])), None)
        if written is None:
            return Ending(sampled, None, "")
        return Ending(sampled, written, after.partition(self._spelling(written))[0])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _added(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.tokenizer.added_tokens_decoder]

    def _eos_or_first(self, ids: Sequence[int]) -> int:
        eos = self.tokenizer.eos_token_id
        return eos if eos is not None and eos in ids else ids[0]

    def _spelling(self, token: int) -> str:
        return self.tokenizer.added_tokens_decoder[token].content

    def _forbidden(self) -> dict[str, int]:
        structure = self.template.structure()
        return {
            t.content: i
            for i, t in self.tokenizer.added_tokens_decoder.items()
            if t.special or (t.content in structure and not THOUGHT.fullmatch(t.content))
        }

    def _keeps(self, role: str, slots: list[Slot]) -> bool:
        """False if the template refuses or drops messages of this role."""
        try:
            self.template.shape(slots)
        except ReadsClock:
            raise
        except SettingError:
            if role == "system":  # a template that refuses even this is broken: raise its error
                self.template.shape([("user", "", "")])
            return False
        return True

    def _takes(self, roles: Sequence[str]) -> bool:
        """Whether the template takes and writes a chat of these roles."""
        try:
            self.template.shape([(role, "", "") for role in roles])
        except ReadsClock:
            raise
        except SettingError:
            return False
        return True

    def _trim(self, role: str, system_kept: bool) -> tuple[bool, bool]:
        """Whether the template strips whitespace at the left and at the right of this role's
        contents."""
        roles = ["system"] * system_kept + ["user", "assistant", "user"]
        if role not in roles:
            return False, False
        number = roles.index(role)
        plain = self.template.shape([(r, "", "") for r in roles])
        padded = self.template.shape(
            [(r, " \n", "\n ") if i == number else (r, "", "") for i, r in enumerate(roles)]
        )
        at = plain.index(number)
        return padded[at - 1] == plain[at - 1], padded[at + 1] == plain[at + 1]

    def _rewrites(self, system_kept: bool) -> str:
        head = [("system", "", "")] * system_kept + [("user", "", "")]
        answer, thought, user = (
            ("assistant", "", ""),
            ("assistant", "<think>\ndeep thought\n</think>\n\n", ""),
            ("user", "", ""),
        )
        first, second = self.template.shape(head), self.template.shape([*head, answer, user])
        third = self.template.shape([*head, answer, user, answer, user])
        if not _begins(second, first) or not _begins(third, second):
            return "an earlier prompt is not the beginning of a later one"
        glues = [
            shape[shape.index(n) + 1 :: 2]
            for shape, n in ((second, len(head)), (third, len(head) + 2))
        ]
        if not glues[0] == glues[1] == self.template.after_answer([user])[::2]:
            return "the text between answer and next prompt depends on where in the chat it stands"
        chat = [
            {"role": role, "content": f"{pre}{role}"} for role, pre, _ in [*head, thought, user]
        ]
        if "deep thought" not in self.template.render(chat):
            return "the thinking of past answers is dropped"
        return ""


def _agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _begins(later: Shape, earlier: Shape) -> bool:
    """Whether one shape begins with another; the last piece of the earlier one may go on."""
    *same, last = earlier
    return later[: len(same)] == same and str(later[len(same)]).startswith(str(last))


def template_text(tokenizer: Tokenizer) -> str:
    """The source of a tokenizer's chat template. Raises `SettingError` if it has none."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise SettingError(
            "tokenizer: no chat template; use the instruct variant of the model, or add"
            " chat_template.jinja"
        ) from error
    if not template:
        raise SettingError(
            "tokenizer: its chat template is empty; use the instruct variant of the model, or"
            " add one"
        )
    return template
