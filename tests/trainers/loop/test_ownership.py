"""A run folder: only what a run wrote is deleted, one run owns it, and places that hold other
things are refused before anything is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from marlora.agents.types import SettingError
from marlora.trainers.loop import checks, lock, ownership
from marlora.trainers.loop.lock import LOCK, FolderLock
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from tests.repository import ROOT

CONFIG = "output_dir: runs/x\nmodel: m\nsystem: {}\nagents: {}\n"
WRITTEN = {  # what a run writes, one file of each kind
    "config.yaml": CONFIG,
    "metrics.jsonl": '{"step": 1}\n',
    "learned.jsonl": '{"step": 1}\n',
    "proofs.json": "[]\n",
    "warnings.log": "w\n",
    "summary.json": "{}\n",
    "report.html": "<html>\n",
    "vllm-tiny-0.log": "l\n",
    "vllm-tiny-0.key": "k\n",
    "episodes/episodes-00000.jsonl": "{}\n",
    "episodes/.lock": "",
    "checkpoints/step-000001/manifest.json": "{}\n",
    "checkpoints/step-000001/system.json": "{}\n",
    "checkpoints/step-000001/values/rules.json": "1\n",
    "checkpoints/step-000001/adapters/a/adapter_model.safetensors": "",
    "checkpoints/step-000001/trainer/state.json": "{}\n",
    "checkpoints/.step-000002.17/trainer/a.safetensors": "",
    "checkpoints/.step-000000.deleted/system.json": "{}\n",
    "versions/a-v0-0123abcd/adapter_config.json": "{}\n",
    "versions/.a-v1-0123abcd/adapter_config.json": "{}\n",
    "dumps/step-000003.json": "{}\n",
    "tracking/marlora/1.2/hparams.yml": "{}\n",
    "eval/eval.json": "{}\n",
    "eval/sampled/episodes-00000.jsonl": "{}\n",
    ".summary.json.4711": "{",
}
FOREIGN = [  # what somebody may keep in or beside a run, and a run never writes
    "notes.txt",
    ".git/HEAD",
    "src/main.py",
    "episodes/mine.txt",
    "episodes/old/episodes-00000.jsonl",
    "checkpoints/best/adapter_model.safetensors",
    "checkpoints/step-000001/notes.md",
    "checkpoints/step-000001/trainer/deeper/state.json",
    "versions/mine/adapter_config.json",
    "dumps/core.1",
    "eval/paper.tex",
    "verifier/paper.tex",
    "server.log",
    "config.yaml.bak",
    "summary.json/inner",
    "empty/",
    "checkpoints/empty/",
]


def fill(folder: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def add(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith("/"):
        path.mkdir(parents=True)
        return path
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def prepare(folder: Path | str, **changes: bool | str) -> None:
    """What a run does with its folder before it begins, and at its end."""
    config = GRPOConfig(output_dir=str(folder), **changes)  # type: ignore[arg-type]
    owned = checks.claim_folder(config, lambda line: None)
    try:
        checks.prepare_folder(config)
    finally:
        owned.release()


def test_what_a_run_wrote_is_replaced(tmp_path: Path) -> None:
    """With the marker, and of version 0.1 without it."""
    for name in ("marked", "earlier"):
        folder = fill(tmp_path / name, WRITTEN)
        if name == "marked":
            ownership.mark(folder)
        assert ownership.foreign(folder) == []
        with pytest.raises(SettingError, match="holds an earlier run; set resume to go on"):
            prepare(folder)
        prepare(folder, overwrite=True)
        assert [path.name for path in folder.rglob("*")] == [ownership.MARKER]


@pytest.mark.parametrize("there", [[], [LOCK]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_without_a_run_becomes_one(
    there: list[str], overwrite: bool, tmp_path: Path
) -> None:
    """Whether it is new, empty, or holds the lock of a run that ended before it wrote anything."""
    prepare(tmp_path / "new", overwrite=overwrite)
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in there:
        (folder / name).touch()
    prepare(folder, overwrite=overwrite)
    assert ownership.marked(tmp_path / "new") and ownership.marked(folder)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "earlier"])
def test_a_folder_that_holds_anything_else_is_refused_by_name(
    tmp_path: Path, name: str, marked: bool
) -> None:
    folder = fill(tmp_path / "run", WRITTEN)
    if marked:
        ownership.mark(folder)
    add(folder, name)
    before = snapshot(folder)
    with pytest.raises(SettingError) as caught:
        prepare(folder, overwrite=True)
    assert name.rstrip("/") in str(caught.value) and str(folder) in str(caught.value)
    assert snapshot(folder) == before


def test_links_are_neither_followed_nor_deleted(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", {"step-000001/system.json": "{}"})
    for name in ("checkpoints", "summary.json"):
        folder = fill(
            tmp_path / f"run-{name}", {"config.yaml": CONFIG, "metrics.jsonl": '{"step": 1}'}
        )
        ownership.mark(folder)
        (folder / name).symlink_to(elsewhere)
        with pytest.raises(SettingError, match=name):
            prepare(folder, overwrite=True)
    assert snapshot(elsewhere)["step-000001/system.json"] == "{}"
    real = fill(tmp_path / "real", WRITTEN)
    (tmp_path / "link").symlink_to(real)
    prepare(tmp_path / "link", overwrite=True)  # a run folder may be reached through a link
    assert (tmp_path / "link").is_symlink() and [p.name for p in real.iterdir()] == [".marlora-run"]


@pytest.mark.parametrize(
    "content",
    [
        {"config.yaml": "name: app\n"},
        {"config.yaml": "name: app\n", "metrics.jsonl": '{"step": 1}\n'},
        {"config.yaml": CONFIG},
        {"config.yaml": "- 1\n", "episodes/episodes-00000.jsonl": "{}\n"},
        {"config.yaml": ": :\n", "metrics.jsonl": "x\n"},
        {"metrics.jsonl": '{"step": 1}\n'},
        {"summary.json": "{}\n"},
    ],
)
@pytest.mark.parametrize("setting", ["", "resume", "overwrite"])
def test_files_of_others_under_our_names_are_not_a_run(
    tmp_path: Path, content: dict[str, str], setting: str
) -> None:
    folder = fill(tmp_path / "app", content)
    before = snapshot(folder)
    with pytest.raises(SettingError, match=r"app: (holds|overwrite deletes run folders only)"):
        prepare(folder, **{setting: True} if setting else {})
    assert snapshot(folder) == before


def test_places_that_hold_everything_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "home/me/work"
    fill(work, {"config.yaml": CONFIG, "metrics.jsonl": '{"step": 1}\n'})
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    monkeypatch.chdir(work)
    (work / "here").symlink_to(".")
    (work / "up").symlink_to("..")
    (work / "runs").mkdir()
    before = snapshot(tmp_path)
    places = [".", "", "/", "..", "./", "here", "up", "runs/..", str(work), str(home), "~", "~/x"]
    for place in [*places, str(tmp_path), str(tmp_path / "home/me")]:
        for change in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(SettingError, match="output_dir"):
                prepare(place, **change)
    assert snapshot(tmp_path) == before
    prepare("runs/first")
    prepare("runs/first", overwrite=True)
    assert (work / "runs/first" / ownership.MARKER).is_file()


def test_a_deletion_that_was_cut_off_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the run that was to go is resumed from."""
    folder = fill(tmp_path / "run", WRITTEN)
    ownership.mark(folder)
    real, left = Path.unlink, [5]

    def unlink(path: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(SettingError, match="holds an earlier run"):
        prepare(folder)
    prepare(folder, resume=True)
    assert [path.name for path in folder.rglob("*")] == [ownership.MARKER]


def test_where_running_servers_write_their_addresses_stays(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", WRITTEN | {"endpoints/node-1.json": "{}"})
    prepare(folder, overwrite=True, endpoints=str(folder / "endpoints"), engine="vllm")
    assert sorted(path.name for path in folder.iterdir()) == [ownership.MARKER, "endpoints"]
    assert (folder / "endpoints/node-1.json").read_text() == "{}"


# one owner


OWNER = """
import sys, time
from pathlib import Path
from marlora.trainers.loop.lock import FolderLock
FolderLock(Path(sys.argv[1])).take()
print("owned", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path):
    """The pid of a process that owns tmp_path/run, and a function that kills it."""
    folder = fill(tmp_path / "run", WRITTEN)
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "WRITTEN", 0.2)


def test_a_second_run_is_refused_with_host_and_pid_and_goes_on_after_a_dead_owner(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "run"
    before = snapshot(folder)
    for change in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(SettingError) as caught:
            prepare(folder, **change)
        (line,) = str(caught.value).splitlines()
        assert f"pid {owner.pid}" in line and f"host {os.uname().nodename}" in line
    assert snapshot(folder) == before
    owner.kill()
    owner.wait()
    start = time.monotonic()
    prepare(folder, overwrite=True)
    assert time.monotonic() - start < 5, "on the same machine a dead owner is seen at once"
    assert [path.name for path in folder.iterdir()] == [ownership.MARKER]


def test_a_run_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    with pytest.raises(SettingError, match=f"pid {os.getpid()}"):
        second.take()
    first.release()
    second.take()
    second.release()
    second.release()
    assert list(tmp_path.iterdir()) == []


def elsewhere(**changes: object) -> dict[str, object]:
    """The record of an owner on another machine."""
    mine = {**lock.this_process(), "host": "node7", "boot": "another", "pid": 7}
    return {**mine, "token": "its", "beat": 1, **changes}


def test_an_owner_on_another_machine_is_alive_as_long_as_it_renews_its_record(
    tmp_path: Path, fast: None
) -> None:
    """Where machines share a folder and not its locks."""
    path, ended = tmp_path / LOCK, threading.Event()

    def renew() -> None:
        beat = 1
        while not ended.wait(0.1):
            beat += 1
            path.write_text(json.dumps(elsewhere(beat=beat)))

    path.write_text(json.dumps(elsewhere()))
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(SettingError, match="host node7, pid 7"):
            FolderLock(tmp_path).take()
    finally:
        ended.set()
        thread.join()
    said: list[str] = []
    mine = FolderLock(tmp_path, said.append)
    mine.take()  # silent for long enough: dead
    assert "host node7, pid 7" in said[0]
    path.write_text(json.dumps(elsewhere(host="node8")))  # it took the folder over
    wait_until(lambda: mine.lost != "")
    with pytest.raises(SettingError, match="host node8, pid 7 has taken it over"):
        mine.check()
    mine.release()
    assert path.exists(), "the lock is the other's now"


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_of_many_that_begin_at_once_one_owns_the_folder(tmp_path: Path, fast: None) -> None:
    locks = [FolderLock(tmp_path) for _ in range(16)]
    refused: list[str] = []

    def take(each: FolderLock) -> None:
        try:
            each.take()
        except SettingError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(each,)) for each in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 15
    for each in locks:
        each.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "null"])
def test_a_lock_that_cannot_be_read_belongs_to_nobody(
    tmp_path: Path, fast: None, content: str
) -> None:
    """Its owner died before it wrote the record."""
    (tmp_path / LOCK).write_text(content)
    mine = FolderLock(tmp_path)
    mine.take()
    mine.release()


def test_a_child_that_outlives_a_dead_owner_does_not_keep_the_folder(tmp_path: Path) -> None:
    """It has inherited the lock."""
    program = OWNER.replace("time.sleep(60)", "") + (
        "import os\nif os.fork() == 0:\n    os.close(1); os.close(2); time.sleep(20)\nos._exit(0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, timeout=60
    )
    assert process.stdout == b"owned\n"
    mine = FolderLock(tmp_path)
    mine.take()
    mine.release()


def test_what_killed_processes_have_staged_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    """The names under which files and folders are written before they get their own."""
    staged = [
        ".summary.json.4711",
        ".report.html.4711",
        "..marlora-run.4711",
        "dumps/.step-000001.json.12",
        "episodes/values/.0123456789abcdef.json.4711",
        ".verifier.4711/manifest.json",
    ]
    kept = [
        "summary.json",
        "episodes/values/0123456789abcdef.json",
        "episodes/.lock",
        ".notes.txt.4711",
        "episodes/values/.mine.txt.4711",
        ".summary.json",
    ]
    for name in (*staged, *kept):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{", encoding="utf-8")
    ownership.remove_staged(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)
