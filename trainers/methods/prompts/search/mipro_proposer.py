"""The proposer of MIPRO: a helper that writes instructions for a team's agents, from a summary of
the tasks, a description of the program, demonstrations, and a tip."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .....agents.seeds import derive_seed
from .....agents.settings import Settings, setting
from .....agents.state import Param
from .....agents.text.tags import block, inside
from .....agents.types import AgentSpec, Task
from .....rollouts.types import Episode
from ....collection.rollout_manager import RolloutManager
from ....feedback.helpers import REFUSED, UNANSWERED, Reply
from ....loop.spec import RunSpec
from ..bootstrapping.demos import Demo

PROPOSER = "proposer"  # the helper's name
TRUNCATED, TOO_LONG, DUPLICATE = "truncated", "too_long", "duplicate"  # why a proposal is dropped
MAX_DEMOS = 3  # demonstrations that the proposer is shown

TIPS: Mapping[str, str] = {
    "none": "",
    "creative": "Don't be afraid to be creative when creating the new instruction!",
    "simple": "Keep the instruction clear and concise.",
    "description": "Make sure your instruction is very informative and descriptive.",
    "high_stakes": "The instruction should include a high stakes scenario in which the agent must"
    " solve the task!",
    "persona": "Include a persona that is relevant to the task in the instruction (such as: You are"
    " a ...).",
}

SYSTEM = "You write instructions for the agents of a team of language models."
OBSERVE = (
    "Write observations about the trends that hold for most of these examples of a dataset:"
    " topics, content, syntax, conciseness, what a right answer looks like."
)
MORE = (
    "Earlier examples gave the observations below. Add what is new in these examples; if nothing"
    " is, answer only COMPLETE."
)
SUMMARISE = "Summarise these observations about a dataset in two to three sentences."
DESCRIBE = "Describe in a few sentences what task this program solves, and how its agents do it."
MODULE = "Describe in a sentence or two what agent {agent} contributes to this program."
PROPOSE = (
    "Use the information above to write a better instruction (system message) for agent {agent}.\n"
    "{tip}\nAnswer with the instruction alone, between <INSTRUCTION> and </INSTRUCTION>."
)


@dataclass
class ProposerConfig(Settings):
    """What the proposer is shown, and how long its replies may be."""

    data_aware_proposer: bool = setting("show the proposer a summary of the training tasks", True)
    program_aware_proposer: bool = setting(
        "show the proposer a description of the program and of the agent's part in it", True
    )
    fewshot_aware_proposer: bool = setting("show the proposer demonstrations of the agent", True)
    tip_aware_proposer: bool = setting(
        "give the proposer a random tip: " + ", ".join(TIPS) + " (none gives it no tip)", True
    )
    view_data_batch_size: int = setting(
        "training tasks, with their answers, that the proposer is shown at once", 10, at_least=1
    )
    max_summary_calls: int = setting(
        "such batches at most, before the summary is written", 10, at_least=1
    )
    max_proposal_tokens: int = setting(
        "tokens of a proposer's reply at most; a truncated instruction is dropped", 512, at_least=1
    )
    max_instruction_chars: int = setting(
        "characters of an instruction at most; a longer one is dropped", 2000, at_least=1
    )


@dataclass
class Proposals:
    """Instructions by agent, and what came of the others.

    Args:
        texts: by agent, those that can be tried; the agent's present one is not among them.
        asked: how many were asked for.
        dropped: how many were dropped, by reason.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    asked: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> int:
        return sum(map(len, self.texts.values()))


