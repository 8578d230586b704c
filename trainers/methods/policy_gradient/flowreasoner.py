"""FlowReasoner: a designer learns to write a workflow for the query at hand, first from its own
rounds, then from what runs of its programs earn.

Gao et al., arXiv:2504.15257, on the system `agents/programs/flowreasoner.py`. The first `sft_steps`
steps are the reasoning warm-up: play rounds, join each successful trajectory into one reply (all
rounds up to the one that is kept, as reasoning, with its program at the end), and imitate it as the
answer to the bare query. All later steps are GRPO: one reward per trajectory, shared by the tokens
of all its rounds. The reward is the weighted sum of `performance` (public checks passed, -1 for a
program that cannot be run), `complexity`, `efficiency` and `diversity`; hidden tests and the task's
answer are evaluation's.

Against the paper, whose training code and reward formulas are not published, so all of these are
ours: the transcripts are the trained model's own, where theirs are DeepSeek-R1's (name another
`init`, or learn from a teacher's store by `episodes`); the trajectories whose kept program reaches
`success_threshold` are imitated; the weights (`REWARD_WEIGHTS`); a trajectory is worth its best
round, or the mean of all (`system.worth`); `diversity` is 1 - the mean similarity of a program to
those of its group: one number per group, as the figure may be read, cancels in group-relative
advantages. The spread of a group is that of a sample (n - 1). The reference of a KL term (`beta`)
is the base, not the warm-up's end.

accelerate launch recipes/flowreasoner.py [--config recipes/flowreasoner.yaml] [--sft_steps 2]
[--field value]
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....agents.programs.flowreasoner import FlowReasoner, best_round
from ....agents.programs.restrictions import parsed, program_of, similarity
from ....agents.programs.workflow import SOURCE
from ....agents.settings import setting
from ....agents.text.templates import render
from ....agents.types import Reward, SettingError, Turn
from ....rollouts.report.sections import ReportSection, stored, table_section
from ....rollouts.rewards.builtin import workflow
from ....rollouts.rewards.scoring import RewardFn
from ....rollouts.types import Episode, groups
from ...config import RunConfig
from ...credit.filtering import SelectionConfig
from ...credit.program_scores import invalid_kinds
from ...credit.weights import CreditConfig
from ...trainer import Trainer
from ...update.losses.policy_gradient import LossConfig, policy_loss
from ..imitation.imitation import ImitationConfig, fit_turns
from ..imitation.sft import selected
from .grpo import check_group_size, policy_gradient

REWARD_WEIGHTS: Mapping[str, float] = {
    "performance": 1.0,
    "complexity": 0.1,
    "efficiency": 0.0,
    "diversity": 0.1,
}  # ours
REASONING = "{reply}\n\n{feedback}\n\n"


@dataclass
class FlowReasonerConfig(RunConfig, CreditConfig, LossConfig, SelectionConfig, ImitationConfig):
    """GRPO's settings, with a warm-up that selects and imitates."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/flowreasoner"
    )
    sft_steps: int = setting("steps of the warm-up; 0 starts with GRPO", 1, at_least=0)
    sft_learning_rate: float = setting(
        "learning rate of the warm-up; 0 takes learning_rate", 0.0, at_least=0
    )
    reasoning: str = setting(
        "template of a round before the last one in a joined trajectory; fields reply and feedback",
        REASONING,
    )
    reward_weights: dict | str | None = setting(
        "weights of performance, complexity, efficiency, diversity and of other rewards",
        factory=lambda: dict(REWARD_WEIGHTS),
    )

    def check(self) -> None:
        check_group_size(self.num_generations, self.credit)
        revision_prompt(self.reasoning, "", "")

    def learning_rate_at(self, step: int, peak: float) -> float:
        if step <= self.sft_steps:
            return self.sft_learning_rate or peak
        return super().learning_rate_at(step, peak)


