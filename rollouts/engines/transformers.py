"""The in-process engine: transformers and PEFT in this process, for CPUs without a server, for
tests and for determinism.

Requests that wait at the same time are decoded together, in an order that depends on nothing but
themselves: the engine waits until the event loop brings no more requests, sorts them behind those
that came before, and decodes in one worker thread. What their prompts have in common is read once
(transformers_prompts.py), replies that end leave the batch, and requests that wait enter it
(transformers_batch.py) when enough rows have ended, whatever the time. So a run that waits for
nothing outside the process is reproduced bit for bit by the same number of threads.

Models whose cache cannot be cut and joined decode a wave in batches of
fixed size, each to its longest reply, and answer all of the wave at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...agents.types import Completion, Sampling, SettingError
from ..renderer import ChatRenderer, load_tokenizer
from .adapter_versions import AdapterRegistry
from .base import EngineError, EngineInfo, ModelRef, PromptTooLong, TeamVersion
from .transformers_batch import CACHE, ContinuousBatch
from .transformers_exactness import fix_rotary
from .transformers_sampler import Sampler, SampleRequest, load_model

T = TypeVar("T")
Replies = dict[SampleRequest, "asyncio.Future[Completion]"]
QUIET = 20  # turns of the event loop without a new request before a wave starts


def _answer(reply: asyncio.Future[T], result: T | EngineError) -> None:
    if reply.done():  # its caller went away
        return
    if isinstance(result, EngineError):
        reply.set_exception(result)
    else:
        reply.set_result(result)


class TransformersEngine:
    """The `Engine` contract on one replica, `local`.

    Args:
        model: folder or hub name of a causal language model with a fast tokenizer and a chat
            template.
        dtype: of the weights: auto (the model's own), float32, bfloat16. Adapters are cast to it.
        device: auto takes the GPU if there is one.
        max_batch: replies decoded at once.
        max_cache: tokens of prompts and replies decoded at once, padding included; a reply that
            needs more is decoded alone.
        threads: CPU threads of the worker; None leaves torch's setting.
        max_adapters: versions loaded at once, a guard against a run that never retires.
        tokens: the renderer of the model's tokenizer, if the caller has it already.
        context: of the run in tokens, which chooses the factors of longrope; see `fix_rotary`.

    Log-probabilities and adapters: see `Sampler`. Raises `SettingError` for a model that cannot be
    loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        max_batch: int = 64,
        max_cache: int = CACHE,
        threads: int | None = None,
        max_adapters: int = 64,
        tokens: ChatRenderer | None = None,
        context: int = 0,
    ) -> None:
        import torch

        for name, value in (("max_batch", max_batch), ("max_cache", max_cache)):
            if value < 1:
                raise SettingError(f"{name}: expected at least 1, got {value}")
        self.tokens = tokens or ChatRenderer(load_tokenizer(model))
        self.device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        loaded = load_model(str(model), dtype, self.device)
        own = int(getattr(loaded.config.get_text_config(), "max_position_embeddings", 0))
        self._context = fix_rotary(loaded, context) or own or 2**20
        self._vocabulary = loaded.get_input_embeddings().num_embeddings
        self._base, self._dtype = str(model), str(loaded.dtype).removeprefix("torch.")
        self.sampler = Sampler(loaded, self.tokens, self.device)
        self.max_batch, self.max_cache = max_batch, max_cache
        self.threads, self.max_adapters = threads, max_adapters
        limit: Callable[[], None] | None = (
            partial(torch.set_num_threads, threads) if threads else None
        )
        self._worker = ThreadPoolExecutor(1, "marlora-engine", limit)
        self._versions = AdapterRegistry("transformers")
        self._waiting: Replies = {}
        self._wave: asyncio.Task[None] | None = None
        self._unscored: dict[ModelRef, list[tuple[tuple[int, ...], asyncio.Future[list[float]]]]]
        self._unscored = {}
        self._scoring: set[asyncio.Task[None]] = set()

    # the contract

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
        if not ids:
            raise EngineError("transformers engine: an empty prompt; at least one token is needed")
        self._check_ids(ids)
        if sampling.grammar:
            raise SettingError(
                "transformers engine: it cannot hold a reply to a grammar or schema; use engine:"
                " vllm"
            )
        for token in sampling.logit_bias:
            if not (token.isdecimal() and int(token) < self._vocabulary):
                raise SettingError(
                    f"logit_bias: {token!r} is no token of {self._base}; its ids are below its"
                    " vocabulary's size"
                )
        if len(ids) + sampling.max_tokens > self._context:
            raise PromptTooLong(
                f"transformers engine: {len(ids)} prompt tokens and"
                f" max_tokens={sampling.max_tokens} do not fit the {self._context} tokens of"
                f" {self._base}; shorten prompts, demonstrations or the descriptions of tools,"
                " lower max_completion_length, or take a model that reads more"
            )
        seed = random.getrandbits(62) if sampling.seed is None else sampling.seed
        loop, plain = asyncio.get_running_loop(), replace(sampling, seed=None)
        with self._versions.request(ref):
            replies = {
                SampleRequest(tuple(ids), ref, plain, seed + k): loop.create_future()
                for k in range(n)
            }
            self._waiting |= replies
            if self._wave is None or self._wave.done():
                self._wave = asyncio.create_task(self._run(), name="transformers engine")
            return list(await asyncio.gather(*replies.values()))

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Raise `SettingError` for a token that the model has no embedding of."""
        if (highest := max(ids)) >= self._vocabulary:
            raise SettingError(
                f"model {self._base}: its tokenizer gives token {self.tokens.show([highest])!r} the"
                f" id {highest}, but its embedding has {self._vocabulary} rows (ids 0 to"
                f" {self._vocabulary - 1}); tokenizer and weights are not of one model: take both"
                " from one folder, or resize the embedding"
            )

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        if replica is not None:
            self._versions.listed(replica)
        if not ids:
            raise EngineError("transformers engine: nothing to score; at least one token is needed")
        self._check_ids(ids)
        if len(ids) > self._context:
            raise PromptTooLong(
                f"transformers engine: {len(ids)} tokens do not fit the {self._context} of"
                f" {self._base}"
            )
        with self._versions.request(ref):
            scores: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
            rows = self._unscored.setdefault(ref, [])
            rows.append((tuple(ids), scores))
            if len(rows) == 1:
                task = asyncio.create_task(self._score(ref), name="transformers engine: scores")
                self._scoring.add(task)
                task.add_done_callback(self._scoring.discard)
            return await scores

    async def _score(self, ref: ModelRef) -> None:
        """Score what was asked of these weights in this turn of the event loop."""
        rows = self._unscored.pop(ref)
        try:
            results = await self._work(partial(self.sampler.score, [ids for ids, _ in rows], ref))
        except EngineError as error:
            for _, scores in rows:
                _answer(scores, error)
        else:
            for (_, scores), result in zip(rows, results, strict=True):
                _answer(scores, result)

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        """Raises `SettingError` for a folder that holds no adapter."""
        if len(self._versions.folders) + len(adapters) > self.max_adapters:
            raise EngineError(
                f"transformers engine: more than max_adapters={self.max_adapters} versions; retire"
                " some"
            )
        folders = self._versions.reserve(adapters)
        for policy, folder in folders.items():
            await self._work(partial(self.sampler.adapters.load, folder))
            self._versions.add(policy, folder)
        return {policy: folder.name for policy, folder in folders.items()}

    async def retire(self, ref: ModelRef) -> None:
        await self._versions.forget(ref)
        await self._work(partial(self.sampler.adapters.unload, ref.version))

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return self._versions.listed(
            replica, await self._work(lambda: self.sampler.adapters.versions)
        )

    def info(self) -> EngineInfo:
        settings = {"max_batch": self.max_batch, "threads": self.threads, "device": self.device}
        return EngineInfo(
            "transformers",
            self._base,
            self._context,
            self._dtype,
            deterministic=True,
            prefix_cache=False,
            settings=settings,
        )

    async def close(self) -> None:
        """Stop after the batch in progress; requests still open fail. May be called twice."""
        self._versions.closed = True
        if (
            self._wave is not None
            and not self._wave.done()
            and self._wave.get_loop() is asyncio.get_running_loop()
        ):
            await asyncio.wait([self._wave])
        self._worker.shutdown(wait=True)

    # waves

    async def _work(self, function: Callable[[], T]) -> T:
        """Run in the one worker thread, where everything that touches the model runs. Failures
        become `EngineError`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, function)
        # out of memory, a folder that does not fit the model, a worker that was shut down, ...
        except Exception as error:
            raise EngineError(f"transformers engine: {type(error).__name__}: {error}") from error

    async def _run(self) -> None:
        """Decode what waits, until nothing does."""
        await (self._run_batches() if self.sampler.shares else self._run_waves())

    async def _quiet(self) -> None:
        """Wait until the event loop brings no more requests."""
        quiet = 0
        while quiet < QUIET:
            seen = len(self._waiting)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0

    def _take(self) -> tuple[list[SampleRequest], Replies]:
        """The requests that wait, in their order, and where their replies go."""
        replies, self._waiting = self._waiting, {}
        open_ = (request for request, reply in replies.items() if not reply.done())
        return sorted(open_, key=lambda request: request.order), replies

    async def _run_batches(self) -> None:
        """Decode what waits in one batch after another; the rows of a batch come and go."""
        queue: list[SampleRequest] = []
        replies: Replies = {}
        batch = self._batch(ModelRef(""))
        while self._waiting or queue or batch.rows:
            await self._quiet()
            new, more = self._take()
            queue, replies = queue + new, replies | more
            queue = [request for request in queue if not replies[request].done()]
            if not batch.rows and queue and queue[0].ref != batch.ref:
                batch = self._batch(queue[0].ref)
            entering = batch.entering(queue)
            queue = queue[len(entering) :]
            held = [*batch.rows, *entering]
            if not held:
                continue
            try:
                if self._versions.closed:
                    raise EngineError("transformers engine: it was closed while requests were open")
                ended = await self._work(partial(batch.advance, entering))
            except EngineError as error:
                batch = self._batch(batch.ref)
                for request in held:
                    _answer(replies.pop(request), error)
                continue
            for request in ended:
                _answer(replies.pop(request), self._completion(request))

    def _batch(self, ref: ModelRef) -> ContinuousBatch:
        return ContinuousBatch(self.sampler, ref, self.max_batch, self.max_cache)

    async def _run_waves(self) -> None:
        """Decode what waits, wave by wave; a wave is sorted and cut into batches."""
        while self._waiting:
            await self._quiet()
            wave, replies = self._take()
            results: list[tuple[SampleRequest, Completion | EngineError]] = []
            while wave:
                size = min(self._together(wave), self.max_batch)
                batch, wave = wave[:size], wave[size:]
                results += await self._decode(batch)
            # all at once, so that the requests that follow from them can be decoded together too
            for request, result in results:
                _answer(replies[request], result)

    def _together(self, wave: Sequence[SampleRequest]) -> int:
        """How many requests, from the first, can be decoded in one batch."""

        def kind(request: SampleRequest) -> tuple[Any, ...]:
            return (*request.batch, 0 if self.sampler.pads else len(request.ids))

        return next((i for i, r in enumerate(wave) if kind(r) != kind(wave[0])), len(wave))

    async def _decode(
        self, batch: list[SampleRequest]
    ) -> list[tuple[SampleRequest, Completion | EngineError]]:
        try:
            if self._versions.closed:
                raise EngineError("transformers engine: it was closed while requests were open")
            await self._work(lambda: self.sampler.decode(batch))
        except EngineError as error:
            return [(request, error) for request in batch]
        return [(request, self._completion(request)) for request in batch]

    def _completion(self, request: SampleRequest) -> Completion:
        return Completion(
            self.tokens.decode(request.token_ids),
            request.ids,
            tuple(request.token_ids),
            tuple(request.logprobs),
            request.finish_reason,
            request.ref.policy,
            request.ref.version,
        )
