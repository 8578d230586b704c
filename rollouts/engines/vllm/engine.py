"""The vLLM engine: token ids to `/v1/completions` of servers started by us or given by URL,
adapters by version on all of them.

Everything that shapes sampling is sent with every request, so no default of a server or model
applies in silence: all fields of `Sampling`, and the tokens that end a reply (`ignore_eos` plus our
own `stop_token_ids`, because vLLM would add those of the model's generation_config.json even under
`--generation-config vllm`). Every reply is checked: the model's name is echoed, the prompt came
back as sent, each sampled token has its log-probability. Text is decoded here, never taken from the
server.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from ....agents.types import BASE, Completion, PolicySpec, Sampling, SettingError, nearest
from ..base import EngineError, EngineInfo, ModelRef, PromptTooLong, TeamVersion
from ..config import EngineConfig
from .addresses import key_from, refuse_open, tidy
from .client import Replica, RetryPolicy
from .discovery import Endpoint, wait_for_endpoints
from .protocol import Reply, read_choices, read_scores, request_body
from .replicas import ReplicaPool, hasty
from .router import Router
from .server import VLLMServer, served_base, start_servers
from .server_args import ServerSettings, lora_sizes, served_dtype, vllm_version

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
CHATS = 4096  # chats whose replica is remembered


class Tokens(Protocol):
    """The two things the engine needs from `ChatRenderer`."""

    eos_ids: tuple[int, ...]

    def decode(self, ids: Sequence[int], /) -> str: ...


class Routes:
    """Keeps a chat on one replica, where its prefix is cached.

    A chat's next prompt begins with its last one (design: chats grow by appending), so a prompt
    goes where the longest prompt that it extends went, for the same policy. Prompts that extend
    none go to the replica with the fewest open requests. Compared are whole earlier prompts, not
    first tokens: few-shot prompts share those across all chats.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], str] = OrderedDict()

    def choose(self, policy: str, ids: Sequence[int], open_requests: Mapping[str, int]) -> str:
        if len(open_requests) == 1:
            return next(iter(open_requests))
        found, last = self._earlier(policy, ids)
        name = (
            found
            if found is not None and found in open_requests
            else min(open_requests, key=lambda one: open_requests[one])
        )
        return self._remember(policy, last, name)

    def chat(self, policy: str, ids: Sequence[int]) -> str:
        """The chat's id: its first prompt's hash, the same in every process. Chats that begin alike
        share one, as they share a prefix."""
        found, last = self._earlier(policy, ids)
        return self._remember(policy, last, found or f"{policy}-{last % 2**64:016x}")

    def _earlier(self, policy: str, ids: Sequence[int]) -> tuple[str | None, int]:
        """Where the longest prompt that this one extends went, and this one's hash."""
        hashes = list(accumulate(ids, lambda seen, token: hash((seen, token)), initial=0))[1:]
        return (
            next(
                (self._seen[policy, h] for h in reversed(hashes) if (policy, h) in self._seen), None
            ),
            hashes[-1],
        )

    def _remember(self, policy: str, last: int, place: str) -> str:
        self._seen[policy, last] = place
        self._seen.move_to_end((policy, last))
        if len(self._seen) > CHATS:
            self._seen.popitem(last=False)
        return place


