"""
Preferences between whole runs of a team: SysDPO (arXiv:2502.17721), and DPO per agent (arXiv:2305.18290) as its control.

One step takes the episodes of `tasks_per_step` tasks (played, or from `episodes: FOLDER`), pairs those of a task whose scores differ
(`preferences.py`), and moves every trainable adapter so that the chosen run as a whole gains on the rejected one against the reference
(`margins.py`). Only scalars couple the agents: turns are scored by forward passes first, then each adapter learns from its own turns, each
with the number that `push` gave it. Against the paper: LoRA, with the adapters off (or as the run began with them) as reference; a score
difference makes the pairs. Frozen and outside agents may stand in the team; they count 0.

accelerate launch recipes/sysdpo.py [--config recipes/sysdpo.yaml] [--field value]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..agents.types import SettingError
from ..rollouts.engines.start import help_of
from ..rollouts.evaluate import best, evaluation
from ..rollouts.types import Episode
from .batches import Batch
from .components import Component
from .config import RunConfig
from .drafts import with_drafts
from .epochs import joined, minibatches
from .losses import Stats, weighted_nll
from .margins import MarginConfig, Push, Vote, push
from .preferences import Pair, PairConfig, agent_pairs, pairs_of
from .samples import Denominators, Sample, TurnKey, samples
from .trainer import Trainer
from .trl_baseline import Lesson, Row, TrainerChoice, learn_with_trl
from .update import Updated

Key = TurnKey | tuple[str, str]  # of a turn, or of what a component made: (episode id, component's name)


@dataclass
class PreferenceConfig(RunConfig, PairConfig, MarginConfig, TrainerChoice):
    """`RunConfig` with pairs (`PairConfig`), a loss of their margins (`MarginConfig`), and how often they are gone through.

    What learns is said by the policies: `policies: {critic: {trainable: false}}` trains all but the critic.
    """

    output_dir: str = help_of("run folder: config, episodes, metrics, checkpoints, report", "runs/sysdpo")
    reference: str = help_of(
        "start: the adapters as the run began (off, unless they have an init); step: as the step began", "start"
    )
    train_batch_size: int = help_of("pairs of one optimizer update; 0 takes all of the step", 0)
    num_train_epochs: int = help_of("times a step's pairs are gone through", 1)
    num_drafts: int = help_of("sampling: drafts played for every task of a step; equal ones count once", 4)
    best_of: int = help_of("also tell what the untrained team reaches if the best of this many episodes counts; 0 does not", 0)

    def __post_init__(self) -> None:
        for parent in (RunConfig, PairConfig, MarginConfig, TrainerChoice):
            parent.__post_init__(self)
        if self.reference not in ("start", "step"):
            raise SettingError(f"reference: expected start or step, got {self.reference!r}")
        if self.train_batch_size < 0 or self.num_train_epochs < 1:
            raise SettingError(
                f"train_batch_size >= 0 and num_train_epochs >= 1 expected, got {self.train_batch_size} and {self.num_train_epochs}"
            )
        if self.mode == "sampling" and (self.train_batch_size or self.num_train_epochs > 1):
            raise SettingError(
                "mode sampling: drafts are drawn anew for every update, so train_batch_size 0 and num_train_epochs 1 expected"
            )
        if self.num_drafts < 1 or self.best_of < 0:
            raise SettingError(f"num_drafts >= 1 and best_of >= 0 expected, got {self.num_drafts} and {self.best_of}")
        if self.num_iterations != 1:
            raise SettingError("num_iterations: preferences are weighed anew before every update; set num_train_epochs instead")
        if self.trainer == "trl":
            self._check_trl()
        if self.num_generations < 2 and not self.episodes:
            raise SettingError(f"num_generations: a pair needs two episodes of a task; got {self.num_generations}")

    def _check_trl(self) -> None:
        if self.mode != "independent":
            raise SettingError(f"trainer trl: TRL knows single agents, so mode independent expected, got {self.mode!r}")
        if self.reference != "step" and self.max_steps > 1:
            raise SettingError("trainer trl: TRL's reference is the adapter as a step begins; set reference step, or max_steps 1")
        if self.length_normalised != (self.loss_type == "ipo"):
            raise SettingError("trainer trl: TRL divides by length for ipo and for no other loss; set length_normalised so")


class PreferenceTrainer(Trainer[PreferenceConfig]):
    """Trains a team by preferences between its runs. Arguments: see `Trainer`.

    Args:
        components: other parts of the system that learn in the same sum (`components.py`).
    """

    Config = PreferenceConfig

    def __init__(self, *args: Any, components: Sequence[Component] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.components = components
        self.references: dict[TurnKey, float] = {}  # of stored episodes, for good: they do not change

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Pair the episodes, go through the pairs; returns metrics."""
        pairs = pairs_of(episodes, self.args, self.args.seed + step)
        if self.args.trainer == "trl":
            return self.learn_with_trl(step, pairs, episodes)
        if self.args.mode == "sampling":
            pairs = with_drafts(self.run, step, pairs, self.args.num_drafts)
        made, dropped = self.samples_of(pairs)
        if step == 1 and made:
            self.run.show(made)
        references = self.reference_scores(made)
        size, seed = self.args.train_batch_size or max(len(pairs), 1), self.args.seed + step
        done: list[dict[str, Updated]] = []
        pushes: list[Push[Key]] = []
        for number, some in enumerate(minibatches(pairs, size, self.args.num_train_epochs, seed)):
            updated, pushed = self.update(step, number, some, made, references)
            done.append(updated)
            pushes.append(pushed)
        if not pairs:
            self.run.progress.warn(f"step {step}: no two episodes of a task differ in score; nothing to learn from")
        return {
            "policies": self.rows(joined(done), episodes),
            "dropped": _counted(dropped),
            "preference": {"pairs": len(pairs), "updates": len(done), **_told(pushes)},
        }

    @property
    def voters(self) -> dict[str, str]:
        """Agent -> policy of those whose turns are scored: what is frozen stands still, but among drafts its probabilities weigh."""
        if self.args.mode != "sampling":
            return self.run.policy_of
        return {agent.name: agent.policy for agent in self.run.system.specs if not self.run.policies[agent.policy].url}

    def samples_of(self, pairs: Iterable[Pair]) -> tuple[list[Sample], Counter[tuple[str, str]]]:
        """The token sequences of every turn that has a vote."""
        chosen = {episode.id: episode for pair in pairs for episode in pair.episodes}.values()
        everything = {(e.id, t.index, t.sibling): 1.0 for e in chosen for t in e.turns if t.taken}
        return samples(chosen, everything, self.voters, ratios=False)

    def reference_scores(self, made: Sequence[Sample]) -> Mapping[TurnKey, float]:
        """log p of every turn under the reference; for stored episodes each is computed once in a run."""
        if self.args.reference == "step":
            return self.run.score(made)
        if not self.args.episodes:
            self.references.clear()
        unknown = [sample for sample in made if not self.references.keys() >= set(sample.keys)]
        self.references |= self.run.score(unknown, reference=True)
        return self.references

    def update(
        self, step: int, number: int, pairs: Sequence[Pair], made: Sequence[Sample], references: Mapping[TurnKey, float]
    ) -> tuple[dict[str, Updated], Push[Key]]:
        """One optimizer update of every policy and component from these pairs: score, push, learn."""
        episodes = {episode.id: episode for pair in pairs for episode in pair.episodes}
        mine = [sample for sample in made if sample.episode in episodes]
        votes = self.votes(episodes, mine, references, draw := self.args.seed + 1000 * step + number)
        pushed = push(pairs, votes, self.args)
        self.push_components(episodes, pushed, draw)
        weights = {key: weight for key, weight in pushed.weights.items() if len(key) == 3}
        found, _ = samples(episodes.values(), weights, self.run.policy_of, ratios=False)  # type: ignore[arg-type]
        done = self.run.learn(step, found, self.loss)
        for result in done.values():
            result.stats["loss"] = pushed.loss
        return done, pushed

    def votes(
        self, episodes: Mapping[str, Episode], made: Sequence[Sample], references: Mapping[TurnKey, float], draw: int
    ) -> dict[Key, Vote]:
        """What every part of these episodes says now, and said under the reference."""
        agents = {(e.id, t.index, t.sibling): (t.agent, len(t.token_ids)) for e in episodes.values() for t in e.turns}
        found: dict[Key, Vote] = {}
        for key, now in self.run.score(made).items():
            agent, tokens = agents[key]
            found[key] = Vote(key[0], agent, self.voters[agent], now, references[key], tokens)
        for component in self.components:
            for episode in episodes.values():
                with torch.no_grad():
                    ratio = float(component.log_ratio(episode, draw))
                found[episode.id, component.name] = Vote(episode.id, component.name, component.name, ratio, 0.0)
        return found

    def push_components(self, episodes: Mapping[str, Episode], pushed: Push[Key], draw: int) -> None:
        for component in self.components:
            for name, episode in episodes.items():
                weight = pushed.weights[name, component.name]
                if weight:
                    (-weight * component.log_ratio(episode, draw)).backward()  # type: ignore[no-untyped-call]
            component.step()

    def learn_with_trl(self, step: int, pairs: Sequence[Pair], episodes: Sequence[Episode]) -> dict[str, Any]:
        """The step by TRL's DPOTrainer, on the pairs of replies to one prompt (`agent_pairs`), one policy after the other."""
        lessons, dropped = {}, Counter[tuple[str, str]]()
        for policy in sorted(set(self.run.policy_of.values())):
            rows, without = agent_pairs(pairs, self.run.agents_of[policy])
            lessons[policy] = Lesson(rows, sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows))
            dropped += without
        done = learn_with_trl(self.run, step, lessons, self.dpo_trainer)
        return {
            "policies": self.rows(done, episodes),
            "dropped": _counted(dropped),
            "preference": {"pairs": len(pairs), "rows": {policy: len(lesson.rows) for policy, lesson in lessons.items()}},
        }

    def dpo_trainer(self, model: Any, tokenizer: Any, rows: Sequence[Row], shared: Mapping[str, Any]) -> Any:
        """A `DPOTrainer` with this run's settings."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Exact(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset  # it would tokenise the texts again; the columns hold the tokens that were sampled

        args = DPOConfig(
            **shared, beta=self.args.beta, loss_type=[self.args.loss_type], label_smoothing=self.args.label_smoothing,
            per_device_train_batch_size=self.args.train_batch_size or len(rows), num_train_epochs=self.args.num_train_epochs,
        )  # fmt: skip
        return Exact(model, args=args, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer)

    def report(self) -> dict[str, Any]:
        """Besides the adapters' shares: best-of-n without training, the team as it was, its best episode picked by the reward itself."""
        if not self.args.best_of:
            return super().report()
        run, count = self.run, self.args.best_of
        episodes = run.play(f"best-of-{count}", run.eval_tasks, count, versions={})
        result = evaluation(run.eval_tasks, best(episodes, run.metric), run.metric)
        return {**super().report(), "best_of": {"n": count, **result.summary()}}

    def loss(
        self, batch: Batch, logp: torch.Tensor, entropy: torch.Tensor, reference: torch.Tensor | None, counts: Denominators
    ) -> tuple[torch.Tensor, Stats]:
        """-sum(weight x log p): its gradient is the preference loss's, its value is not."""
        return weighted_nll(logp, batch.advantage, 1.0)


def _counted(dropped: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {f"{agent}: {reason}": count for (agent, reason), count in sorted(dropped.items())}


def _told(pushes: Sequence[Push[Key]]) -> dict[str, Any]:
    """Means over updates of what the pairs said before each."""
    if not pushes:
        return {}
    count = len(pushes)
    return {
        "loss": sum(p.loss for p in pushes) / count,
        "first_loss": pushes[0].loss,
        "accuracy": sum(p.accuracy for p in pushes) / count,
        "margin": sum(sum(p.margins) / len(p.margins) for p in pushes) / count,
        "margins": {agent: sum(p.by_agent.get(agent, 0.0) for p in pushes) / count for agent in pushes[-1].by_agent},
    }
