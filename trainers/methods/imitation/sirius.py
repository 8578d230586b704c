"""SiriuS: a team bootstraps itself. It plays, its successes go into a library, failures are mended
with the help of somebody who knows the answer, and every agent is fine-tuned on its own turns of
the library (Zhao et al., arXiv 2502.04780).

An iteration is a step: play, mend (`mend.py`), select by success (`selection.py`), imitate
(`imitate.py`), publish, evaluate. The library is the run's own store: which of its turns are learnt
from is decided by selection each time. Nothing that saw the answer is learnt: the conversations
that mend are marked, a mended turn is trained on its original prompt as `written`, and a text that
tells the answer without being the one to give it, or that shows how it was made, is refused.

Against the paper: LoRA adapters on one base instead of full or hosted fine-tuning; several episodes
per task at temperature 1 where the paper has one at 0; `start_from` says whether an iteration
begins from the base or goes on (the paper does not say); turns before a mended one are not added,
as in its appendix; regenerated turns keep the prompts of play, where the authors' code trains on
the templates of regeneration; in teams with rewards per turn (actor-critic) a turn counts by its
own reward. Competitive games are the same trainer with rewards per agent: the winner's turns are
kept, nothing is mended; freeze the other side by `policies.NAME.trainable`.

accelerate launch recipes/sirius.py [--config recipes/sirius_problem_solving.yaml] [--max_iterations
1] [--field value]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....agents.patterns.self_correction import SPLIT
from ....agents.settings import help_of
from ....agents.types import BASE, AgentSpec, PolicySpec, SettingError, from_json, to_json
from ....rollouts.types import Episode
from ...collection.derived_episodes import derive, is_derived
from ...collection.stored_episodes import training
from ...config import RunConfig
from ...credit.filtering import SelectionConfig
from ...trainer import Trainer
from .correction import CORRECTION, CorrectionConfig, Corrector, broken, tally
from .imitation import ImitationConfig, IterationConfig, fit_turns, reset_adapters, teacher_text
from .sft import openings, selected


@dataclass
class SiriusConfig(IterationConfig, RunConfig, SelectionConfig, CorrectionConfig, ImitationConfig):
    """`RunConfig` with iterations, a selection, the repair of failures and epochs of imitation."""

    output_dir: str = help_of(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/sirius"
    )
    library: str = help_of(
        "what an iteration learns from: iteration (its own successes), or all (of all iterations so"
        " far)",
        "iteration",
    )

    def __post_init__(self) -> None:
        for part in (
            RunConfig,
            IterationConfig,
            SelectionConfig,
            CorrectionConfig,
            ImitationConfig,
        ):
            part.__post_init__(self)
        if self.library not in ("iteration", "all"):
            raise SettingError(f"library: expected iteration or all, got {self.library!r}")
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
        """The iteration's episodes, and all that was played to mend those that failed."""
        run, learning = self.run, list(self.run.policy_of)
        played = [e for e in run.collect(step) if not is_derived(e, CORRECTION)]
        failed = broken([e for e in played if e.parent is None], self.args, self.args, learning)
        return [*played, *derive(run, step, failed, CORRECTION, self.mend)]

    async def mend(self, episode: Episode) -> list[Episode]:
        run = self.run
        mender = Corrector(
            run.stage.player(run.versions),
            self.args,
            self.args,
            list(run.policy_of),
            partial(teacher_text, run),
            openings(run),
        )
        return await mender(episode)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Select from the library, then imitate; returns metrics."""
        library = [*self.earlier(step), *(e for e in episodes if e.split != SPLIT)]
        selection = selected(self.run, step, library, self.args)
        if self.args.start_from == "base":
            reset_adapters(self.run, {self.run.policy_of[kept.agent] for kept in selection.kept})
        done = fit_turns(self.run, step, library, selection.weights, self.args)
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
        found: list[Episode] = []

        def read() -> list[Any]:
            found.extend(e for e in training(self.run.stage.store) if e.step < step)
            return [to_json(e) for e in found] if self.run.ranks.size > 1 else []

        sent = self.run.ranks.on_main(read)
        return found if self.run.ranks.main else [from_json(Episode, e) for e in sent]
