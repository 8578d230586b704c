"""Scripted engine, a public test double: replies come from a function, with token ids,
log-probabilities, versions and faults, but no model.

    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "15")

Its tokenizer knows bytes and five special tokens, the same ids as the tiny model's, so whole runs
can be played and even trained on without a model. Log-probabilities come from a known
function, `scripted_logprob`, so that alignment can be tested.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from ...agents.types import Completion, Sampling
from ..renderer import ChatRenderer
from .adapter_versions import FILES, AdapterRegistry
from .base import EngineError, EngineInfo, ModelRef, PromptTooLong, TeamVersion

SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 to 4
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# (prompt with its special tokens as text, weights, sampling, number of the sibling) -> text
Answer = Callable[[str, ModelRef, Sampling, int], str]


def _byte_order() -> list[int]:
    """All bytes in the order of the printable characters that byte-level tokenizers write for them;
    ids 5 to 260."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    written = {byte: byte if byte in printable else next(stand_ins) for byte in range(256)}
    return sorted(written, key=written.__getitem__)


class ByteTokenizer:
    """Text as UTF-8 bytes, in plain Python: all that `ChatRenderer` asks of a tokenizer."""

    eos_token_id: int | None = 1
    bos_token_id: int | None = None
    vocab_size = len(SPECIALS) + 256
    added_tokens_decoder: Mapping[int, Any] = {
        i: SimpleNamespace(content=s, special=True) for i, s in enumerate(SPECIALS)
    }
    _BYTES = _byte_order()
    _IDS = {byte: len(SPECIALS) + i for i, byte in enumerate(_BYTES)}

    def get_chat_template(self) -> str:
        return TEMPLATE

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **settings: Any
    ) -> str:
        for message in conversation:
            if f"<|{message['role']}|>" not in SPECIALS:
                raise ValueError(f"unknown role {message['role']!r}")
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in conversation)
        return text + "<|assistant|>" * add_generation_prompt

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        while text:
            at, special = min((text.find(s), s) if s in text else (len(text), "") for s in SPECIALS)
            ids += [self._IDS[byte] for byte in text[:at].encode()]
            ids += [SPECIALS.index(special)] if special else []
            text = text[at + len(special) :]
        return ids

    def decode(self, token_ids: Sequence[int], **settings: Any) -> str:
        start = len(SPECIALS)
        raw = b"".join(
            SPECIALS[i].encode() if i < start else bytes([self._BYTES[i - start]])
            for i in token_ids
            if i < self.vocab_size
        )
        return raw.decode(errors="replace")

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])


def scripted_logprob(weights: str, before: Sequence[int], token: int) -> float:
    """The log-probability, between -2 and 0, that this engine gives `token` after `before`.

    `weights` is the sha256 of the adapter's weights file, "" for the base, so that adapters differ
    as real ones do.
    """
    return -(zlib.crc32(repr((weights, *before[-8:], token)).encode()) % 2000) / 1000


@dataclass(frozen=True)
class Fault:
    """A fault of one call.

    `raise`: `error`. `delay`: `seconds` late. `stall`: no answer until cancelled or closed.
    `miscount`: a log-probability too few. `drop`: a completion too few.
    """

    kind: Literal["raise", "delay", "stall", "miscount", "drop"]
    seconds: float = 0.0
    error: Exception = EngineError("scripted fault")


