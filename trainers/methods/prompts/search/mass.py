"""MASS: prompts of building blocks, the topology that they form, and prompts of the whole, in three
stages; no weight moves.

Zhou et al., "Multi-Agent Design: Optimizing Agents with Better Prompts and Topologies" (arXiv
2502.02533). The system is `BuildingBlocks`. A step of the run is one of these:

1. Block prompts: MIPRO finds the predictor's prompt and demonstrations; then for every block those
   of its agent, in the least team that has the block, the predictor as found. What the block does
   for the score, E(block) / E(predictor), is its influence.
2. Topology: blocks take part by softmax(influence / t); `num_topologies` of at most `max_agents`
   agents are drawn, built with the prompts found, and measured `topology_evaluations` times on the
   validation tasks; the best is taken, of equal ones that with the fewest agents.
3. Workflow prompts: MIPRO goes on with all agents of that topology, from the prompts they have.

There is no code by the authors, so the rest is ours: topologies are drawn without repetition, and
no more than `max_draws` times; the predictor alone is always compared too; stage 3 counts only if
the team is then strictly better, measured as topologies are. Executing shows the reflector what
came of an answer, so it needs the block `reflect`, whose prompt its own search goes on with. A
predictor that solves nothing counts as half a success in the denominator of influence. The first
version of the paper prints the rule for taking part the other way round (`activation: printed`).
Topologies are measured at the run's temperature, held-out tasks at temperature 0.

accelerate launch recipes/mass.py [--config recipes/mass.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .....agents.programs.building_blocks import SPEAKERS, VALUES, BuildingBlocks
from .....agents.seeds import derive_seed
from .....agents.settings import mapping, parsed_mapping, setting
from .....agents.state import TeamState
from .....agents.types import SettingError, nearest
from ....config import RunConfig
from ....inner_config import inner_config
from ....loop.step_result import StepResult
from ....trainer import Trainer
from ....values.acceptance import strictly_better
from ....values.memory import Memory
from ....values.parts import Part
from ....values.search import Candidate, Search
from .mipro import MIPROConfig, MIPROTrainer
from .topologies import (
    ACTIVATIONS,
    MINIMAL,
    chances,
    influence,
    num_agents,
    sample,
    space_size,
    topology,
)

PREDICTOR, TOPOLOGY, WORKFLOW = "predictor", "topology", "workflow"  # steps beside the blocks'
OPTIMIZER = "prompt_optimizer"


@dataclass
class MASSConfig(RunConfig):
    """`RunConfig` with the settings of MIPRO (`prompt_optimizer`) and of the topologies."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/mass"
    )
    blocks: list[str] = setting(
        "blocks that are searched, in this order; empty: all that the team can have, and execute"
        " only if all tasks have public tests",
        factory=list,
        choices=tuple(VALUES),
    )
    prompt_optimizer: dict | str | None = setting(
        "settings of mipro, which finds prompts and demonstrations",
        factory=lambda: {
            "max_bootstrapped_demos": 3,
            "max_labeled_demos": 0,
            "num_candidates": 10,
            "num_instructions": 10,
            "num_trials": 10,
            "minibatch_size": 0,
        },
    )
    num_topologies: int = setting("topologies that are drawn and measured", 10, at_least=1)
    topology_evaluations: int = setting(
        "plays of every validation task, by which blocks and topologies are compared", 3, at_least=1
    )
    influence_temperature: float = setting(
        "t of softmax(influence / t), by which blocks take part", 0.05, above=0
    )
    activation: str = setting(
        "a block takes part with its probability (influential), or with the rest of it, as the"
        " paper's first version prints it (printed)",
        "influential",
        choices=ACTIVATIONS,
    )
    max_agents: int = setting("agents of a topology at most", 10, at_least=1)
    max_draws: int = setting(
        "draws of topologies at most, rejected ones included", 1000, at_least=1
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which everything is compared", 60, at_least=1
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )
    max_steps: int = setting("follows from the blocks; leave it out", 0, at_least=0)

    def prepare(self) -> None:
        self.prompt_optimizer = parsed_mapping(OPTIMIZER, self.prompt_optimizer)

    def check(self) -> None:
        self.mipro([])
        if len({*self.blocks}) < len(self.blocks):
            raise SettingError(f"blocks: each once expected, got {', '.join(self.blocks)}")

    def mipro(self, modules: Sequence[str]) -> MIPROConfig:
        """The settings of the search for prompts of these agents. Raises `SettingError`."""
        own = mapping(OPTIMIZER, self.prompt_optimizer)
        if "modules" in own:
            raise SettingError(f"{OPTIMIZER}.modules: every stage has its own agents; leave it out")
        return inner_config(MIPROConfig, self, OPTIMIZER, {**own, "modules": list(modules)})


