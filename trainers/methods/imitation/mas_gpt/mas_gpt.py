"""MAS-GPT: a designer learns to write a whole multi-agent system for a query, from the systems of a
pool that answered similar queries (Ye et al., arXiv:2503.03686).

A step takes `tasks_per_step` queries. Every system of the pool answers each of them (0/1 scores;
what was played is not played again); queries fall into clusters, and all queries of a cluster are
assigned the system that answers most of them, of equals the first of the pool. A helper
(`helpers: {refiner: ...}`), if there is one, fits the system to the query and gives reasons; the
rewritten system is learnt unless it scores worse than its base. Then the designer imitates
reasoning and program (`imitation.py`); its prompt is not trained on. With `num_val_tasks` the loss
on triples of other queries is measured before and after.

Queries whose system fails them are learnt from too (`keep_wrong`), as the paper's rule has it:
similar queries then have one target. `assign: random` is its ablation: for each query a right
system, drawn by itself.

Against the paper, whose training code and data are not published: LoRA instead of full
fine-tuning; programs of operators in the sandbox (`agents/programs/mas_gpt.py`); clusters by
`cluster_by`; one reply of the helper holds program and reasoning, and the reasoning of a refused
rewriting is kept; a rewriting may change texts alone. Without a helper the reasoning is a template.

accelerate launch recipes/mas_gpt.py [--config recipes/mas_gpt.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .....agents.programs.mas_gpt import MASGPT, executing_team
from .....agents.programs.program import PROGRAM, Program
from .....agents.programs.restrictions import program_of
from .....agents.settings import Settings, parsed_mapping, setting
from .....agents.text.templates import render
from .....agents.types import SettingError, Task, to_json
from .....rollouts.evaluation.accuracy import evaluation
from .....rollouts.report.sections import stored
from .....rollouts.rewards.builtin import workflow
from .....rollouts.rewards.scoring import RewardFn
from .....rollouts.types import Episode
from ....batching.samples import samples
from ....config import RunConfig
from ....loop.checks import check_sole_learner
from ....loop.step_result import StepResult
from ....trainer import Trainer
from ....values.memory import Memory
from ....values.parts import Part
from ..imitation import ImitationConfig, encoded, fit_turns
from ..sft import opening_messages
from .clusters import SOURCE, TEXT, clusters_of, group_of
from .outcomes import comparison, designs, pool_row
from .pool import POOL
from .refinement import PROGRAMS, REFINE, ProgramByQuery, Refinement, refinement_of, refinement_task
from .score_table import ScoreTable
from .triples import REPLY, Triple, lesson, reply_of, weights, with_proposal

REFINER = "refiner"  # the helper


@dataclass
class TripleConfig(Settings):
    """How queries, systems and reasons become what a designer learns."""

    pool: dict | str | None = setting(
        "systems by name: their programs; empty: the shipped ones", factory=dict
    )
    success_threshold: float = setting(
        "value of the first reward from which a system has answered a query", 1.0
    )
    cluster_by: list[str] = setting(
        "what puts queries into one cluster: source, text (k-means on hashed n-grams), or names of"
        " fields of a task's meta; all that are named have to agree",
        factory=lambda: [SOURCE, TEXT],
    )
    num_clusters: int = setting(
        "clusters by text, within each group that the rest of cluster_by gives", 8, at_least=1
    )
    assign: str = setting(
        "the system of a query: the best of its cluster (cluster), or one that answers it, drawn"
        " for each query by itself (random)",
        "cluster",
        choices=("cluster", "random"),
    )
    keep_wrong: bool = setting("learn also from queries that their system fails", True)
    reasoning: str = setting(
        "reasoning where no helper writes it: a template; fields cluster and system", ""
    )
    reply: str = setting("what the designer learns to write; fields reasoning and program", REPLY)
    refinement: str = setting("the helper's prompt; fields operators, system and query", REFINE)

    def prepare(self) -> None:
        self.pool = parsed_mapping("pool", self.pool) or dict(POOL)

    def check(self) -> None:
        if not self.cluster_by:
            raise SettingError(f"cluster_by: expected {SOURCE}, {TEXT} or fields of meta, got none")
        reply_of(self.reply, "", "")
        self.reason("", "")

    def reason(self, cluster: str, system: str) -> str:
        """The reasoning that no helper wrote."""
        fields = {"cluster": cluster, "system": system}
        return render(self.reasoning, fields, setting="reasoning")


@dataclass
class MASGPTConfig(RunConfig, TripleConfig, ImitationConfig):
    """`RunConfig` with how triples come about (`TripleConfig`) and epochs of imitation
    (`ImitationConfig`)."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/mas_gpt"
    )
    max_steps: int = setting("steps, each with queries of its own", 1, at_least=0)
    num_train_epochs: int = setting("passes over the triples of a step", 3, at_least=1)
    train_batch_size: int = setting("triples per optimizer update", 32, at_least=1)

    def check(self) -> None:
        if self.episodes:
            raise SettingError("episodes: this method plays its systems itself; leave it out")
        if self.max_staleness:
            raise SettingError("max_staleness: no step is played ahead here; leave it 0")


