"""Names of the rewards that a reward function may give, as far as they are known before it runs."""

from __future__ import annotations

from collections.abc import Iterable

from .actor_critic import roles
from .builtin import posted, returned, workflow
from .ratings import ratings
from .scoring import RewardFn, fn_name

# functions whose rewards are not named like them, or not all
GIVEN: dict[RewardFn, frozenset[str]] = {
    roles: frozenset({"role"}),
    ratings: frozenset({"rating"}),
    workflow: frozenset({"valid", "ran", "val", "performance", "complexity", "efficiency"}),
}
OPEN = (workflow, returned, posted)  # others than us choose the names: systems and programs
PACKAGE = __name__.rpartition(".")[0]


def names_given(rewards: Iterable[RewardFn]) -> set[str]:
    """Names of the rewards that these functions give. One of the user's is known to give a reward
    of its own name, and may give any."""
    return {name for fn in rewards for name in GIVEN.get(fn, {fn_name(fn)})}


def has_known_names(fn: RewardFn) -> bool:
    """Whether the function gives no rewards of other names than `names_given` says."""
    ours = str(getattr(fn, "__module__", "")).startswith(f"{PACKAGE}.")
    return ours and fn not in OPEN
