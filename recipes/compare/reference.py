"""The rows that every comparison has: the team as it is, a single agent, self-consistency of both,
the best hand-written prompts, the noise floor; and the headroom test.

They are played in this process, in a run folder of their own. Episodes are identified by all that
they depend on, so a comparison that goes on, or asks for more samples, plays only what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from marlora.agents.patterns.chain import Chain
from marlora.agents.settings import mapping
from marlora.agents.state import TeamState, check_values
from marlora.agents.system import System
from marlora.agents.types import AgentSpec, SettingError, Task, from_json, to_json
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.trainer import Trainer

from .measured import Measurement, by_sample, by_vote, of_episodes, task_key
from .plan import ComparisonPlan, TeamConfig
from .statistics import detectable, mean, repeats, spread_of_repeats

TEAM, SINGLE = "team as it is", "single agent"
VOTES = {TEAM: "team, self-consistency", SINGLE: "single agent, self-consistency"}
PROMPTS = "best hand-written prompts"
OUTSIDE = "headroom_model"  # the policy that speaks in every seat
COMPARED_WITH = 3  # reference rows that every arm is compared with
LEAST_VOTE = 3  # answers that can have a majority: of two, one is as good as the other


class ReferenceTrainer(Trainer[TeamConfig]):
    """Plays the team of a plan and trains nothing."""

    Config = TeamConfig


class Reference:
    """Measures a plan's team on its held-out tasks; a context manager, which starts and stops the
    engine.

    Args:
        plan: what is compared.
        folder: of the episodes.
        policies: more policies than the team's.

    `tasks`: the held-out tasks of all seeds. `val_tasks`: the validation tasks of the first seed,
    or, where there are none, as many training tasks as are held out.
    """

    def __init__(
        self, plan: ComparisonPlan, folder: Path, policies: dict[str, Any] | None = None
    ) -> None:
        self.plan = plan
        config = dataclasses.replace(
            plan.config,
            output_dir=str(folder),
            seed=plan.seeds[0],
            resume=folder.is_dir(),
            max_steps=0,
            policies={**plan.config.policies, **(policies or {})},  # type: ignore[dict-item]
        )
        trainer = ReferenceTrainer(args=config, recipe="compare")
        self.run, self.spec = trainer.run, trainer.spec
        self.metric = self.spec.metric
        self.val_tasks = list(self.spec.val_tasks) or list(self.spec.tasks[: config.num_eval_tasks])
        self.tasks = held_out(config, plan.all_seeds)
        self.single_agent = single_agent(plan, self.spec.system)
        for number, values in enumerate(plan.prompts):
            try:
                check_values(self.spec.system.params(), values)
            except SettingError as error:
                raise SettingError(f"prompts[{number}]: {error}") from error

    def __enter__(self) -> Reference:
        self.run.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()

    def play(
        self,
        what: str,
        tasks: Sequence[Task],
        *,
        n: int = 1,
        greedy: bool = True,
        system: System | None = None,
        state: TeamState | None = None,
    ) -> list[Episode]:
        """Episodes of these tasks; `what` names them in the progress bar. Raises `SettingError` if
        none could be scored."""
        chosen = self.state if state is None else state
        episodes = self.run.rollouts.play(
            tasks, chosen, n=n, greedy=greedy, kind="eval", system=system, label=what
        )
        parents = [episode for episode in episodes if episode.parent is None]
        if all(episode.error for episode in parents):
            raise SettingError(f"{what}: every episode failed; the first: {parents[0].error}")
        return episodes

    @property
    def state(self) -> TeamState:
        """What the plan's team plays with."""
        return self.run.state

    # rows

    def team(self) -> Measurement:
        return self._measured(self.play(TEAM, self.tasks))

    def single(self) -> Measurement:
        """One agent on the whole task, without the team's values."""
        return self._measured(
            self.play(SINGLE, self.tasks, system=self.single_agent, state=self.no_values)
        )

    def votes(self, tokens: float) -> dict[str, tuple[int, Measurement]]:
        """Self-consistency of the team and of the single agent at no more than so many tokens per
        task: by row, the number of samples that these pay for, and the measurement. Where they pay
        for no vote (`LEAST_VOTE`), it is the one answer of temperature 0."""
        rows = {}
        for name, system, state, once in (
            (SINGLE, self.single_agent, self.no_values, self.single),
            (TEAM, None, self.state, self.team),
        ):
            what = VOTES[name]
            one = self.play(what, self.tasks, greedy=False, system=system, state=state)
            samples = samples_within(tokens, self._measured(one).tokens)
            if samples < LEAST_VOTE:
                rows[what] = samples, once()
                continue
            episodes = self.play(
                what, self.tasks, n=samples, greedy=False, system=system, state=state
            )
            rows[what] = samples, by_vote(episodes, self.metric, samples, self.plan.seeds[0])
        return rows

    def hand_prompts(self) -> tuple[int, float, Measurement] | None:
        """Of the hand-written prompts the best on the validation tasks: its number from 0, the
        tokens that choosing it took, and what it is worth on the held-out tasks."""
        if not self.plan.prompts:
            return None
        states = [
            (f"prompts {number}", self.state.with_values(values))
            for number, values in enumerate(self.plan.prompts)
        ]
        tried = [
            self._measured(self.play(f"{what}, validation", self.val_tasks, state=state))
            for what, state in states
        ]
        means = [mean(each.scores) for each in tried]
        best = means.index(max(means))
        spent = sum(each.tokens for each in tried) * len(self.val_tasks)
        what, state = states[best]
        return best, spent, self._measured(self.play(what, self.tasks, state=state))

    def noise(self) -> dict[str, Any]:
        """The noise floor: the team as it is measured again with other random numbers, at
        temperature 0 as arms are, and sampled."""
        count = self.plan.noise_repeats
        floors = {}
        for name, greedy in (("greedy", True), ("sampled", False)):
            episodes = self.play(f"noise floor, {name}", self.tasks, n=count, greedy=greedy)
            floors[name] = repeats(by_sample(episodes, self.metric, count))
        return floors

    @property
    def no_values(self) -> TeamState:
        return dataclasses.replace(self.state, values={})

    def _measured(self, episodes: Sequence[Episode]) -> Measurement:
        return of_episodes(episodes, self.metric, self.plan.seeds[0])


