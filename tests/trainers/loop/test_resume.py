"""Killed, stopped or out of disk: a run that goes on ends where the undisturbed one does, bit for
bit."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Usage
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.files import file_sha256
from marlora.trainers.checkpoint import verify
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.chaos import ledger
from tests.chaos.file_calls import names
from tests.trainers.small_run import EPISODES, EVAL, STEPS, runner

pytestmark = pytest.mark.process

LAST = "checkpoints/step-000003"


@pytest.fixture(scope="module")
def play() -> Iterator[Callable[..., int]]:
    with runner() as ask:
        yield ask


@pytest.fixture(scope="module")
def undisturbed(play, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert play(folder, model) == 0, log(folder)
    return folder


def log(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()


def weights(folder: Path, step: int = STEPS) -> dict[str, str]:
    """sha256 of the files of adapters and optimizers of the last step's checkpoint."""
    last = folder / f"checkpoints/step-{step:06d}"
    files = [*(last / "adapters").rglob("*"), *(last / "trainer").glob("*.safetensors")]
    found = {str(path.relative_to(folder)): file_sha256(path) for path in files if path.is_file()}
    assert len(found) == 6  # two adapters of two files, two optimizers
    return found


def metrics(folder: Path, *, ahead: bool = False) -> list[dict[str, Any]]:
    """The rows without what two equal runs may differ in: clocks, and the residual of a proof,
    which is a measurement. `ahead`: and what is spent by then, which with rollouts ahead depends
    on how far these have come."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["tokens_per_s"]
        if ahead:
            del row["budget"]
        row["proof"] = {policy: proof["status"] for policy, proof in row["proof"].items()}
    return rows


def episodes(folder: Path) -> dict[str, Any]:
    """All stored episodes by id, without the time they took; no id is there twice."""
    found = list(Store(folder / "episodes"))
    assert len({episode.id for episode in found}) == len(found)
    timeless = {name: Usage() for name in ("first", "last")}
    return {e.id: dataclasses.replace(e, usage=timeless) for e in found}


def assert_same(folder: Path, expected: Path, steps: int = STEPS, *, ahead: bool = False) -> None:
    ledger.balance_run(folder, steps, EPISODES)
    assert weights(folder, steps) == weights(expected, steps)
    assert metrics(folder, ahead=ahead) == metrics(expected, ahead=ahead)
    assert episodes(folder) == episodes(expected)
    mine, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, expected))
    for key in ("steps", "tokens", "policies", "eval"):
        assert mine[key] == theirs[key], key
    assert (
        mine["live_proof"]["failed"] == 0
        and mine["live_proof"]["passed"] >= theirs["live_proof"]["passed"]
    )
    assert names(folder) <= names(expected), "left by a run that was killed"


def test_the_run_learns_something(undisturbed: Path) -> None:
    """The equalities below mean nothing unless every step moves both adapters and old checkpoints
    are pruned."""
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["policies"][name]["grad_norm"] > 0 for row in rows for name in ("first", "last"))
    summary = json.loads((undisturbed / "summary.json").read_text())["policies"]
    assert all(policy["sha256_before"] != policy["sha256_after"] for policy in summary.values())
    assert [p.name for p in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000003",
    ]
    assert len(episodes(undisturbed)) == STEPS * EPISODES + 2 * EVAL, (
        "training, and two evaluations"
    )


def test_a_run_repeats_itself_bit_for_bit(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    assert play(tmp_path / "run", model) == 0
    assert_same(tmp_path / "run", undisturbed)
    assert play(tmp_path / "other", model, seed=1) == 0
    assert weights(tmp_path / "other") != weights(undisturbed)


def test_a_checkpoint_holds_plain_files_only(undisturbed: Path) -> None:
    files = [path for path in (undisturbed / LAST).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert all(json.loads(path.read_text()) is not None for path in files if path.suffix == ".json")


KILLS = {
    "a line of the store is half written": dict(
        fault="torn line", at=EVAL + EPISODES + 4
    ),  # in step 2
    "updated, not published": dict(fault="learn", at=2, after=True),
    "saving, between two files": dict(fault="optimizer file", at=2 + 2),
}


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_resumed(
    point: str, play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert play(folder, model, **KILLS[point]) < 0
    assert play(folder, model, resume=True) == 0, log(folder)
    assert "resumed from step-00000" in log(folder)
    assert_same(folder, undisturbed)


def test_killed_while_a_state_of_episodes_is_half_written(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert play(folder, model, fault="file call", at="episodes/values/.", half=True) < 0
    assert any(path.name.startswith(".") for path in (folder / "episodes/values").iterdir())
    assert play(folder, model, resume=True) == 0, log(folder)
    assert_same(folder, undisturbed)


MORE_KILLS = {
    "before the first episode": dict(fault="store", at=1),
    "before anything is saved": dict(fault="learn", at=1),
    "one adapter updated, the other not": dict(fault="step", at=4),
    "published, not proven": dict(fault="prove", at=2),
    "proven, not logged": dict(fault="metrics", at=2),
    "logged, not saved": dict(fault="save", at=3),
    "staged, not renamed": dict(fault="rename", at=11),
    "renamed, not pruned": dict(fault="prune", at=3),
    "pruning": dict(fault="delete", at=1),
    **{
        f"{name} is half written": dict(fault="file call", at=f"/.{name}.", half=True)
        for name in (
            "config.yaml",
            "evaluations.json",
            "proofs.json",
            "summary.json",
            "report.html",
        )
    },
    "a version is half written": dict(fault="file call", at="versions/.first-v2", half=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", MORE_KILLS)
def test_killed_and_resumed_at_more_points(
    point: str, play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert play(folder, model, **MORE_KILLS[point]) < 0
    assert play(folder, model, resume=True) == 0, log(folder)
    assert_same(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_anywhere_again_and_again(seed: int, play, model: Path, tmp_path: Path) -> None:
    """Seven kills per seed at random durable writes; every second run is killed a second time after
    it was resumed."""
    whole = tmp_path / "whole"
    assert play(whole, model, seed=seed, fault="fsync") == 0
    writes = int(Path(f"{whole}.calls").read_text())
    rng = random.Random(seed)
    for number in range(7):
        folder = tmp_path / f"run-{number}"
        at, after = rng.randint(1, writes), rng.random() < 0.5
        assert play(folder, model, seed=seed, fault="fsync", at=at, after=after) == -9
        if number % 2:
            assert play(
                folder,
                model,
                seed=seed,
                resume=True,
                fault="fsync",
                at=rng.randint(1, 12),
                after=after,
            ) in (-9, 0)
        assert play(folder, model, seed=seed, resume=True) == 0, (
            f"killed at write {at} of {writes}: {log(folder)}"
        )
        assert_same(folder, whole)


@pytest.fixture(scope="module")
def ahead(play, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run whose rollouts are one step ahead."""
    folder = tmp_path_factory.mktemp("runs") / "ahead"
    assert play(folder, model, max_staleness=1) == 0, log(folder)
    assert [row["staleness"] for row in metrics(folder)] == [0, 1, 1]
    return folder