class VLLMEngine:
    """Keeps the contract of `engine.Engine` over one or more vLLM servers.

    Args:
        servers: started `VLLMServer`s, which `close` stops, or endpoints or URLs of servers that
            others run.
        tokens: decodes, and names the tokens that end a reply.
        adapter_root: the only folder adapters are loaded from.
        key: for URLs: what they ask for as a bearer token ("" = none).
        allow_open_server: accept URLs that generate or load adapters without a key.
        dtype: of weights served by URL, which servers do not tell; ours know theirs.
        router: URL of a router before the servers ("" = none): it is asked to generate, they
            themselves for all else.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer | Endpoint | str],
        tokens: Tokens,
        *,
        adapter_root: str | Path,
        key: str = "",
        allow_open_server: bool = False,
        dtype: str = "bfloat16",
        router: str = "",
        patience: RetryPolicy | None = None,
    ) -> None:
        if not servers:
            raise SettingError("engine vllm: expected at least one server or URL")
        self.tokens, self.root = tokens, Path(adapter_root).resolve()
        self.replicas: dict[str, Replica] = {}
        self.max_rank, self.base, contexts = 0, "", []
        calm = patience or RetryPolicy()
        patience = hasty(calm) if len(servers) > 1 else calm
        for server in servers:
            replica, context = _connect(server, key, allow_open_server, patience)
            if replica.name in self.replicas:
                raise SettingError(f"server_urls: {replica.name} is given twice")
            self.replicas[replica.name] = replica
            contexts.append(context)
            if isinstance(server, VLLMServer):
                sizes = lora_sizes(server.settings.policies, server.settings.staleness)
                self.max_rank, self.base = sizes.max_rank if sizes else 0, server.settings.model
                dtype = served_dtype(server.settings)
        self.context, self.dtype = min(contexts), dtype
        self.base = self.base or next(iter(self.replicas.values())).base
        self._versions: dict[str, str] = {}  # version -> policy, of those that may be asked for
        self._used: set[str] = set()  # every version name there ever was
        self.fleet = ReplicaPool(self.replicas)
        self.router = self._routed_by(router, calm) if router else None
        self._routes = Routes()
        self._draw = random.SystemRandom()
        self._closed = False

    def _routed_by(self, url: str, patience: RetryPolicy) -> Router:
        """Raises `SettingError` unless the servers are told apart by nothing but their place."""
        for what, found in (
            ("key", {r.key for r in self.replicas.values()}),
            ("name", {r.base for r in self.replicas.values()}),
        ):
            if len(found) > 1:
                raise SettingError(
                    f"router_url {url}: a router sends one {what} to all servers, but they have"
                    f" {len(found)}; start them with one"
                )
        first = next(iter(self.replicas.values()))
        return Router(tidy(url), first.key, first.base, self.fleet, patience)

    # tokens

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`. At temperature 0 all n replies are equal, and sampled once."""
        if len(ids) + sampling.max_tokens > self.context:
            raise PromptTooLong(
                f"{len(ids)} prompt tokens and max_tokens {sampling.max_tokens} exceed the context"
                f" of {self.context}"
            )
        if sampling.seed is None:
            sampling = replace(
                sampling, seed=self._draw.getrandbits(62)
            )  # drawn once, so that a retry repeats it
        asked = (
            n if sampling.temperature > 0 else 1
        )  # vLLM refuses n > 1 for greedy sampling; sibling k draws with seed + k

        def request(model: str) -> tuple[dict[str, Any], Callable[[Any], list[Reply]]]:
            read = partial(
                read_choices, model=model, prompt=list(ids), n=asked, max_tokens=sampling.max_tokens
            )
            return request_body(ids, model, sampling, asked, self.tokens.eos_ids), read

        async def ask(place: Replica) -> Any:
            model = self._model(ref, place.base)
            return await self._send(place, model, *request(model))

        if self.router is not None and replica is None:
            self._some_of(ids)
            chat = self._routes.chat(ref.policy, ids)
            replies = await self.router.complete(chat, *request(self._model(ref, self.router.base)))
        else:
            replies = await self._ask(ref, ids, replica, ask)
        made = [
            Completion(
                self.tokens.decode(tokens),
                tuple(ids),
                tokens,
                logprobs,
                reason,
                ref.policy,
                ref.version,
            )
            for tokens, logprobs, reason in replies
        ]
        return made if asked == n else made * n

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        """See `Engine.score`. vLLM wants to generate a token, so at most context - 1 tokens can be
        scored."""
        if len(ids) + 1 > self.context:
            raise PromptTooLong(
                f"{len(ids)} tokens to score do not fit the context of {self.context} with one more"
            )

        async def ask(place: Replica) -> Any:
            model = self._model(ref, place.base)
            body = request_body(
                ids, model, Sampling(max_tokens=1, seed=0), 1, self.tokens.eos_ids
            ) | {"prompt_logprobs": 0}
            return await self._send(
                place, model, body, partial(read_scores, model=model, prompt=list(ids))
            )

        return await self._ask(ref, ids, replica, ask)

    async def _ask(
        self,
        ref: ModelRef,
        ids: Sequence[int],
        name: str | None,
        ask: Callable[[Replica], Awaitable[Any]],
    ) -> Any:
        """On the replica of this name, or on the one where the chat is, and another if that is
        lost."""
        if name is not None:
            return await self.fleet.only(name, ask)
        return await self.fleet.ask(lambda present: self._choose(ref, ids, present), ask)

    async def _send(self, replica: Replica, model: str, body: Mapping[str, Any], read: Any) -> Any:
        replica.open[model] += 1
        try:
            return await replica.request("POST", "/v1/completions", body, read)
        finally:
            replica.open[model] -= 1

    def _choose(self, ref: ModelRef, ids: Sequence[int], present: Mapping[str, Replica]) -> Replica:
        self._some_of(ids)
        return present[
            self._routes.choose(
                ref.policy, ids, {name: r.open.total() for name, r in present.items()}
            )
        ]

    @staticmethod
    def _some_of(ids: Sequence[int]) -> None:
        if not ids:
            raise EngineError("an empty prompt: at least one token expected")

    def _model(self, ref: ModelRef, base: str) -> str:
        """The name to ask for, `base` for the bare base. An unknown version, or another policy's,
        is an error and never the base."""
        if self._closed:
            raise EngineError("the vLLM engine is closed")
        if not ref.version:
            return base
        if ref.version not in self._versions:
            why = (
                "was retired"
                if ref.version in self._used
                else f"was never published; {nearest(ref.version, self._versions)}"
            )
            raise EngineError(f"adapter version {ref.version!r} of policy {ref.policy!r} {why}")
        if self._versions[ref.version] != ref.policy:
            raise EngineError(
                f"adapter version {ref.version!r} is policy {self._versions[ref.version]!r}'s, not"
                f" {ref.policy!r}'s"
            )
        return ref.version

    # versions

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        """See `Engine.publish`. Raises `SettingError` for a folder that is not a plain adapter
        inside `adapter_root`."""
        found = {policy: self._checked(Path(folder)) for policy, folder in adapters.items()}
        names = [folder.name for folder in found.values()]
        for name in names:
            if (
                name in self._used
                or names.count(name) > 1
                or name == BASE
                or any(name == r.base for r in self.replicas.values())
            ):
                raise EngineError(
                    f"adapter version {name!r}: the name was used before; every version needs a"
                    " new one"
                )
        self._used.update(names)
        for folder in found.values():
            await self.fleet.load(folder.name, folder)
        self._versions |= {folder.name: policy for policy, folder in found.items()}
        return {policy: folder.name for policy, folder in found.items()}

    def _checked(self, folder: Path) -> Path:
        """The real folder. A server loads any file it is told to, so what it is told is checked
        here."""
        where = folder.resolve()
        if where.parent != self.root or folder.is_symlink():
            raise SettingError(f"adapter {folder}: expected a folder in {self.root}, not a link")
        files = {file.name: file for file in where.iterdir()} if where.is_dir() else {}
        if set(files) != ADAPTER_FILES or any(
            file.is_symlink() or not file.is_file() for file in files.values()
        ):
            raise SettingError(
                f"adapter {folder}: exactly {sorted(ADAPTER_FILES)} expected, as plain files; got"
                f" {sorted(files)}"
            )
        rank = json.loads(files["adapter_config.json"].read_text()).get("r")
        if self.max_rank and (not isinstance(rank, int) or rank > self.max_rank):
            raise SettingError(
                f"adapter {folder.name}: rank {rank} is above the server's {self.max_rank}; start"
                " it with this policy"
            )
        return where

    async def retire(self, ref: ModelRef) -> None:
        """See `Engine.retire`. Waits for the open requests of this version."""
        self._model(ref, BASE)
        if not ref.version:
            raise EngineError("the bare base cannot be retired")
        del self._versions[ref.version]
        if self.router is not None:
            await self.router.idle(ref.version)
        await self.fleet.unload(ref.version)

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return await self.fleet.only(replica, Replica.listed)

    def info(self) -> EngineInfo:
        servers = [replica.server for replica in self.replicas.values() if replica.server]
        settings = {"urls": [replica.url for replica in self.replicas.values()]} | (
            {"vllm": servers[0].version} if servers else {}
        )
        present = tuple(self.fleet.present)
        return EngineInfo(
            "vllm", self.base, self.context, self.dtype, self.max_rank, present, settings=settings
        )

    async def close(self) -> None:
        """Close connections and stop the servers that are ours. Safe to call twice."""
        self._closed = True
        if self.router is not None:
            await self.router.close()
        await self.fleet.close()


