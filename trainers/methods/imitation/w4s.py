"""W4S: a weak designer learns to write the program that a stronger model executes (Nie et al.,
arXiv:2504.04785, reinforcement learning for agentic workflow optimization).

A step is an iteration: `num_episodes` episodes of design (`w4s_episode.py`), each a chat of
`num_turns` turns with `num_candidates` candidates for one program that has to solve every task.
Candidates are repaired after the error's words, scored on the validation tasks and rewarded
(`w4s_rewards.py`); the chat goes on with the best. In the first `num_fits` iterations the designer
is then fitted: it imitates every rewarded candidate with the weight exp(reward / tau). The others
use it as it is, so the second iteration of two is the trained designer at work. The best program by
validation is the team's; held-out tasks are played before and after the run only.

The team is a `Program`: the agent `designer` learns, the others execute and are frozen: the base,
another model, or an outside one.

Against the authors' code: accuracies are all on the same validation tasks, and the program is
chosen by them, where the code adds ten fresh tasks each time and chooses by the test set; `best_of`
counts all programs of the chat as best so far; weights are normalised; a candidate's weight trains
its own turn (`trained_turns: all` has the earlier ones too); a repair's target is the reply with
its program replaced, as there, and the talk of repair is not learnt; a turn without a program that
works ends its episode. Programs are of operators and run in the sandbox. LoRA by default.

accelerate launch recipes/w4s.py [--config recipes/w4s.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from ....agents.programs.program import PROGRAM, Program
from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.types import AgentSpec, Sampling, SettingError
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.report.sections import ReportSection, stored, table_section
from ...config import RunConfig
from ...errors import RunError
from ...loop.checks import check_sole_learner
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.memory import Memory
from ...values.parts import Part
from ...values.search import Candidate, Search
from ..workflow_search.experience import case
from ..workflow_search.measurement import MeasurementConfig, ProgramMeter, program_rows
from ..workflow_search.seeds import CHAIN_OF_THOUGHT, SELF_CONSISTENCY
from .imitation import ImitationConfig, ImitationResult, IterationConfig, encoded, fit_turns
from .w4s_episode import Cases, DesignEpisodeConfig, DesignRecord, DesignRunner
from .w4s_rewards import DesignRewardConfig, RewardWeightConfig, turn_weights
from .w4s_talk import DesignTalkConfig

EXAMPLES: Mapping[str, str] = {
    "chain of thought": CHAIN_OF_THOUGHT,
    "self-consistency": SELF_CONSISTENCY,
    "code generation": "await programmer()",
}
COLUMNS = (
    "iteration",
    "candidates",
    "usable",
    "repaired",
    "mean reward",
    "mean accuracy",
    "of first turns",
    "best accuracy",
    "then fitted",
)


@dataclass
class W4SConfig(
    IterationConfig,
    RunConfig,
    DesignTalkConfig,
    DesignEpisodeConfig,
    DesignRewardConfig,
    RewardWeightConfig,
    MeasurementConfig,
    ImitationConfig,
):
    """`RunConfig` with iterations of design, rewards and weights of programs, their measurement,
    and epochs of imitation."""

    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/w4s"
    )
    max_iterations: int = setting("iterations of design", 2, at_least=0)
    num_fits: int = setting(
        "iterations after which the designer is fitted; the later ones use it as it is",
        1,
        at_least=0,
    )
    num_episodes: int = setting("episodes of design in an iteration", 15, at_least=1)
    carry_over: bool = setting(
        "an episode's first prompt also shows the last program that was designed before", True
    )
    examples: list[str] = setting(
        "programs that a chat begins with, beside the team's own",
        factory=lambda: list(EXAMPLES),
        choices=tuple(EXAMPLES),
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, on which programs are compared", 128, at_least=1
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )

    def check(self) -> None:
        if self.trainer != "marlora":
            raise SettingError("trainer: W4S imitates with weights, which trl has not; leave it")


class W4STrainer(Trainer[W4SConfig]):
    """Trains the designer of a `Program`. Arguments: see `Trainer`.

    executor = AgentSpec("executor", policy="executor")
    designer = AgentSpec("designer", sampling=Sampling(temperature=0.5, max_tokens=4096))
    trainer = W4STrainer(model="Qwen/Qwen2.5-Coder-7B-Instruct", tasks="gsm8k",
                         system=Program([executor, designer]),
                         args=W4SConfig(policies={"executor": {"url": "https://HOST/v1"}}))
    trainer.train()
    """

    Config = W4SConfig

    def parts(self) -> Sequence[Part]:
        args, system = self.args, self.spec.system
        if not isinstance(system, Program):
            raise SettingError(
                f"system.class: {type(system).__name__} has no program for all tasks; use"
                " marlora.agents.programs.program:Program"
            )
        self.agent = self._designer(system)
        executors = [spec for spec in system.specs if spec.name != self.agent.name]
        target = system.with_agents(executors)
        assert isinstance(target, Program)
        self.starts = self._starts(target)
        self.search = Search("programs", args.seed)
        self.memory = Memory("designs")  # episodes of design, iterations, the last program
        self.meter = ProgramMeter(self.run.rollouts, args, self.spec.metric, target)
        self.runner = DesignRunner(
            self.run.rollouts,
            self.agent,
            target,
            self.search,
            self.measure,
            self.cases,
            args,
            args,
            args,
            len(self.spec.val_tasks),
        )
        return [self.search, self.memory]

    def _designer(self, system: Program) -> AgentSpec:
        """The designer, with room for a whole program. It alone learns."""
        name, args = self.args.designer, self.args
        specs = {spec.name: spec for spec in system.specs}
        if name not in specs or len(specs) < 2:
            raise SettingError(
                f"designer: expected one of several agents of the team, {', '.join(specs)}; got"
                f" {name!r}"
            )
        if name in system.executors.values():
            raise SettingError(
                f"system.executors: {name!r} is the designer, which executes nothing; list another"
                " agent first, or name it there"
            )
        check_sole_learner(self.spec.policies, specs[name].policy, "W4S")
        own = Sampling(temperature=args.design_temperature, max_tokens=args.max_program_length)
        return dataclasses.replace(specs[name], sampling=specs[name].sampling or own)

    def _starts(self, target: Program) -> dict[str, str]:
        """The programs that chats begin with, by name: the team's own first."""
        programs = {name: EXAMPLES[name] for name in self.args.examples}
        for name, program in programs.items():
            if fault := target.fault(program):
                raise SettingError(f"examples: {name!r} cannot be used: {fault}; leave it out")
        own = str(self.spec.values.get(PROGRAM, target.program))
        return {"the team's own": own, **programs}

    # an iteration

    def step(self, step: int) -> StepResult:
        """Episodes of design, and a fit."""
        if step == 1:
            self._begin()
        records = [self._designed(step, number) for number in range(self.args.num_episodes)]
        if not any(record.turns for record in records):
            raise RunError(f"step {step}: every episode failed; the first one: {records[0].error}")
        done = self.fit(step, records) if step <= self.args.num_fits else None
        lessons = [lesson for record in records for lesson in record.lessons]
        best, before = self.search.best(), self.search.current
        if before is None or best.mean > before.mean:
            self.search.adopt(best.id, f"best by validation: {best.mean:.4f}")
        row = {**described(records), "best": best.mean, "fitted": done is not None}
        self.memory["iterations"] = [*self.memory.get("iterations", []), row]
        self.run.log.say(
            f"step {step}: {row['candidates']} candidates, {row['usable']:.2f} usable; mean"
            f" accuracy {row['accuracy']:.4f}, best {best.mean:.4f}"
        )
        rows = self.rows(done.updates if done else {}, lessons)
        metrics: dict[str, Any] = {"w4s": row, "policies": done.into(rows) if done else rows}
        if done:
            metrics["dropped"] = done.untrained
        return StepResult(metrics, lessons, self.run.state.with_values(best.values))

    def _begin(self) -> None:
        """Score the programs that chats begin with."""
        for name, program in self.starts.items():
            if self.search.find({PROGRAM: program}) is None:
                self.measure(self.search.add(Candidate({PROGRAM: program}, "start", name)))
        if not self.context():
            faults = "; ".join(each.fault for each in self.search.candidates)
            raise SettingError(f"system.program: no program to begin with can be used: {faults}")

    def context(self) -> list[Candidate]:
        """The programs that a chat begins with: the first ones, and the last that was designed."""
        started = [each for each in self.search.pool() if each.proposer == "start"]
        last = self.last
        return started if last is None else [*started, last]

    @property
    def last(self) -> Candidate | None:
        """The last program that was designed, if episodes go on from it."""
        id = self.memory.get("last") if self.args.carry_over else None
        return None if id is None else self.search[id]

    def _designed(self, step: int, number: int) -> DesignRecord:
        """An episode of design, remembered."""
        context = self.context()
        before = self.last or context[0]
        record = self.runner.play(f"design-{step:06d}-{number:03d}", context, before, step)
        if record.error:
            self.run.log.warn(f"step {step}: {record.error}")
        if record.chosen and record.chosen[-1].candidate:
            self.memory["last"] = record.chosen[-1].candidate.id
        self.memory["episodes"] = [*self.memory.get("episodes", []), record.row]
        return record

    def measure(self, candidate: Candidate) -> Candidate:
        """Score a candidate on the validation tasks, see `ProgramMeter`."""
        return self.meter.measure(self.search, candidate, self.run.state, self.spec.val_tasks)

    def cases(self, candidate: Candidate, label: str) -> Cases:
        """Some validation tasks with a candidate's answers, drawn for this label."""
        tasks, count = self.spec.val_tasks, min(self.args.num_cases, len(self.spec.val_tasks))
        if not count:
            return Cases()
        rng = random.Random(derive_seed(self.args.seed, "cases", label))
        chosen = rng.sample(list(tasks), count)
        program = str(candidate.values[PROGRAM])
        played = self.meter.play(self.run.state, program, chosen)
        first = {each.task.id: each for each in reversed(played) if each.parent is None}
        scores = evaluation(chosen, first.values(), self.spec.metric).scores
        text = "\n\n".join(case(first[task.id], task.answer) for task in chosen)
        return Cases(text, count, sum(score >= 1 for score in scores.values()))

    def fit(self, step: int, records: Sequence[DesignRecord]) -> ImitationResult | None:
        """Reward-weighted regression on the iteration's candidates; None if none has a reward."""
        learner, args = self.run.learner, self.args
        chats = [chat for record in records for chat in record.chats]
        if not chats:
            self.run.log.warn(f"step {step}: no candidate could be used; nothing to learn from")
            return None
        if args.start_from == "base":
            learner.reset({self.agent.policy})
        lessons = [encoded(learner, each) for record in records for each in record.lessons]
        lengths = {(e.id, t.index, t.sibling): len(t.token_ids) for e in lessons for t in e.turns}
        weights = turn_weights(chats, lengths, args, derive_seed(args.seed, "fit", step))
        return fit_turns(learner, step, lessons, weights, args)

    def report(self) -> dict[str, Any]:
        """Also `programs`, the tree of all programs (see `program_rows`), and what each iteration
        came to."""
        section = iterations_section(self.memory.get("iterations", []))
        return {**super().report(), "programs": program_rows(self.search), **stored(section)}