AHEAD = {
    "updated, not published, the next step in play": dict(fault="learn", at=2, after=True),
    **{
        point: pytest.param(order, marks=pytest.mark.slow)
        for point, order in {
            "an episode half written, of this step or the next": dict(
                fault="torn line", at=EVAL + EPISODES + 4
            ),
            "an episode of the last step": dict(fault="store", at=EVAL + 2 * EPISODES + 3),
            "published, not proven": dict(fault="prove", at=2),
            "logged, not saved": dict(fault="save", at=3),
            "nothing saved at all": dict(fault="learn", at=3, after=True, save_every=10),
        }.items()
    },
}


@pytest.mark.parametrize("order", AHEAD.values(), ids=list(AHEAD))
def test_killed_and_resumed_with_rollouts_ahead(
    order: dict[str, Any], play, model: Path, ahead: Path, tmp_path: Path
) -> None:
    """What was stored of later steps counts, what was not is played as it would have been: nothing
    is lost or counted twice."""
    folder = tmp_path / "run"
    assert play(folder, model, max_staleness=1, **order) == -9
    assert play(folder, model, max_staleness=1, resume=True) == 0, log(folder)
    assert_same(folder, ahead, ahead=True)


@pytest.mark.slow
def test_killed_anywhere_with_rollouts_ahead(play, model: Path, tmp_path: Path) -> None:
    whole, rng, order = (
        tmp_path / "whole",
        random.Random(5),
        dict(seed=5, max_staleness=2, max_steps=4),
    )
    assert play(whole, model, **order, fault="fsync") == 0
    writes = int(Path(f"{whole}.calls").read_text())
    for number in range(5):
        folder = tmp_path / f"run-{number}"
        at = rng.randint(1, writes)
        assert play(folder, model, **order, fault="fsync", at=at) == -9
        assert play(folder, model, **order, resume=True, fault="fsync", at=rng.randint(1, 12)) in (
            -9,
            0,
        )
        assert play(folder, model, **order, resume=True) == 0, (
            f"killed at write {at} of {writes}: {log(folder)}"
        )
        assert_same(folder, whole, steps=4, ahead=True)


