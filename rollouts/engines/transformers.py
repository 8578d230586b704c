"""The in-process engine: transformers and PEFT in this very process, for CPUs without a server, for
tests and for determinism.

Requests that wait at the same time are decoded together, in an order that depends on nothing but
themselves: the engine waits until the event loop has nothing more to say, sorts what came, and runs
batches of fixed size in one worker thread. A token is the inverse of the cumulative distribution at
a uniform number drawn from the request's own seed. So a run that waits for nothing outside the
process is reproduced bit for bit by the same number of threads.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...agents.types import Completion, Sampling, SettingError
from ..renderer import ChatRenderer, load_tokenizer
from .adapter_versions import AdapterRegistry
from .base import EngineError, EngineInfo, ModelRef, PromptTooLong, TeamVersion

T = TypeVar("T")
QUIET = 20  # turns of the event loop without a new request before a wave starts


@dataclass(eq=False)
class _Request:
    """One sibling: what it reads, how it is drawn, and what came of it."""

    ids: tuple[int, ...]
    ref: ModelRef
    sampling: Sampling  # without its seed, so that requests can be compared
    seed: int
    future: asyncio.Future[Completion]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def batch(self) -> tuple[Any, ...]:
        s = self.sampling
        settings = (
            s.temperature,
            s.top_p,
            s.top_k,
            s.min_p,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
        )
        return (self.ref, settings, tuple(sorted(s.logit_bias.items())), s.max_tokens, s.stop)

    @property
    def order(self) -> tuple[Any, ...]:
        return (*self.batch, len(self.ids), self.seed, self.ids)


class TransformersEngine:
    """Keeps the contract of `engine.Engine` on one replica, `local`.

    Args:
        model: folder or hub name of a causal language model with a fast tokenizer and a chat
            template.
        dtype: of the weights: auto (the model's own), float32, bfloat16. Adapters are cast to it.
        device: auto takes the GPU if there is one.
        max_batch: replies decoded at once.
        threads: CPU threads of the worker; None leaves torch's setting.
        max_adapters: versions loaded at once, a guard against a run that never retires.
        tokens: the chats of the model's tokenizer, if the caller has them already.

    At temperature 0 the log-probabilities are those at temperature 1; otherwise those of the
    distribution the token was drawn from. Adapters are never merged: the base stays what it was.
    Raises `SettingError` for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        max_batch: int = 64,
        threads: int | None = None,
        max_adapters: int = 64,
        tokens: ChatRenderer | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if max_batch < 1:
            raise SettingError(f"max_batch: expected at least 1, got {max_batch}")
        self.tokens = tokens or ChatRenderer(load_tokenizer(model))
        self.device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        try:
            # without False, transformers asks on the terminal whether to run the code that a model
            # folder brings
            found = AutoModelForCausalLM.from_pretrained(
                str(model), dtype=dtype, trust_remote_code=False
            )
            self._model = found.to(self.device).eval()
        except (OSError, ValueError) as error:
            raise SettingError(
                f"model {str(model)!r}: cannot be loaded ({str(error).splitlines()[0]})"
            ) from error
        self._model.requires_grad_(False)
        self._context = (
            int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 0))
            or 2**20
        )
        self._base, self._dtype = str(model), str(self._model.dtype).removeprefix("torch.")
        self.max_batch, self.threads, self.max_adapters = max_batch, threads, max_adapters
        limit: Callable[[], None] | None = (
            partial(torch.set_num_threads, threads) if threads else None
        )
        self._worker = ThreadPoolExecutor(1, "marlora-engine", limit)
        self._versions = AdapterRegistry("transformers")
        self._waiting: list[_Request] = []
        self._wave: asyncio.Task[None] | None = None
        self._speaking: str | None = (
            None  # the version that is switched on, "" for the bare base, None if unknown
        )

    # -- the contract
    # ---------------------------------------------------------------------------------------------------------

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
        if sampling.grammar:
            raise SettingError(
                "transformers engine: it cannot hold a reply to a grammar or schema; use engine:"
                " vllm"
            )
        for token in sampling.logit_bias:
            if not (
                token.isdecimal() and int(token) < self._model.get_input_embeddings().num_embeddings
            ):
                raise SettingError(
                    f"logit_bias: {token!r} is no token of {self._base}; its ids are below its"
                    " vocabulary's size"
                )
        if len(ids) + sampling.max_tokens > self._context:
            asked = f"{len(ids)} prompt tokens and max_tokens={sampling.max_tokens}"
            raise PromptTooLong(
                f"transformers engine: {asked} do not fit the {self._context} tokens of"
                f" {self._base}"
            )
        seed = random.getrandbits(62) if sampling.seed is None else sampling.seed
        loop, plain = asyncio.get_running_loop(), replace(sampling, seed=None)
        with self._versions.request(ref):
            requests = [
                _Request(tuple(ids), ref, plain, seed + k, loop.create_future()) for k in range(n)
            ]
            self._waiting += requests
            if self._wave is None or self._wave.done():
                self._wave = asyncio.create_task(self._play_waves(), name="transformers engine")
            return list(await asyncio.gather(*(request.future for request in requests)))

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        if replica is not None:
            self._versions.listed(replica)
        if not ids:
            raise EngineError("transformers engine: nothing to score; at least one token is needed")
        if len(ids) > self._context:
            raise PromptTooLong(
                f"transformers engine: {len(ids)} tokens do not fit the {self._context} of"
                f" {self._base}"
            )
        with self._versions.request(ref):
            return await self._work(partial(self._score, tuple(ids), ref))

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        """Raises `SettingError` for a folder that holds no adapter or whose name PEFT cannot
        take."""
        if len(self._versions.folders) + len(adapters) > self.max_adapters:
            raise EngineError(
                f"transformers engine: more than max_adapters={self.max_adapters} versions; retire"
                " some"
            )
        for folder in adapters.values():
            if "." in Path(folder).name:
                raise SettingError(
                    f"adapter {folder}: PEFT takes no '.' in the name of an adapter; rename the"
                    " folder"
                )
        found = self._versions.reserve(adapters)
        for policy, folder in found.items():
            await self._work(partial(self._load, folder))
            self._versions.add(policy, folder)
        return {policy: folder.name for policy, folder in found.items()}

    async def retire(self, ref: ModelRef) -> None:
        await self._versions.forget(ref)
        await self._work(partial(self._unload, ref.version))

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return self._versions.listed(
            replica, await self._work(lambda: getattr(self._model, "peft_config", {}))
        )

    def info(self) -> EngineInfo:
        settings = {"max_batch": self.max_batch, "threads": self.threads, "device": self.device}
        return EngineInfo(
            "transformers", self._base, self._context, self._dtype, exact=True, settings=settings
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

    # -- waves
    # ------------------------------------------------------------------------------------------------------------------

    async def _work(self, function: Callable[[], T]) -> T:
        """Run in the one worker thread, where everything that touches the model runs. Failures
        become `EngineError`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, function)
        # out of memory, a folder that does not fit the model, a worker that was shut down, ...
        except Exception as error:
            raise EngineError(f"transformers engine: {type(error).__name__}: {error}") from error

    async def _play_waves(self) -> None:
        while self._waiting:
            quiet = 0
            while quiet < QUIET:
                seen = len(self._waiting)
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._waiting) == seen else 0
            wave = sorted((r for r in self._waiting if not r.future.done()), key=lambda r: r.order)
            self._waiting = []
            finished: list[tuple[_Request, Completion | EngineError]] = []
            while wave:
                size = next((i for i, r in enumerate(wave) if r.batch != wave[0].batch), len(wave))
                batch, wave = wave[: min(size, self.max_batch)], wave[min(size, self.max_batch) :]
                finished += await self._play_batch(batch)
            for (
                request,
                result,
            ) in finished:  # all at once, so that what they ask next can be decoded together too
                if request.future.done():
                    continue
                if isinstance(result, EngineError):
                    request.future.set_exception(result)
                else:
                    request.future.set_result(result)

    async def _play_batch(
        self, batch: list[_Request]
    ) -> list[tuple[_Request, Completion | EngineError]]:
        try:
            if self._versions.closed:
                raise EngineError("transformers engine: it was closed while requests were open")
            await self._work(lambda: self._decode(batch))
        except EngineError as error:
            return [(request, error) for request in batch]
        return [(request, self._completion(request)) for request in batch]

    def _completion(self, request: _Request) -> Completion:
        text = self.tokens.decode(request.token_ids)
        drawn = tuple(request.token_ids), tuple(request.logprobs)
        return Completion(
            text,
            request.ids,
            *drawn,
            request.finish_reason,
            request.ref.policy,
            request.ref.version,
        )

    # -- in the worker thread
    # ---------------------------------------------------------------------------------------------------

    def _load(self, folder: Path) -> None:
        from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

        self._speaking = None
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        if isinstance(self._model, PeftModel):
            self._model.add_adapter(folder.name, config, autocast_adapter_dtype=False)
        else:
            self._model = PeftModel(self._model, config, folder.name, autocast_adapter_dtype=False)
        try:
            weights = load_peft_weights(str(folder), device=self.device)
            found = set_peft_model_state_dict(self._model, weights, adapter_name=folder.name)
            absent = [key for key in found.missing_keys if f".{folder.name}." in key]
            if absent or found.unexpected_keys:
                raise ValueError(
                    f"{folder} does not fit the model: missing {absent[:3]}, unknown"
                    f" {found.unexpected_keys[:3]}"
                )
        except Exception:
            self._unload(folder.name)
            raise
        self._model.eval()

    def _unload(self, version: str) -> None:
        self._speaking = None
        others = [name for name in self._model.peft_config if name != version]
        if others:
            self._model.set_adapter(others[0])  # PEFT keeps one active
            self._model.delete_adapter(version)
        else:
            self._model = self._model.unload()  # the base as it was; nothing was ever merged
        self._model.requires_grad_(False)

    def _speak_as(self, ref: ModelRef) -> None:
        """From now on the model is the base with this version's adapter, or the bare base. PEFT's
        switches cost as much as a token."""
        if self._speaking == ref.version:
            return
        if ref.version:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(ref.version)
            self._model.requires_grad_(False)  # PEFT turns the gradients of the active adapter on
        elif hasattr(self._model, "peft_config"):
            self._model.base_model.disable_adapter_layers()
        self._speaking = ref.version

    def _score(self, ids: tuple[int, ...], ref: ModelRef) -> list[float]:
        import torch

        with torch.inference_mode():
            self._speak_as(ref)
            tensor = torch.tensor([ids], device=self.device)
            logits = self._model(input_ids=tensor, use_cache=False).logits[0, :-1].float()
            return torch.log_softmax(logits, -1).gather(1, tensor[0, 1:, None])[:, 0].tolist()

    def _decode(self, batch: list[_Request]) -> None:
        """Fill in tokens, log-probs and finish reason of each request. All have the same ref and
        sampling.

        Equal prompts are read once. Rows that have ended are dropped from the cache when half of
        them have.
        """
        import torch

        with torch.inference_mode():
            self._speak_as(batch[0].ref)
            prompts = list(dict.fromkeys(request.ids for request in batch))
            width = max(map(len, prompts))
            ids = torch.tensor([(0,) * (width - len(p)) + p for p in prompts], device=self.device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device
            )
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
            rows, noise = (
                list(batch),
                {id(request): random.Random(request.seed) for request in batch},
            )
            where = torch.tensor(
                [prompts.index(request.ids) for request in batch], device=self.device
            )
            cache, logits, mask = out.past_key_values, out.logits[:, -1][where], mask[where]
            if len(prompts) < len(batch):
                cache.reorder_cache(where)
            while True:
                tokens = self._draw(rows, logits, [noise[id(request)].random() for request in rows])
                alive = [i for i, request in enumerate(rows) if not request.finish_reason]
                if not alive:
                    return
                if len(alive) <= len(rows) // 2:
                    where = torch.tensor(alive, device=self.device)
                    cache.reorder_cache(where)
                    rows, tokens, mask = [rows[i] for i in alive], tokens[where], mask[where]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                out = self._model(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, logits = out.past_key_values, out.logits[:, -1]

    def _draw(self, rows: list[_Request], logits: Any, uniform: list[float]) -> Any:
        """Draw a token [B] for each row from logits [B, V] and write it down in the rows that have
        not ended."""
        import torch

        sampling = rows[0].sampling
        shaped = shape_logits(
            logits.float(), sampling, [r.ids for r in rows], [r.token_ids for r in rows]
        )
        logprobs = torch.log_softmax(shaped, -1)
        if sampling.temperature == 0:
            tokens = shaped.argmax(-1)
        else:
            cumulative = logprobs.double().exp().cumsum(-1)
            points = (
                torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None]
                * cumulative[:, -1:]
            )
            tokens = torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(
                max=logits.shape[-1] - 1
            )
        drawn = logprobs.gather(1, tokens[:, None])[:, 0]
        for request, token, logprob in zip(rows, tokens.tolist(), drawn.tolist(), strict=True):
            if not request.finish_reason:
                request.token_ids.append(token)
                request.logprobs.append(logprob)
                request.finish_reason = self._end(request)
        return tokens

    def _end(self, request: _Request) -> str:
        stop = request.sampling.stop
        if request.token_ids[-1] in self.tokens.eos_ids:
            return "stop"
        # a stop string ends in the newest token, so a tail of as many tokens as it has bytes is
        # enough
        if stop:
            tail = request.token_ids[-max(len(s.encode()) for s in stop) - 4 :]
            if any(s in self.tokens.decode(tail) for s in stop):
                return "stop"
        return "length" if len(request.token_ids) >= request.sampling.max_tokens else ""


def shape_logits(
    logits: Any,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]],
) -> Any:
    """The logits [B, V] a token is drawn from: penalties, bias, temperature, min_p, top_k, top_p,
    in this order.

    Repetition counts prompt and reply, presence and frequency the reply alone. Temperature 0 stays
    at 1: its token is the largest.
    """
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, (before, after) in enumerate(zip(prompts, sampled, strict=True)):
            seen[row, list({*before, *after})] = True
        factor = sampling.repetition_penalty
        logits = torch.where(
            seen, torch.where(logits > 0, logits / factor, logits * factor), logits
        )
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = torch.zeros_like(logits)
        for row, after in enumerate(sampled):
            counts[row] = torch.bincount(
                torch.tensor(after, dtype=torch.long), minlength=logits.shape[-1]
            ).to(logits)
        logits = (
            logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        )
    if sampling.logit_bias:
        logits = logits.clone()
        logits[:, [int(token) for token in sampling.logit_bias]] += torch.tensor(
            list(sampling.logit_bias.values())
        ).to(logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        logits = MinPLogitsWarper(sampling.min_p)(None, logits)
    if sampling.top_k > 0:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits
