"""External programs as systems: any program that uses an OpenAI-compatible address can be played,
scored and trained.

    system: {class: "marlora.rollouts.gateway.programs:Function", agents: [solver, critic], main:
        "my_module:main"}
    system: {class: "marlora.rollouts.gateway.programs:Command", agents: [solver, critic], command:
        [python, my_script.py]}

`workers.py` has a third kind, commands that play many tasks each.

The program calls `model="solver"` and gets that agent's reply. Temperature, adapters and seeds are
the run's. Its calls are turns like those of any other system, in the order in which they arrive; so
a program that calls several agents at once, or depends on the clock, is not replayed turn for turn
(`given`), and counterfactual credit needs a program that calls in a fixed order.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.concurrency import from_outside
from ...agents.lookup import load_function, needs_trust
from ...agents.system import System
from ...agents.team import Team
from ...agents.types import SettingError, Task, to_json
from .api.fields import BadRequest
from .process import ProcessLimits, ProgramError, run_command
from .server import REWARD_TOKEN, GatewayServer
from .session import Session

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
RESULT = ("output", "reward", "rewards")


@dataclass
class ExternalProgram(System):
    """The base of both kinds: plays a program behind the gateway.

    Args:
        models: other names that the program calls the agents by, such as `{gpt-4o: solver}`.
        keep_sampling: temperature, top_p and penalties are the program's where it names them.
            Otherwise the run's hold, so that training explores and evaluation is greedy whatever
            the program says; length and stop strings are the program's anyway.
        unforced_tools: where the program wants to force the call of a tool (`tool_choice:
            required`, or one by name), the agent may call it or not, as it would without. Otherwise
            such a request is refused: a forced call is not sampled from the agent.
        reward_wait: seconds to wait, after the program ended, for a reward that is posted.
        host: the address that agents are asked at; loopback unless the program runs elsewhere.
        call_timeout: seconds until a call without an answer gets an error.
        on_error: `drop` or `zero` for a program that fails after a call, see the run's setting of
            that name; "" is as the run says.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    keep_sampling: bool = False
    unforced_tools: bool = False
    reward_wait: float = 0.0
    host: str = "127.0.0.1"
    call_timeout: float = 600.0
    on_error: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [agent.name for agent in self.specs]
        for model, agent in self.models.items():
            if agent not in names:
                raise SettingError(
                    f"models.{model}: no agent {agent!r}; expected one of {', '.join(names)}"
                )
        for spec in self.specs:
            if spec.tools:
                raise SettingError(
                    f"agents.{spec.name}.tools: a program brings its own tools; leave them out"
                )
        if not (0 <= self.reward_wait < math.inf and 0 < self.call_timeout < math.inf):
            raise SettingError(
                f"reward_wait, call_timeout: expected seconds, got {self.reward_wait!r} and"
                f" {self.call_timeout!r}"
            )
        if self.on_error not in ("", "drop", "zero"):
            raise SettingError(f"on_error: expected drop or zero, got {self.on_error!r}")
        self._gateway = GatewayServer(self.host, call_timeout=self.call_timeout)

    async def run(self, task: Task, team: Team) -> str:
        options = {"keep_sampling": self.keep_sampling, "unforced_tools": self.unforced_tools}
        async with self._gateway.open_session(team, self.models, **options) as session:
            output = take_result(await session.guard(self.play(task, session)), session)
            if self.reward_wait:
                try:
                    await asyncio.wait_for(session.posted.wait(), self.reward_wait)
                except TimeoutError as error:
                    raise ProgramError(
                        f"no reward was posted in {self.reward_wait:g} s (system.reward_wait)"
                    ) from error
            return output

    async def play(self, task: Task, session: Session) -> Any:
        """Run the program; what it returns is the output, see `take_result`."""
        raise TypeError(f"{type(self).__name__} has no play(task, session)")


def take_result(result: Any, session: Session) -> str:
    """The output of what a program returned: a value, or a mapping of `output` and `reward` (a
    number, an object, or a list of objects).

    A reward counts only if the run's `rewards` name `returned`.
    """
    if not (isinstance(result, Mapping) and "output" in result and set(result) <= set(RESULT)):
        return "" if result is None else str(result)
    try:
        for key in ("reward", "rewards"):
            if result.get(key) is not None:
                session.reward(result[key], "returned")
    except BadRequest as error:
        raise ProgramError(f"the program returned a {error}") from error
    return "" if result["output"] is None else str(result["output"])


