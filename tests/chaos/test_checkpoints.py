"""A checkpoint that is damaged in any file, or is somebody else's: resume goes back to the newest
that is whole and fits, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from marlora.agents.types import SettingError
from marlora.trainers import checkpoint as ckpt
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers import small_run

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "torn": lambda data: data[: len(data) // 2],
    "two bytes short": lambda data: data[:-2],
    "emptied": lambda data: b"",
    "a bit flipped at the start": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a bit flipped at the end": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "a block of zeros": lambda data: (
        data[: len(data) // 4] + bytes(len(data) // 2) + data[len(data) // 4 + len(data) // 2 :]
    ),
    "gone": lambda data: None,
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    small_run.trainer(folder, model, max_steps=2, num_generations=2, tasks_per_step=1).train()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def newest(run: Path) -> Path:
    return run / "checkpoints/step-000002"


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_found_and_named(how: str, run: Path) -> None:
    files = sorted(path for path in newest(run).rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors"} and len(
        files
    ) == 2 * 2 + 2 + 5, "adapters, optimizers; system, values, their origin, state, manifest"
    for path in files:
        data = path.read_bytes()
        damaged = DAMAGES[how](data)
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        said: list[str] = []
        assert ckpt.newest_valid(run, said.append) == run / "checkpoints/step-000001", path.name
        assert (
            len(said) == 1 and said[0].startswith("skipping step-000002: ") and path.name in said[0]
        ), said
        path.write_bytes(data)
    assert ckpt.newest_valid(run, print) == newest(run), "mended, it is taken"


def stamped(folder: Path) -> None:
    """Give a folder a manifest that holds, as whoever wrote it would have."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != ckpt.MANIFEST
    )
    hashes = {str(path.relative_to(folder)): ckpt.file_sha256(path) for path in files}
    ckpt.write_json(folder / ckpt.MANIFEST, {"schema": ckpt.SCHEMA, "sha256": hashes})
    ckpt.verify(folder)


def resumed(
    run: Path, model: Path, capsys: pytest.CaptureFixture[str], **settings: object
) -> tuple[int, str]:
    """(step it went on from, what was said)."""
    capsys.readouterr()
    made = small_run.trainer(
        run, model, max_steps=2, num_generations=2, tasks_per_step=1, resume=True, **settings
    )
    with made.run as opened:
        return opened.step, capsys.readouterr().err


@pytest.mark.parametrize("kind", ["rank", "base", "seed"])
def test_somebody_elses_checkpoint_among_ours_is_passed_over(
    kind: str, run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied into the wrong folder, say: whole, the newest, and of another rank, base or seed."""
    changes = {"rank": {"lora_r": 8}, "base": {}, "seed": {"seed": 5}}[kind]
    of = tiny_random_model(tmp_path / "other", seed=1) if kind == "base" else model
    small_run.trainer(
        tmp_path / "theirs", of, max_steps=2, num_generations=2, tasks_per_step=1, **changes
    ).train()
    shutil.rmtree(newest(run))
    shutil.copytree(newest(tmp_path / "theirs"), newest(run))
    ckpt.verify(newest(run))
    step, said = resumed(run, model, capsys)
    words = {
        "rank": "r is 8, the policy says 4",
        "base": "made for base",
        "seed": "the run began with 5",
    }[kind]
    assert (
        step == 1
        and "skipping step-000002" in said
        and words in said
        and "resumed from step-000001" in said
    )
    shutil.rmtree(run / "checkpoints/step-000001")
    with pytest.raises(SettingError, match=words):
        resumed(run, model, capsys)


def test_a_whole_checkpoint_in_another_form_is_no_crash_and_no_new_beginning(
    run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written by another version: its manifest holds, and a key that we read is not there."""
    for name in ("step-000001", "step-000002"):
        path = run / "checkpoints" / name / "trainer/state.json"
        state = json.loads(path.read_text())
        del state["monitor"]
        path.write_text(json.dumps(state))
        stamped(path.parent.parent)
        if name == "step-000001":
            step, said = resumed(run, model, capsys)
            assert step == 2 and "skipping" not in said
    with pytest.raises(
        SettingError, match=r"step-000002: whole, but not in the form .*KeyError: 'monitor'"
    ):
        resumed(run, model, capsys)


@pytest.mark.parametrize(
    "manifest",
    [
        "{}",
        '{"sha256": {}}',
        '{"sha256": []}',
        '{"sha256": "x"}',
        "[]",
        "null",
        "\x00" * 100,
        "\udcff",
    ],
)
def test_a_manifest_of_any_other_form_is_no_manifest(manifest: str, run: Path) -> None:
    (newest(run) / ckpt.MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    said: list[str] = []
    assert ckpt.newest_valid(run, said.append) == run / "checkpoints/step-000001"
    assert "not a complete checkpoint" in said[0]


def test_moving_baselines_are_restored(model: Path, tmp_path: Path) -> None:
    """RAE's baseline is an average over steps: a run that was cut has the same one, and so the same
    adapters, as one that was not."""

    def run(folder: Path, steps: int, **settings: object) -> tuple[dict[str, float], object]:
        made = small_run.trainer(
            folder,
            model,
            max_steps=steps,
            num_generations=2,
            tasks_per_step=1,
            credit="rae",
            **settings,
        )
        return made.run.learner.credit_state, made.train()["policies"]

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 1)
    found = run(tmp_path / "cut", 3, resume=True)
    assert whole[0] and found == whole
