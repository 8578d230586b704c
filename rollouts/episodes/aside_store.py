"""Talks with the helpers that rewards ask, kept in the store of a run or of an evaluation and
found there when it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..types import Episode
from .store import Store


class StoredAsides:
    """The talks about episodes, by id.

    Args:
        store: holds those of earlier processes.
        keep: stores new ones.
        again: every talk is had again, so that replayed rollouts are decoded in the same batches;
            stored ones stay as they are.
    """

    def __init__(
        self, store: Store, keep: Callable[[Sequence[Episode]], object], *, again: bool = False
    ) -> None:
        self._store, self._keep, self._again = store, keep, again
        self._earlier: dict[str, Episode] | None = None

    def find(self, id: str) -> Episode | None:
        """The talk of this id that an earlier process had. None if there is none, or where every
        talk is had again."""
        if self._again:
            return None
        if self._earlier is None:  # those of this process are not asked for a second time
            self._earlier = {e.id: e for e in self._store if e.parent and e.parent == e.follows}
        return self._earlier.pop(id, None)

    def keep(self, episodes: Sequence[Episode]) -> None:
        """Store what is not stored yet."""
        known = self._store.ids()
        self._keep([episode for episode in episodes if episode.id not in known])
