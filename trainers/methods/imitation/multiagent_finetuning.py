"""Multiagent Finetuning: a debate teaches itself, and its members stay different (Subramaniam et
al., arXiv 2501.05707).

Every seat of a `Debate` has a generator, which answers first, and a critic, which goes on in its
chat: two adapters per seat. The majority of the last round is the label; no gold answer is read. An
iteration is a step: play; every generator imitates its first answers that give the label; every
critic imitates the transcripts of its seat that end in the label, those that came to it (C-: the
first answer was another) and those that stayed with it (C+: it was the same) mixed in shares w and
1 - w; publish; the next iteration goes on from there.

Against the paper: LoRA adapters on one base, not copies of the model; C- and C+ are mixed by
weights, so that no transcript is thrown away and w is kept exactly (the authors' code keeps every
C- and adds a C+ with probability 1/2 after each: w = 2/3 on average); where one of the two is
empty, the other counts alone; a critic learns its last answer only (`critic_loss`), where the
authors' code puts the loss on every answer of the transcript, the wrong first ones too; ties of the
majority are broken by the episode's seed (their code: by the order of strings); held-out tasks are
never trained on (their scripts train and test on the same problems). The control with one adapter
for all is the same trainer: let the agents share a policy
(recipes/multiagent_finetuning_pooled.yaml).

accelerate launch recipes/multiagent_finetuning.py [--config recipes/multiagent_finetuning.yaml]
[--max_iterations 3] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.lookup import load_function
from ....agents.patterns.debate import Debate
from ....agents.settings import setting
from ....agents.text.answers import same, vote
from ....agents.types import SettingError, Turn
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.evaluation.statistics import paired
from ....rollouts.report.sections import accuracy_section, stored
from ....rollouts.types import Episode, TurnKey
from ...batching.samples import samples
from ...config import RunConfig
from ...credit.filtering import Rule, SelectionConfig
from ...trainer import Trainer
from .diversity import consensus, divergence, diversity_section, embedding_distance, nll_table
from .imitation import ImitationConfig, IterationConfig, fit_turns
from .sft import selected

Seats = Sequence[tuple[str, str]]  # (generator, critic) by seat


@dataclass
class MultiagentFinetuningConfig(IterationConfig, RunConfig, ImitationConfig):
    """`RunConfig` with iterations, the mixture of a critic's transcripts, and epochs of
    imitation."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/multiagent_finetuning"
    )
    correction_share: float = setting(
        "w: share of transcripts that came to the majority's answer, against those that stayed"
        " with it",
        0.5,
        at_least=0,
        at_most=1,
    )
    critic_loss: str = setting(
        "answers of a transcript that a critic imitates: last, or all (the generator's too)",
        "last",
        choices=("last", "all"),
    )
    num_eval_samples: int = setting(
        "sampled debates per held-out task, before and after, for accuracy and diversity",
        1,
        at_least=1,
    )
    embedder: str = setting(
        "module:function from texts to vectors, for the embedding distance; empty: not measured", ""
    )


