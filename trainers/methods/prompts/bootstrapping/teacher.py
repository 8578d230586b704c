"""The teacher of bootstrapping: the team whose successful runs are shown or imitated, the run's own
team with some values of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .....agents.settings import Settings, mapping, parsed_mapping, setting
from .....agents.state import TeamState, check_values
from .....agents.types import BASE, SettingError, nearest
from ....loop.spec import RunSpec


@dataclass
class TeacherConfig(Settings):
    """Who plays the runs that are learnt from."""

    teacher: dict | str | None = setting(
        "values in which the teacher differs from the team, such as NAME.policy (a larger model,"
        " named in `policies`), NAME.prompt or NAME.demos; empty: the team itself",
        factory=dict,
    )

    def prepare(self) -> None:
        self.teacher = parsed_mapping("teacher", self.teacher)

    @property
    def teacher_values(self) -> dict[str, Any]:
        """The values in which the teacher differs from the team."""
        return mapping("teacher", self.teacher)

    def check_teacher(self, spec: RunSpec) -> None:
        """Raise `SettingError` at a value that no param has or takes, or at a policy that is not
        served."""
        check_values(spec.system.params(), self.teacher_values, "teacher")
        for name, value in self.teacher_values.items():
            if name.endswith(".policy") and value not in (BASE, *spec.policies):
                raise SettingError(
                    f"teacher.{name}: no policy {value!r} is served;"
                    f" {nearest(value, list(spec.policies))}; name it in `policies` with init, base"
                    " or url"
                )

    def teacher_state(self, state: TeamState) -> TeamState:
        """The teacher of a team in this state."""
        return state.with_values(self.teacher_values)
