"""docs/reference/ says what the commands, files and variables are today."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from marlora.rollouts.episodes.codec import pack
from marlora.trainers.loop import checkpointing, ownership
from tests.reference_pages import (
    FOLDER,
    INNER,
    SAMPLE,
    columns,
    commands,
    facts,
    pages,
    variables_in_the_code,
)
from tests.trainers.small_run import trainer


@pytest.mark.parametrize("name", sorted(pages()))
def test_the_page_is_todays(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == pages()[name], (
        "run python -m tests.reference_pages"
    )


def test_every_command_and_flag_is_named() -> None:
    page = pages()["cli.md"]
    for name, command in commands().items():
        assert f"## marlora {name}\n" in page
        for action in command._actions:
            assert all(
                f"`{flag}`" in page or flag in ("-h", "--help") for flag in action.option_strings
            )


def test_every_column_of_a_line_is_named() -> None:
    assert {name for name, _ in columns(pack(SAMPLE))} == facts()["line"].keys()


def test_every_field_of_what_a_text_holds_is_named() -> None:
    page = pages()["formats.md"]
    for cls in INNER:
        part = page.partition(f"### {cls.__name__}\n")[2].partition("\n#")[0]
        assert all(f"| `{field.name}` |" in part for field in dataclasses.fields(cls))


def test_every_variable_of_ours_is_named() -> None:
    assert variables_in_the_code() == facts()["environment"].keys()


def test_files_and_state_are_those_of_a_run() -> None:
    folders = {f"{name}/" for name in ownership._FOLDERS}
    assert facts()["files"].keys() == folders | set(ownership._FILES.split())
    assert facts()["state"].keys() == set(checkpointing.STATE)


def test_keys_are_those_of_a_run(model: Path, tmp_path: Path) -> None:
    """summary.json, system.json, learned.jsonl and a checkpoint's files, of a run of one step."""
    trainer(tmp_path / "run", model, max_steps=1).train()
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000001"
    optional = {"heads", "adapters"}  # of runs that have them
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() - optional == facts()["summary"].keys()
    system = json.loads((checkpoint / "system.json").read_text(encoding="utf-8"))
    assert system.keys() == facts()["system"].keys()
    rows = (run / "learned.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[0]).keys() == facts()["learned"].keys()
    named = {name.partition("/")[0] for name in facts()["checkpoint"]}
    assert {path.name for path in checkpoint.iterdir()} == named
    there = {f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir()}
    assert {name for name in there if not name.startswith(".")} <= facts()["files"].keys()
