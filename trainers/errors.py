"""Errors that end a training run."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot go on; everything finished before it is on disk."""


class Stopped(KeyboardInterrupt):
    """The user or the cluster asked to stop, noticed where the last finished step can be saved as
    it is."""


class RankLost(RunError):
    """Another process of the run has ended while this one waited for it."""
