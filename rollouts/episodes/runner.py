"""The episode runner: plays a system on tasks, many episodes at once, each reproducible from its
seed; failures are recorded as data."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.chat import Services
from ...agents.concurrency import from_outside, gather
from ...agents.lookup import only_trusted
from ...agents.seeds import derive_seed
from ...agents.system import System
from ...agents.team import Team
from ...agents.transcript import Transcript
from ...agents.types import (
    Call,
    Completion,
    Decision,
    LimitError,
    Reward,
    Sampling,
    SettingError,
    Task,
    Turn,
    nearest,
)
from ..engines.base import EngineError, PromptTooLong, TeamVersion
from ..rewards.scoring import TIMEOUT, RewardFn, score
from ..sandbox.sandbox import check
from ..sandbox.sandbox import run as execute
from ..types import Episode, Usage
from .completers import Completer


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of episodes. `max_turns` and `max_tool_calls` (per reply) per episode;
    `episode_timeout` and `reward_timeout` (each reward function's) in seconds; `concurrency` in
    episodes. `on_error`: what an episode whose system or program raised is worth: "drop" (nothing:
    it has failed) or "zero" (every reward is 0, and its turns are trained on)."""

    max_turns: int = 200
    max_tool_calls: int = 4
    episode_timeout: float = 1200.0
    reward_timeout: float = TIMEOUT
    concurrency: int = 64
    on_error: str = "drop"


@dataclass(frozen=True)
class EpisodeRequest:
    """An episode to play.

    Args:
        group: shared by the episodes of one task in one step; `sample` numbers them.
        draw: what its seed is derived from, beside the run's; "" is its id. Requests of one `draw`
            draw the same random numbers.
    """

    task: Task
    group: str
    sample: int = 0
    step: int = 0
    draw: str = ""

    @property
    def id(self) -> str:
        return f"{self.group}/{self.sample}"


def episode_requests(
    tasks: Iterable[Task], *, label: str, num_generations: int = 1, step: int = 0
) -> list[EpisodeRequest]:
    """One request per task and sample; groups are named `label/TASK`."""
    return [
        EpisodeRequest(task, f"{label}/{task.id}", k, step)
        for task in tasks
        for k in range(num_generations)
    ]


@dataclass(frozen=True)
class _Start:
    """What an episode starts from: adapter versions (`latest` gives those of the next call, if they
    may change inside the episode), what is replayed, its seed, and the episode it is a child of."""

    version: TeamVersion
    latest: Callable[[], TeamVersion] | None = None
    given: Iterable[Turn] = ()
    replace: Mapping[int, Completion] | None = None
    decisions: Iterable[Decision] = ()
    seed: int | None = None
    parent: str | None = None