@dataclass
class Function(ExternalProgram):
    """An async function `main(task, base_url, api_key) -> output`, in this process.

    Args:
        main: `module:function`. The task has no answer. It must await what it waits for: a blocking
            call would block the agents it calls; a program that blocks is a `Command`.
    """

    main: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.main, str) or ":" not in self.main:
            raise SettingError(f"main: expected module:function, got {self.main!r}")
        needs_trust("the program", self.main)
        self._main: Callable[..., Awaitable[Any]] = load_function("main", self.main, {})
        if not inspect.iscoroutinefunction(self._main):
            raise SettingError(
                f"main {self.main!r}: expected an async function; a program that blocks is run as a"
                " Command"
            )

    async def play(self, task: Task, session: Session) -> Any:
        caller = asyncio.current_task()
        try:
            return await self._main(task, session.base_url, session.key)
        except BaseException as error:
            if isinstance(error, Exception) or from_outside(error, caller):
                raise
            # of its own task, which would end the event loop with it
            raise ProgramError(f"{type(error).__name__}: {error}") from error


@dataclass
class Command(ExternalProgram):
    """Any command, one process per episode; it need not be Python, nor this one.

    It reads the task as JSON from stdin (id, prompt, source, split, meta; no answer) and finds
    `OPENAI_BASE_URL`, `OPENAI_API_KEY`, the same for Anthropic's client, and `MARLORA_EPISODE` in
    its environment. The last line of its stdout is the output if it is a JSON object with an
    `output` (and perhaps a `reward`); else all of stdout is. Another exit code than 0 makes a
    failed episode, with the end of stderr as its error.

    As many run at once as the run's `max_concurrency` says. It is not a sandbox: the command runs
    with your rights.

    Args:
        command: program and arguments. folder: where it runs; "" is the current one. TMPDIR is its
            own, deleted afterwards.
        environment: names of variables that are passed on; all others are not.
        timeout: seconds. memory: MiB of address space, cpu_seconds: of each process; 0 is no limit.
    """

    command: Sequence[str] = ()
    folder: str = ""
    environment: Sequence[str] = PASSED_ON
    timeout: float = 600.0
    memory: int = 0
    cpu_seconds: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.command, str)
            or not self.command
            or not all(isinstance(part, str) for part in self.command)
        ):
            raise SettingError(
                "command: expected a list of texts such as [python, my_script.py], got"
                f" {self.command!r}"
            )
        if isinstance(self.environment, str) or not all(
            isinstance(name, str) for name in self.environment
        ):
            raise SettingError(f"environment: expected a list of names, got {self.environment!r}")
        needs_trust("the program", json.dumps(list(self.command)))
        if REWARD_TOKEN in self.environment:
            raise SettingError(
                f"environment: {REWARD_TOKEN} is not for programs; who has it sets rewards"
            )
        if not 0 < self.timeout < math.inf or self.memory < 0 or self.cpu_seconds < 0:
            raise SettingError(
                "timeout, memory, cpu_seconds: expected a timeout above 0, the others at least 0"
            )
        if self.folder and not os.path.isdir(self.folder):
            raise SettingError(f"folder {self.folder!r}: no such folder")

    async def play(self, task: Task, session: Session) -> Any:
        with tempfile.TemporaryDirectory(prefix="marlora-program-") as scratch:
            environment = {
                **self.passed_on(scratch),
                "OPENAI_BASE_URL": session.base_url,
                "OPENAI_API_KEY": session.key,
                # its clients append /v1 themselves
                "ANTHROPIC_BASE_URL": session.base_url.removesuffix("/v1"),
                "ANTHROPIC_API_KEY": session.key,
                "MARLORA_EPISODE": session.id,
            }
            stdout = await run_command(
                list(self.command),
                json.dumps(public(task)),
                environment,
                self.folder or None,
                self.bounds,
            )
        last = stdout.strip().rpartition("\n")[2]
        try:
            result = json.loads(last)
        except (ValueError, RecursionError):
            return stdout.strip()
        return result if isinstance(result, dict) and "output" in result else stdout.strip()

    @property
    def bounds(self) -> ProcessLimits:
        """Of a process."""
        return ProcessLimits(self.timeout, self.memory, self.cpu_seconds)

    def passed_on(self, scratch: str) -> dict[str, str]:
        """The variables of every process: those that are passed on, and its own TMPDIR."""
        named = {name: os.environ[name] for name in self.environment if name in os.environ}
        return {**named, "TMPDIR": scratch}


def public(task: Task) -> dict[str, Any]:
    """A task as a command reads it: without its answer."""
    return {key: value for key, value in to_json(task).items() if key != "answer"}
