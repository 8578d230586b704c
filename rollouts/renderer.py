"""Chat-template tokenisation, token in and token out: a growing chat is never tokenised again, and
content cannot inject special tokens.

Two rules. First, a chat that goes on is never re-tokenised: the next prompt is the last prompt, the
tokens sampled after it, and *glue*, the template's tokens from the end of the answer to the next
generation prompt. Second, message content never yields a special token. The template is rendered
with marks instead of contents (see `template_probe`), so it is known which characters are structure
and which are content; where a content spells a special token, the text is cut inside that spelling
and tokenised in pieces. Every other text is tokenised at once, exactly as the tokenizer's own chat
template would.

This module imports neither torch nor, except in `load_tokenizer`, transformers: any object with the
handful of methods in `Tokenizer` will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..agents.types import Completion, Message, SettingError, Turn
from .template_probe import (
    MARK,
    THOUGHT,
    ChatTemplate,
    Slot,
    TemplateProbe,
    Tokenizer,
    template_text,
)
from .template_variables import for_template

# how tool results are shown; some templates look for this wrapping
OPEN, CLOSE = "<tool_response>", "</tool_response>"
Part = tuple[str, bool]  # text, and whether it is the content of a message


class ChatRenderer:
    """Renders chats with one tokenizer and its chat template.

    Args:
        tokenizer: see `template_probe.Tokenizer`.
        settings: variables of the template, such as `enable_thinking=False`; see
            `template_variables`.

    Attributes:
        append_only: True if a later prompt contains an earlier prompt and answer unchanged. A
            template that rewrites history (drops past thinking, moves the system message) is
            rendered afresh for every turn, which is then a segment of its own.
        eos_ids: tokens that end an answer: the tokenizer's, and the one the template writes after
            an answer.
        template_hash: of the template and its settings; a checkpoint keeps it.
        variables: names that the template reads.

    Raises `SettingError` if there is no chat template, or nothing that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, **settings: Any) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.template = ChatTemplate(tokenizer, settings)
        self.facts = TemplateProbe(self.template).run()
        self.template_hash, self.variables = self.template.hash, self.template.variables.names
        self.append_only = self.facts.append_only
        self.end_of_turn, self.eos_ids = self.facts.ending.sampled, self.facts.eos_ids
        self._structure: dict[str, list[int]] = {}  # structure text -> its token ids
        self._forbidden_ids = frozenset(self.facts.forbidden.values())

    def prompt(self, messages: Sequence[Message], previous: Turn | None = None) -> tuple[int, ...]:
        """Token ids of the chat, generation prompt included.

        Args:
            messages: the whole chat. With `previous` it must be `previous.messages`, its answer,
                then the messages since.
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
                and not self._joins_answer(messages[len(done) :])
                and (previous.token_ids or not previous.text)
            ):
                tail = self._encode(self._tail_parts(messages[len(done) :]))
                if self.end_of_turn is not None and previous.token_ids[-1:] == (self.end_of_turn,):
                    written = self.facts.ending.written
                    tail = tail[tail.index(written) + 1 if written is not None else 0 :]
                return previous.prompt_ids + previous.token_ids + tuple(tail)
        return tuple(self._encode(self._parts(messages)))

    def write(self, prompt_ids: Sequence[int], text: str) -> Completion:
        """A given text as an answer to this prompt, end-of-turn token included, for imitation.

        It was not sampled, so it has no log-probabilities. The prompt stays as it was sent; a text
        that spells special tokens is cut so that it has none. The completion's text is decoded from
        its tokens.
        """
        before = self.facts.ending.before if self.end_of_turn is not None else ""
        ids = self._encode([(_clean(text), True), (before, False)])
        ids.append(self.eos_ids[0])
        return Completion(self.decode(ids), tuple(prompt_ids), tuple(ids))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer: without the end-of-turn tokens at its end, and without what the
        template writes before these; special tokens sampled before stay visible."""
        end = len(token_ids)
        while end and token_ids[end - 1] in self.eos_ids:
            end -= 1
        text = self.show(token_ids[:end])
        ended = self.end_of_turn is not None and self.end_of_turn in token_ids[end:]
        return text.removesuffix(self.facts.ending.before) if ended else text

    def show(self, ids: Sequence[int]) -> str:
        """Any token ids as text, special tokens visible."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def probe(self) -> dict[str, Any]:
        """The facts about the template as JSON values, for logs."""
        ids = self.prompt([Message("user", "probe")])
        bos = self.tokenizer.bos_token_id
        return {
            "template_hash": self.template_hash,
            "append_only": self.append_only,
            "rewrites": self.facts.rewrites,
            "system": "kept" if self.facts.system_kept else "merged into the first user message",
            "tool": "kept" if self.facts.tool_kept else "sent as user message",
            "trims": sorted(role for role, sides in self.facts.trims.items() if any(sides)),
            "ends_turn": self.end_of_turn is not None,
            "eos": [self.show([i]) for i in self.eos_ids],
            # how many at the start: 2 would be one too many
            "bos": next(i for i, token in enumerate(ids) if token != bos),
        }

    # text: structure and content

    def _parts(self, messages: Sequence[Message]) -> list[Part]:
        chat = self._known_roles(messages)
        slots, contents = [_slot(m) for m in chat], [self._content(m) for m in chat]
        pieces = list(self.template.shape(slots))
        for i, message in enumerate(chat):
            if message.role == "assistant" and (
                self.facts.rewrites or THOUGHT.search(message.content)
            ):
                at = pieces.index(i)
                pieces[at - 1], contents[i] = self._kept(chat, slots, i)
        return [
            (contents[piece], True) if isinstance(piece, int) else (piece, False)
            for piece in pieces
        ]

    def _joins_answer(self, messages: Sequence[Message]) -> bool:
        """Whether the first of these messages becomes one with the answer before it."""
        return (
            bool(messages) and messages[0].role == "assistant" and "assistant" in self.facts.single
        )

    def _tail_parts(self, messages: Sequence[Message]) -> list[Part]:
        chat = self._known_roles(messages, goes_on=True)
        pieces = self.template.after_answer([_slot(m) for m in chat])
        return [
            (self._content(chat[p - 2]), True) if isinstance(p, int) else (p, False) for p in pieces
        ]

    def _known_roles(self, messages: Sequence[Message], *, goes_on: bool = False) -> list[Message]:
        """Tool results as wrapped user messages; the system text in the first user message if the
        template wants no system, later ones as the user's if it wants them nowhere else; neighbours
        of one role as one message if it refuses two. `goes_on`: these follow an answer.
        """
        chat: list[Message] = []
        begins = not goes_on
        for m in messages:
            begins = begins and m.role == "system"
            if m.role == "tool":
                m = Message("user", f"{OPEN}\n{m.content}\n{CLOSE}")
            elif m.role == "system" and not begins and not self.facts.late_system:
                m = Message("user", m.content)
            if chat and chat[-1].role == m.role and m.role in self.facts.single:
                m = _joined(chat.pop(), m)
            chat.append(m)
        if not self.facts.system_kept and chat and chat[0].role == "system":
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
        left, right = self.facts.trims[message.role] if not pre else (False, False)
        text = text.lstrip() if left else text
        return text.rstrip() if right else text

    def _kept(self, chat: list[Message], slots: list[Slot], number: int) -> tuple[str, str]:
        """What the template makes of an answer it may rewrite: the structure before it, and the
        text it keeps.

        The answer is rendered with its real text, all other messages as marks. Only structure that
        is there with a mark for the answer too counts as structure.
        """
        pieces = self.template.shape(slots)
        at = pieces.index(number)
        before, after = str(pieces[at - 1]), str(pieces[at + 1])
        texts = [f"{pre}{MARK}{i};{post}" for i, (_, pre, post) in enumerate(slots)]
        texts[number] = _clean(chat[number].content).replace(MARK, "")
        rendered = self.template.render(
            [{"role": slot[0], "content": text} for slot, text in zip(slots, texts, strict=True)]
        )
        marks = [
            f"{MARK}{pieces[at + step]};" if 0 <= at + step < len(pieces) else ""
            for step in (-2, 2)
        ]
        start = rendered.index(marks[0]) + len(marks[0])
        piece = rendered[start : rendered.index(marks[1], start) if marks[1] else len(rendered)]
        head = _common(before, piece.removesuffix(after))
        lost = self._special(self._encode_structure(before[len(head) :]))
        if lost or not piece.endswith(after):
            raise SettingError(
                "chat template changes the roles it writes with the text of the answer"
                f" {chat[number].content[:60]!r}"
            )
        return head, piece[len(head) : len(piece) - len(after)]

    # tokens

    def _encode(self, parts: Sequence[Part]) -> list[int]:
        """Tokenise, cut only where a content spells a forbidden token."""
        structure = [
            i for text, content in parts if not content for i in self._encode_structure(text)
        ]
        expected = self._special(structure)
        ids = self._encode_cut(parts, everywhere=False)
        if self._special(ids) != expected:  # a token matches more than its spelling, e.g. any case
            ids = self._encode_cut(parts, everywhere=True)
            if self._special(ids) != expected:
                raise SettingError(
                    "tokenizer: the text of a message becomes special tokens however it is cut; use"
                    " another tokenizer"
                )
        return ids

    def _special(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._forbidden_ids]

    def _encode_cut(self, parts: Sequence[Part], *, everywhere: bool) -> list[int]:
        text, cuts, legal = "", {0}, set()
        for part, content in parts:
            if content and everywhere:
                cuts.update(range(len(text), len(text) + len(part) + 1))
            elif not content:
                legal.add((len(text), len(text) + len(part)))
            text += part
        for token in self.facts.forbidden:
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


def _common(a: str, b: str) -> str:
    """The longest text with which both begin."""
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:same]


def _joined(a: Message, b: Message) -> Message:
    """Two messages of one role as one: results below one another, as `agents.chat` gives them, all
    else as paragraphs."""
    results = all(pre for _, pre, _ in (_slot(a), _slot(b)))
    texts = [m.content for m in (a, b) if m.content]
    return Message(a.role, ("\n" if results else "\n\n").join(texts))


def _slot(message: Message) -> Slot:
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


def base_renderer(path: str | Path, settings: Mapping[str, Any]) -> ChatRenderer:
    """The renderer of a base model, with those of a run's `chat_template_kwargs` that its template
    reads."""
    tokenizer = load_tokenizer(path)
    return ChatRenderer(tokenizer, **for_template(template_text(tokenizer), settings))


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
        template_text(tokenizer)
    except SettingError as error:
        raise SettingError(f"model {str(path)!r}: {error}") from error
    return tokenizer
