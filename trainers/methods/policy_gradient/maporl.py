"""MAPoRL: a team learns to debate. Every answer is worth what a verifier makes of it and of the
answers that follow from it.

Multi-agent post-co-training by PPO (Park et al., arXiv:2502.18439) on a `Collaboration`. A verifier
scores every answer of every round; an answer's reward is its own score and, discounted, the team's
later ones (`credit/reward_shaping.py`), plus a bonus for changing one's mind or another's for the
better; PPO with a critic per policy (`ppo.py`) learns from it, the rounds taking turns. Against the
paper:

- The verifier learns with the run's own base, or is a rule; `verifier: ""` compares with the gold
  answer ("no verifier").
- Scores are read from rewards of turns, in the store: a run can learn from stored debates
  (`episodes`).
- Words are shown to agents only of a verifier that cannot see the gold answer. The authors' code
  may show the label itself; here no system can reach it, and a turn that saw it would not be
  trained on.
- A critic reads what the member reads, where theirs may read question and answer only, and its head
  is trained, where theirs stays random. One update per policy over all its turns, where they step
  after every (turn, agent) block. Masks in the place of their sentinels; a full base, not a 4-bit
  one.
- An invalid answer's penalty counts against its own author only, unless `share_penalty`.

accelerate launch recipes/maporl.py [--config recipes/maporl.yaml] [--field value]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.patterns.collaboration import Collaboration
from ....agents.settings import setting
from ....agents.tools.verifiers import resolve_verifier
from ....agents.types import SettingError, Turn
from ....rollouts.evaluation.rounds import answers_by_round, transitions
from ....rollouts.report.sections import rounds_section, stored
from ....rollouts.types import Episode, TurnKey
from ...config import RunConfig
from ...credit.reward_shaping import HORIZONS, SHARES, SIGNS, Table, influence, invalid, shaping
from ...credit.weights import CreditConfig
from ...trainer import Trainer
from ...update.losses.policy_gradient import LossConfig
from ...update.scalar_heads import HeadSpec
from .critics import CriticConfig, critics
from .ppo import PPOSettings, check_iterations, ppo_step

RIGHT, VERIFIER = "right", "verifier"  # rewards of turns: by the gold answer, by the verifier


@dataclass
class MAPoRLConfig(RunConfig, PPOSettings, CreditConfig, CriticConfig, LossConfig):
    """The settings of PPO with a verifier, the reward of an answer, and which rounds learn when.

    Ablations are settings. No verifier: `verifier: ""`. Single-agent PPO: one member, or
    `horizon: current`, `share: individual`. No shaping: `shaping: none`.
    """

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/maporl"
    )
    rewards: list[str] = setting(
        "team's rewards; those of turns (`right`, `verified(...)`) are added",
        factory=lambda: ["correct"],
    )
    num_generations: int = setting(
        "debates per task: nothing compares them, the critic is the baseline", 1, at_least=1
    )
    num_eval_samples: int = setting(
        "sampled debates per held-out task, before and after, for the table of transitions",
        1,
        at_least=1,
    )
    verifier: str = setting(
        "scorer of answers: calculator, module:function,"
        " marlora.trainers.methods.reward_model.verifier:trained(FOLDER); empty: the gold answer",
        "",
    )
    feedback: bool = setting(
        "members read the verifier's score of every answer in words, from the second round on",
        False,
    )
    horizon: str = setting(
        "reward of an answer: discounted_sum, last or current (see"
        " trainers/credit/reward_shaping.py)",
        "discounted_sum",
        choices=HORIZONS,
    )
    share: str = setting(
        "later answers that count: all members' or individual ones", "all", choices=SHARES
    )
    influence_discount: float = setting(
        "discounted_sum: factor per round", 0.3, at_least=0, at_most=1
    )
    shaping: str = setting(
        "bonus for changes for the better: none, paper_sign or code_sign", "none", choices=SIGNS
    )
    shaping_weights: list[float] = setting(
        "alpha0, alpha1 (own revision), beta0, beta1 (others')",
        factory=lambda: [1.0, 1.0, 1.0, 1.0],
    )
    penalty: float = setting("score of an invalid answer", -1.0)
    share_penalty: bool = setting(
        "the penalty enters the sums of all members' earlier answers too, as in the authors' code",
        False,
    )
    min_words: int = setting("an answer of fewer words and signs is invalid", 0, at_least=0)
    repeats: int = setting(
        "an answer with a pattern more than so often in a row is invalid; 0 never", 3, at_least=0
    )
    boxed: bool = setting(
        "an answer without \\\\boxed{...} is invalid (not looked for in rounds that are not"
        " trained)",
        False,
    )
    warm_steps: int = setting("schedule: so many steps train the second round only", 0, at_least=0)
    block_steps: int = setting(
        "schedule: then so many train the last round, then the one before, ... and again; 0 trains"
        " all always",
        0,
        at_least=0,
    )

    def check(self) -> None:
        check_iterations(self)
        if self.verifier == RIGHT or (self.feedback and not self.verifier):
            raise SettingError(
                "verifier: empty means the gold answer, and what knows that cannot be shown to"
                " members that are trained (feedback); name a verifier that reads question and"
                " answer only: calculator, module:function or"
                " marlora.trainers.methods.reward_model.verifier:trained(FOLDER)"
            )
        weights = self.shaping_weights
        if len(weights) != 4 or not all(
            isinstance(w, (int, float)) and math.isfinite(w) for w in weights
        ):
            raise SettingError(
                "shaping_weights: expected four numbers (alpha0, alpha1, beta0, beta1), got"
                f" {weights!r}"
            )
        if self.credit != "agent" or self.across_turns:
            raise SettingError(
                "credit, across_turns: MAPoRL has a reward for every answer that counts later ones"
                " already; leave them as they are"
            )


def scheduled(step: int, rounds: int, warm_steps: int, block_steps: int) -> set[int] | None:
    """The rounds (0, 1, ...) that learn in step 1, 2, ...; None is all.

    The paper's: `warm_steps` of round 1 only, then blocks of `block_steps` for the last round, the
    one before, ... and round 1, again and again. With one round there is nothing to take turns.
    """
    if rounds < 2 or (not block_steps and step > warm_steps):
        return None
    if step <= warm_steps:
        return {1}
    return {rounds - 1 - (step - warm_steps - 1) // block_steps % (rounds - 1)}


def answer_rewards(
    episodes: Iterable[Episode],
    config: MAPoRLConfig,
    member_of: Mapping[str, str],
    *,
    rounds: int,
    frozen: Iterable[str] = (),
    step: int = 1,
) -> dict[TurnKey, float]:
    """R + B of every answer that learns in this step, by turn; NaN where an answer of the debate
    has no score.

    Args:
        member_of: agent -> member.
        rounds: of a whole debate, for the schedule.
        frozen: agents that do not learn: they need no box.
    """
    found: dict[TurnKey, float] = {}
    exempt = set(frozen)
    learn = scheduled(step, rounds, config.warm_steps, config.block_steps)

    def counted(member: str, turn: Turn, score: float) -> float:
        why = invalid(
            turn.text,
            min_words=config.min_words,
            boxed=config.boxed and turn.agent not in exempt,
            repeats=config.repeats,
        )
        return config.penalty if why else score

    for episode in episodes:
        played = answers_by_round(episode, member_of)
        scores = _table(episode, played, VERIFIER if config.verifier else RIGHT)
        own = [
            {m: counted(m, turn, scores[t][m]) for m, turn in row.items()}
            for t, row in enumerate(played)
        ]
        others = own if config.share_penalty else scores
        worth = influence(
            others,
            horizon=config.horizon,
            share=config.share,
            discount=config.influence_discount,
            own=own,
        )
        bonus = shaping(_table(episode, played, RIGHT), config.shaping_weights, config.shaping)
        for t, row in enumerate(played):
            if learn is None or t in learn:
                found |= {
                    (episode.id, turn.index, turn.sibling): worth[t][m] + bonus[t][m]
                    for m, turn in row.items()
                }
    return found


def _table(episode: Episode, played: Sequence[Mapping[str, Turn]], name: str) -> Table:
    values = {(r.turn, r.sibling): r.value for r in episode.rewards if r.name == name}
    return [
        {m: values.get((turn.index, turn.sibling), math.nan) for m, turn in row.items()}
        for row in played
    ]


class MAPoRLTrainer(Trainer[MAPoRLConfig]):
    """Trains a `Collaboration` by PPO with influence-aware rewards. Arguments: see `Trainer`."""

    Config = MAPoRLConfig
    ratios = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not isinstance(self.spec.system, Collaboration):
            name = type(self.spec.system).__name__
            raise SettingError(
                "system.class: MAPoRL trains a"
                f" marlora.agents.patterns.collaboration:Collaboration, got a {name}"
            )
        self.system = self.spec.system
        if self.args.feedback and self.system.verifier != self.args.verifier:
            raise SettingError(
                f"feedback: the system was built with verifier {self.system.verifier!r}; expected"
                f" {self.args.verifier!r}, the one that scores"
            )
        if self.system.verifier:
            resolve_verifier(self.system.verifier)

    def extra_rewards(self) -> Sequence[str]:
        verifier = self.args.verifier
        return (RIGHT, *([f"verified({verifier})"] if verifier else []))

    def system_settings(self) -> Mapping[str, Any]:
        return {"verifier": self.args.verifier} if self.args.feedback else {}

    def heads(self) -> Sequence[HeadSpec]:
        return critics(self.spec.system.specs, self.spec.policies, self.args)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """One step of PPO; returns metrics, with the accuracy of every round."""
        frozen = [
            spec.name for spec in self.system.specs if spec.name not in self.run.learner.policy_of
        ]
        rewards = answer_rewards(
            episodes,
            self.args,
            self.system.member_of,
            rounds=self.system.rounds,
            frozen=frozen,
            step=step,
        )
        accuracy = transitions(episodes, self.system.member_of)["accuracy"]
        return {
            **ppo_step(self, step, episodes, rewards),
            "rounds": {str(n): value for n, value in enumerate(accuracy, start=1)},
        }

    def report(self) -> dict[str, Any]:
        """`collaboration`: accuracy of every round and the transitions between them, on sampled
        held-out debates before and after."""
        found = {}
        for name, state in (("before", self.run.origin), ("after", self.run.state)):
            played = self.run.rollouts.play(
                self.spec.eval_tasks,
                state,
                n=self.args.num_eval_samples,
                kind="eval",
                label=f"sampled-{name}",
            )
            found[name] = transitions(played, self.system.member_of)
        return {**super().report(), "collaboration": found, **stored(rounds_section(found))}
