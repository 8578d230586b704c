"""What the library `gepa` asks of a run: to score a candidate on tasks, and to write a new prompt
for one agent from its turns. Every answer is recorded, so that the library can be run again from
its start, with what was asked before answered from the record."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .....agents.settings import Settings, setting
from .....agents.state import Param, TeamState
from .....agents.text.tags import block, nested
from .....agents.types import AgentSpec, SettingError, Task
from .....rollouts.evaluation.accuracy import evaluation
from .....rollouts.types import Episode
from ....collection.rollout_manager import RolloutManager
from ....errors import RunError
from ....feedback.helpers import Reply
from ....loop.spec import RunSpec
from ....values.parts import json_sha256
from .mipro_proposer import Proposals, usable

T = TypeVar("T")
REFLECTOR = "reflector"  # the helper's name
SYSTEM = "You write instructions for the agents of a team of language models."
# after the library's own prompt, with blocks that no text inside them can close
REFLECT = (
    "Agent {agent} performs a task with this instruction:\n{instruction}\n\nThese are inputs that"
    " it was given, its responses, and feedback on how the team did:\n{examples}\n\nWrite a new"
    " instruction for agent {agent}. Read the inputs carefully and infer the task in detail. Read"
    " all responses and the feedback: put niche and domain specific facts into the instruction,"
    " since they may not be available to the agent in the future, and a strategy that generalises,"
    " if it used one.\nAnswer with the instruction alone, between <INSTRUCTION> and"
    " </INSTRUCTION>."
)


@dataclass
class ReflectionConfig(Settings):
    """What the reflector is shown, and how long its replies may be."""

    reflection_minibatch_size: int = setting(
        "training tasks on which a candidate is reflected on and first compared", 3, at_least=1
    )
    max_proposal_tokens: int = setting(
        "tokens of a reflector's reply at most; a truncated instruction is dropped",
        1024,
        at_least=1,
    )
    max_instruction_chars: int = setting(
        "characters of an instruction at most; a longer one is dropped", 4000, at_least=1
    )


@dataclass
class Record:
    """What the library asked, in order, and the answers: JSON, so a memory keeps it.

    `calls`: `asked` (a hash of the question) and `answer`. `place`: how many were asked in this run
    of the library.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    place: int = 0

    def answer(self, question: Any, work: Callable[[], T]) -> T:
        """The recorded answer to the next question, or that of `work`, which is then recorded.
        Raises `RunError` if another question was asked at this place."""
        asked = json_sha256(question)
        if self.place < len(self.calls):
            known = self.calls[self.place]
            if known["asked"] != asked:
                raise RunError(
                    f"gepa: question {self.place + 1} is another than the one on record; resume"
                    " with the settings, and the version of the package gepa, that the run began"
                    " with"
                )
            self.place += 1
            return known["answer"]
        found = work()
        self.calls.append({"asked": asked, "answer": found})
        self.place += 1
        return found


@dataclass
class Evaluated:
    """Scores of a batch as the library wants them. `trajectories`: (task id, score, episode), the
    last None where the score is from the record."""

    outputs: list[Any]
    scores: list[float]
    trajectories: list[Any]
    objective_scores: Any = None
    num_metric_calls: int | None = None


