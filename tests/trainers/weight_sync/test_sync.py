"""Weight sync alone: in which order a step's adapters are published, verified and put in force."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from marlora.agents.state import TeamState
from marlora.agents.types import AgentSpec, to_json
from marlora.trainers.config import RunConfig
from marlora.trainers.weight_sync.sync import WeightSync
from marlora.trainers.weight_sync.verification import VerificationRecord, WeightMismatch


class FakePublisher:
    """Notes what is asked of it; `wrong`: verification fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.versions: dict[str, str] = {}
        self.loaded: list[str] = []
        self.asked = self.wrong = False

    async def publish(self, step: int, policies: Sequence[str]) -> dict[str, str]:
        self.calls.append(f"publish {step}")
        self.versions = {policy: f"{policy}-v{step}" for policy in policies}
        return self.versions

    async def verify(
        self, step: int, probes_of: Mapping[str, Any], *, final: bool
    ) -> list[VerificationRecord]:
        self.calls.append(f"verify {step}{' now' if final else ''}")
        self.asked = True
        if self.wrong:
            raise WeightMismatch("another adapter")
        return [VerificationRecord(step, p, v, "r", "passed") for p, v in self.versions.items()]

    @contextlib.contextmanager
    def hold(self, versions: Mapping[str, str]) -> Iterator[None]:
        self.loaded += versions.values()
        yield
        for version in versions.values():
            self.loaded.remove(version)

    def to_json(self) -> list[dict[str, object]]:
        return [{"asked": self.asked}]


def run(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def sync_of(folder: Path, bound: int) -> tuple[WeightSync, FakePublisher, list[Any]]:
    learner = SimpleNamespace(
        agents=(AgentSpec("a"),),
        bases={"m": SimpleNamespace(policies=("a", "unused"))},
        trained=["a", "unused"],
        policies={},
    )
    written: list[Any] = []
    config = RunConfig(output_dir=str(folder), max_staleness=bound)
    sync = WeightSync(config, learner, {}, written.append)  # type: ignore[arg-type]
    publisher = FakePublisher()
    sync.publishers["m"] = publisher  # type: ignore[assignment]
    sync._perform = sync._alone = run  # type: ignore[assignment]
    return sync, publisher, written


def test_a_step_is_published_then_verified_then_in_force(tmp_path: Path) -> None:
    sync, publisher, written = sync_of(tmp_path, 1)
    for step in (1, 2, 3):
        sync.advance(step, (), final=step == 3)
    assert publisher.calls == [
        "publish 1",
        "verify 1",
        "publish 2",
        "verify 2",
        "publish 3",
        "verify 3 now",
    ]
    assert sync.team.of == {2: TeamState({"a": "a-v2"}), 3: TeamState({"a": "a-v3"})}, (
        "what no agent speaks as is left out"
    )
    assert publisher.loaded == ["a-v2", "a-v3"], "the last S + 1 versions stay loaded"
    assert sync.verified["a"] == {"status": "passed", "residual": None} and len(written) == 3
    assert sync.state_dict()["team"] == {str(s): to_json(v) for s, v in sync.team.of.items()}


def test_a_version_that_is_wrong_is_recorded_and_never_in_force(tmp_path: Path) -> None:
    sync, publisher, written = sync_of(tmp_path, 0)
    sync.advance(1, (), final=False)
    publisher.wrong = True
    with pytest.raises(WeightMismatch):
        sync.advance(2, (), final=False)
    assert (
        sync.team.newest == TeamState({"a": "a-v1"}) and len(written) == 2 and sync.verified == {}
    )


def test_the_start_is_verified_once(tmp_path: Path) -> None:
    sync, publisher, _ = sync_of(tmp_path, 0)
    sync.publish(0)
    assert sync.verify(0, (), start=True).keys() == {"a", "unused"}
    assert sync.verify(0, (), start=True) == {} and publisher.calls == ["publish 0", "verify 0 now"]
