"""`marlora collect` killed, asked to end, or out of disk: whoever calls it again gets every episode
once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import Store
from tests.chaos.ledger import balance
from tests.trainers.small_run import runner

pytestmark = pytest.mark.process

TASKS, SIBLINGS = 5, 2


@pytest.fixture(scope="module")
def play() -> Iterator[Callable[..., int]]:
    with runner() as ask:
        yield ask


@pytest.fixture(scope="module")
def checkpoint(
    play: Callable[..., int], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert play(folder, model, max_steps=1) == 0, said(folder)
    return folder / "checkpoints/step-000001"


def said(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()


Collect = Callable[..., int]


@pytest.fixture(scope="module")
def collect(
    play: Callable[..., int],
    checkpoint: Path,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Collect:
    """`marlora collect` into a folder, in a process of its own, struck by a fault; what it says is
    in `collect.log`."""
    log = tmp_path_factory.mktemp("said") / "collect"

    def run(store: Path, **fault: object) -> int:
        tasks = [
            "--tasks",
            "marlora.rollouts.tasks.toy:tiny_tasks",
            "--num_tasks",
            str(TASKS),
            "--num_generations",
            str(SIBLINGS),
        ]
        argv = [
            "collect",
            str(checkpoint),
            "--output",
            str(store),
            "--engine",
            "transformers",
            "--trust_checkpoint",
            *tasks,
        ]
        code = play(log, model, argv=argv, **fault)
        run.said = said(log)  # type: ignore[attr-defined]
        return code

    return run


@pytest.fixture(scope="module")
def expected(collect: Collect, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ids of the episodes of an undisturbed call."""
    store = tmp_path_factory.mktemp("store")
    assert collect(store) == 0, collect.said
    assert len(Store(store)) == TASKS * SIBLINGS
    return list(Store(store).ids())


KILLS = {
    "a line is half written": dict(fault="torn line", at=4),
    "before the first line": dict(fault="fsync", at=1),
    "a line written, not durable": dict(fault="fsync", at=6),
    "a line durable, not counted": dict(fault="fsync", at=6, after=True),
    "asked to end": dict(fault="fsync", at=5, signal="SIGTERM"),
    "asked to end, started with signals ignored": dict(
        fault="fsync", at=5, signal="SIGTERM", ignored=["SIGTERM", "SIGHUP"]
    ),
}


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_called_again(
    point: str, collect: Collect, expected: list[str], tmp_path: Path
) -> None:
    """Twice at the same point: the second call is killed as far behind the first one's end as that
    was behind the beginning."""
    store = tmp_path / "store"
    code = -15 if "signal" in KILLS[point] else -9
    kept = b""
    for _ in range(2):
        assert collect(store, **KILLS[point]) == code, collect.said
        files = Store(store).files()
        data = files[0].read_bytes() if files else b""
        assert data.startswith(kept), "what was stored is never touched again"
        kept = data[: data.rfind(b"\n") + 1]
    assert collect(store) == 0, collect.said
    assert Store(store).files()[0].read_bytes().startswith(kept)
    balance(store, expected)
    assert f"{TASKS * SIBLINGS} episodes to play" not in collect.said or not kept
    assert collect(store) == 0 and "\n0 episodes to play" in collect.said


@pytest.mark.parametrize(
    "ignored", [[], ["SIGINT", "SIGHUP"]], ids=["at a prompt", "in the background of a script"]
)
def test_interrupted_it_says_so_and_loses_nothing(
    ignored: list[str], collect: Collect, expected: list[str], tmp_path: Path
) -> None:
    assert collect(tmp_path / "store", fault="fsync", at=5, signal="SIGINT", ignored=ignored) == 1
    assert collect.said.splitlines()[-1] == "stopped"
    assert collect(tmp_path / "store") == 0, collect.said
    balance(tmp_path / "store", expected)


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[Callable[[], None]]:
    """A file system of a megabyte on `folder` with `room` KiB left; the yielded function makes room
    again. Mounting needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    try:
        (folder / "filler").write_bytes(b"x" * (shutil.disk_usage(folder).free - room * 1024))
        yield (folder / "filler").unlink
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("room", [8, 0])
def test_a_full_disk(room: int, collect: Collect, expected: list[str], tmp_path: Path) -> None:
    """A real one as root; else writes that fail as on one."""
    if os.geteuid() == 0:
        with small_disk(tmp_path / "disk", room) as more:
            full_disk(collect, tmp_path / "disk/store", expected, {}, more)
    else:
        full_disk(
            collect,
            tmp_path / "store",
            expected,
            dict(fault="fsync", at=1 + room // 4, signal="ENOSPC"),
            lambda: None,
        )


def full_disk(
    collect: Collect,
    store: Path,
    expected: list[str],
    fault: dict[str, object],
    more: Callable[[], None],
) -> None:
    assert collect(store, **fault) == 1
    (error,) = [line for line in collect.said.splitlines() if line.startswith("error:")]
    assert (
        "No space left on device" in error
        and str(store) in error
        and "Traceback" not in collect.said
    )
    assert set(Store(store).ids()) < set(expected)
    more()
    assert collect(store) == 0, collect.said
    balance(store, expected)
