"""The vLLM engine: token ids to `/v1/completions` of servers that are started here or given by URL,
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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ....agents.types import BASE, Completion, PolicySpec, Sampling, SettingError, to_json
from ..adapter_versions import FILES, AdapterRegistry
from ..base import EngineError, EngineInfo, ModelRef, PromptTooLong, TeamVersion
from ..config import EngineConfig
from .client import ReplicaClient
from .discovery import Endpoint, key_from, refuse_open, tidy, wait_for_endpoints
from .health import ReplicaPolicy
from .protocol import Reply, read_choices, read_scores, request_body
from .replicas import Replica, ReplicaPool, capped
from .router import Router, Routes
from .server import VLLMServer, served_base, start_servers
from .server_args import ServerSettings, lora_sizes, served_dtype, vllm_version


class Tokens(Protocol):
    """What the engine needs of `ChatRenderer`."""

    eos_ids: tuple[int, ...]

    def decode(self, ids: Sequence[int], /) -> str: ...


class VLLMEngine:
    """The `Engine` contract over one or more vLLM servers.

    Args:
        servers: started `VLLMServer`s, which `close` stops, or endpoints or URLs of servers that
            others run.
        tokens: decodes, and names the tokens that end a reply.
        adapter_root: the only folder adapters are loaded from.
        key: for URLs: their bearer token ("" = none).
        allow_open_server: accept URLs that generate or load adapters without a key.
        dtype: of weights served by URL, which servers do not report; our own servers' is known.
        router: URL of a router before the servers ("" = none): it is asked to generate, they
            themselves for all else.
        foreign: another process starts servers again, publishes and retires; this one only asks.
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
        retry: ReplicaPolicy | None = None,
        foreign: bool = False,
    ) -> None:
        if not servers:
            raise SettingError("engine vllm: expected at least one server or URL")
        self.tokens, self.root = tokens, Path(adapter_root).resolve()
        self.replicas: dict[str, Replica] = {}
        self.max_rank, self.base, contexts = 0, "", []
        policy = retry or ReplicaPolicy()
        for server in servers:
            replica, context = _connect(
                server, key, allow_open_server, capped(policy) if len(servers) > 1 else policy
            )
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
        self._versions = AdapterRegistry("vllm", foreign)
        self.fleet = ReplicaPool(self.replicas, asked=self._versions.asked if foreign else None)
        self.router = self._routed_by(router, policy) if router else None
        self._routes = Routes()
        self._draw = random.SystemRandom()

    def _routed_by(self, url: str, policy: ReplicaPolicy) -> Router:
        """Raises `SettingError` unless all servers have one key and one name of the base."""
        for what, values in (
            ("key", {replica.client.key for replica in self.replicas.values()}),
            ("name", {replica.base for replica in self.replicas.values()}),
        ):
            if len(values) > 1:
                raise SettingError(
                    f"router_url {url}: a router sends one {what} to all servers, but they have"
                    f" {len(values)}; start them with one"
                )
        first = next(iter(self.replicas.values()))
        return Router(tidy(url), first.client.key, first.base, self.fleet, policy)

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
                f" of {self.context}; shorten prompts, demonstrations or the descriptions of tools,"
                " lower max_completion_length, or raise max_model_len"
            )
        if not ids:
            raise EngineError("an empty prompt: at least one token expected")
        if sampling.seed is None:  # drawn once, so that a retry repeats it
            sampling = replace(sampling, seed=self._draw.getrandbits(62))
        # vLLM refuses n > 1 for greedy sampling; sibling k draws with seed + k
        siblings = n if sampling.temperature > 0 else 1

        def request(model: str) -> tuple[dict[str, Any], Callable[[Any], list[Reply]]]:
            read = partial(
                read_choices,
                model=model,
                prompt=list(ids),
                n=siblings,
                max_tokens=sampling.max_tokens,
            )
            return request_body(ids, model, sampling, siblings, self.tokens.eos_ids), read

        async def ask(place: Replica) -> Any:
            model = ref.version or place.base
            return await self._send(place, model, *request(model))

        with self._versions.request(ref):
            if self.router is not None and replica is None:
                chat = self._routes.chat(ref.policy, ids)
                body, read = request(ref.version or self.router.base)
                replies = await self.router.complete(chat, body, read)
            else:
                replies = await self._ask(ref, ids, replica, ask)
        completions = [
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
        return completions if siblings == n else completions * n

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        """See `Engine.score`. vLLM always generates a token too, so at most context - 1 tokens can
        be scored."""
        if len(ids) + 1 > self.context:
            raise PromptTooLong(
                f"{len(ids)} tokens to score do not fit the context of {self.context} with one more"
            )
        if not ids:
            raise EngineError("an empty prompt: at least one token expected")

        async def ask(place: Replica) -> Any:
            model = ref.version or place.base
            sampling = Sampling(max_tokens=1, seed=0)
            body = request_body(ids, model, sampling, 1, self.tokens.eos_ids)
            read = partial(read_scores, model=model, prompt=list(ids))
            return await self._send(place, model, body | {"prompt_logprobs": 0}, read)

        with self._versions.request(ref):
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
        open_requests = {name: replica.open.total() for name, replica in present.items()}
        return present[self._routes.choose(ref.policy, ids, open_requests)]

    # versions

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        """See `Engine.publish`. Raises `SettingError` for a folder that is not a plain adapter
        inside `adapter_root`."""
        bases = (replica.base for replica in self.replicas.values())
        folders = self._versions.reserve(adapters, self._check_folder, (BASE, *bases))
        for folder in folders.values():
            await self.fleet.load(folder.name, folder)
        for policy, folder in folders.items():
            self._versions.add(policy, folder)
        return {policy: folder.name for policy, folder in folders.items()}

    def _check_folder(self, folder: Path) -> None:
        """A server loads any file it is asked to, so what it is asked to load is checked here."""
        target = folder.resolve()
        if target.parent != self.root or folder.is_symlink():
            raise SettingError(f"adapter {folder}: expected a folder in {self.root}, not a link")
        files = {file.name: file for file in target.iterdir()} if target.is_dir() else {}
        if set(files) != set(FILES) or any(
            file.is_symlink() or not file.is_file() for file in files.values()
        ):
            raise SettingError(
                f"adapter {folder}: exactly {sorted(FILES)} expected, as plain files; got"
                f" {sorted(files)}"
            )
        rank = json.loads(files["adapter_config.json"].read_text(encoding="utf-8")).get("r")
        if self.max_rank and (not isinstance(rank, int) or rank > self.max_rank):
            raise SettingError(
                f"adapter {folder.name}: rank {rank} is above the server's {self.max_rank}; start"
                " it with this policy"
            )

    async def retire(self, ref: ModelRef) -> None:
        """See `Engine.retire`. Waits for the open requests of this version."""
        await self._versions.forget(ref)
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

    def address(self) -> dict[str, Any]:
        """What another process needs to ask the same servers, as JSON (see `attach_engine`): of a
        key the file that holds it, beside which a server of ours keeps its URL of the moment."""
        servers = [
            Endpoint(r.url, str(r.server.key_file) if r.server else r.client.key_file)
            for r in self.replicas.values()
        ]
        router = self.router.url if self.router is not None else ""
        return {"servers": to_json(servers), "router_url": router, "dtype": self.dtype}

    async def close(self) -> None:
        """Close connections and stop the servers that were started here. Safe to call twice."""
        self._versions.closed = True
        if self.router is not None:
            await self.router.close()
        await self.fleet.close()


def _connect(
    server: VLLMServer | Endpoint | str, key: str, allow_open: bool, policy: ReplicaPolicy
) -> tuple[Replica, int]:
    """(replica, its context in tokens). Raises `SettingError` for an open server."""
    if isinstance(server, VLLMServer):
        if not server.alive:
            raise EngineError(f"{server.name} is not running; start it before the engine")
        base, context = served_base(server.url, server.key)
        client = ReplicaClient(server.name, server.url, server.key, base)
        return Replica(client, policy, server), context
    key_file = server.key_file if isinstance(server, Endpoint) else ""
    url = tidy(server.url if isinstance(server, Endpoint) else server)
    key = key_from(key_file, "endpoints: key_file") or key
    if not allow_open:
        refuse_open(url)
    base, context = served_base(url, key)
    return Replica(ReplicaClient(url, url, key, base, key_file), policy), context


async def start_vllm(
    model: str,
    tokens: Tokens,
    policies: Sequence[PolicySpec],
    config: EngineConfig,
    *,
    folder: Path,
    say: Callable[[str], None],
    staleness: int = 0,
) -> VLLMEngine:
    """An engine on servers that are started here, or on those of `endpoints` or `server_urls`;
    adapters come from `folder/versions`.

    `server_devices` "0" or "0,1" is one server on these; "0;1" is one server on each. `staleness`:
    as in `server_settings`.
    """
    settings: dict[str, Any] = {
        "adapter_root": folder / "versions",
        "allow_open_server": config.allow_open_server,
    }
    if config.endpoints or config.server_urls:
        settings |= {"router": config.router_url, "key": key_from(config.server_key)}
        running: Sequence[Endpoint | str] = config.server_urls
        if config.endpoints:
            running = await wait_for_endpoints(
                Path(config.endpoints), model, config.num_servers, config.server_timeout, say
            )
        served = next((e.dtype for e in running if isinstance(e, Endpoint) and e.dtype), "bfloat16")
        dtype = served if config.engine_dtype == "auto" else config.engine_dtype
        engine = await asyncio.to_thread(
            partial(VLLMEngine, running, tokens, dtype=dtype, **settings)
        )
        await engine.fleet.forget(engine.root)
        return engine
    start = server_settings(model, policies, config, folder, say, staleness=staleness)
    servers = await start_servers(start, len(start.devices), say)
    return VLLMEngine(servers, tokens, **settings)


def server_settings(
    model: str,
    policies: Sequence[PolicySpec],
    config: EngineConfig,
    folder: Path,
    say: Callable[[str], None],
    where: str = "",
    staleness: int = 0,
) -> ServerSettings:
    """Settings of vLLM servers of this base, to be started here.

    Args:
        where: part of their names, if servers on several nodes share the folder.
        staleness: earlier versions of every adapter that stay loaded beside the newest one; servers
            get as many more LoRA slots.
    """
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
        staleness=staleness,
        dtype=config.engine_dtype,
        max_model_len=config.max_model_len,
        memory=memory,
        devices=config.server_devices.split(";"),
        host=config.server_host,
        port=config.server_port,
        timeout=config.server_timeout,
        engine_args=dict(config.engine_args or {}),  # type: ignore[arg-type]
    )