class Proposer:
    """Asks the helper `proposer` of a run. Every rank has to call it.

    Args:
        rollouts: asks.
        spec: of its training tasks the proposer sees prompts and answers, of the others nothing.
    """

    def __init__(self, rollouts: RolloutManager, spec: RunSpec, config: ProposerConfig) -> None:
        self.rollouts, self.spec, self.config = rollouts, spec, config

    def propose(
        self, params: Sequence[Param], count: int, demos: Mapping[str, Sequence[Sequence[Demo]]]
    ) -> Proposals:
        """`count` instructions for each of these prompts, fewer where some are dropped.

        Args:
            params: the agents' prompts, with the values in force.
            demos: by agent, sets of demonstrations; the n-th proposal is shown one of them in turn.
        """
        summary = self._summary() if self.config.data_aware_proposer else ""
        program = self._program()
        modules = self._modules([param.agent for param in params], program)
        about = [(param, number) for param in params for number in range(count)]
        texts = []
        for param, number in about:
            sets = [own for own in demos.get(param.agent, ()) if own]
            shown = sets[number % len(sets)] if sets else ()
            parts = [
                ("DATASET", summary),
                ("PROGRAM", program),
                ("AGENT", modules.get(param.agent, "")),
                ("EXAMPLES", _examples(shown) if self.config.fewshot_aware_proposer else ""),
                ("CURRENT_INSTRUCTION", param.value),
            ]
            fields = {"agent": param.agent, "tip": self._tip(param.agent, number)}
            texts.append(_with_blocks(PROPOSE.format(**fields), parts))
        asked = [f"instruction/{param.agent}/{number}" for param, number in about]
        replies = self._ask(asked, texts)
        return usable([param for param, _ in about], replies, self.config.max_instruction_chars)

    def _tip(self, agent: str, number: int) -> str:
        if not self.config.tip_aware_proposer:
            return ""
        rng = random.Random(derive_seed(self.spec.config.seed, "tip", agent, number))
        return TIPS[rng.choice(list(TIPS))]

    # what it is shown

    def _summary(self) -> str:
        """Two to three sentences about the training tasks; "" if the proposer says nothing."""
        size, tasks = self.config.view_data_batch_size, self.spec.tasks
        starts = range(0, len(tasks), size)[: self.config.max_summary_calls]
        observed, complete = "", 0
        for start in starts:
            shown = _tasks(tasks[start : start + size])
            head = f"{OBSERVE}\n{MORE}" if observed else OBSERVE
            text = self._said(
                f"observations/{start}", head, [("EXAMPLES", shown), ("OBSERVATIONS", observed)]
            )
            if observed and text.upper().startswith("COMPLETE"):
                complete += 1
                if complete == 5:
                    break
            elif text:
                observed += f"\n{text}" if observed else text
        return self._said("summary", SUMMARISE, [("OBSERVATIONS", observed)]) if observed else ""

    def _program(self) -> str:
        """A description of the program, by the proposer, from its source and its agents."""
        if not self.config.program_aware_proposer:
            return ""
        system = self.spec.system
        agents = "\n".join(f"{spec.name}: {spec.role or '(no role)'}" for spec in system.specs)
        parts = [("SOURCE", _source(type(system))), ("AGENTS", agents)]
        return self._said("program", DESCRIBE, parts)

    def _modules(self, agents: Sequence[str], program: str) -> dict[str, str]:
        """What each agent contributes, by the proposer."""
        if not program:
            return {}
        texts = [_with_blocks(MODULE.format(agent=a), [("PROGRAM", program)]) for a in agents]
        replies = self._ask([f"module/{agent}" for agent in agents], texts)
        said = [(reply.output or "").strip() for reply in replies]
        return dict(zip(agents, said, strict=True))

    def _said(self, about: str, text: str, parts: Sequence[tuple[str, str]]) -> str:
        (reply,) = self._ask([about], [_with_blocks(text, parts)])
        return (reply.output or "").strip()

    def _ask(self, about: Sequence[str], texts: Sequence[str]) -> list[Episode]:
        talk = Reply([self._agent()], saw_gold=True)
        tasks = [Task(name, text) for name, text in zip(about, texts, strict=True)]
        return self.rollouts.ask_all([(talk, task, "") for task in tasks])

    def _agent(self) -> AgentSpec:
        """The helper, at temperature 1 unless its settings say otherwise."""
        agent, config = self.spec.helper(PROPOSER), self.spec.config
        free = dataclasses.replace(
            config.sampling(), temperature=1.0, max_tokens=self.config.max_proposal_tokens
        )
        return dataclasses.replace(
            agent, prompt=agent.prompt or SYSTEM, sampling=agent.sampling or free
        )


def usable(params: Sequence[Param], replies: Sequence[Episode], max_chars: int) -> Proposals:
    """The instructions in these replies, each for the param at its place, without those that cannot
    be tried: what was cut off, empty, longer than `max_chars`, refused by the param, or known."""
    done = Proposals({param.agent: [] for param in params}, len(replies))
    for param, reply in zip(params, replies, strict=True):
        text, known = read(reply), done.texts[param.agent]
        if cut_off(reply):
            fault = TRUNCATED
        elif not text:
            fault = UNANSWERED
        elif len(text) > max_chars:
            fault = TOO_LONG
        elif text in (param.value, *known):
            fault = DUPLICATE
        else:
            fault = REFUSED if param.problem(text) else ""
        if fault:
            done.dropped[fault] += 1
        else:
            known.append(text)
    return done


def read(reply: Episode) -> str:
    """The instruction in a reply: between the tags, or all of it where it has none."""
    text = reply.output or ""
    inner = inside(text, "INSTRUCTION")
    return (text if inner is None else inner).strip()


def cut_off(reply: Episode) -> bool:
    """Did a reply end before its instruction did: at the most tokens, or without the closing
    tag?"""
    text = reply.output or ""
    if inside(text, "INSTRUCTION") is not None:
        return False
    return "<INSTRUCTION>" in text or any(t.finish_reason == "length" for t in reply.turns)


def _with_blocks(text: str, parts: Sequence[tuple[str, str]]) -> str:
    """The text behind blocks of what is not empty, each between tags that its text cannot close."""
    return "\n\n".join([*(block(name, own) for name, own in parts if own.strip()), text])


def _tasks(tasks: Sequence[Task]) -> str:
    return "\n\n".join(f"Question: {task.prompt}\nAnswer: {task.answer}" for task in tasks)


def _examples(demos: Sequence[Demo]) -> str:
    shown = [m for demo in demos[:MAX_DEMOS] for m in demo.messages]
    return "\n".join(f"{message.role}: {message.content}" for message in shown)


def _source(cls: type) -> str:
    """The source of a class; its name and docstring where it stands in no file (a notebook)."""
    try:
        return inspect.getsource(cls)
    except OSError:
        return f"{cls.__name__}: {inspect.getdoc(cls)}"