class FlowReasonerTrainer(Trainer[FlowReasonerConfig]):
    """Trains a `FlowReasoner`. Arguments: see `Trainer`."""

    Config = FlowReasonerConfig
    ratios = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not isinstance(self.spec.system, FlowReasoner):
            raise SettingError(
                "system: FlowReasoner trains a marlora.agents.programs.flowreasoner:FlowReasoner,"
                f" got {type(self.spec.system).__name__}"
            )
        self.system: FlowReasoner = self.spec.system

    def extra_rewards(self) -> Sequence[RewardFn]:
        return (workflow,)  # what the system reports of each trajectory

    def reward_names(self) -> Sequence[str]:
        return ("diversity", *super().reward_names())

    def collect(self, step: int) -> list[Episode]:
        if step == self.args.sft_steps + 1 > 1:
            self.run.rollouts.play(self.spec.eval_tasks, kind="eval", label="sampled-sft")
        return self.run.rollouts.collect(step)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Warm-up or GRPO; returns metrics."""
        played = [episode for episode in episodes if episode.parent is None]
        told = {"designs": self.designs(played)}
        if step > self.args.sft_steps:
            scored = with_diversity(episodes, self.system)
            return {
                **policy_gradient(self, step, scored, partial(policy_loss, config=self.args)),
                **told,
            }
        lessons = [as_single_turn(episode, self.system, self.args.reasoning) for episode in played]
        selection = selected(self, step, lessons, self.args, self.rule)
        done = fit_turns(self.run.learner, step, lessons, selection.weights, self.args)
        return {
            "policies": done.into(self.rows(done.updates, episodes)),
            "selection": selection.table(),
            "dropped": done.untrained,
            **told,
        }

    def rule(self, episode: Episode, turn: Turn) -> tuple[float, str]:
        """Trajectories whose kept program reaches `success_threshold`, weight 1."""
        score = next(
            (r.value for r in episode.rewards if r.name == "val" and r.turn == turn.index), math.nan
        )
        if turn.agent != self.system.designer:
            return 0.0, "no designer"
        if not math.isfinite(score) or score < self.args.success_threshold:
            return 0.0, "no success" if math.isfinite(score) else "no score"
        earlier = sum(r.name == "val" for r in episode.rewards if (r.turn or 0) < turn.index)
        return 1.0, f"solved in round {1 + earlier}"

    def designs(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Means over trajectories: each reward of the mix and their sum, rounds, and the share of
        programs that cannot be run."""
        played = [
            episode for episode in with_diversity(episodes, self.system) if episode.error is None
        ]
        found: dict[str, Any] = {}
        for name in REWARD_WEIGHTS:
            values = [value for e in played if not math.isnan(value := e.reward(name))]
            found[name] = sum(values) / len(values) if values else None
        found["reward"] = sum(
            self.args.weight(name) * (found[name] or 0.0) for name in REWARD_WEIGHTS
        )
        valid = [r for e in played for r in e.rewards if r.name == "valid"]
        rounds = [sum(r.name == "val" for r in e.rewards) for e in played]
        return {
            **found,
            "rounds": sum(rounds) / max(len(rounds), 1),
            "invalid": invalid_kinds(valid),
        }

    def report(self) -> dict[str, Any]:
        """Held-out tasks as the team plays in training, sampled: as the base, after the warm-up, at
        the end."""
        rollouts, tasks, metric = self.run.rollouts, self.spec.eval_tasks, self.spec.metric
        before = rollouts.play(tasks, self.run.origin, kind="eval", label="sampled-base")
        after = rollouts.play(tasks, kind="eval", label="sampled")
        between = rollouts.stored("sampled-sft")
        found: dict[str, Any] = {}
        for name, played in (("base", before), ("sft", between), ("rl", after)):
            if played:
                values = [e.reward(metric) for e in played]
                found[name] = {
                    **self.designs(played),
                    metric: sum(v for v in values if v == v) / len(values),
                }
                self.run.log.say(f"sampled, {name}: {found[name]}")
        return {"stages": found, **stored(stages_section(found)), **self.contributions()}


