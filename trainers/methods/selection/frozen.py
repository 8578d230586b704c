"""Settings of methods that select among policies and train none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ....agents.settings import mapping
from ....agents.types import AgentSpec, PolicySpec, SettingError
from ...config import RunConfig


@dataclass
class SelectionConfig(RunConfig):
    """`RunConfig` whose policies are all frozen."""

    def policy_specs(self, agents: tuple[AgentSpec, ...]) -> dict[str, PolicySpec]:
        """The policies of `RunConfig.policy_specs`, none of them trained."""
        specs = super().policy_specs(agents)
        for name, given in self.policies.items():  # type: ignore[union-attr]
            if mapping(f"policies.{name}", given).get("trainable"):
                raise SettingError(
                    f"policies.{name}.trainable: this method trains no policy; leave it out"
                )
        return {name: dataclasses.replace(s, trainable=False) for name, s in specs.items()}