def _connect(
    server: VLLMServer | Endpoint | str, key: str, allow_open: bool, patience: RetryPolicy
) -> tuple[Replica, int]:
    if isinstance(server, VLLMServer):
        if not server.alive:
            raise EngineError(f"{server.name} is not running; start it before the engine")
        base, context = served_base(server.url, server.key)
        return Replica(server.name, server.url, server.key, base, patience, server), context
    key_file = server.key_file if isinstance(server, Endpoint) else ""
    url, key = (
        tidy(server.url if isinstance(server, Endpoint) else server),
        key_from(key_file, "endpoints: key_file") or key,
    )
    if not allow_open:
        refuse_open(url)
    base, context = served_base(url, key)
    return Replica(url, url, key, base, patience, key_file=key_file), context


async def start_vllm(
    model: str,
    tokens: Tokens,
    policies: Sequence[PolicySpec],
    config: EngineConfig,
    *,
    folder: Path,
    say: Callable[[str], None],
) -> VLLMEngine:
    """Servers of ours, or those of `endpoints` or `server_urls`, as an engine; adapters come from
    `folder/versions`.

    `server_devices` "0" or "0,1" is one server on these; "0;1" is one server on each.
    """
    settings: dict[str, Any] = {
        "adapter_root": folder / "versions",
        "allow_open_server": config.allow_open_server,
    }
    if config.endpoints or config.server_urls:
        settings |= {"router": config.router_url, "key": key_from(config.server_key)}
        found: Sequence[Endpoint | str] = config.server_urls
        if config.endpoints:
            found = await wait_for_endpoints(
                Path(config.endpoints), model, config.num_servers, config.server_timeout, say
            )
        named = next((e.dtype for e in found if isinstance(e, Endpoint) and e.dtype), "bfloat16")
        dtype = named if config.engine_dtype == "auto" else config.engine_dtype
        engine = await asyncio.to_thread(
            partial(VLLMEngine, found, tokens, dtype=dtype, **settings)
        )
        await engine.fleet.forget(engine.root)
        return engine
    wanted = server_settings(model, policies, config, folder, say)
    servers = await start_servers(wanted, len(wanted.devices), say)
    return VLLMEngine(servers, tokens, **settings)


def server_settings(
    model: str,
    policies: Sequence[PolicySpec],
    config: EngineConfig,
    folder: Path,
    say: Callable[[str], None],
    where: str = "",
) -> ServerSettings:
    """How to start servers of this base here. `where`: part of their names, if servers on several
    nodes share the folder."""
    memory, on_cpu = config.server_memory, vllm_version()[1]
    if not memory and not on_cpu:
        memory = 0.9
        say(f"vLLM takes {memory:.0%} of its GPU's memory")
    return ServerSettings(
        model=model,
        folder=folder,
        label="-".join(
            filter(None, ("vllm", re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name), where))
        ),
        policies=policies,
        staleness=config.max_staleness,
        dtype=config.engine_dtype,
        max_model_len=config.max_model_len,
        memory=memory,
        devices=config.server_devices.split(";"),
        host=config.server_host,
        port=config.server_port,
        timeout=config.server_timeout,
        engine_args=dict(config.engine_args or {}),  # type: ignore[arg-type]
    )
