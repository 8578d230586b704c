"""An agent's chat in one episode, and the services that its calls use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .execution import Check, Execute, ExecutionResult, Externals, Limits, SandboxError
from .seeds import derive_seed
from .tools.tools import Tool, parse_calls, python_tool, resolve_tools, run_call, tool_prompt
from .transcript import Ask, Call, Choose, Operation, Transcript
from .types import AgentSpec, Message, Sampling, SettingError, Task, Turn, from_json


@dataclass(frozen=True)
class Services:
    """What an episode may call outside itself, and its bounds.

    Args:
        complete: gives the completions of a `Call`: an engine in training, a function in tests.
        play: plays child episodes (system, tasks), for `team.play`.
        execute: runs programs that a model wrote, for `team.execute` and the tool `python`.
        check: tests such programs, for `team.check`.
        sampling: holds for agents that name none of their own.
        max_tool_calls: tool calls of one reply.
    """

    complete: Ask
    play: Callable[[Any, Sequence[Task]], Awaitable[list[Any]]] | None = None
    execute: Execute | None = None
    check: Check | None = None
    sampling: Sampling = Sampling()
    max_tool_calls: int = 4

    async def run_program(
        self, program: str, externals: Externals | None = None, limits: Limits = Limits()
    ) -> ExecutionResult:
        """Run a program in the sandbox. Raises `SandboxError` where there is none."""
        if self.execute is None:
            raise SandboxError(
                "team.execute: this team has no sandbox; use"
                " rollouts.episodes.runner.EpisodeRunner, or give Services(execute=...)"
            )
        return await self.execute(program, externals, limits)


class Agent:
    """An agent in a running episode. Its chat grows by appending; `fresh()` opens a second, empty
    one.

    Args:
        spec: name, policy, prompt and tools.
        services: gives completions and runs tools.
        transcript: numbers and keeps the turns.
        values: `NAME.prompt`, `NAME.demos` and `NAME.policy` stand in for the spec's.
    """

    def __init__(
        self, spec: AgentSpec, services: Services, transcript: Transcript, values: Mapping[str, Any]
    ) -> None:
        policy = values.get(f"{spec.name}.policy") or spec.policy
        self.spec, self._services = replace(spec, policy=policy), services
        self._transcript, self._values = transcript, values
        self.chat: tuple[Message, ...] = ()
        self._last: Turn | None = None
        self._opening = 0  # messages of the chat that stand there before the first call
        self._read: set[int] = set()  # turns shown in this chat so far
        self._own: set[int] = set()  # its own turns in this chat
        self._saw_gold = False  # in this chat so far
        self._busy = False

    @property
    def name(self) -> str:
        """The agent's name, unique in its team."""
        return self.spec.name

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, {len(self.chat)} messages)"

    @property
    def tools(self) -> Mapping[str, Tool]:
        """The agent's tools by name. Raises `SettingError` at one that does not exist."""
        names = self.spec.tools
        own = {"python": python_tool(self._services.run_program)} if "python" in names else {}
        return resolve_tools(names, own)

    @property
    def sampling(self) -> Sampling:
        """The sampling of its replies, unless a call overrides it."""
        return self.spec.sampling or self._services.sampling

    @property
    def turns_per_reply(self) -> int:
        """Turn indices that a reply takes: with tools, one more for each call it may make."""
        return 1 + (self._services.max_tool_calls if self.tools else 0)

    def opening(self, tools: Mapping[str, Tool]) -> tuple[Message, ...]:
        """System message and demonstrations that start a chat: from `values` if named there, else
        from the spec."""
        spec = self.spec
        prompt = str(self._values.get(f"{spec.name}.prompt", spec.prompt))
        text = "\n\n".join(part for part in (prompt, tool_prompt(tools)) if part)
        demos = self._values.get(f"{spec.name}.demos", spec.demos)
        head = (Message("system", text),) if text else ()
        where = f"{spec.name}.demos"
        return head + tuple(
            d if isinstance(d, Message) else from_json(Message, d, where) for d in demos
        )

    def fresh(self) -> Agent:
        """The same agent with an empty chat."""
        return Agent(self.spec, self._services, self._transcript, self._values)

    def take_over(self, other: Agent) -> Agent:
        """A chat in which this agent goes on where `other` stands, under this agent's own opening.

        The other's replies stand as the assistant's, but only what this agent adds is its own (a
        critic that goes on for a generator, a policy per round). Its turns' `reads` hold the
        other's turns.
        """
        if other._busy:
            raise SettingError(
                f"agent {other.name!r} is still answering in the chat that {self.name!r} would take"
                " over; await it"
            )
        agent = self.fresh()
        agent._open()
        agent.chat += other.chat[other._opening :]
        agent._read, agent._saw_gold = other._read | other._own, other._saw_gold
        return agent

    def _open(self) -> None:
        self.chat = self.opening(self.tools)
        self._opening = len(self.chat)

    def reply(
        self,
        text: str,
        *,
        reads: Sequence[Turn | Operation] = (),
        n: int = 1,
        choose: Choose | None = None,
        saw_gold: bool = False,
        sampling: Sampling | None = None,
        index: int | None = None,
    ) -> Awaitable[Turn]:
        """Send `text` to the agent and await its answer. The turn's index is taken now, before
        anything is awaited.

        Args:
            reads: the turns and operations whose text stands in `text`; required wherever agents
                read one another. The turn's own `reads` are these and those of the chat's earlier
                calls, whose messages it holds too.
            n, choose: sample n siblings in one request; `choose(turns) -> number` picks the one the
                chat goes on with (the first if None). All siblings are recorded.
            saw_gold: `text` tells the answer; neither this turn nor a later one of this chat will
                be trained on.
            sampling: overrides the agent's for this call.
            index: one that `team.reserve` gave before, for a call whose number must not depend on
                when it comes.
        """
        if n < 1:
            raise SettingError(f"agent {self.name!r}: reply(n={n}), expected n >= 1")
        if self._busy:
            raise SettingError(
                f"agent {self.name!r} is still answering in this chat; await it, or use"
                " agent.fresh()"
            )
        tools = self.tools
        if not self.chat:
            self._open()
        if index is None:
            index = self._transcript.reserve(self.turns_per_reply)
        self._busy = True
        read = {turn.index for turn in reads}
        return self._reply(index, tools, text, read, n, choose, saw_gold, sampling)

    def answer(
        self,
        messages: Sequence[Message],
        previous: Turn | None = None,
        *,
        reads: Sequence[int] = (),
        n: int = 1,
        sampling: Sampling | None = None,
    ) -> Awaitable[Turn]:
        """Answer a whole list of messages, as programs send that keep their chats themselves; the
        agent's own chat is not touched.

        No prompt or demonstration of the agent's is added and no tool is run. The turn's index is
        taken now.

        Args:
            previous: the turn this list goes on from: it begins with that turn's messages and its
                text as the assistant's.
            reads: indices of the turns whose text stands in `messages`.
        """
        if n < 1:
            raise SettingError(f"agent {self.name!r}: answer(n={n}), expected n >= 1")
        index = self._transcript.reserve(1)
        call = Call(index, self.spec, tuple(messages), self._sampling(index, sampling), n, previous)
        return self._transcript.record(call, self._services.complete, reads=tuple(sorted(reads)))

    def _sampling(self, index: int, override: Sampling | None) -> Sampling:
        """The call's sampling with its seed: derived from the episode's, the agent's name and the
        turn's index, unless one is set."""
        sampling = override or self.sampling
        if sampling.seed is not None:
            return sampling
        return replace(sampling, seed=derive_seed(self._transcript.seed, self.name, index))

    async def _reply(
        self,
        index: int,
        tools: Mapping[str, Tool],
        text: str,
        reads: set[int],
        n: int,
        choose: Choose | None,
        saw_gold: bool,
        sampling: Sampling | None,
    ) -> Turn:
        """Answer, run the tools that the answer calls, and answer again with their results."""
        try:
            for left in range(self._services.max_tool_calls if tools else 0, -1, -1):
                # The chat grows once the answer is there: after a failed call (a prompt too long)
                # it is as it was before.
                messages = self.chat + (Message("user", text),)
                read, gold = self._read | reads, self._saw_gold or saw_gold
                call = Call(
                    index, self.spec, messages, self._sampling(index, sampling), n, self._last
                )
                turn = await self._transcript.record(
                    call,
                    self._services.complete,
                    reads=tuple(sorted(read)),
                    choose=choose,
                    saw_gold=gold,
                )
                self.chat = messages + (Message("assistant", turn.text),)
                self._read, self._saw_gold, self._last = read, gold, turn
                self._own.add(turn.index)
                calls = parse_calls(turn.text) if tools and left else []
                if not calls:
                    break
                results = [await run_call(request, tools) for request in calls]
                text, index = "\n".join(results), index + 1
            return turn
        finally:
            self._busy = False
