"""SiriuS: a team bootstraps itself. It plays, its successes go into a library, failures are
corrected with the help of an agent that knows the answer, and every agent is fine-tuned on its own
turns of the library (Zhao et al., arXiv 2502.04780).

An iteration is a step: play, correct (`correction.py`), select by success (`credit/filtering.py`),
imitate (`imitation.py`), publish, evaluate. The library is the run's own store: which of its turns
are learnt from is decided by selection each time. Nothing that saw the answer is learnt: the
conversations that correct are marked, a corrected turn is trained on its original prompt as
`written`, and a text that tells the answer without being the one to give it, or that shows how it
was made, is refused.

Against the paper: LoRA adapters on one base instead of full or hosted fine-tuning; several episodes
per task at temperature 1 where the paper has one at 0; `start_from` says whether an iteration
begins from the base or goes on (the paper does not say); turns before a corrected one are not
added, as in its appendix; regenerated turns keep the prompts of play, where the authors' code
trains on the templates of regeneration; in teams with rewards per turn (actor-critic) a turn counts
by its own reward. Competitive games are the same trainer with rewards per agent: the winner's turns
are kept, nothing is corrected; freeze the other side by `policies.NAME.trainable`.

accelerate launch recipes/sirius.py [--config recipes/sirius_problem_solving.yaml] [--max_iterations
1] [--field value]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....agents.settings import setting
from ....agents.types import BASE, CORRECTION_SPLIT, AgentSpec, PolicySpec, SettingError
from ....rollouts.types import Episode
from ...collection.derived_episodes import is_derived
from ...config import RunConfig
from ...credit.filtering import SelectionConfig
from ...trainer import Trainer
from .correction import CORRECTION, CorrectionConfig, Corrector, broken, tally
from .imitation import ImitationConfig, IterationConfig, fit_turns, teacher_text
from .sft import openings, selected


@dataclass
class SiriusConfig(IterationConfig, RunConfig, SelectionConfig, CorrectionConfig, ImitationConfig):
    """`RunConfig` with iterations, a selection, the repair of failures and epochs of imitation."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/sirius"
    )
    library: str = setting(
        "what an iteration learns from: iteration (its own successes), or all (of all iterations so"
        " far)",
        "iteration",
        choices=("iteration", "all"),
    )

    def check(self) -> None:
        if self.library == "all" and self.episodes:
            raise SettingError(
                "library: all is of the run's own iterations, so it needs episodes played here;"
                " leave `episodes` out"
            )

    def policy_specs(self, agents: tuple[AgentSpec, ...]) -> dict[str, PolicySpec]:
        """The team's policies, and the feedback agent's if that is an outside model."""
        critic = self.critic
        self.check_agents(agents)
        if critic.policy in (BASE, *(agent.policy for agent in agents)):
            return super().policy_specs(agents)
        specs = super().policy_specs((*agents, critic))
        if specs[critic.policy].url is None:
            raise SettingError(
                f"feedback_agent.policy: {critic.policy!r} is neither base nor a policy of the"
                f" team; give policies.{critic.policy}.url if it is an outside model"
            )
        return specs


class SiriusTrainer(Trainer[SiriusConfig]):
    """Trains a team by bootstrapping. Arguments: see `Trainer`."""

    Config = SiriusConfig

    def collect(self, step: int) -> list[Episode]:
        """The iteration's episodes, and all that was played to correct those that failed."""
        rollouts, learning = self.run.rollouts, list(self.run.learner.policy_of)
        played = [e for e in rollouts.collect(step) if not is_derived(e, CORRECTION)]
        failed = broken([e for e in played if e.parent is None], self.args, self.args, learning)
        return [*played, *rollouts.derive(step, failed, CORRECTION, self.correct)]

    async def correct(self, episode: Episode) -> list[Episode]:
        """All that is played to correct an episode, see `Corrector`."""
        run = self.run
        corrector = Corrector(
            run.rollouts.player(),
            self.args,
            self.args,
            list(run.learner.policy_of),
            partial(teacher_text, run.learner),
            openings(self.spec.system, run.values),
        )
        return await corrector(episode)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Select from the library, then imitate; returns metrics."""
        own = (e for e in episodes if e.split != CORRECTION_SPLIT)
        library = [*self.earlier(step), *own]
        selection = selected(self, step, library, self.args)
        if self.args.start_from == "base":
            learner = self.run.learner
            learner.reset({learner.policy_of[kept.agent] for kept in selection.kept})
        done = fit_turns(self.run.learner, step, library, selection.weights, self.args)
        return {
            "policies": done.into(self.rows(done.updates, episodes)),
            "selection": selection.table(),
            "dropped": done.untrained,
            "repairs": tally([e for e in episodes if is_derived(e, CORRECTION)], self.args),
        }

    def earlier(self, step: int) -> list[Episode]:
        """The episodes of earlier iterations, if the library holds them, on every rank."""
        if self.args.library == "iteration":
            return []
        return self.run.rollouts.earlier(step)