class MultiagentFinetuningTrainer(Trainer[MultiagentFinetuningConfig]):
    """Trains a `Debate`. Arguments: see `Trainer`."""

    Config = MultiagentFinetuningConfig

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not isinstance(self.spec.system, Debate):
            raise SettingError(
                "system: Multiagent Finetuning trains a marlora.agents.patterns.debate:Debate, got"
                f" {type(self.spec.system).__name__}"
            )
        self.seats = self.spec.system.seats
        self.embed = (
            load_function("embedder", self.args.embedder, {}) if self.args.embedder else None
        )

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Measure, select, imitate; returns metrics. Diversity is that of the policies that played
        the step."""
        diversity = self.diversity(episodes)
        lessons = [view for episode in episodes for view in transcripts(episode, self.seats)]
        rule = debate_rule(lessons, self.seats, self.args)
        selection = selected(self, step, lessons, SelectionConfig(), rule)
        if self.args.start_from == "base":
            learner = self.run.learner
            learner.reset({learner.policy_of[kept.agent] for kept in selection.kept})
        done = fit_turns(self.run.learner, step, lessons, selection.weights, self.args)
        return {
            "policies": done.into(self.rows(done.updates, episodes)),
            "selection": selection.table(),
            "diversity": diversity,
        }

    def diversity(self, episodes: Sequence[Episode], judge: str | None = None) -> dict[str, Any]:
        """Consensus of the last round, and how far generators (on first answers) and critics (on
        last ones) are apart.

        `judge`: a policy that spoke for everybody, such as `base` before anything was learnt.
        """
        generators, critics = ([seat[n] for seat in self.seats] for n in (0, 1))
        found: dict[str, Any] = {"consensus": consensus(episodes, critics)}
        policy_of = self.run.learner.policy_of
        for name, agents, place in (("generators", generators, 0), ("critics", critics, -1)):
            if not all(agent in policy_of for agent in agents):
                continue  # frozen: nothing of theirs changes
            turns = [
                (e, said[place])
                for e in episodes
                if not e.error
                for a in agents
                if (said := e.trajectory(a))
            ]
            own, _ = samples(
                episodes,
                {(e.id, t.index, t.sibling): 1.0 for e, t in turns},
                policy_of,
                ratios=False,
            )
            policies = [judge or policy_of[agent] for agent in agents]
            table = nll_table(self.run.learner, own, list(dict.fromkeys(policies)))
            if judge is not None:
                table = {(judge, judge): sum(table.values()) / len(table)}
            found[name] = dataclasses.asdict(divergence(table, policies))
        if self.embed is not None:
            found["embedding_distance"] = embedding_distance(episodes, critics, self.embed)
        return found

    def report(self) -> dict[str, Any]:
        """Held-out tasks as the team plays in training, sampled: accuracy and diversity, the bare
        base beside it."""
        rollouts, metric = self.run.rollouts, self.spec.metric
        tasks, count = self.spec.eval_tasks, self.args.num_eval_samples
        before = rollouts.play(tasks, self.run.origin, n=count, kind="eval", label="sampled-base")
        after = rollouts.play(tasks, n=count, kind="eval", label="sampled")
        scored = {
            name: evaluation(tasks, played, metric)
            for name, played in (("before", before), ("after", after))
        }
        found: dict[str, Any] = {name: result.summary() for name, result in scored.items()}
        self.run.log.say(
            f"sampled, {len(tasks)} held-out tasks x {count}: {metric}"
            f" {scored['before'].accuracy:.3f} as the base, {scored['after'].accuracy:.3f} now"
        )
        found["paired"] = paired(scored["before"], scored["after"])
        found["diversity"] = {
            "before": self.diversity(before, "base"),
            "after": self.diversity(after),
        }
        accuracy = accuracy_section(
            "accuracy of the majority as the team plays in training",
            {
                "base team": found["before"],
                "trained team": {**found["after"], "paired": found["paired"]},
            },
            "sampled, held out",
        )
        sections = stored(accuracy, diversity_section(found["diversity"]))
        return {"sampled": found, **sections, **self.contributions()}


def transcripts(episode: Episode, seats: Seats) -> list[Episode]:
    """A debate in two views, as the two sets are taken from it: the generators' first answers, and
    the critics' transcripts, in which a generator's answer stands as the critic's own first one.
    The second has an id of its own. Neither holds the gold answer.
    """
    first = {name: said[0].index for name, _ in seats if (said := episode.trajectory(name))}
    critic_of = dict(seats)
    opening = [turn for turn in episode.turns if first.get(turn.agent) == turn.index]
    whole = [
        dataclasses.replace(turn, agent=critic_of.get(turn.agent, turn.agent))
        for turn in episode.turns
        if turn.agent in critic_of or turn.agent in critic_of.values()
    ]
    untold = dataclasses.replace(episode, task=episode.task.public())
    return [
        dataclasses.replace(untold, turns=tuple(opening)),
        dataclasses.replace(untold, id=f"{episode.id}#transcripts", turns=tuple(whole)),
    ]


def debate_rule(
    lessons: Sequence[Episode], seats: Seats, config: MultiagentFinetuningConfig
) -> Rule:
    """The sets D^G, C- and C+ of all seats as a rule of `selection`: weights and reasons of the
    turns of `transcripts`."""
    kind: dict[TurnKey, str] = {}
    for lesson in lessons:
        whole = lesson.id.endswith("#transcripts")
        for generator, critic in seats:
            said = lesson.trajectory(critic if whole else generator)
            for n, turn in enumerate(said):
                kind[lesson.id, turn.index, turn.sibling] = _kind(
                    lesson, said, n, whole, config.critic_loss
                )
    counts = Counter(
        (turn.agent, kind.get((e.id, turn.index, turn.sibling)))
        for e in lessons
        for turn in e.turns
    )

    def rule(episode: Episode, turn: Turn) -> tuple[float, str]:
        what = kind.get((episode.id, turn.index, turn.sibling), "not taken")
        if what == AGREES:
            return 1.0, what
        if what in (CORRECTED, STAYED):
            minus, plus = mixture(
                counts[turn.agent, CORRECTED], counts[turn.agent, STAYED], config.correction_share
            )
            return (minus if what == CORRECTED else plus), what
        return 0.0, what

    return rule


AGREES, CORRECTED, STAYED = (
    "first answer agrees (G)",
    "came to the majority (C-)",
    "stayed with the majority (C+)",
)


def _kind(lesson: Episode, said: Sequence[Turn], n: int, whole: bool, critic_loss: str) -> str:
    """What turn n of a seat's turns is for the sets."""
    if not (lesson.output or "").strip():
        return "no majority"
    first, last = (same(vote(said[place]), lesson.output) for place in (0, -1))
    if not whole:
        return AGREES if first else "first answer differs"
    if len(said) < 2 or not last:
        return "ends otherwise"
    if critic_loss == "last" and n < len(said) - 1:
        return "not the last answer"
    return STAYED if first else CORRECTED


def mixture(minus: int, plus: int, share: float) -> tuple[float, float]:
    """Weight of one of `minus` samples and of one of `plus`, so that the first have `share` of the
    whole and the mean weight is 1.

    Where there are none of one kind, the others count 1.
    """
    if not minus or not plus:
        return 1.0, 1.0
    return share * (minus + plus) / minus, (1 - share) * (minus + plus) / plus
