"""Chats as tokens: what was sampled stays as sampled, and no text can forge a role.

Two rules. First, a chat that goes on is never re-tokenised: the next prompt is the last prompt, the
tokens sampled after it, and *glue*, the template's tokens from the end of the answer to the next
generation prompt. Second, message content never yields a special token. The template is rendered
with marks instead of contents, so it is known which characters are structure and which are content;
where a content spells a special token, the text is cut inside that spelling and tokenised in
pieces. Every other text is tokenised in one go, exactly as the tokenizer's own chat template would.

This module imports neither torch nor, except in `load_tokenizer`, transformers: any object with the
handful of methods in `Tokenizer` will do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from ..agents.types import Completion, Message, SettingError, Turn

MARK = "\ue000slot"  # a private-use character: not whitespace, in no template
OPEN, CLOSE = (
    "<tool_response>",
    "</tool_response>",
)  # how tool results are shown; some templates look for this wrapping
THOUGHT = re.compile(
    r"</?\w*think\w*>"
)  # marks of a thought are no role: a text may hold them, as tokens
Part = tuple[str, bool]  # text, and whether it is the content of a message


class Tokenizer(Protocol):
    """What `ChatRenderer` asks of a tokenizer; every fast tokenizer of transformers has it, and
    `scripted.ByteTokenizer`."""

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


class ChatRenderer:
    """The chats of one tokenizer and its chat template.

    Args:
        tokenizer: see `Tokenizer`.
        settings: variables of the template, such as `enable_thinking=False`.

    Attributes:
        append_only: True if a later prompt contains an earlier prompt and answer unchanged. A
            template that rewrites history (drops past thinking, moves the system message) is
            rendered afresh for every turn, which is then a segment of its own.
        eos_ids: tokens that end an answer: the tokenizer's, and the one the template writes after
            an answer.
        template_hash: of the template and its settings; a checkpoint keeps it.

    Raises `SettingError` if there is no chat template, or nothing that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, **settings: Any) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        template = _template(tokenizer)
        self.template_hash = hashlib.sha256(
            (template + json.dumps(settings, sort_keys=True)).encode()
        ).hexdigest()[:16]
        self._shapes: dict[tuple[tuple[str, str, str], ...], list[str | int]] = {}
        self._structure: dict[str, list[int]] = {}
        self._forbidden: dict[str, int] = {}
        self.system_kept = self._keeps("system", [("system", "", ""), ("user", "", "")])
        self.tool_kept = self._keeps(
            "tool", [("user", "", ""), ("assistant", "", ""), ("tool", "", "")]
        )
        self._trims = {role: self._trim(role) for role in ("system", "user", "assistant")}
        self.rewrites = self._rewrites()
        self.append_only = not self.rewrites
        after = self._encode_structure(self._after_answer([("user", "", "")])[0])
        added = tokenizer.added_tokens_decoder
        self.end_of_turn: int | None = after[0] if after and after[0] in added else None
        self.eos_ids: tuple[int, ...] = tuple(
            dict.fromkeys(
                token for token in (self.end_of_turn, tokenizer.eos_token_id) if token is not None
            )
        )
        if not self.eos_ids:
            raise SettingError(
                "tokenizer: no eos token, and its chat template ends answers with none; a reply"
                " would never stop"
            )
        written = "".join(
            piece for shape in self._shapes.values() for piece in shape if isinstance(piece, str)
        )
        # what a text must not spell: all that is special, and whatever else the template writes as
        # a token
        self._forbidden = {
            t.content: i
            for i, t in added.items()
            if t.special or (t.content in written and not THOUGHT.fullmatch(t.content))
        }
        self._forbidden_ids = frozenset(self._forbidden.values())

    def prompt(self, messages: Sequence[Message], previous: Turn | None = None) -> tuple[int, ...]:
        """Token ids of the chat, generation prompt included.

        Args:
            messages: the whole chat. With `previous` it must be `previous.messages`, its answer,
                then what was said since.
            previous: the turn this chat goes on from. If it holds tokens and the template is
                append-only, the result begins with `previous.prompt_ids + previous.token_ids`; the
                end-of-turn token follows if the answer lacks it.
        """
        if previous is not None:
            done = (*previous.messages, Message("assistant", previous.text))
            if tuple((m.role, m.content) for m in messages[: len(done)]) != tuple(
                (m.role, m.content) for m in done
            ):
                raise ValueError(
                    f"chat of {previous.agent!r} does not go on from turn {previous.index}: its"
                    " messages were changed"
                )
            if (
                self.append_only
                and previous.prompt_ids
                and (previous.token_ids or not previous.text)
            ):
                tail = self._encode(self._tail_parts(messages[len(done) :]))
                ended = self.end_of_turn is not None and previous.token_ids[-1:] == (
                    self.end_of_turn,
                )
                return previous.prompt_ids + previous.token_ids + tuple(tail[1:] if ended else tail)
        return tuple(self._encode(self._parts(messages)))

    def write(self, prompt_ids: Sequence[int], text: str) -> Completion:
        """`text` as an answer that somebody else wrote to this prompt, the end-of-turn token
        included: fit for imitation.

        It has no log-probabilities, for nobody sampled it. The prompt stays as it was sent; a text
        that spells special tokens is cut so that it has none. The completion's text is what its
        tokens say.
        """
        ids = self._encode([(_clean(text), True)])
        return Completion(self.decode(ids), tuple(prompt_ids), (*ids, self.eos_ids[0]))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer: without the end-of-turn tokens at its end; special tokens sampled
        before stay visible."""
        end = len(token_ids)
        while end and token_ids[end - 1] in self.eos_ids:
            end -= 1
        return self.tokenizer.decode(
            list(token_ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def show(self, ids: Sequence[int]) -> str:
        """Any token ids as text for people, special tokens visible."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def probe(self) -> dict[str, Any]:
        """What was found out about the template, as JSON values for logs and checkpoints."""
        ids = self.prompt([Message("user", "probe")])
        bos = self.tokenizer.bos_token_id
        return {
            "template_hash": self.template_hash,
            "append_only": self.append_only,
            "rewrites": self.rewrites,
            "system": "kept" if self.system_kept else "merged into the first user message",
            "tool": "kept" if self.tool_kept else "sent as user message",
            "trims": sorted(role for role, sides in self._trims.items() if any(sides)),
            "ends_turn": self.end_of_turn is not None,
            "eos": [
                self.tokenizer.decode(
                    [i], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                for i in self.eos_ids
            ],
            "bos": next(
                i for i, token in enumerate(ids) if token != bos
            ),  # how many at the start: 2 would be one too many
        }

    # -- text: structure and content
    # ------------------------------------------------------------------------------------------

    def _render(self, chat: list[dict[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.settings
            )
        except Exception as error:  # templates raise whatever jinja gives them
            roles = ", ".join(m["role"] for m in chat)
            raise SettingError(
                f"chat template refuses a chat of the roles ({roles}): {error}"
            ) from error

    def _shape(self, slots: Sequence[tuple[str, str, str]]) -> list[str | int]:
        """The template's text around the contents: pieces of structure and, between them, numbers
        of messages.

        A slot is (role, text before, text after the content): the wrapping that templates look at
        stays visible to them.
        """
        key = tuple(slots)
        if key not in self._shapes:
            chat = [
                {"role": role, "content": f"{pre}{MARK}{i};{post}"}
                for i, (role, pre, post) in enumerate(slots)
            ]
            pieces: list[str | int] = list(re.split(f"{MARK}(\\d+);", self._render(chat)))
            pieces[1::2] = [int(number) for number in pieces[1::2]]
            for i, (role, _, _) in enumerate(slots):
                if i not in pieces[1::2]:
                    raise SettingError(
                        f"chat template drops the {role} message at place {i} of {len(slots)}"
                    )
            self._shapes[key] = pieces
        return self._shapes[key]

    def _parts(self, messages: Sequence[Message]) -> list[Part]:
        chat = self._known_roles(messages)
        slots, contents = [_slot(m) for m in chat], [self._content(m) for m in chat]
        pieces = list(self._shape(slots))
        for i, message in enumerate(chat):
            if message.role == "assistant" and (self.rewrites or THOUGHT.search(message.content)):
                at = pieces.index(i)
                pieces[at - 1], contents[i] = self._kept(chat, slots, i)
        return [
            (contents[piece], True) if isinstance(piece, int) else (piece, False)
            for piece in pieces
        ]

    def _tail_parts(self, messages: Sequence[Message]) -> list[Part]:
        chat = self._known_roles(messages)
        pieces = self._after_answer([_slot(m) for m in chat])
        return [
            (self._content(chat[p - 2]), True) if isinstance(p, int) else (p, False) for p in pieces
        ]

    def _after_answer(self, slots: Sequence[tuple[str, str, str]]) -> list[Any]:
        """The shape of what follows an answer: `slots`, then the generation prompt. Message numbers
        count from 2."""
        pieces = self._shape([("user", "", ""), ("assistant", "", ""), *slots])
        return pieces[pieces.index(1) + 1 :]

    def _known_roles(self, messages: Sequence[Message]) -> list[Message]:
        """Tool results as wrapped user messages; the system text in the first user message if the
        template wants no system."""
        chat = [
            Message("user", f"{OPEN}\n{m.content}\n{CLOSE}") if m.role == "tool" else m
            for m in messages
        ]
        if not self.system_kept and chat and chat[0].role == "system":
            text = chat[0].content
            if len(chat) > 1 and chat[1].role == "user":
                chat[1:2] = [Message("user", f"{text}\n\n{chat[1].content}")]
                return chat[1:]
            chat[0] = Message("user", text)
        return chat

    def _content(self, message: Message) -> str:
        text = _clean(message.content)
        _, pre, post = _slot(message)
        text = text[len(pre) : len(text) - len(post)] if pre else text
        left, right = self._trims[message.role] if not pre else (False, False)
        text = text.lstrip() if left else text
        return text.rstrip() if right else text

    def _kept(
        self, chat: list[Message], slots: list[tuple[str, str, str]], number: int
    ) -> tuple[str, str]:
        """What the template makes of an answer it may rewrite: the structure before it, and the
        text it keeps.

        The answer is rendered with its real text, all other messages as marks. Only structure that
        stands there with a mark for the answer too counts as structure.
        """
        pieces = self._shape(slots)
        at = pieces.index(number)
        before, after = str(pieces[at - 1]), str(pieces[at + 1])
        texts = [f"{pre}{MARK}{i};{post}" for i, (_, pre, post) in enumerate(slots)]
        texts[number] = _clean(chat[number].content).replace(MARK, "")
        rendered = self._render(
            [{"role": slot[0], "content": text} for slot, text in zip(slots, texts, strict=True)]
        )
        marks = [
            f"{MARK}{pieces[at + step]};" if 0 <= at + step < len(pieces) else ""
            for step in (-2, 2)
        ]
        start = rendered.index(marks[0]) + len(marks[0])
        piece = rendered[start : rendered.index(marks[1], start) if marks[1] else len(rendered)]
        head = _common(before, piece.removesuffix(after))
        lost = [i for i in self._encode_structure(before[len(head) :]) if i in self._forbidden_ids]
        if lost or not piece.endswith(after):
            raise SettingError(
                "chat template changes the roles it writes with the text of the answer"
                f" {chat[number].content[:60]!r}"
            )
        return head, piece[len(head) : len(piece) - len(after)]

    # -- probes
    # -----------------------------------------------------------------------------------------------------------------

    def _keeps(self, role: str, slots: list[tuple[str, str, str]]) -> bool:
        """False if the template refuses or drops messages of this role."""
        try:
            self._shape(slots)
        except SettingError:
            if role == "system":
                self._shape(
                    [("user", "", "")]
                )  # a template that refuses even this is broken: let its error out
            return False
        return True

    def _trim(self, role: str) -> tuple[bool, bool]:
        """Whether the template strips whitespace at the left and at the right of this role's
        contents."""
        roles = ["system"] * self.system_kept + ["user", "assistant", "user"]
        if role not in roles:
            return False, False
        number = roles.index(role)
        plain = self._shape([(r, "", "") for r in roles])
        padded = self._shape(
            [(r, " \n", "\n ") if i == number else (r, "", "") for i, r in enumerate(roles)]
        )
        at = plain.index(number)
        return padded[at - 1] == plain[at - 1], padded[at + 1] == plain[at + 1]

    def _rewrites(self) -> str:
        """Why a later prompt does not begin with an earlier prompt and its answer; "" if it
        does."""
        head = [("system", "", "")] * self.system_kept + [("user", "", "")]
        answer, thought, user = (
            ("assistant", "", ""),
            ("assistant", "<think>\ndeep thought\n</think>\n\n", ""),
            ("user", "", ""),
        )
        first, second = self._shape(head), self._shape([*head, answer, user])
        third = self._shape([*head, answer, user, answer, user])
        if not _begins(second, first) or not _begins(third, second):
            return "an earlier prompt is not the beginning of a later one"
        glues = [
            shape[shape.index(n) + 1 :: 2]
            for shape, n in ((second, len(head)), (third, len(head) + 2))
        ]
        if not glues[0] == glues[1] == self._after_answer([user])[::2]:
            return "the text between answer and next prompt depends on where in the chat it stands"
        chat = [
            {"role": role, "content": f"{pre}{role}"} for role, pre, _ in [*head, thought, user]
        ]
        if "deep thought" not in self._render(chat):
            return "the thinking of past answers is dropped"
        return ""

    # -- tokens
    # -----------------------------------------------------------------------------------------------------------------

    def _encode(self, parts: Sequence[Part]) -> list[int]:
        """Tokenise, cut only where a content spells a forbidden token."""
        wanted = [
            i
            for text, content in parts
            if not content
            for i in self._encode_structure(text)
            if i in self._forbidden_ids
        ]
        ids = self._encode_cut(parts, everywhere=False)
        if [
            i for i in ids if i in self._forbidden_ids
        ] != wanted:  # a token that matches more than its spelling, e.g. any case
            ids = self._encode_cut(parts, everywhere=True)
            if [i for i in ids if i in self._forbidden_ids] != wanted:
                raise SettingError(
                    "tokenizer: the text of a message becomes special tokens however it is cut; use"
                    " another tokenizer"
                )
        return ids

    def _encode_cut(self, parts: Sequence[Part], *, everywhere: bool) -> list[int]:
        text, cuts, legal = "", {0}, set()
        for part, content in parts:
            if content and everywhere:
                cuts.update(range(len(text), len(text) + len(part) + 1))
            elif not content:
                legal.add((len(text), len(text) + len(part)))
            text += part
        for token in self._forbidden:
            at = text.find(token)
            while at >= 0:
                if not any(start <= at and at + len(token) <= end for start, end in legal):
                    cuts.add(at + 1)
                at = text.find(token, at + 1)
        places = sorted(cuts | {len(text)})
        runs = (text[a:b] for a, b in pairwise(places))
        return [
            i for run in runs if run for i in self.tokenizer.encode(run, add_special_tokens=False)
        ]

    def _encode_structure(self, text: str) -> list[int]:
        if text not in self._structure:
            self._structure[text] = (
                self.tokenizer.encode(text, add_special_tokens=False) if text else []
            )
        return self._structure[text]


def _begins(later: list[str | int], earlier: list[str | int]) -> bool:
    """Whether one shape begins with another; the last piece of the earlier one may go on."""
    *same, last = earlier
    return later[: len(same)] == same and str(later[len(same)]).startswith(str(last))


def _common(a: str, b: str) -> str:
    """The longest text with which both begin."""
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:same]


def _slot(message: Message) -> tuple[str, str, str]:
    text = message.content
    wrapped = (
        message.role == "user"
        and len(text) >= len(OPEN + CLOSE)
        and text.startswith(OPEN)
        and text.endswith(CLOSE)
    )
    return (message.role, OPEN, CLOSE) if wrapped else (message.role, "", "")


def _clean(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _template(tokenizer: Tokenizer) -> str:
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


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a model folder or hub name, checked to have a chat template. Raises
    `SettingError`."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(
        list(folder.glob(kind)) for kind in ("token*", "vocab*", "*.model")
    ):
        raise SettingError(
            f"model {str(path)!r}: the folder has no tokenizer; copy tokenizer.json and its like"
            " from the model's source"
        )
    if not folder.is_dir() and (
        folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1
    ):
        raise SettingError(
            f"model {str(path)!r}: no such folder; expected one in the Hugging Face layout, or a"
            " hub name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever they meet in a file
        where = "" if folder.is_dir() else "no such folder here, and from the hub "
        raise SettingError(
            f"model {str(path)!r}: {where}no tokenizer could be loaded"
            f" ({str(error).splitlines()[0]})"
        ) from error
    if not tokenizer.is_fast:
        raise SettingError(
            f"model {str(path)!r}: a fast tokenizer (tokenizer.json) is needed, found"
            f" {type(tokenizer).__name__}"
        )
    try:
        _template(tokenizer)
    except SettingError as error:
        raise SettingError(f"model {str(path)!r}: {error}") from error
    return tokenizer
