"""Checkpoints are whole or absent, and a damaged one is passed over aloud."""

from __future__ import annotations

import hashlib
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from marlora.agents.types import SettingError
from marlora.rollouts import files as rollout_files
from marlora.trainers import checkpoint as ckpt
from tests.repository import ROOT, modules


def save(run: Path, step: int, text: str = "weights") -> Path:
    def write(folder: Path) -> None:
        (folder / "adapters").mkdir()
        (folder / "adapters/a.bin").write_text(text)
        ckpt.write_json(folder / "system.json", {"step": step})

    return ckpt.publish_folder(run / "checkpoints" / f"step-{step:06d}", write)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_published_folder_lists_the_hash_of_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"].keys() == {"adapters/a.bin", "system.json"}
    assert manifest["sha256"]["adapters/a.bin"] == hashlib.sha256(b"weights").hexdigest()
    assert names(tmp_path) == ["step-000003"], "nothing staged is left"
    ckpt.verify(folder)


def test_the_name_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files are written, and until all of them and the manifest are durable, no checkpoint of
    that name is there."""
    target, durable = tmp_path / "checkpoints/step-000001", []

    def fsync(path: Path) -> None:
        durable.append(path.name)
        assert target.exists() == (path == target.parent)

    monkeypatch.setattr(ckpt, "fsync", fsync)
    save(tmp_path, 1)
    assert {"a.bin", "system.json", "manifest.json", "adapters", "checkpoints"} <= set(durable)
    assert durable[-1] == "checkpoints", "the rename itself is made durable"


def test_a_save_that_fails_leaves_nothing_and_the_earlier_one_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        ckpt.publish_folder(tmp_path / "checkpoints/step-000002", write)
    assert names(tmp_path) == ["step-000001"]
    ckpt.verify(tmp_path / "checkpoints/step-000001")


def truncate(folder: Path) -> None:
    (folder / "adapters/a.bin").write_text("weig")


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "adapters/a.bin").read_bytes())
    data[2] ^= 1
    (folder / "adapters/a.bin").write_bytes(data)


def lose_a_file(folder: Path) -> None:
    (folder / "system.json").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def tear_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "a.bin: its sha256"),
        (flip_a_bit, "a.bin: its sha256"),
        (lose_a_file, "system.json: missing"),
        (lose_the_manifest, "no readable manifest"),
        (tear_the_manifest, "no readable manifest"),
    ],
)
def test_the_loader_walks_back_over_damage_and_says_so(tmp_path: Path, damage, words: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints/step-000003")
    said: list[str] = []
    assert ckpt.newest_valid(tmp_path, said.append) == tmp_path / "checkpoints/step-000002"
    assert len(said) == 1 and said[0].startswith("skipping step-000003: ") and words in said[0]


def test_a_checkpoint_that_does_not_fit_is_passed_over_but_never_for_a_new_beginning(
    tmp_path: Path,
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    said: list[str] = []

    def fits(folder: Path) -> None:
        if folder.name == "step-000002":
            raise SettingError("made for another base")

    assert ckpt.newest_valid(tmp_path, said.append, fits) == tmp_path / "checkpoints/step-000001"
    assert said == ["skipping step-000002: made for another base"]

    def none_fits(folder: Path) -> None:
        raise SettingError(f"{folder.name} is of another base")

    with pytest.raises(SettingError, match="step-000002 is of another base"):
        ckpt.newest_valid(tmp_path, said.append, none_fits)


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert ckpt.newest_valid(tmp_path, print) is None
    lose_the_manifest(save(tmp_path, 1))
    assert ckpt.newest_valid(tmp_path, print) is None


def test_a_damaged_checkpoint_is_replaced_by_the_run_that_comes_to_its_step_again(
    tmp_path: Path,
) -> None:
    flip_a_bit(save(tmp_path, 1))
    ckpt.verify(save(tmp_path, 1))


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    ckpt.prune(tmp_path, 2, "step-000001")
    assert names(tmp_path) == ["step-000001", "step-000004", "step-000005"]
    ckpt.prune(tmp_path, 1, None)
    assert names(tmp_path) == ["step-000005"]


def test_sweep_deletes_what_a_kill_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-000002.4711", ".step-000000.deleted"):
        (tmp_path / "checkpoints" / name).mkdir()
    ckpt.sweep(tmp_path)
    assert names(tmp_path) == ["step-000001"]


def test_a_file_written_anew_is_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout_files.write_text(tmp_path / "x.json", "old")

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollout_files, "fsync", fail)
    with pytest.raises(OSError):
        rollout_files.write_text(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_tensor_files_follow_from_their_tensors_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {
        f"key{i}": "x" * i for i in range(8)
    }  # safetensors itself would write one of 40320 orders
    for name in ("one", "two"):
        ckpt.write_tensors(tmp_path / name, tensors, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert torch.equal(file.get_tensor("b"), tensors["b"]) and torch.equal(
            file.get_tensor("a"), tensors["a"]
        )


def test_nothing_is_pickled() -> None:
    forbidden = re.compile(
        r"\b(pickle|cPickle|dill|joblib|torch\.save|torch\.load|broadcast_object_list|all_gather_object)\b\s*[.(]|import"
        r" pickle"
    )
    for path in modules("agents", "rollouts", "trainers", "recipes"):
        found = forbidden.search((ROOT / path).read_text())
        assert found is None, f"{path}: {found.group()}" if found else ""


def test_lines_of_a_log_are_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    """On a disk that takes 40 bytes more, by the limit on a file's size; the error names the
    file."""
    path = tmp_path / "metrics.jsonl"
    rollout_files.append_text(path, "x" * 59 + "\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"earlier lines are whole: .*metrics\.jsonl"):
            rollout_files.append_text(path, "y" * 99 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "x" * 59 + "\n"
    rollout_files.append_text(path, "z\n")
    assert path.read_text() == "x" * 59 + "\nz\n"
