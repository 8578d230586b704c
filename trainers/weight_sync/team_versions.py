"""Which adapter versions were in force at which step, and how stale an episode is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...rollouts.types import Episode
from ..errors import RunError


class TeamVersions:
    """The team versions of the last S + 1 steps: every episode played now began with one of them.
    Pure bookkeeping.

    Args:
        bound: S, how many versions behind an episode may be.
        known: {step: {policy: adapter version}}, of a run that is resumed.
        pin: may an episode's turns be spoken by versions that came into force after it began
            ("call"), or not ("episode")?
    """

    def __init__(
        self, bound: int, known: Mapping[int, Mapping[str, str]] | None = None, pin: str = "episode"
    ) -> None:
        self.bound, self.pin = bound, pin
        self.of: dict[int, dict[str, str]] = {
            step: dict(version) for step, version in sorted((known or {}).items())
        }

    def put(self, step: int, version: Mapping[str, str]) -> None:
        """The version in force from now on, after `step`."""
        self.of = {s: v for s, v in self.of.items() if step - self.bound <= s < step} | {
            step: dict(version)
        }

    @property
    def newest(self) -> dict[str, str]:
        of = self.of  # another thread may put the next one now
        return of[max(of)]

    def named(self, ahead: int) -> dict[str, str]:
        """The version that plays the step `ahead` steps after the one to learn next, where it
        follows from the step's number: as old as may be, but never older than the run."""
        return self.of[max(max(self.of) + ahead - self.bound, min(self.of))]

    def age(self, episode: Episode) -> int | None:
        """How many versions behind an episode is, were it learnt from now. None: more than the
        bound, or never in force here."""
        steps = [
            step
            for step, version in self.of.items()
            if spoken(version, episode) == episode.team_version
        ]
        return max(self.of) - max(steps) if steps else None

    def ages(self, episodes: Iterable[Episode]) -> list[int]:
        """The age of each episode. Raises `RunError` for one beyond the bound, or with a turn that
        its version did not speak."""
        ages = []
        for episode in episodes:
            age = self.age(episode)
            if age is None or age > self.bound:
                raise RunError(
                    f"episode {episode.id}: played by {dict(episode.team_version)}, which is more"
                    f" than max_staleness {self.bound} versions behind {self.newest}; nothing so"
                    " old may be learnt from"
                )
            later = [
                v for step, v in self.of.items() if self.pin == "call" and step > max(self.of) - age
            ]
            for turn in episode.turns:
                if turn.source == "sampled" and all(
                    turn.version != v.get(turn.policy, "") for v in (episode.team_version, *later)
                ):
                    raise RunError(
                        f"episode {episode.id}, turn {turn.index}: spoken by"
                        f" {turn.version or 'the base'!r}, but the episode began with"
                        f" {dict(episode.team_version)}; "
                        + (
                            "a turn is as young as its episode"
                            if self.pin == "call"
                            else "an episode keeps its version"
                        )
                    )
            ages.append(age)
        return ages


def spoken(version: Mapping[str, str], episode: Episode) -> dict[str, str]:
    """The part of a team version that an episode names: all of it, or, of a child that another
    system played, that of its policies."""
    if episode.parent is None:
        return dict(version)
    policies = {turn.policy for turn in episode.turns} | set(episode.team_version)
    return {policy: name for policy, name in version.items() if policy in policies}
