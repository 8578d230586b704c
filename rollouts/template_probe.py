"""Probing a chat template: rendered once at start with marks instead of contents.

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

MARK = "\ue000slot"  # a private-use character: not whitespace, in no template
# marks of a thought are no role: a text may hold them, as tokens
THOUGHT = re.compile(r"</?\w*think\w*>")
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
        text = template_text(tokenizer) + json.dumps(self.settings, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._shapes: dict[tuple[Slot, ...], Shape] = {}

    def render(self, chat: list[dict[str, str]]) -> str:
        """The text of a chat, generation prompt included. Raises `SettingError` where the template
        refuses it."""
        try:
            return self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.settings
            )
        except Exception as error:  # templates raise whatever jinja gives them
            roles = ", ".join(m["role"] for m in chat)
            raise SettingError(
                f"chat template refuses a chat of the roles ({roles}): {error}"
            ) from error

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

    def structure(self) -> str:
        """All structure of the shapes so far, as one text."""
        return "".join(
            piece for shape in self._shapes.values() for piece in shape if isinstance(piece, str)
        )


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does with messages.

    Args:
        system_kept, tool_kept: it accepts and writes messages of this role.
        trims: per role, whether it strips whitespace at the left and at the right of contents.
        rewrites: why a later prompt does not begin with an earlier prompt and its answer; "" if it
            does.
        end_of_turn: the token that it writes after an answer; None if that is no token of its own.
        eos_ids: tokens that end an answer: `end_of_turn` and the tokenizer's eos.
        forbidden: spellings that no content may turn into a token, and their ids: all special
            tokens, and whatever else the template writes as a token.
    """

    system_kept: bool
    tool_kept: bool
    trims: Mapping[str, tuple[bool, bool]]
    rewrites: str
    end_of_turn: int | None
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
        trims = {role: self._trim(role, system_kept) for role in ("system", "user", "assistant")}
        rewrites = self._rewrites(system_kept)
        end_of_turn = self._end_of_turn()
        ends = (end_of_turn, self.tokenizer.eos_token_id)
        eos_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
        if not eos_ids:
            raise SettingError(
                "tokenizer: no eos token, and its chat template ends answers with none; a reply"
                " would never stop"
            )
        return TemplateFacts(
            system_kept, tool_kept, trims, rewrites, end_of_turn, eos_ids, self._forbidden()
        )

    def _end_of_turn(self) -> int | None:
        text = self.template.after_answer([("user", "", "")])[0]
        ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        return ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else None

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
        except SettingError:
            if role == "system":  # a template that refuses even this is broken: raise its error
                self.template.shape([("user", "", "")])
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
