"""The teacher of bootstrapping: the team whose successful runs are shown or imitated, the run's own
team with some values of its own."""

from __future__ import annotations

from dataclasses import dataclass

from ....agents.settings import Settings, parsed_mapping, setting
from ....agents.state import TeamState, check_values
from ....agents.types import SettingError, nearest
from ...loop.spec import RunSpec


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

    def check_teacher(self, spec: RunSpec) -> None:
        """Raise `SettingError` at a value that no param has or takes, or at a policy that is not
        served."""
        check_values(spec.system.params(), self.teacher, "teacher")  # type: ignore[arg-type]
        for name, value in self.teacher.items():  # type: ignore[union-attr]
            if name.endswith(".policy") and value not in spec.policies:
                raise SettingError(
                    f"teacher.{name}: no policy {value!r} is served;"
                    f" {nearest(value, list(spec.policies))}; name it in `policies` with init, base"
                    " or url"
                )

    def teacher_state(self, state: TeamState) -> TeamState:
        """The teacher of a team in this state."""
        return state.with_values(self.teacher)  # type: ignore[arg-type]
