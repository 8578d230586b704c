"""Which state of the team was in force at which step, and how stale an episode is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...agents.state import TeamState
from ...rollouts.types import Episode
from ..errors import RunError


class TeamStates:
    """The team's states of the last S + 1 steps: every episode played now began with one of them.
    Pure bookkeeping.

    Args:
        bound: S, how many states behind an episode may be.
        known: state by step, of a run that is resumed.
        pin: may an episode's turns be spoken by adapter versions that came into force after it
            began ("call"), or not ("episode")?
    """

    def __init__(
        self, bound: int, known: Mapping[int, TeamState] | None = None, pin: str = "episode"
    ) -> None:
        self.bound, self.pin = bound, pin
        self.of: dict[int, TeamState] = dict(sorted((known or {}).items()))

    def put(self, step: int, state: TeamState) -> None:
        """The state in force from now on, after `step`."""
        self.of = {s: v for s, v in self.of.items() if step - self.bound <= s < step} | {
            step: state
        }

    @property
    def newest(self) -> TeamState:
        of = self.of  # another thread may put the next one now
        return of[max(of)]

    def named(self, ahead: int) -> TeamState:
        """The state that plays the step `ahead` steps after the one to learn next, where it follows
        from the step's number: as old as may be, but never older than the run."""
        return self.of[max(max(self.of) + ahead - self.bound, min(self.of))]

    def age(self, episode: Episode) -> int | None:
        """How many states behind an episode is, were it learnt from now. None: more than the bound,
        or never in force here."""
        steps = [
            step
            for step, state in self.of.items()
            if spoken(state, episode).key == episode.state.key
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
                    f"episode {episode.id}: played by {dict(episode.state.versions)} with values of"
                    f" state {episode.state.key}, which is more than max_staleness {self.bound}"
                    f" states behind {self.newest.key}; nothing so old may be learnt from"
                )
            self._check_turns(episode, age)
            ages.append(age)
        return ages

    def _check_turns(self, episode: Episode, age: int) -> None:
        later = [
            state.versions
            for step, state in self.of.items()
            if self.pin == "call" and step > max(self.of) - age
        ]
        for turn in episode.turns:
            if turn.source == "sampled" and all(
                turn.version != versions.get(turn.policy, "")
                for versions in (episode.state.versions, *later)
            ):
                raise RunError(
                    f"episode {episode.id}, turn {turn.index}: spoken by"
                    f" {turn.version or 'the base'!r}, but the episode began with"
                    f" {dict(episode.state.versions)}; "
                    + (
                        "a turn is as young as its episode"
                        if self.pin == "call"
                        else "an episode keeps its version"
                    )
                )


def spoken(state: TeamState, episode: Episode) -> TeamState:
    """The part of a state that an episode names: all of it, or, of a child that another system
    played, the versions of its policies."""
    if episode.parent is None:
        return state
    policies = {turn.policy for turn in episode.turns} | set(episode.state.versions)
    return state.of([policy for policy in state.versions if policy in policies])
