"""Play a system on tasks: many episodes at once, each reproducible from its seed, failures kept as
data."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.chat import Services
from ...agents.concurrency import gather
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
    """Bounds of play. `max_turns` and `max_tool_calls` (per reply) per episode; `episode_timeout`
    and `reward_timeout` (each reward function's) in seconds; `concurrency` in episodes."""

    max_turns: int = 200
    max_tool_calls: int = 4
    episode_timeout: float = 1200.0
    reward_timeout: float = TIMEOUT
    concurrency: int = 64


@dataclass(frozen=True)
class EpisodeRequest:
    """An episode to play. `group` is shared by the episodes of one task in one step; `sample`
    numbers them.

    `draw`: what its seed is derived from, beside the run's; "" is its id. Jobs of one `draw` draw
    the same random numbers.
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
    """One job per task and sample; groups are named `label/TASK`."""
    return [
        EpisodeRequest(task, f"{label}/{task.id}", k, step)
        for task in tasks
        for k in range(num_generations)
    ]


@dataclass
class EpisodeRunner:
    """Plays `system` with one speaker per policy and scores what comes out.

    `seed` is the run's: an episode's seed is derived from it and the job's id, whatever is played
    beside it. `sampling` holds for agents that name none of their own. `pinned`: the team version
    of episodes played without naming one. `pin`: what keeps the team version it began with, the
    "episode" or only the "call" (see `collect`). `untrusted`: the system is a stranger's, and so
    are names that it looks up while it runs (see `agents.names`).
    """

    system: System
    speakers: Mapping[str, Completer]
    rewards: Sequence[RewardFn] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    limits: EpisodeLimits = EpisodeLimits()
    seed: int = 0
    pinned: TeamVersion | None = None
    pin: str = "episode"
    untrusted: bool = False

    def __post_init__(self) -> None:
        for agent in self.system.specs:
            if agent.policy not in self.speakers:
                hint = nearest(agent.policy, list(self.speakers))
                raise SettingError(
                    f"agent {agent.name!r} speaks with policy {agent.policy!r}, which nobody"
                    f" serves; {hint}"
                )

    def greedy(self) -> EpisodeRunner:
        """The same, with every agent at temperature 0 and no other change of the distribution: the
        usual way to evaluate."""

        def cold(sampling: Sampling) -> Sampling:
            return Sampling(temperature=0.0, max_tokens=sampling.max_tokens, stop=sampling.stop)

        agents = [
            dataclasses.replace(a, sampling=cold(a.sampling) if a.sampling else None)
            for a in self.system.specs
        ]
        return dataclasses.replace(
            self, system=self.system.with_agents(agents), sampling=cold(self.sampling)
        )

    async def play(
        self,
        job: EpisodeRequest,
        version: TeamVersion | None = None,
        *,
        given: Iterable[Turn] = (),
        replace: Mapping[int, Completion] | None = None,
        decisions: Iterable[Decision] = (),
        seed: int | None = None,
    ) -> Episode:
        """Play one episode and score it. `given` and `replace` are replayed (see `Team`); what they
        do not cover is played live.

        A failing system, reward or prompt is data in the episode. Raises `EngineError` when an
        engine is gone and `SettingError` when the system asks for what does not exist: both concern
        the whole run.
        """
        return (
            await self._play(
                job, version or self.pinned or {}, given, replace, decisions, seed, parent=None
            )
        )[-1]

    async def collect(
        self,
        plan: Sequence[EpisodeRequest],
        version: TeamVersion | Callable[[], TeamVersion] | None = None,
        room: asyncio.Semaphore | None = None,
    ) -> AsyncIterator[Episode]:
        """Play all jobs, at most `limits.concurrency` at once; yields episodes as they end,
        children before their parent.

        Every episode keeps the team version it began with; a function as `version` is asked
        whenever one begins (with `pin` "call" at every call of a policy too, and turns say who
        spoke). `room`: shared with other plans that are played at the same time. Closing the
        iterator cancels what is open. An `EngineError` or `SettingError` cancels it too, and is
        raised once every episode that had ended is yielded.
        """
        room = room or asyncio.Semaphore(self.limits.concurrency)

        async def one(job: EpisodeRequest) -> list[Episode]:
            async with room:
                now = version() if callable(version) else version
                latest = version if callable(version) and self.pin == "call" else None
                return await self._play(
                    job, now or self.pinned or {}, (), None, (), None, parent=None, latest=latest
                )

        tasks = [asyncio.create_task(one(job), name=job.id) for job in plan]
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

    async def _play(
        self,
        job: EpisodeRequest,
        version: TeamVersion,
        given: Iterable[Turn],
        replace: Mapping[int, Completion] | None,
        decisions: Iterable[Decision],
        seed: int | None,
        parent: str | None,
        latest: Callable[[], TeamVersion] | None = None,
    ) -> list[Episode]:
        seed = derive_seed(self.seed, job.draw or job.id) if seed is None else seed
        usage: dict[str, Usage] = {agent.name: Usage() for agent in self.system.specs}
        children: list[Episode] = []

        async def ask(call: Call) -> list[Completion]:
            start = time.perf_counter()
            now = version if latest is None else latest()
            completions = await self.speakers[call.agent.policy](
                call, now.get(call.agent.policy, "")
            )
            prompts, sampled = (
                sum(len(c.prompt_ids) for c in completions),
                sum(len(c.token_ids) for c in completions),
            )
            usage[call.agent.name] += Usage(1, prompts, sampled, time.perf_counter() - start)
            return completions

        async def play_children(system: System, tasks: Sequence[Task]) -> list[Episode]:
            inner = dataclasses.replace(self, system=system)
            first = len(children)
            made = [
                EpisodeRequest(
                    task, f"{job.id}/{type(system).__name__}/{task.id}", first + k, job.step
                )
                for k, task in enumerate(tasks)
            ]
            played = await gather(
                inner._play(j, version, (), None, (), None, job.id, latest) for j in made
            )
            children.extend(episode for family in played for episode in family)
            return [family[-1] for family in played]

        services = Services(
            complete=ask,
            play=play_children,
            execute=execute,
            check=check,
            sampling=self.sampling,
            max_tool_calls=self.limits.max_tool_calls,
        )
        transcript = Transcript(
            seed, given=given, replace=replace, decisions=decisions, max_turns=self.limits.max_turns
        )
        team = Team(self.system.specs, services, transcript, self.values)
        output, stop_reason, error = await self._run(job.task, team)
        spoke = {
            agent.policy: version[agent.policy]
            for agent in self.system.specs
            if agent.policy in version
        }
        episode = Episode(
            id=job.id,
            group=job.group,
            task=job.task,
            seed=seed,
            parent=parent,
            split=job.task.split,
            step=job.step,
            team_version=spoke,
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
            episode = dataclasses.replace(
                episode,
                rewards=await score(job.task, episode, self.rewards, self.limits.reward_timeout),
            )
        return [*children, episode]

    async def _run(self, task: Task, team: Team) -> tuple[str | None, str, str | None]:
        """(output, stop reason, error) of one run; only errors that concern the whole run get
        out."""
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
        except Exception as error:
            if isinstance(error, TimeoutError) and clock.expired():
                return (
                    None,
                    "timeout",
                    f"not done after {self.limits.episode_timeout:g} s (episode_timeout)",
                )
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return (
                None,
                "error",
                (
                    f"{type(error).__name__}: {error}"
                    f" ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
                ),
            )