class TeamAdapter:
    """The library's `GEPAAdapter` of a team.

    Args:
        rollouts: plays, and asks the helper; every rank has to run the library.
        spec: knows the helper and the metric.
        config: bounds of what is proposed.
        state: what the team plays with beside a candidate's values.
        params: the prompts under search by name, with the values in force.
        record: of what was asked before, see `Record`.

    `failure`: what ended a call. The library turns exceptions into lines of a log and goes on, so
    whoever runs it raises this afterwards (`failed`). `proposals`: those of this run of the
    library, without recorded ones.
    """

    def __init__(
        self,
        rollouts: RolloutManager,
        spec: RunSpec,
        config: ReflectionConfig,
        state: TeamState,
        params: Mapping[str, Param],
        record: Record,
    ) -> None:
        self.rollouts, self.spec, self.config = rollouts, spec, config
        self.state, self.params, self.record = state, params, record
        self.failure: Exception | None = None
        self.proposals = Proposals()

    def evaluate(
        self, batch: list[Task], candidate: dict[str, str], capture_traces: bool = False
    ) -> Evaluated:
        """The metric of a candidate on these tasks, played at temperature 0; a failure counts 0."""
        tasks = list({task.id: task for task in batch}.values())  # a small epoch repeats some
        episodes: dict[str, Episode] = {}

        def score() -> dict[str, float]:
            played = self.rollouts.play(tasks, self.state.with_values(candidate), greedy=True)
            episodes.update({e.task.id: e for e in played if e.parent is None})
            return dict(evaluation(tasks, played, self.spec.metric).scores)

        with self.failing():
            scores = self.record.answer([candidate, [task.id for task in tasks]], score)
        return Evaluated(
            [None] * len(batch),
            [scores[task.id] for task in batch],
            [(task.id, scores[task.id], episodes.get(task.id)) for task in batch],
        )

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Evaluated, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """By prompt the turns of its agent: `input`, `response`, `feedback`."""
        played = {t: (score, e) for t, score, e in eval_batch.trajectories if e is not None}
        with self.failing():
            return {
                name: [
                    example
                    for score, episode in played.values()
                    for example in examples(episode, self.params[name].agent, score)
                ]
                for name in components_to_update
            }

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """New prompts, by the helper, for those of these for which it wrote a usable one."""
        names = list(components_to_update)
        with self.failing():
            return self.record.answer(
                ["propose", candidate, names],
                lambda: self._asked(candidate, reflective_dataset, names),
            )

    def _asked(
        self,
        candidate: Mapping[str, str],
        shown: Mapping[str, Sequence[Mapping[str, Any]]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """The usable answers of the helper; nothing is asked for an agent that has not spoken."""
        spoken = [name for name in names if shown.get(name)]
        talk = Reply([self._helper()], saw_gold=True)
        tasks = [
            Task(f"{name}/{self.record.place}", self._prompt(name, candidate[name], shown[name]))
            for name in spoken
        ]
        replies = self.rollouts.ask_all([(talk, task, "") for task in tasks])
        now = [dataclasses.replace(self.params[name], value=candidate[name]) for name in spoken]
        texts: dict[str, str] = {}
        for name, param, reply in zip(spoken, now, replies, strict=True):
            found = usable([param], [reply], self.config.max_instruction_chars)
            self.proposals.asked += 1
            self.proposals.dropped += found.dropped
            if found.usable:
                (texts[name],) = found.texts[param.agent]
        return texts

    def _prompt(self, name: str, value: str, shown: Sequence[Mapping[str, Any]]) -> str:
        blocks = "\n".join(
            nested("EXAMPLE", "\n".join(block(k.upper(), str(v)) for k, v in example.items()))
            for example in shown
        )
        instruction = block("CURRENT_INSTRUCTION", value or "(none)")
        return REFLECT.format(
            agent=self.params[name].agent, instruction=instruction, examples=blocks
        )

    def _helper(self) -> AgentSpec:
        """The helper, at temperature 1 unless its settings say otherwise."""
        agent, config = self.spec.helper(REFLECTOR), self.spec.config
        free = dataclasses.replace(
            config.sampling(), temperature=1.0, max_tokens=self.config.max_proposal_tokens
        )
        return dataclasses.replace(
            agent, prompt=agent.prompt or SYSTEM, sampling=agent.sampling or free
        )

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Keep what ends a call, and end all later ones by it."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    def failed(self, state: Any = None) -> bool:
        """Has a call failed? The library asks it before each iteration."""
        return self.failure is not None


def examples(episode: Episode, agent: str, score: float) -> list[dict[str, str]]:
    """What an agent read and said in an episode, with feedback: score, answer, words of rewards,
    the error."""
    words = [r.text for r in episode.rewards if r.text and r.agent in (None, agent)]
    answer = [] if episode.task.answer is None else [f"The right answer is: {episode.task.answer}"]
    error = [f"The run failed: {episode.error}"] if episode.error else []
    output = [f"The team's output was: {episode.output}"] if episode.output is not None else []
    feedback = "\n".join([f"Score: {score:g}", *output, *answer, *words, *error])
    return [
        {
            "input": "\n".join(m.content for m in turn.messages if m.role == "user"),
            "response": turn.text,
            "feedback": feedback,
        }
        for turn in episode.trajectory(agent)
    ]


def gepa_module() -> Any:
    """The package gepa. Raises `SettingError` if it is not installed."""
    try:
        import gepa
    except ImportError as error:
        raise SettingError(
            "gepa_prompts needs the package gepa, which is not installed; pip install"
            " 'marlora[gepa]'"
        ) from error
    return gepa