class ScriptedEngine:
    """The `Engine` contract with replies from a function.

    Args:
        answer: gives the text of sibling k. It is cut after `max_tokens` tokens or the first stop
            string, else it ends by itself.
        tokens: chats of another tokenizer than `ByteTokenizer`.
        faults: by number of the `generate` call, from 0.
        latency: seconds before an answer, or a function of the call's number.
        context: tokens per sequence.

    An adapter folder that changes or goes while it is loaded raises `EngineError` at the next
    request for it.
    """

    def __init__(
        self,
        answer: Answer,
        tokens: ChatRenderer | None = None,
        *,
        faults: Mapping[int, Fault] | None = None,
        latency: float | Callable[[int], float] = 0.0,
        context: int = 4096,
    ) -> None:
        self.answer, self.tokens = answer, tokens or ChatRenderer(ByteTokenizer())
        self.faults, self.latency, self.context = dict(faults or {}), latency, context
        # every generate call: ids, ref, sampling, n
        self.calls: list[tuple[tuple[int, ...], ModelRef, Sampling, int]] = []
        self._versions = AdapterRegistry("scripted")
        self._contents: dict[str, dict[str, bytes]] = {}
        self._stalled: set[asyncio.Future[None]] = set()

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        if replica is not None:
            self._versions.listed(replica)
        if len(ids) + sampling.max_tokens > self.context:
            raise PromptTooLong(
                f"scripted engine: {len(ids)} prompt tokens and max_tokens={sampling.max_tokens} do"
                f" not fit a context of {self.context}"
            )
        if not ids:
            raise EngineError("scripted engine: an empty prompt; at least one token is needed")
        number = len(self.calls)
        self.calls.append((tuple(ids), ref, sampling, n))
        with self._versions.request(ref):
            self._check_unchanged(ref)
            await asyncio.sleep(self.latency(number) if callable(self.latency) else self.latency)
            kind = await self._fault(number)
            replies = [
                self._completion(tuple(ids), ref, sampling, k, kind == "miscount") for k in range(n)
            ]
            return replies[:-1] if kind == "drop" else replies

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        if replica is not None:
            self._versions.listed(replica)
        with self._versions.request(ref):
            self._check_unchanged(ref)
            await asyncio.sleep(0)
            return self._logprobs(ref, tuple(ids), 1)

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        folders = self._versions.reserve(adapters)
        for policy, folder in folders.items():
            self._versions.add(policy, folder)
            self._contents[folder.name] = _contents(folder)
        return {policy: folder.name for policy, folder in folders.items()}

    async def retire(self, ref: ModelRef) -> None:
        await self._versions.forget(ref)
        del self._contents[ref.version]

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return self._versions.listed(replica)

    def info(self) -> EngineInfo:
        return EngineInfo("scripted", "scripted", self.context)

    async def close(self) -> None:
        """Stalled calls fail. May be called twice."""
        self._versions.closed = True
        for stalled in self._stalled:
            if not stalled.done():
                stalled.set_exception(EngineError("scripted engine: closed while a call stalled"))

    def _check_unchanged(self, ref: ModelRef) -> None:
        if (
            ref.version
            and _contents(self._versions.folders[ref.version]) != self._contents[ref.version]
        ):
            raise EngineError(
                f"scripted engine: the folder of {ref.version!r} changed or went while it was"
                " loaded"
            )

    async def _fault(self, number: int) -> str:
        """Play the fault of this call; its kind, or ""."""
        fault = self.faults.get(number)
        if fault is None:
            return ""
        if fault.kind == "raise":
            raise fault.error
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        if fault.kind == "stall":
            stalled = asyncio.get_running_loop().create_future()
            self._stalled.add(stalled)
            try:
                await stalled
            finally:
                self._stalled.discard(stalled)
        return fault.kind

    def _completion(
        self, ids: tuple[int, ...], ref: ModelRef, sampling: Sampling, k: int, miscount: bool
    ) -> Completion:
        prompt = self.tokens.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = self.answer(prompt, ref, sampling, k)
        stops = [at + len(s) for s in sampling.stop if (at := text.find(s)) >= 0]
        encoded = self.tokens.tokenizer.encode(
            text[: min(stops)] if stops else text, add_special_tokens=False
        )
        encoded += [] if stops else [self.tokens.eos_ids[0]]
        reason = "length" if len(encoded) > sampling.max_tokens else "stop"
        sampled = tuple(encoded[: sampling.max_tokens])
        logprobs = self._logprobs(ref, ids + sampled, len(ids))[: -1 if miscount else None]
        return Completion(
            self.tokens.decode(sampled),
            ids,
            sampled,
            tuple(logprobs),
            reason,
            ref.policy,
            ref.version,
        )

    def _logprobs(self, ref: ModelRef, ids: tuple[int, ...], start: int) -> list[float]:
        weights = (
            hashlib.sha256(self._contents[ref.version][FILES[1]]).hexdigest() if ref.version else ""
        )
        return [
            scripted_logprob(weights, ids[max(0, i - 8) : i], ids[i])
            for i in range(start, len(ids))
        ]


def _contents(folder: Path) -> dict[str, bytes]:
    return (
        {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        if folder.is_dir()
        else {}
    )