def described(records: Sequence[DesignRecord]) -> dict[str, Any]:
    """What an iteration's candidates are worth. `accuracy`: the mean over all, 0 where one cannot
    be used; `reward`: the mean over those that have one."""
    designs = [design for record in records for design in record.designs]
    rewards = [design.reward for design in designs if design.reward is not None]
    usable = [design for design in designs if not design.fault]
    programs = {design.candidate.id for design in usable if design.candidate}
    return {
        "episodes": len(records),
        "candidates": len(designs),
        "usable": len(usable) / len(designs),
        "repaired": sum(design.repairs > 0 for design in usable),
        "rewarded": len(rewards),
        "reward": fmean(rewards) if rewards else None,
        "accuracy": fmean(design.accuracy for design in designs),
        "accuracy_by_turn": accuracy_by_turn(records),
        "distinct": len(programs),
        "failed": sum(bool(record.error) for record in records),
    }


def accuracy_by_turn(records: Sequence[DesignRecord]) -> list[float]:
    """The mean accuracy of all candidates of the first turns, of the second ones, ..."""
    count = max(len(record.turns) for record in records)
    turns = [[r.turns[k] for r in records if len(r.turns) > k] for k in range(count)]
    return [fmean(design.accuracy for turn in own for design in turn) for own in turns]


def iterations_section(rows: Sequence[Mapping[str, Any]]) -> ReportSection:
    """The iterations of a run as a table of the report."""

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.3f}"

    cells = [
        [
            str(count),
            str(row["candidates"]),
            number(row["usable"]),
            str(row["repaired"]),
            number(row["reward"]),
            number(row["accuracy"]),
            number(row["accuracy_by_turn"][0]),
            number(row["best"]),
            "yes" if row["fitted"] else "no",
        ]
        for count, row in enumerate(rows, 1)
    ]
    text = "Accuracies are on the validation tasks; a candidate that cannot be used counts 0."
    return table_section("Programs that the designer wrote", COLUMNS, cells, text)