def single_agent(plan: ComparisonPlan, team: System) -> System:
    """The plan's single agent; policy and sampling are those of the team's last agent unless the
    plan names others."""
    last = team.specs[-1]
    own = {"policy": last.policy, "sampling": to_json(last.sampling), **plan.single_agent}
    return Chain((from_json(AgentSpec, {"name": "agent", **own}, "single_agent"),))


def held_out(config: TeamConfig, seeds: Iterable[int]) -> list[Task]:
    """The held-out tasks of the runs of all seeds, each once: a seed orders a task set, or draws
    it, so the first `num_eval_tasks` may be others."""
    tasks: dict[str, Task] = {}
    for seed in seeds:
        own = load_tasks(config.tasks, "eval", seed=seed, **mapping("task_args", config.task_args))
        for task in own[: config.num_eval_tasks]:
            tasks.setdefault(task_key(task.id, task.prompt), task)
    return list(tasks.values())


def samples_within(tokens: float, each: float) -> int:
    """How many samples of `each` tokens are paid for by `tokens`; one at least."""
    return max(1, int(tokens / each + 1e-9)) if each else 1


# the headroom test


def headroom(plan: ComparisonPlan) -> dict[str, Any]:
    """What there is to gain, before anything is learnt: the best of n samples by the reward itself,
    another model in every seat, and the smallest difference that the held-out tasks can show
    (`shown_by`).

    Played on the validation tasks (or training ones), so that nothing is known of the held-out
    ones.
    """
    settings = plan.headroom
    count = settings.samples
    extra = {OUTSIDE: mapping("headroom.model", settings.model)} if settings.model else {}
    with Reference(plan, plan.folder / "headroom", extra) as reference:
        tasks, metric = reference.val_tasks, reference.metric
        greedy = of_episodes(reference.play("headroom, greedy", tasks), metric)
        sampled = reference.play("headroom, sampled", tasks, n=count, greedy=False)
        plays = by_sample(sampled, metric, count)
        best = {task: max(play[task] for play in plays) for task in plays[0]}
        result: dict[str, Any] = {
            "tasks": len(tasks),
            "held_out_tasks": len(reference.tasks),
            "team": mean(greedy.scores),
            "sampled": mean({n: play for n, play in enumerate(plays)}),
            "best_of": {"samples": count, "score": mean({0: best})},
        }
        if extra:
            seats = {f"{agent.name}.policy": OUTSIDE for agent in reference.spec.system.specs}
            other = reference.play(
                "headroom, other model", tasks, state=reference.state.with_values(seats)
            )
            result["other_model"] = mean(of_episodes(other, metric).scores)
    return {**result, "spread": spread_of_repeats(plays)}


def shown_by(result: dict[str, Any], comparisons: int) -> dict[str, Any]:
    """The result of the headroom test with the smallest difference that can be shown among so many
    comparisons, and a sentence that says both."""
    least = detectable(result["spread"], result["held_out_tasks"], comparisons)
    full = {**result, "comparisons": comparisons, "detectable": least}
    return {**full, "summary": headroom_sentence(full)}


def comparisons_of(plan: ComparisonPlan) -> int:
    """How many differences the plan's page will test at most."""
    arms = plan.arms.values()
    among = sum(bool(arm.control_of) + bool(arm.compared_with) for arm in arms)
    return COMPARED_WITH * len(plan.arms) + among + bool(plan.prompts)


def headroom_sentence(result: dict[str, Any]) -> str:
    """What there may be to gain, and whether the plan could show it."""
    team, best, least = result["team"], result["best_of"], result["detectable"]
    other = result.get("other_model", team)
    room = max(best["score"], other) - team
    if room <= 0:
        return (
            "Nothing shows that there is something to gain: neither the best of the samples nor"
            " another model is above the team as it is; choose harder tasks or another metric."
        )
    counts = f"{result['held_out_tasks']} held-out tasks and {result['comparisons']} comparisons"
    shown = f"with {counts} differences from {least:.3f} on can be shown"
    too_few = "; hold out more tasks, or compare fewer arms" if room < least else ""
    another = f"; another model in every seat has {other:.3f}" if "other_model" in result else ""
    return (
        f"The best of {best['samples']} samples, chosen by the reward itself, has"
        f" {best['score']:.3f} where the team as it is has {team:.3f} and one sample"
        f" {result['sampled']:.3f}: what such a choice adds is in part luck of sampling, so it is a"
        f" bound and no promise{another}. {shown.capitalize()}{too_few}."
    )
