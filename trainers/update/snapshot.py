"""A snapshot of what a learner holds, to try something and put it back."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .learner import Learner


class Snapshot:
    """Adapters, optimizers and heads of this rank as they were, in a folder of their own."""

    def __init__(self, learner: Learner, folder: Path) -> None:
        self.learner, self.folder = learner, folder
        self.adapters = {name: {"sha256": sha256} for name, sha256 in learner.hashes().items()}
        self.heads = learner.state_dict()["heads"]
        self.credit = dict(learner.credit_state)
        (folder / "trainer").mkdir(parents=True)
        learner.save(folder)

    @property
    def moved(self) -> bool:
        """Whether an adapter or a head is another one now."""
        now = {name: {"sha256": sha256} for name, sha256 in self.learner.hashes().items()}
        return now != self.adapters or self.learner.state_dict()["heads"] != self.heads

    def put_back(self) -> None:
        """Make the learner what it was, to the last bit."""
        self.learner.restore(self.folder, self.adapters, self.heads)
        self.learner.credit_state.clear()
        self.learner.credit_state.update(self.credit)


@contextlib.contextmanager
def snapshot(learner: Learner) -> Iterator[Snapshot]:
    """A snapshot, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="marlora-") as folder:
        yield Snapshot(learner, Path(folder))