class MASGPTTrainer(Trainer[MASGPTConfig]):
    """Trains the designer of a `MASGPT`. Arguments: see `Trainer`.

    trainer = MASGPTTrainer(model="Qwen/Qwen2.5-Coder-0.5B-Instruct", tasks="gsm8k",
                            system=MASGPT(["designer", AgentSpec("executor", policy="base")]),
                            args=MASGPTConfig(tasks_per_step=500))
    trainer.train()
    """

    Config = MASGPTConfig

    def extra_rewards(self) -> Sequence[RewardFn]:
        return (workflow,)  # what became of the designer's programs

    def parts(self) -> Sequence[Part]:
        if not isinstance(self.spec.system, MASGPT):
            raise SettingError(
                f"system.class: {type(self.spec.system).__name__} does not write one program for"
                " each query; use marlora.agents.programs.mas_gpt:MASGPT"
            )
        self.system: MASGPT = self.spec.system
        designer = next(a for a in self.system.specs if a.name == self.system.designer)
        check_sole_learner(self.spec.policies, designer.policy, "MAS-GPT")
        self.pool: Mapping[str, str] = self.args.pool  # type: ignore[assignment]
        self.teams = {name: self._team(name, program) for name, program in self.pool.items()}
        for task in (*self.spec.tasks, *self.spec.val_tasks):
            group_of(task, self.args.cluster_by)  # a field that is missing is named at once
        self.refiner = self.spec.helper(REFINER) if self.spec.helpers else None
        self.memory = Memory("mas_gpt")  # the score table and the triples
        return [self.memory]

    def _team(self, name: str, program: Any) -> Program:
        """The executors with a program of the pool, which the designer can learn to write."""
        if not isinstance(program, str):
            raise SettingError(f"pool.{name}: expected the text of a program, got {program!r:.60}")
        try:
            team = executing_team(self.system, program)
        except SettingError as error:
            raise SettingError(f"pool.{name}: {error}; change it, or leave it out") from error
        text = reply_of(self.args.reply, "reasoning", program)
        if program_of(text, self.system.tag) != program.strip("\n"):
            raise SettingError(
                f"reply: between {self.system.tag!r} of system.tag the reply does not hold the"
                f" program of pool.{name}; put {{program}} where the designer's program is read"
            )
        return team

    def step(self, step: int) -> StepResult:
        """Score, assign, refine, imitate."""
        run, args = self.run, self.args
        tasks = {task.id: task for task in (*run.rollouts.tasks_of(step), *self.spec.val_tasks)}
        table, pool = self.scored(step, list(tasks.values()))
        triples = self.triples(table, tasks)
        opening = opening_messages(self.system, run.values)[self.system.designer]
        lessons = {
            split: [
                lesson(each, tasks[each.query], step, self.system, opening, args.reply)
                for each in triples
                if each.split == split
            ]
            for split in ("train", "val")
        }
        before = self.loss(lessons["val"])
        done = fit_turns(run.learner, step, lessons["train"], weights(lessons["train"]), args)
        after = self.loss(lessons["val"])
        row = {**pool, **self.described(table, triples), "val_nll": [before, after]}
        metrics = {
            "policies": done.into(self.rows(done.updates, lessons["train"])),
            "dropped": done.untrained,
            "mas_gpt": row,
        }
        # what is published is verified on what the designer said before the run
        return StepResult(metrics, run.rollouts.stored("before"))

    # the score table

    def scored(self, step: int, tasks: Sequence[Task]) -> tuple[ScoreTable, dict[str, Any]]:
        """The table of all systems on these tasks, and metrics of the pool. A run without an answer
        scores 0."""
        args, metric = self.args, self.spec.metric
        columns, rows = [], {}
        for name, program in self.pool.items():
            played = self.played(tasks, {PROGRAM: program}, self.teams[name])
            result = evaluation(tasks, played, metric)
            columns.append(result.scores)
            rows[name] = pool_row(result, played)
        own = {t.id: tuple(int(c[t.id] >= args.success_threshold) for c in columns) for t in tasks}
        clusters = clusters_of(tasks, args.cluster_by, args.num_clusters, args.seed)
        table = ScoreTable(tuple(self.pool), own, clusters)
        train = self.training(table)
        best = table.systems[table.best(train)]
        self.memory["systems"] = list(table.systems)
        scores = {query: list(row) for query, row in own.items()}
        self.memory["scores"] = {**self.memory.get("scores", {}), **scores}
        self.memory["clusters"] = {**self.memory.get("clusters", {}), **clusters}
        self.memory["best"] = best
        shares = [count / len(train) for count in table.sums(train)]
        answered = sum(any(own[query]) for query in train) / len(train)
        self.run.log.say(
            f"step {step}: {len(train)} queries, {len(shares)} systems; the best single one,"
            f" {best!r}, answers {max(shares):.3f}, any of them {answered:.3f}"
        )
        return table, {"pool": rows, "best_single": max(shares), "any_system": answered}

    def played(
        self, tasks: Sequence[Task], values: Mapping[str, Any], team: Program
    ) -> list[Episode]:
        """These tasks, played by the executors as they play for the designer."""
        return self.run.rollouts.play(tasks, self.run.state.with_values(values), system=team)

    def training(self, table: ScoreTable) -> list[str]:
        """The queries of a table that are learnt from."""
        val = {task.id for task in self.spec.val_tasks}
        return [query for query in table.rows if query not in val]

    # triples

    def triples(self, table: ScoreTable, tasks: Mapping[str, Task]) -> list[Triple]:
        """The triples of these tasks. Remembered, with counts of what was left out."""
        args = self.args
        chosen = (
            table.assigned(self.training(table))
            if args.assign == "cluster"
            else table.drawn(args.seed)
        )
        left_out = {"no system answers it": len(tasks) - len(chosen)}
        val = {task.id for task in self.spec.val_tasks}
        plain = []
        for query, k in chosen.items():
            name, cluster = table.systems[k], table.clusters[query]
            plain.append(
                Triple(
                    query,
                    tasks[query].source,
                    "val" if query in val else "train",
                    cluster,
                    name,
                    args.reason(cluster, name),
                    self.pool[name].strip("\n"),
                    table.rows[query][k],
                )
            )
        triples = self.refined(plain, tasks) if self.refiner else plain
        left_out["no reasoning"] = len(plain) - len(triples)
        kept = [each for each in triples if each.score or args.keep_wrong]
        left_out["its system fails it"] = len(triples) - len(kept)
        self.memory["triples"] = [*self.memory.get("triples", []), *map(to_json, kept)]
        self.memory["left_out"] = {why: count for why, count in left_out.items() if count}
        return kept

    def refined(self, triples: Sequence[Triple], tasks: Mapping[str, Task]) -> list[Triple]:
        """The triples with the helper's reasoning and, where it is not worse, its program."""
        assert self.refiner is not None
        run, args = self.run, self.args
        questions = [
            (
                Refinement([self.refiner], target=self.teams[each.system]),
                refinement_task(tasks[each.query], self.teams[each.system], args.refinement),
                "",
            )
            for each in triples
        ]
        proposals = {
            each.query: refinement_of(episode, self.teams[each.system].program)
            for each, episode in zip(triples, run.rollouts.ask_all(questions), strict=True)
        }
        new = {
            each.query: proposals[each.query].program
            for each in triples
            if not proposals[each.query].fault and proposals[each.query].program != each.program
        }
        scores = self.rescored([tasks[query] for query in new], new)
        return [
            with_proposal(each, proposals[each.query], scores.get(each.query))
            for each in triples
            if proposals[each.query].note
        ]

    def rescored(self, tasks: Sequence[Task], programs: Mapping[str, str]) -> dict[str, int]:
        """Scores of a program for each task, 0 or 1."""
        if not tasks:
            return {}
        team = executing_team(self.system, next(iter(self.pool.values())), ProgramByQuery)
        played = self.played(tasks, {PROGRAMS: dict(programs)}, team)
        scores = evaluation(tasks, played, self.spec.metric).scores
        return {query: int(score >= self.args.success_threshold) for query, score in scores.items()}

    # what it comes to

    def loss(self, lessons: Sequence[Episode]) -> float | None:
        """The mean negative log-probability per token of what these lessons would have the
        designer write, in nats; None without lessons."""
        if not lessons:
            return None
        learner = self.run.learner
        sequences, _ = samples(
            [encoded(learner, each) for each in lessons],
            weights(lessons),
            learner.policy_of,
            ratios=False,
        )
        return learner.mean_nll(sequences)[learner.policy_of[self.system.designer]]

    def described(self, table: ScoreTable, triples: Sequence[Triple]) -> dict[str, Any]:
        """Metrics of a step's triples."""
        train = [each for each in triples if each.split == "train"]
        return {
            "queries": len(self.training(table)),
            "clusters": {
                cluster: table.systems[k]
                for cluster, k in table.by_cluster(self.training(table)).items()
            },
            "triples": len(train),
            "systems": len({each.program for each in train}),
            "score": sum(each.score for each in train) / max(len(train), 1),
            "base_score": sum(each.base for each in train) / max(len(train), 1),
            "rewritten": sum(each.refined is not None for each in train),
            "accepted": sum(each.accepted for each in train),
            "refused": sum(bool(each.fault) for each in train),
            "left_out": self.memory["left_out"],
        }

    def report(self) -> dict[str, Any]:
        """Held-out tasks as the team plays, sampled: the designer before and after, and the best
        single system of the pool."""
        if "best" not in self.memory:
            return self.contributions()  # no step was finished
        run, tasks, best = self.run, self.spec.eval_tasks, self.memory["best"]
        single = run.state.with_values({PROGRAM: self.pool[best]})
        played = {
            "designer before": run.rollouts.play(
                tasks, run.origin, kind="eval", label="played-base"
            ),
            f"best single system: {best}": run.rollouts.play(
                tasks, single, kind="eval", system=self.teams[best], label="played-single"
            ),
            "designer after": run.rollouts.play(tasks, kind="eval", label="played"),
        }
        results = {name: evaluation(tasks, own, self.spec.metric) for name, own in played.items()}
        rows = {
            name: designs(own, self.system.designer)
            for name, own in played.items()
            if name.startswith("designer")
        }
        summary, sections = comparison(results, rows)
        for line in summary["lines"]:
            run.log.say(line)
        return {"mas_gpt": summary["numbers"], **stored(*sections), **self.contributions()}