def test_stored_episodes_give_the_same_update_without_the_engine(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Contract (a): with the later checkpoints gone, the steps are learnt again from the store, and
    nothing is played."""
    folder = tmp_path / "run"
    assert play(folder, model, save_total_limit=9) == 0
    for name in ("step-000002", "step-000003"):
        shutil.rmtree(folder / "checkpoints" / name)
    before = file_sha256(folder / "episodes/episodes-00000.jsonl")
    assert play(folder, model, resume=True, fault="speak", at=1) == 0, log(folder)
    assert file_sha256(folder / "episodes/episodes-00000.jsonl") == before
    assert weights(folder) == weights(undisturbed) and metrics(folder) == metrics(undisturbed)


@pytest.mark.parametrize(
    "signal",
    ["SIGINT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGUSR1"))],
)
def test_asked_to_stop_it_saves_the_last_finished_step(
    signal: str, play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """While an episode of step 3 is stored. Only every tenth step is saved by itself, so the
    checkpoint is the signal's."""
    folder = tmp_path / "run"
    assert (
        play(folder, model, fault="store", at=EVAL + 2 * EPISODES + 4, signal=signal, save_every=10)
        == 1
    )
    said = log(folder).splitlines()
    assert "stopped: the last finished step is saved; go on with --resume true" in said
    assert not any("Traceback" in line for line in said)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    verify(folder / "checkpoints/step-000002")
    assert play(folder, model, resume=True, save_every=10) == 0
    assert weights(folder) == weights(undisturbed) and metrics(folder) == metrics(undisturbed)


@pytest.mark.slow
def test_asked_to_stop_while_learning_it_finishes_the_step(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert play(folder, model, fault="learn", at=2, signal="SIGINT", save_every=10) == 1
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert play(folder, model, resume=True) == 0
    assert weights(folder) == weights(undisturbed)


def test_an_impatient_second_interrupt_saves_nothing_half_learnt(
    play, model: Path, tmp_path: Path
) -> None:
    """In the middle of a step the adapters are of no step: what is on disk stays as it is."""
    folder = tmp_path / "run"
    assert play(folder, model, fault="step", at=4, signal="SIGINT twice") == 1
    assert (
        "interrupted: go on from the newest checkpoint with --resume true"
        in log(folder).splitlines()
    )
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert play(folder, model, fault="optimizer file", at=2 * 2 + 1, signal="ENOSPC") == 1
    errors = [line for line in log(folder).splitlines() if line.startswith("error:")]
    assert (
        len(errors) == 1
        and "checkpoint of step 3" in errors[0]
        and "No space left on device" in errors[0]
    )
    assert "Traceback" not in log(folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000002",
    ]
    verify(folder / "checkpoints/step-000002")
    assert play(folder, model, resume=True) == 0
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_a_full_disk_while_logging(play, model: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The step was learnt and published, and its line cannot be written; it is done again."""
    folder = tmp_path / "run"
    assert play(folder, model, fault="metrics", at=2, signal="ENOSPC") == 1
    errors = [line for line in log(folder).splitlines() if line.startswith("error:")]
    assert (
        len(errors) == 1
        and "No space left on device" in errors[0]
        and "Traceback" not in log(folder)
    )
    assert play(folder, model, resume=True) == 0, log(folder)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize(
    "room", [24, *(pytest.param(room, marks=pytest.mark.slow) for room in (0, 8, 48))]
)
def test_a_disk_that_is_really_full(
    room: int, play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A small file system with `room` KiB left after two steps; without the right to mount one,
    files that may not grow."""
    disk = tmp_path / "disk"
    disk.mkdir()
    folder, filler = disk / "run", disk / "filler"
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk]).returncode
    )
    try:
        assert play(folder, model, max_steps=2) == 0
        if mounted:
            filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - room * 1024))
            assert play(folder, model, resume=True) == 1, log(folder)
        else:
            assert (
                play(folder, model, resume=True, fault="fsync", at=1 + room // 4, signal="ENOSPC")
                == 1
            ), log(folder)
        errors = re.findall(r"error: .*", log(folder))  # a bar may stand before it in the line
        assert len(errors) == 1 and "No space left on device" in errors[0], log(folder)
        assert "Traceback" not in log(folder)
        verify(folder / "checkpoints/step-000002")
        filler.unlink(missing_ok=True)
        assert play(folder, model, resume=True) == 0, log(folder)
        assert weights(folder) == weights(undisturbed)
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    path = folder / LAST / "adapters/first/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert play(folder, model, resume=True) == 0
    assert "skipping step-000003" in log(folder) and "resumed from step-000002" in log(folder)
    assert weights(folder) == weights(undisturbed)


def test_a_checkpoint_of_another_base_rank_or_seed_is_refused(
    play, model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    other = tiny_random_model(tmp_path / "other", seed=1)
    for order, words in (
        ((other, {}), "made for base"),
        ((model, {"lora_r": 8}), "r is 4, the policy says 8"),
        ((model, {"lora_target_modules": ["q_proj"]}), "tensors differ in name"),
        ((model, {"seed": 7}), "seed: the run began with 0"),
    ):
        assert play(folder, order[0], resume=True, **order[1]) == 2, log(folder)
        (error,) = [line for line in log(folder).splitlines() if line.startswith("error:")]
        assert words in error, error


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "template"])
def test_a_model_changed_in_its_place_is_refused(change: str, play, tmp_path: Path) -> None:
    folder, model = tmp_path / "run", tiny_random_model(tmp_path / "model")
    assert play(folder, model, max_steps=1) == 0
    if change == "weights":
        tiny_random_model(model, seed=1)
    else:
        path = model / "chat_template.jinja"
        path.write_text(path.read_text() + "{# changed #}")
    assert play(folder, model, resume=True) == 2
    words = {"weights": "with other weights", "template": "chat template"}[change]
    assert words in log(folder), log(folder)
