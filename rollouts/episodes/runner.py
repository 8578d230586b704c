"""The episode runner: plays a system on tasks, many episodes at once, each reproducible from its
seed; failures are recorded as data."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...agents.chat import Services
from ...agents.concurrency import from_outside, gather
from ...agents.lookup import only_trusted
from ...agents.seeds import derive_seed
from ...agents.state import TeamState
from ...agents.system import System
from ...agents.team import Team
from ...agents.transcript import LimitError, Output, Transcript
from ...agents.types import Completion, Decision, Sampling, SettingError, Task, Turn, Usage, nearest
from ..engines.base import EngineError, PromptTooLong
from ..ledger import BudgetSpent, Ledger
from ..rewards.scoring import TIMEOUT, RewardFn, score, zeros
from ..sandbox.sandbox import check
from ..sandbox.sandbox import run as execute
from ..types import Episode, Kind
from .answered import AsideStore, answered
from .calls import EpisodeCalls
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
        kind: of the episode. follows: id of the episode that an aside is about.
    """

    task: Task
    group: str
    sample: int = 0
    step: int = 0
    draw: str = ""
    kind: Kind = "train"
    follows: str = ""

    @property
    def id(self) -> str:
        return f"{self.group}/{self.sample}"


def episode_requests(
    tasks: Iterable[Task],
    *,
    label: str,
    num_generations: int = 1,
    step: int = 0,
    kind: Kind = "train",
) -> list[EpisodeRequest]:
    """One request per task and sample; groups are named `label/TASK`."""
    return [
        EpisodeRequest(task, f"{label}/{task.id}", k, step, kind=kind)
        for task in tasks
        for k in range(num_generations)
    ]


# Plays a request with a state somewhere, or calls the function, which plays it here; gives the
# episode after its children.
Spread = Callable[
    [EpisodeRequest, TeamState, Callable[[], Awaitable[list[Episode]]]], Awaitable[list[Episode]]
]


