"""The team of one episode: its agents, its decisions and what it may call.

A system is a coroutine that is handed a `Team`. Replay is the same with a transcript of recorded
turns, which answer the first calls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .chat import Agent, Services
from .execution import ExecutionResult, Externals, Limits, SandboxError, TestResult, TestSuite
from .seeds import derive_seed
from .transcript import Operation, Transcript
from .types import AgentSpec, Decision, Reward, SettingError, Task, Turn, nearest


class Team:
    """The agents of one episode by name, in the order of their specs.

    Args:
        agents: the specs.
        services: gives completions, plays child episodes, runs and tests programs.
        transcript: numbers and keeps turns and decisions; an empty one if None. Its seed is the
            episode's: `rng` follows from it too.
        values: what a method may change, by name: `NAME.prompt`, `NAME.demos`, `NAME.policy`, a
            program, logits of decisions.
        greedy: decisions take the likeliest option, as agents at temperature 0 do.

    `rewards` is what the system itself gives the episode.
    """

    def __init__(
        self,
        agents: Sequence[AgentSpec],
        services: Services,
        transcript: Transcript | None = None,
        values: Mapping[str, Any] | None = None,
        *,
        greedy: bool = False,
    ) -> None:
        self.services, self.greedy = services, greedy
        self.transcript = transcript or Transcript()
        self.values: dict[str, Any] = dict(values or {})
        self.rng = random.Random(derive_seed(self.transcript.seed, "rng"))
        self.rewards: list[Reward] = []
        self._agents = {
            spec.name: Agent(spec, services, self.transcript, self.values) for spec in agents
        }

    def __getitem__(self, name: str) -> Agent:
        if name not in self._agents:
            raise SettingError(f"team[{name!r}]: no such agent; {nearest(name, self._agents)}")
        return self._agents[name]

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns so far, siblings included, ordered by index."""
        return self.transcript.turns

    @property
    def decisions(self) -> list[Decision]:
        """The decisions so far, in order."""
        return self.transcript.decisions

    def siblings(self, turn: Turn) -> tuple[Turn, ...]:
        """Every answer sampled by the call that gave `turn`, itself included."""
        return self.transcript.siblings(turn)

    def reserve(self, count: int) -> int:
        """The first of `count` turn indices, for calls whose numbers must not depend on timing."""
        return self.transcript.reserve(count)

    def select(self, turn: Turn, *, taken: bool = True) -> None:
        """Mark which sibling the chat went on with, or, with `taken` False, that a turn was never
        read."""
        self.transcript.select(turn, taken=taken)

    def decide(
        self,
        name: str,
        options: Sequence[str],
        about: str = "",
        *,
        logits: Mapping[str, float] | None = None,
        table: str = "",
    ) -> str:
        """Choose one of `options` and record it: drawn by the softmax of its logits, or the
        likeliest if `greedy`.

        Args:
            about: the text that the choice is made for, such as the query.
            logits: by option, where the system computes them (from `about`); None takes
                `values[name]`, or `values[table][name]`. Options without one have logit 0.
        """
        if logits is None:
            of_table = self.values.get(table) or {} if table else self.values
            logits = of_table.get(name) or {}
        return self.transcript.decide(name, options, logits, about=about, greedy=self.greedy)

    def record(
        self, name: str, text: str, *, reads: Sequence[Turn | Operation] = (), error: str = ""
    ) -> Operation:
        """Put plain Python between turns on record: `text` came of what it `reads`. Turns that are
        shown it name it among their `reads`, so feedback on them can flow through it."""
        return self.transcript.note(name, text, reads, error)

    @property
    def operations(self) -> list[Operation]:
        """The operations so far, in order."""
        return self.transcript.operations

    async def execute(
        self, program: str, externals: Externals | None = None, limits: Limits = Limits()
    ) -> ExecutionResult:
        """Run a program that a model wrote, in the sandbox: with `externals` a workflow program
        that can call these, else plain Python."""
        return await self.services.run_program(program, externals, limits)

    async def check(self, program: str, tests: TestSuite, limits: Limits = Limits()) -> TestResult:
        """Test a program that a model wrote, in the sandbox. A team has public tests only; hidden
        ones are a reward's."""
        if self.services.check is None:
            raise SandboxError(
                "team.check: this team has no sandbox; use"
                " rollouts.episodes.runner.EpisodeRunner, or give Services(check=...)"
            )
        return await self.services.check(program, tests, limits)

    async def play(self, system: Any, tasks: Sequence[Task]) -> list[Any]:
        """Play child episodes of a system (their `parent` is this one) and return them in order."""
        if self.services.play is None:
            raise SettingError(
                "team.play: this team cannot play child episodes; use"
                " rollouts.episodes.runner.EpisodeRunner, or give Services(play=...)"
            )
        return await self.services.play(system, tasks)