@dataclass
class EpisodeRunner:
    """Plays `system` with one completer per policy and scores the episodes.

    Args:
        sampling: of agents that have none of their own.
        seed: the run's; an episode's seed is derived from it and the request's id, whatever is
            played beside it.
        pinned: the team version of episodes that are played without naming one.
        version_policy: what keeps the team version it began with (setting `pin`): the "episode", or
            only the "call", so that weights may change inside an episode (see `collect`).
        untrusted: names that the system looks up while it runs are checked as those of a checkpoint
            that is not trusted (see `agents.lookup`).
    """

    system: System
    completers: Mapping[str, Completer]
    rewards: Sequence[RewardFn] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    limits: EpisodeLimits = EpisodeLimits()
    seed: int = 0
    pinned: TeamVersion | None = None
    version_policy: str = "episode"
    untrusted: bool = False

    def __post_init__(self) -> None:
        for agent in self.system.specs:
            if agent.policy not in self.completers:
                hint = nearest(agent.policy, list(self.completers))
                raise SettingError(
                    f"agent {agent.name!r}: its policy {agent.policy!r} is not served; {hint}"
                )

    def greedy(self) -> EpisodeRunner:
        """A runner for greedy evaluation: every agent at temperature 0, and no other change of the
        distribution."""

        def at_zero(sampling: Sampling) -> Sampling:
            return Sampling(temperature=0.0, max_tokens=sampling.max_tokens, stop=sampling.stop)

        agents = [
            dataclasses.replace(a, sampling=at_zero(a.sampling) if a.sampling else None)
            for a in self.system.specs
        ]
        return dataclasses.replace(
            self, system=self.system.with_agents(agents), sampling=at_zero(self.sampling)
        )

    async def play(
        self,
        request: EpisodeRequest,
        version: TeamVersion | None = None,
        *,
        given: Iterable[Turn] = (),
        replace: Mapping[int, Completion] | None = None,
        decisions: Iterable[Decision] = (),
        seed: int | None = None,
    ) -> Episode:
        """Play one episode and score it. `given`, `replace` and `decisions` are replayed (see
        `Transcript`); the rest is sampled.

        A failing system, reward or prompt is data in the episode. Raises `EngineError` when an
        engine is gone and `SettingError` when the system asks for what does not exist: both concern
        the whole run.
        """
        start = _Start(
            version or self.pinned or {},
            given=given,
            replace=replace,
            decisions=decisions,
            seed=seed,
        )
        return (await self._play(request, start))[-1]

    async def collect(
        self,
        plan: Sequence[EpisodeRequest],
        version: TeamVersion | Callable[[], TeamVersion] | None = None,
        slots: asyncio.Semaphore | None = None,
    ) -> AsyncIterator[Episode]:
        """Play all requests, at most `limits.concurrency` at once; yields episodes as they end,
        children before their parent.

        Every episode keeps the team version it began with; a function as `version` is called
        whenever one begins (with `version_policy` "call" at every call of a policy too; turns
        record the versions that sampled them). `slots`: shared with other plans that are played at
        the same time. Closing the iterator cancels open episodes. An `EngineError` or
        `SettingError` cancels them too, and is raised once every episode that had ended is yielded.
        """
        slots = slots or asyncio.Semaphore(self.limits.concurrency)

        async def one(request: EpisodeRequest) -> list[Episode]:
            async with slots:
                now = version() if callable(version) else version
                in_flight = callable(version) and self.version_policy == "call"
                latest = version if callable(version) and in_flight else None
                return await self._play(request, _Start(now or self.pinned or {}, latest))

        tasks = [asyncio.create_task(one(request), name=request.id) for request in plan]
        try:
            ended: asyncio.Queue[asyncio.Task[list[Episode]]] = asyncio.Queue()
            for task in tasks:
                task.add_done_callback(ended.put_nowait)
            failed: asyncio.Task[list[Episode]] | None = None
            for _ in tasks:
                if failed is not None and ended.empty():
                    break
                task = await ended.get()
                if task.cancelled() or task.exception() is not None:
                    failed = failed or task
                    await asyncio.sleep(0)  # others may have ended in this very turn of the loop
                    continue
                for episode in task.result():
                    yield episode
            if failed is not None:
                await failed  # raises
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, request: EpisodeRequest, start: _Start) -> list[Episode]:
        """The episode after its children."""
        seed = start.seed
        if seed is None:
            seed = derive_seed(self.seed, request.draw or request.id)
        usage: dict[str, Usage] = {agent.name: Usage() for agent in self.system.specs}
        children: list[Episode] = []
        services = Services(
            complete=self._completion(start, usage),
            play=self._child_player(request, start, children),
            execute=execute,
            check=check,
            sampling=self.sampling,
            max_tool_calls=self.limits.max_tool_calls,
        )
        transcript = Transcript(
            seed,
            given=start.given,
            replace=start.replace,
            decisions=start.decisions,
            max_turns=self.limits.max_turns,
        )
        team = Team(self.system.specs, services, transcript, self.values)
        output, stop_reason, error = await self._run(request.task, team)
        problem = error if stop_reason == "error" and team.turns and self._errors_count() else None
        if problem is not None:
            output, error = "", None
        policies = [agent.policy for agent in self.system.specs]
        episode = Episode(
            id=request.id,
            group=request.group,
            task=request.task,
            seed=seed,
            parent=start.parent,
            split=request.task.split,
            step=request.step,
            team_version={p: start.version[p] for p in policies if p in start.version},
            values=dict(self.values),
            turns=team.turns,
            decisions=tuple(team.decisions),
            output=output,
            usage=usage,
            stop_reason=stop_reason,
            error=error,
        )
        if error is None:
            episode = dataclasses.replace(episode, rewards=tuple(team.rewards))
            rewards = await score(request.task, episode, self.rewards, self.limits.reward_timeout)
            episode = dataclasses.replace(
                episode, rewards=rewards if problem is None else _zeros(rewards, problem)
            )
        return [*children, episode]

    def _errors_count(self) -> bool:
        """Whether an error of the system is worth 0 (`on_error: zero`); a system's own setting wins
        over the run's."""
        own = getattr(self.system, "on_error", "") or self.limits.on_error
        return bool(own == "zero")

    def _completion(
        self, start: _Start, usage: dict[str, Usage]
    ) -> Callable[[Call], Awaitable[list[Completion]]]:
        """Completes an agent's calls in one episode; adds their cost to `usage`."""

        async def complete(call: Call) -> list[Completion]:
            began = time.perf_counter()
            version = start.version if start.latest is None else start.latest()
            policy = call.agent.policy
            completions = await self.completers[policy](call, version.get(policy, ""))
            prompts = sum(len(c.prompt_ids) for c in completions)
            sampled = sum(len(c.token_ids) for c in completions)
            usage[call.agent.name] += Usage(1, prompts, sampled, time.perf_counter() - began)
            return completions

        return complete

    def _child_player(
        self, request: EpisodeRequest, start: _Start, children: list[Episode]
    ) -> Callable[[System, Sequence[Task]], Awaitable[list[Episode]]]:
        """Plays child episodes of one episode; appends them, and their own, to `children`."""

        async def play(system: System, tasks: Sequence[Task]) -> list[Episode]:
            runner = dataclasses.replace(self, system=system)
            group = f"{request.id}/{type(system).__name__}"
            first = len(children)
            requests = [
                EpisodeRequest(task, f"{group}/{task.id}", first + k, request.step)
                for k, task in enumerate(tasks)
            ]
            begin = _Start(start.version, start.latest, parent=request.id)
            played = await gather(runner._play(each, begin) for each in requests)
            children.extend(episode for family in played for episode in family)
            return [family[-1] for family in played]

        return play

    async def _run(self, task: Task, team: Team) -> tuple[str | None, str, str | None]:
        """(output, stop reason, error) of one run; raises only errors that concern the whole
        run."""
        caller = asyncio.current_task()
        try:
            async with asyncio.timeout(self.limits.episode_timeout) as clock:
                with only_trusted(self.untrusted):
                    output = await self.system.run(task.public(), team)
            return None if output is None else str(output), "done", None
        except PromptTooLong as error:
            return None, "context", str(error)
        except LimitError as error:
            return None, "limit", str(error)
        except (EngineError, SettingError):
            raise
        except BaseException as error:
            if from_outside(error, caller):
                raise
            if isinstance(error, TimeoutError) and clock.expired():
                seconds = self.limits.episode_timeout
                return None, "timeout", f"not done after {seconds:g} s (episode_timeout)"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
            return None, "error", f"{type(error).__name__}: {error} ({where})"


def _zeros(rewards: Iterable[Reward], problem: str) -> tuple[Reward, ...]:
    """The rewards of an episode whose system raised: those of the functions, each worth 0."""
    return tuple(
        dataclasses.replace(reward, value=0.0, text=f"on_error: zero; {problem}")
        for reward in rewards
    )