def stages_section(stages: Mapping[str, Mapping[str, Any]]) -> ReportSection:
    """What sampled trajectories of held-out tasks are worth as the base, after the warm-up and at
    the end, as a table."""
    first: Mapping[str, Any] = next(iter(stages.values()), {})
    names = [name for name in first if name != "invalid"]
    rows = [
        [
            stage,
            *("-" if numbers[name] is None else f"{numbers[name]:.3f}" for name in names),
            f"{sum(numbers['invalid'].values()):.3f}",
        ]
        for stage, numbers in stages.items()
    ]
    columns = ("stage", *names, "cannot be run")
    return table_section("sampled trajectories, held out", columns, rows)


# trajectories


def rounds_of(episode: Episode, system: FlowReasoner) -> list[tuple[Turn, Reward]]:
    """The designer's turns with what was told of each (`val`), up to the one whose program is
    kept."""
    told = {
        (r.turn, r.sibling): r for r in episode.rewards if r.name == "val" and r.source == SOURCE
    }
    found = [
        (t, told[t.index, t.sibling])
        for t in episode.trajectory(system.designer)
        if (t.index, t.sibling) in told
    ]
    return found[: best_round([reward.value for _, reward in found]) + 1] if found else []


def revision_prompt(template: str, reply: str, feedback: str) -> str:
    fields = {"reply": reply, "feedback": feedback}
    return render(template, fields, setting="reasoning")


def as_single_turn(episode: Episode, system: FlowReasoner, reasoning: str = REASONING) -> Episode:
    """A trajectory as a lesson: one turn that answers the bare query with the reasoning of all
    rounds and the kept program last.

    It is `written` (it was not sampled as a whole), unless the first round's program is kept: then
    it is that round's own turn, if that has tokens (an outside teacher's has none).
    """
    rounds = rounds_of(episode, system)
    if not rounds:
        return dataclasses.replace(episode, turns=())
    (first, _), (last, _) = rounds[0], rounds[-1]
    if len(rounds) > 1 or not last.token_ids:
        text = (
            "".join(
                revision_prompt(reasoning, turn.text.strip(), reward.text)
                for turn, reward in rounds[:-1]
            )
            + last.text
        )
        unsaid: dict[str, Any] = {"token_ids": (), "logprobs": (), "source": "written", "reads": ()}
        last = dataclasses.replace(
            last, messages=first.messages, prompt_ids=first.prompt_ids, text=text, **unsaid
        )
    return dataclasses.replace(episode, turns=(last,))


def with_diversity(episodes: Sequence[Episode], system: FlowReasoner) -> list[Episode]:
    """Each episode with its reward `diversity`: 1 - mean similarity of its program to the programs
    of the others of its group.

    Programs are compared without comments and layout. 0 for one that cannot be run, and where no
    other can.
    """
    found: dict[str, Reward] = {}
    for group in groups(e for e in episodes if e.parent is None and e.error is None).values():
        programs = {e.id: program for e in group if (program := _program(e, system)) is not None}
        for episode in group:
            own = programs.get(episode.id)
            others = (
                [similarity(own, each) for i, each in programs.items() if i != episode.id]
                if own is not None
                else []
            )
            value = 1 - sum(others) / len(others) if others else 0.0
            found[episode.id] = Reward("diversity", value, source=SOURCE)
    return [
        dataclasses.replace(e, rewards=(*e.rewards, found[e.id])) if e.id in found else e
        for e in episodes
    ]


def _program(episode: Episode, system: FlowReasoner) -> str | None:
    """The program that a trajectory keeps, in one spelling; None if it cannot be run."""
    rounds = rounds_of(episode, system)
    if not rounds or rounds[-1][1].value < 0:
        return None
    return ast.unparse(parsed(program_of(rounds[-1][0].text, system.tag) or ""))
