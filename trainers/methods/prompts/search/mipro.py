"""MIPRO: instructions and demonstrations of all agents, searched jointly; no weight moves.

Opsahl-Ong et al., "Optimizing Instructions and Demonstrations for Multi-Stage Language Model
Programs" (arXiv:2406.11695), as MIPROv2 of DSPy has it. The first step makes the options: for every
agent sets of demonstrations (`bootstrapping.py`) and instructions by the helper `proposer`
(`mipro_proposer.py`), the first of each what the agent has; and evaluates the team as it began on
all validation tasks. Every further step is a trial: a tree-structured Parzen estimator suggests an
option of every param, and the team with these is scored on a random minibatch of the validation
tasks. After every `full_eval_steps` trials, and after the last, the candidate with the highest mean
minibatch score that was not yet evaluated in full is evaluated on all of them, and adopted if it is
better than the best so far. `minibatch_size: 0` evaluates every trial in full.

Against the authors' code: the first option is what the agent has, demonstrations included, also in
the trial that stands for it; equal options count once; an instruction that was cut off, is too long
or refused is dropped, and counted; none is asked for that the present one would overwrite; tasks
that candidates are compared on are never bootstrapped from; a full evaluation that would repeat an
earlier one is left out; what was played before with the same state costs nothing. Where the
proposer gives no usable instruction at all, demonstrations are searched alone; without these the
run ends. Presets there are numbers here: light 6 candidates and 100 validation tasks, medium 12 and
300, heavy 18 and 1000. Not taken over: all validation tasks for every trial where there are at most
50 (set `minibatch_size: 0`).

accelerate launch recipes/mipro.py [--config recipes/mipro.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from .....agents.seeds import derive_seed
from .....agents.settings import setting
from .....agents.state import Param, TeamState
from .....agents.types import SettingError, nearest
from ....config import RunConfig
from ....credit.filtering import SelectionConfig
from ....loop.step_result import StepResult
from ....trainer import Trainer
from ....values.acceptance import strictly_better
from ....values.memory import Memory
from ....values.parts import Part
from ....values.search import Candidate, Search
from ..bootstrapping.bootstrapper import BootstrapConfig, Bootstrapper
from ..bootstrapping.demos import LABELED, UNSHUFFLED, ZERO_SHOT, Demo, demo_values
from .mipro_proposer import PROPOSER, Proposals, Proposer, ProposerConfig
from .mipro_search import (
    SAMPLERS,
    Trial,
    default_trials,
    minibatch,
    next_full,
    optuna_module,
    program_runs,
)

CONTEXT_DEMOS = 3  # demonstrations that the proposer is shown where none are searched


@dataclass
class MIPROConfig(RunConfig, BootstrapConfig, SelectionConfig, ProposerConfig):
    """`RunConfig` with options (`BootstrapConfig`, `ProposerConfig`) and a search."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/mipro"
    )
    modules: list[str] = setting("agents that options are searched for; empty: all", factory=list)
    num_candidates: int = setting(
        "sets of demonstrations per agent, the one that it has included", 6, at_least=1
    )
    num_instructions: int = setting(
        "instructions per agent, the one that it has included; 0: half of num_candidates where"
        " demonstrations are searched, else all",
        0,
        at_least=0,
    )
    num_trials: int = setting(
        "trials; 0: max(2 v log2 N, 1.5 N) with N num_candidates and v the agents, twice where"
        " demonstrations are searched",
        0,
        at_least=0,
    )
    minibatch_size: int = setting("validation tasks of a trial; 0: all", 35, at_least=0)
    full_eval_steps: int = setting("trials between full evaluations", 5, at_least=1)
    sampler: str = setting(
        "what suggests a trial: tpe (needs optuna), or random", "tpe", choices=SAMPLERS
    )
    max_bootstrapped_demos: int = setting(
        "most bootstrapped demonstrations; with max_labeled_demos 0 too, instructions alone are"
        " searched",
        4,
        at_least=0,
    )
    max_labeled_demos: int = setting(
        "most demonstrations of an agent where labelled ones fill up", 4, at_least=0
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which candidates are compared", 100, at_least=1
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )
    max_steps: int = setting(
        "follows from the trials: a step is one, after a first one; leave it out", 0, at_least=0
    )

    def check(self) -> None:
        if self.minibatch_size > self.num_val_tasks:
            raise SettingError(
                f"minibatch_size: {self.minibatch_size} tasks of {self.num_val_tasks} validation"
                " tasks; set num_val_tasks higher, or minibatch_size lower (0: all)"
            )
        if not self.searches_demos and self.instructions == 1:
            raise SettingError(
                "num_instructions: 1 is the one that every agent has, and no demonstrations are"
                " searched; set it above 1, or max_bootstrapped_demos above 0"
            )

    @property
    def searches_demos(self) -> bool:
        """Are demonstrations searched too?"""
        return self.num_candidates > 1 and bool(
            self.max_bootstrapped_demos or (self.max_labeled_demos and self.labeled_demos)
        )

    @property
    def instructions(self) -> int:
        """Instructions per agent, the one that it has included."""
        if self.num_instructions:
            return self.num_instructions
        return max(self.num_candidates // 2 if self.searches_demos else self.num_candidates, 1)

    def trials(self, num_agents: int) -> int:
        """Trials of the search."""
        if self.num_trials:
            return self.num_trials
        return default_trials(num_agents, self.searches_demos, self.num_candidates)


class MIPROTrainer(Trainer[MIPROConfig]):
    """Searches instructions and demonstrations for the agents of a team. Arguments: see `Trainer`.

    trainer = MIPROTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]),
                           tasks="gsm8k", args=MIPROConfig(helpers={"proposer": {}}))
    trainer.train()
    """

    Config = MIPROConfig

    def parts(self) -> Sequence[Part]:
        args = self.args
        self.demos = Bootstrapper(self.run.rollouts, self.spec, args, args)
        self.proposer = Proposer(self.run.rollouts, self.spec, args)
        if args.instructions > 1:
            self.spec.helper(PROPOSER)
        if args.sampler == "tpe":
            optuna_module()
        names = [agent.name for agent in self.spec.system.specs]
        for name in args.modules:
            if name not in names:
                raise SettingError(f"modules: no agent {name!r}; {nearest(name, names)}")
        self.modules = args.modules or names
        self.num_trials = args.trials(len(self.modules))
        config = self.spec.config
        if config.max_steps not in (0, self.num_trials + 1):
            raise SettingError(
                f"max_steps: a step is a trial and there are {self.num_trials} after the first, so"
                f" leave it out; got {config.max_steps}"
            )
        config.max_steps = self.num_trials + 1
        self.search = Search("candidates", args.seed)
        # `options` by param, `trials`, `runs` of the team asked for, `proposals`
        self.memory = Memory("mipro")
        return [self.search, self.memory]

    @property
    def start(self) -> TeamState:
        """The state in force, with the values that the search began with."""
        return self.run.state.with_values(self.spec.values)

    def step(self, step: int) -> StepResult:
        """First make the options and evaluate the team as it began; then one trial per step."""
        return self._begin() if step == 1 else self._trial(step - 1)

    # the first step

    def _begin(self) -> StepResult:
        sets = self._demo_sets()
        proposals = self._proposals(sets)
        options: dict[str, list[Any]] = {}
        for param in self._prompts():
            agent = param.agent
            options[param.name] = [param.value, *proposals.texts.get(agent, ())]
            if self.args.searches_demos:
                name = f"{agent}.demos"
                given = [demo_values({agent: own[agent]})[name] for own in sets]
                options[name] = distinct([self.demos.student[name], *given])
                del options[name][self.args.num_candidates :]
        self.memory["options"] = options
        self.memory["proposals"] = {"asked": proposals.asked, "dropped": dict(proposals.dropped)}
        self._say_plan(options, proposals)
        row = self._evaluated({name: 0 for name in options}, full=True, proposer="start")
        done = self._hopeless(options, proposals)
        if done:
            self.run.log.warn(done)
        return StepResult({"trial": {"number": 0, **row}, "policies": self.rows({}, ())}, done=done)

    def _prompts(self) -> list[Param]:
        """Every agent's prompt, with the value in force."""
        params = {param.name: param for param in self.spec.system.params()}
        return [in_force(params[f"{name}.prompt"], self.start.values) for name in self.modules]

    def _demo_sets(self) -> list[dict[str, list[Demo]]]:
        """The sets of demonstrations beside those that the agents have; where none are searched,
        one that only the proposer is shown."""
        args, demos = self.args, self.demos
        if not args.searches_demos:
            if args.instructions == 1 or not args.fewshot_aware_proposer:
                return []
            runs = demos.successes(UNSHUFFLED, self.start, CONTEXT_DEMOS)
            agents = demos.sets.agents
            return [{agent: [run[agent] for run in runs if agent in run] for agent in agents}]
        numbers = [ZERO_SHOT] if any(demos.student.values()) else []
        if args.max_labeled_demos and args.labeled_demos:
            numbers.append(LABELED)
        if args.max_bootstrapped_demos:
            numbers += [UNSHUFFLED, *range(args.num_candidates)]
        state, chosen = self.start, numbers[: args.num_candidates - 1]
        return [own for own, _ in demos.candidates(chosen, state)]

    def _proposals(self, sets: Sequence[Mapping[str, Sequence[Demo]]]) -> Proposals:
        count = self.args.instructions - 1
        if not count:
            return Proposals()
        by_agent = {agent: [own[agent] for own in sets] for agent in self.demos.sets.agents}
        return self.proposer.propose(self._prompts(), count, by_agent)

    def _say_plan(self, options: Mapping[str, Sequence[Any]], proposals: Proposals) -> None:
        args, count = self.args, len(self.spec.val_tasks)
        runs = program_runs(self.num_trials, args.full_eval_steps, args.minibatch_size, count)
        sizes = ", ".join(f"{name} {len(own)}" for name, own in options.items())
        self.run.log.say(
            f"options: {sizes}; {self.num_trials} trials, at most {runs} runs of the team"
        )
        if proposals.dropped:
            self.run.log.say(f"instructions dropped: {counts(proposals.dropped)}")

    def _hopeless(self, options: Mapping[str, Sequence[Any]], proposals: Proposals) -> str:
        """Why there is nothing to search; "" if there is. Without a usable instruction the
        demonstrations are searched alone, and the log says so."""
        none = ""
        if proposals.asked and not proposals.usable:
            none = (
                f"helpers.{PROPOSER}: none of {proposals.asked} instructions is usable"
                f" ({counts(proposals.dropped)}); give the helper a stronger model, or raise"
                " max_proposal_tokens or max_instruction_chars"
            )
        if all(len(own) == 1 for own in options.values()):
            return none or "nothing to search: no agent has a second option (no run succeeded)"
        if none:
            self.run.log.warn(f"{none}. Demonstrations alone are searched")
        return ""

    def _trial(self, number: int) -> StepResult:
        args, options = self.args, self.memory["options"]
        space = {name: len(own) for name, own in options.items() if len(own) > 1}
        trials = [Trial(**saved) for saved in self.memory["trials"]]
        seed = derive_seed(args.seed, "trial", number)
        choice = SAMPLERS[args.sampler](space, trials, seed)
        before = self.search.current
        row = self._evaluated(
            {name: choice.get(name, 0) for name in options},
            full=not args.minibatch_size,
            proposer=args.sampler,
            number=number,
        )
        if args.minibatch_size and (
            number % args.full_eval_steps == 0 or number == self.num_trials
        ):
            row["full"] = self._evaluated_in_full(number)
        best = self.search.current
        assert best is not None and before is not None
        adopted = best.id != before.id
        row |= {"number": number, "adopted": adopted, "best": best.id, "best_score": best.mean}
        self.run.log.say(
            f"trial {number}: candidate {row['id']} {row['score']:.4f} on {row['num_tasks']} tasks;"
            f" best: candidate {best.id} {best.mean:.4f}"
        )
        return StepResult(
            {"trial": row, "policies": self.rows({}, ())},
            state=self.start.with_values(best.values) if adopted else None,
        )

    def _evaluated_in_full(self, number: int) -> dict[str, Any] | None:
        """The row of the best candidate that was not yet evaluated in full; None if there is
        none."""
        trials = [Trial(**saved) for saved in self.memory["trials"]]
        id = next_full(trials)
        if id is None:
            return None
        choice = next(dict(trial.choice) for trial in trials if trial.candidate == id)
        return self._evaluated(choice, full=True, number=number)

    def _evaluated(
        self, choice: Mapping[str, int], *, full: bool, proposer: str = "", number: int = 0
    ) -> dict[str, Any]:
        """Score a choice, on the trial's minibatch or on all validation tasks, remember it, and
        after a full evaluation adopt it if it is the best."""
        args, val = self.args, self.spec.val_tasks
        options = self.memory["options"]
        values = {name: options[name][at] for name, at in choice.items()}
        candidate = self.search.find(values) or self.search.add(
            Candidate(values, proposer=proposer, note=str(dict(choice)), round=number)
        )
        size = 0 if full else args.minibatch_size
        tasks = [val[at] for at in minibatch(len(val), size, args.seed, number)]
        result = self.run.evaluator.measure(self.start.with_values(values), tasks)
        candidate = self.search.score(candidate.id, result.scores)
        trial = Trial(dict(choice), candidate.id, result.accuracy, full)
        self.memory["trials"] = [*self.memory.get("trials", []), asdict(trial)]
        self.memory["runs"] = self.memory.get("runs", 0) + len(tasks)
        if full:
            self._gate(candidate)
        failed = {"failed": result.failed} if result.failed else {}
        score = {"id": candidate.id, "score": result.accuracy, "num_tasks": len(tasks)}
        return {**score, "choice": dict(choice), **failed}

    def _gate(self, candidate: Candidate) -> None:
        """Adopt a candidate that was evaluated in full, if it is better than the best so far."""
        best = self.search.current
        if best is None:
            self.search.adopt(candidate.id, "the team as it began")
        elif best.id != candidate.id:
            verdict = strictly_better(candidate, best, [task.id for task in self.spec.val_tasks])
            (self.search.adopt if verdict else self.search.reject)(candidate.id, verdict)

    def report(self) -> dict[str, Any]:
        """Also `candidates` that were evaluated in full, the best first, and `search`: trials, runs
        of the team, what became of the proposals."""
        memory = self.memory
        trials = [Trial(**saved) for saved in memory.get("trials", [])]
        full = {trial.candidate: trial.score for trial in trials if trial.full}
        rows = [
            {"id": id, "score": score, "note": self.search[id].note, "verdict": verdict}
            for id, score in sorted(full.items(), key=lambda pair: -pair[1])
            for verdict in [self.search[id].verdict]
        ]
        search = {
            "sampler": self.args.sampler,
            "trials": max(self.run.step - 1, 0),
            "evaluations": len(trials),
            "runs": memory.get("runs", 0),
            "proposals": memory.get("proposals", {"asked": 0, "dropped": {}}),
        }
        return {**super().report(), "candidates": rows, "search": search}


def in_force(param: Param, values: Mapping[str, Any]) -> Param:
    """The param with its value in force."""
    return dataclasses.replace(param, value=values.get(param.name, param.value))


def distinct(options: Sequence[Any]) -> list[Any]:
    """The options in order, equal ones once."""
    return [option for n, option in enumerate(options) if option not in options[:n]]


def counts(dropped: Mapping[str, int]) -> str:
    """`2 truncated, 1 duplicate`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