@dataclass(frozen=True)
class _Start:
    """What an episode starts from: the team's state (`latest` gives that of the next call, if
    adapter versions may change inside the episode), what is replayed, its seed, and the episode it
    is a child of."""

    state: TeamState
    latest: Callable[[], TeamState] | None = None
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
        state: what the team plays with where a call names no other state.
        version_policy: what keeps the adapter versions it began with (setting `pin`): the
            "episode", or only the "call", so that weights may change inside an episode (see
            `collect`).
        greedy_decisions: decisions take the likeliest option.
        ledger: meters every call, and refuses one that the budget has no room for.
        recorded: False if the episodes will not be stored, so that the store does not tell what
            they cost.
        asides: keeps the talks with helpers that rewards ask, such as judges.
        untrusted: names that the system looks up while it runs are checked as those of a checkpoint
            that is not trusted (see `agents.lookup`).
    """

    system: System
    completers: Mapping[str, Completer]
    rewards: Sequence[RewardFn] = ()
    state: TeamState = TeamState()
    sampling: Sampling = Sampling()
    limits: EpisodeLimits = EpisodeLimits()
    seed: int = 0
    version_policy: str = "episode"
    untrusted: bool = False
    greedy_decisions: bool = False
    ledger: Ledger | None = None
    recorded: bool = True
    asides: AsideStore | None = None

    def __post_init__(self) -> None:
        self.policies_of(self.state)

    def policies_of(self, state: TeamState) -> list[str]:
        """The policies that the agents speak with in this state, in order. Raises `SettingError`
        for one that is not served."""
        policies = {
            agent.name: state.values.get(f"{agent.name}.policy") or agent.policy
            for agent in self.system.specs
        }
        for agent, policy in policies.items():
            if policy not in self.completers:
                hint = nearest(policy, list(self.completers))
                raise SettingError(f"agent {agent!r}: its policy {policy!r} is not served; {hint}")
        return list(dict.fromkeys(policies.values()))

    def greedy(self) -> EpisodeRunner:
        """A runner for greedy evaluation: every agent at temperature 0, and no other change of the
        distribution; decisions take the likeliest option."""

        def at_zero(sampling: Sampling) -> Sampling:
            return Sampling(temperature=0.0, max_tokens=sampling.max_tokens, stop=sampling.stop)

        agents = [
            dataclasses.replace(a, sampling=at_zero(a.sampling) if a.sampling else None)
            for a in self.system.specs
        ]
        return dataclasses.replace(
            self,
            system=self.system.with_agents(agents),
            sampling=at_zero(self.sampling),
            greedy_decisions=True,
        )

    async def play(
        self,
        request: EpisodeRequest,
        state: TeamState | None = None,
        *,
        given: Iterable[Turn] = (),
        replace: Mapping[int, Completion] | None = None,
        decisions: Iterable[Decision] = (),
        seed: int | None = None,
    ) -> Episode:
        """Play one episode and score it. `given`, `replace` and `decisions` are replayed (see
        `Transcript`); the rest is sampled.

        A failing system, reward or prompt is data in the episode. Raises `EngineError` when an
        engine is gone, `SettingError` when the system asks for what does not exist and
        `BudgetSpent` when a call no longer fits the budget: all concern the whole run.
        """
        start = _Start(
            state or self.state, given=given, replace=replace, decisions=decisions, seed=seed
        )
        return (await self._play(request, start))[-1]

    async def collect(
        self,
        plan: Sequence[EpisodeRequest],
        state: TeamState | Callable[[], TeamState] | None = None,
        slots: asyncio.Semaphore | None = None,
        spread: Spread | None = None,
    ) -> AsyncIterator[Episode]:
        """Play all requests, at most `limits.concurrency` at once; yields episodes as they end,
        children before their parent.

        Every episode keeps the state it began with; a function as `state` is called whenever one
        begins (with `version_policy` "call" at every call of a policy too, for its adapter
        versions; turns record the versions that sampled them). `slots`: shared with other plans
        that are played at the same time. `spread`: may play episodes in other processes; not with
        `version_policy` "call", since a state that changes meanwhile is known here only. Closing
        the iterator cancels open episodes. An `EngineError`, `SettingError` or `BudgetSpent`
        cancels them too, and is raised once every episode that had ended is yielded.
        """
        slots = slots or asyncio.Semaphore(self.limits.concurrency)

        async def one(request: EpisodeRequest) -> list[Episode]:
            async with slots:
                now = (state() if callable(state) else state) or self.state
                in_flight = callable(state) and self.version_policy == "call"
                latest = state if callable(state) and in_flight else None
                here = functools.partial(self._play, request, _Start(now, latest))
                return await (here() if spread is None or latest else spread(request, now, here))

        # of episodes not yet yielded: a task holds its result for as long as it is held itself
        tasks = dict.fromkeys(asyncio.create_task(one(each), name=each.id) for each in plan)
        try:
            ended: asyncio.Queue[asyncio.Task[list[Episode]]] = asyncio.Queue()
            for task in tasks:
                task.add_done_callback(ended.put_nowait)
            failed: asyncio.Task[list[Episode]] | None = None
            for _ in plan:
                if failed is not None and ended.empty():
                    break
                task = await ended.get()
                del tasks[task]
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
        """The episode after its children. What ends in an error will not be stored."""
        children: list[Episode] = []
        try:
            return await self._play_to_end(request, start, children)
        except BaseException:
            if self.ledger is not None:
                for id_ in (request.id, *(child.id for child in children)):
                    self.ledger.dropped(id_)
            raise

    async def _play_to_end(
        self, request: EpisodeRequest, start: _Start, children: list[Episode]
    ) -> list[Episode]:
        seed = start.seed
        if seed is None:
            seed = derive_seed(self.seed, request.draw or request.id)
        usage: dict[str, Usage] = {agent.name: Usage() for agent in self.system.specs}
        services = self._services(request, start, usage, children)
        transcript = Transcript(
            seed,
            given=start.given,
            replace=start.replace,
            decisions=start.decisions,
            max_turns=self.limits.max_turns,
        )
        state = start.state.of(self.policies_of(start.state))
        team = Team(
            self.system.specs, services, transcript, state.values, greedy=self.greedy_decisions
        )
        output, stop_reason, error = await self._run(request.task, team)
        spent = self.ledger.stopped if self.ledger and request.kind != "eval" else ""
        if error is not None and spent:
            raise BudgetSpent(spent)  # also where a system took it for an answer
        problem = error if stop_reason == "error" and team.turns and self._errors_count() else None
        if problem is not None:
            output, error = Output(""), None
        episode = Episode(
            id=request.id,
            group=request.group,
            task=request.task,
            seed=seed,
            kind=request.kind,
            parent=start.parent,
            follows=request.follows,
            split=request.task.split,
            step=request.step,
            state=state,
            turns=team.turns,
            decisions=tuple(team.decisions),
            operations=tuple(team.operations),
            output=None if output is None else output.text,
            output_from=() if output is None else tuple(each.index for each in output.reads),
            usage=usage,
            stop_reason=stop_reason,
            error=error,
        )
        if error is None:
            episode = dataclasses.replace(episode, rewards=tuple(team.rewards))
            functions = await answered(self, request, episode, start.state)
            rewards = await score(request.task, episode, functions, self.limits.reward_timeout)
            episode = dataclasses.replace(
                episode, rewards=rewards if problem is None else zeros(rewards, problem)
            )
        return [*children, episode]

    def _services(
        self,
        request: EpisodeRequest,
        start: _Start,
        usage: dict[str, Usage],
        children: list[Episode],
    ) -> Services:
        """What one episode may call: its calls are added to `usage`, what it plays to
        `children`."""
        calls = EpisodeCalls(
            self.completers,
            start.latest or (lambda: start.state),
            usage,
            self.ledger,
            request.kind,
            request.id if self.recorded else "",
        )
        return Services(
            complete=calls,
            play=self._child_player(request, start, children),
            execute=execute,
            check=check,
            sampling=self.sampling,
            max_tool_calls=self.limits.max_tool_calls,
        )

    def _errors_count(self) -> bool:
        """Whether an error of the system is worth 0 (`on_error: zero`); a system's own setting wins
        over the run's."""
        own = getattr(self.system, "on_error", "") or self.limits.on_error
        return bool(own == "zero")

    def _child_player(
        self, request: EpisodeRequest, start: _Start, children: list[Episode]
    ) -> Callable[[System, Sequence[Task]], Awaitable[list[Episode]]]:
        """Plays child episodes of one episode; appends them, and their own, to `children`."""

        async def play(system: System, tasks: Sequence[Task]) -> list[Episode]:
            runner = dataclasses.replace(self, system=system)
            group = f"{request.id}/{type(system).__name__}"
            first = len(children)
            requests = [
                EpisodeRequest(
                    task, f"{group}/{task.id}", first + k, request.step, kind=request.kind
                )
                for k, task in enumerate(tasks)
            ]
            begin = _Start(start.state, start.latest, parent=request.id)
            played = await gather(runner._play(each, begin) for each in requests)
            children.extend(episode for family in played for episode in family)
            return [family[-1] for family in played]

        return play

    async def _run(self, task: Task, team: Team) -> tuple[Output | None, str, str | None]:
        """(output, stop reason, error) of one run; raises only errors that concern the whole
        run."""
        caller = asyncio.current_task()
        try:
            async with asyncio.timeout(self.limits.episode_timeout) as clock:
                with only_trusted(self.untrusted):
                    output = await self.system.run(task.public(), team)
            return Output.of(output), "done", None
        except PromptTooLong as error:
            return None, "context", str(error)
        except LimitError as error:
            return None, "limit", str(error)
        except (EngineError, SettingError, BudgetSpent):
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
