"""The contract of an inference engine: token ids in, token ids and log-probabilities out, LoRA
adapters by version.

Three engines implement it, under one conformance suite (tests/rollouts/engine_conformance.py):
`vllm`, `transformers`, `scripted`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...agents.types import Completion, Sampling


class ModelRef(NamedTuple):
    """The weights to sample with: a policy and the name of its adapter version
    (`solver-v12-3fa9`). Version "" is the bare base."""

    policy: str
    version: str = ""


# policy -> adapter version; a policy that is missing uses the bare base
TeamVersion = Mapping[str, str]


class EngineError(RuntimeError):
    """The engine cannot go on; the message names it and gives the tail of its log where there is
    one."""


class ReplicaLost(EngineError):
    """One of several replicas is lost for now and the others go on: a request to it by name
    fails."""


class PromptTooLong(EngineError):
    """A prompt and `max_tokens` do not fit the model's context; counted as data, not fatal."""


@dataclass(frozen=True)
class EngineInfo:
    """Facts of a running engine. `context`: tokens per sequence; `dtype`: of the served weights;
    `replicas`: places a version must reach, those that are there now.

    `deterministic`: the same requests, all sent again, get the same replies to the last bit; some
    of them sent alone may not (another batch rounds differently). `prefix_cache`: a prompt may be
    answered from what an earlier request has left of it.
    """

    kind: str
    base: str
    context: int
    dtype: str = "float32"
    max_rank: int = 0
    replicas: tuple[str, ...] = ("local",)
    deterministic: bool = False
    prefix_cache: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """An inference engine for one base model and its adapters."""

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        """Sample n replies to `ids` [P], on one replica (None: any). Sibling k draws with
        `sampling.seed + k`.

        Raises `PromptTooLong`; `EngineError` when the engine is gone or does not know `ref`.
        """
        ...

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        """Log-probabilities [len(ids) - 1] of ids[1:] at temperature 1, each given all before it,
        on one replica (None: any)."""
        ...

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        """Load adapter folders, by policy, on every replica. The folder's name is the version's
        name. Returns {policy: version}.

        Folders never change and no name is used twice. Other policies' versions stay as they are;
        nothing is retired here.
        """
        ...

    async def retire(self, ref: ModelRef) -> None:
        """Unload a version from every replica once no request uses it. Files may be deleted only
        after this returns."""
        ...

    async def adapters(self, replica: str) -> Mapping[str, str]:
        """What a replica itself lists as loaded: {version: absolute folder}."""
        ...

    def info(self) -> EngineInfo:
        """What the engine is: its kind, its model, how long a prompt may be."""

    async def close(self) -> None: ...