class MASSTrainer(Trainer[MASSConfig]):
    """Searches prompts and topology of a team of building blocks. Arguments: see `Trainer`.

    team = BuildingBlocks(["solver", "reflector", "aggregator"], reflector="reflector",
                          aggregator="aggregator")
    trainer = MASSTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=team, tasks="gsm8k",
                          args=MASSConfig(helpers={"proposer": {}}))
    trainer.train()
    """

    Config = MASSConfig

    def parts(self) -> Sequence[Part]:
        self.blocks = self._blocks()
        self.stages = [PREDICTOR, *self.blocks, TOPOLOGY, WORKFLOW]
        config = self.spec.config
        if config.max_steps not in (0, len(self.stages)):
            raise SettingError(
                f"max_steps: a step is a stage and there are {len(self.stages)}, so leave it out;"
                f" got {config.max_steps}"
            )
        config.max_steps = len(self.stages)
        self._optimizer({}, [self.system.predictor])  # refuses what cannot work
        self.search = Search("candidates", self.args.seed)
        # `scores` and `influence` by stage, `draws`, `topologies`, `optimized`: searches of prompts
        self.memory = Memory("mass")
        return [self.search, self.memory]

    @property
    def system(self) -> BuildingBlocks:
        """The team. Raises `SettingError` for one of another kind."""
        system = self.spec.system
        if not isinstance(system, BuildingBlocks):
            raise SettingError(
                f"system.class: {type(system).__name__}; MASS searches the topology of"
                " marlora.agents.programs.building_blocks:BuildingBlocks"
            )
        return system

    def _blocks(self) -> list[str]:
        known, tasks = self.system.blocks, (*self.spec.tasks, *self.spec.val_tasks)
        untested = next((task.id for task in tasks if not task.meta.get("tests")), None)
        blocks = self.args.blocks or [
            name for name in known if name != "execute" or untested is None
        ]
        for name in blocks:
            if name not in known:
                raise SettingError(
                    f"blocks: the team has no {SPEAKERS[name]} for {name!r}; {nearest(name, known)}"
                )
        if "execute" in blocks and untested is not None:
            raise SettingError(
                f"blocks: execute runs public tests, and task {untested!r} has none (meta.tests);"
                " leave it out"
            )
        if not blocks:
            raise SettingError("blocks: the team is a predictor alone; give it a reflector, ...")
        if "execute" in blocks and "reflect" not in blocks[: blocks.index("execute")]:
            raise SettingError("blocks: execute needs reflect before it, which is shown what came")
        return blocks

    def step(self, step: int) -> StepResult:
        """One stage: the predictor, a block, the topology, or the whole."""
        stage = self.stages[step - 1]
        state: TeamState | None
        if stage == TOPOLOGY:
            state, row = self._chosen_topology(step)
        elif stage == WORKFLOW:
            state, row = self._workflow(step)
        else:
            state, row = self._block(stage, step)
        self.run.log.say(f"{stage}: " + ", ".join(f"{k} {v}" for k, v in row.items()))
        return StepResult(
            {"mass": {"stage": stage, **row}, "policies": self.rows({}, ())}, state=state
        )

    # stage 1

    def _block(self, stage: str, step: int) -> tuple[TeamState, dict[str, Any]]:
        """Find the prompt of one block's agent, and what the block does."""
        alone = stage == PREDICTOR
        agent = self.system.predictor if alone else getattr(self.system, SPEAKERS[stage])
        shape = self._values(topology({} if alone else MINIMAL[stage]))
        state = self._optimized(shape, [agent], stage)
        score = self._measured(state, stage, step).mean
        self._remember("scores", stage, score)
        row: dict[str, Any] = {"agent": agent, "score": score}
        if not alone:
            floor = 0.5 / (len(self.spec.val_tasks) * self.args.topology_evaluations)
            row["influence"] = influence(score, self.memory["scores"][PREDICTOR], floor)
            self._remember("influence", stage, row["influence"])
        return state.with_values(self._values(topology())), row

    def _optimizer(self, values: Mapping[str, Any], modules: Sequence[str]) -> MIPROTrainer:
        """MIPRO inside this run, begun with these values beside those in force."""
        begun = {**self.run.values, **values}
        return self.inside(MIPROTrainer, self.args.mipro(modules), begun)

    def _optimized(self, shape: Mapping[str, int], modules: Sequence[str], stage: str) -> TeamState:
        """The state with the prompts that MIPRO finds for these agents in this topology."""
        optimizer = self._optimizer(shape, modules)
        state = optimizer.all_steps() or optimizer.start
        self._remember("optimized", stage, optimizer.memory["proposals"])
        return state

    def _values(self, shape: Mapping[str, int]) -> dict[str, int]:
        """A topology as values of this team, which may lack some blocks."""
        return {name: shape[name] for name in self.system.blocks}

    # stage 2

    def _chosen_topology(self, step: int) -> tuple[TeamState, dict[str, Any]]:
        """The best of the topologies that are drawn by influence, and of the predictor alone."""
        args, influences = self.args, self.memory["influence"]
        parts = chances(influences, args.influence_temperature)
        draws = sample(
            parts,
            args.num_topologies,
            derive_seed(args.seed, TOPOLOGY),
            max_agents=args.max_agents,
            max_draws=args.max_draws,
            rule=args.activation,
        )
        self.memory["draws"] = {
            "chances": parts,
            "activation": args.activation,
            "space": space_size(self.blocks),
            "rejected": draws.rejected,
        }
        shapes = [topology(), *(shape for shape in draws.topologies if shape != topology())]
        states = [self.run.state.with_values(self._values(shape)) for shape in shapes]
        found = [self._measured(state, TOPOLOGY, step).mean for state in states]
        self.memory["topologies"] = [
            {"topology": shape, "agents": num_agents(shape), "score": score}
            for shape, score in zip(shapes, found, strict=True)
        ]
        best = min(range(len(shapes)), key=lambda at: (-found[at], num_agents(shapes[at])))
        self._remember("scores", TOPOLOGY, found[best])
        chosen = self._candidate(states[best], TOPOLOGY, step)
        self.search.adopt(chosen.id, f"best of {len(shapes)} topologies")
        return states[best], {
            "topology": {name: shapes[best][name] for name in self.blocks},
            "agents": num_agents(shapes[best]),
            "score": found[best],
            "measured": len(shapes),
            "rejected": draws.rejected,
        }

    # stage 3

    def _workflow(self, step: int) -> tuple[TeamState | None, dict[str, Any]]:
        """Prompts of all agents of the topology, kept if the team is then better."""
        before = self.search.current
        assert before is not None
        shape = self.system.shape(self.run.values)
        state = self._optimized({}, self._agents(shape), WORKFLOW)
        new = self._measured(state, WORKFLOW, step)
        row = {"agents": self._agents(shape), "before": before.mean, "score": new.mean}
        self._remember("scores", WORKFLOW, new.mean)
        if new.id == before.id:
            return None, {**row, "accepted": False, "verdict": "nothing better was found"}
        verdict = strictly_better(new, before, [task.id for task in self.spec.val_tasks])
        (self.search.adopt if verdict else self.search.reject)(new.id, verdict)
        row |= {"accepted": bool(verdict), "verdict": str(verdict)}
        return (state if verdict else None), row

    def _agents(self, shape: Mapping[str, int]) -> list[str]:
        """The agents that speak in a topology."""
        spoken = [SPEAKERS[name] for name in VALUES if shape[name] != VALUES[name][0]]
        return [
            self.system.predictor,
            *(getattr(self.system, role) for role in dict.fromkeys(spoken)),
        ]

    # what a state is worth

    def _measured(self, state: TeamState, proposer: str, step: int) -> Candidate:
        """The candidate that is this state, scored on the validation tasks at the run's
        temperature."""
        result = self.run.evaluator.measure(
            state, self.spec.val_tasks, n=self.args.topology_evaluations, greedy=False
        )
        return self.search.score(self._candidate(state, proposer, step).id, result.scores)

    def _candidate(self, state: TeamState, proposer: str, step: int) -> Candidate:
        values = {
            param.name: state.values.get(param.name, param.value)
            for param in self.system.params()
            if param.kind in ("text", "demos", "number")
        }
        shape = {name: values[name] for name in self.blocks}
        known = self.search.find(values)
        return known or self.search.add(
            Candidate(values, proposer=proposer, note=str(shape), round=step)
        )

    def _remember(self, what: str, stage: str, value: Any) -> None:
        self.memory[what] = {**self.memory.get(what, {}), stage: value}

    def report(self) -> dict[str, Any]:
        """Also `mass`: scores and influence by stage, the topologies that were measured, how they
        were drawn, and what became of the proposals of every search of prompts."""
        return {**super().report(), "mass": self.memory.state_dict()}
