"""`marlora export`: what is copied, what the card says, and that nothing is uploaded unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from marlora.recipes.cli.checkpoint.export import card, speaking
from marlora.recipes.cli.main import main
from marlora.rollouts.checkpoints.reader import read_checkpoint
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers import small_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    small_run.trainer(folder / "run", tiny_random_model(folder / "model"), max_steps=1).train()
    return folder / "run" / "checkpoints" / "step-000001"


class Hub:
    """Stands in for the hub: keeps what it is asked."""

    asked: list[tuple[str, Any]] = []

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        Hub.asked.append((name, private))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.asked.append(
            (
                repo_id,
                sorted(
                    str(p.relative_to(folder_path))
                    for p in Path(folder_path).rglob("*")
                    if p.is_file()
                ),
            )
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    return Hub.asked


def export(*argv: object) -> int:
    try:
        main(["export", *map(str, argv)])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_a_folder_to_give_away(
    checkpoint: Path, tmp_path: Path, hub: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, "--output", tmp_path / "team") == 0
    assert hub == [] and "nothing was uploaded" in capsys.readouterr().err
    found = {
        str(p.relative_to(tmp_path / "team")) for p in (tmp_path / "team").rglob("*") if p.is_file()
    }
    adapters = {
        f"adapters/{p}/{f}"
        for p in ("first", "last")
        for f in ("adapter_config.json", "adapter_model.safetensors")
    }
    values = {"values/values.json", "values/origin.json"}
    assert found == {"README.md", "system.json", *adapters, *values}
    assert read_checkpoint(tmp_path / "team") == read_checkpoint(checkpoint), (
        "it is a checkpoint still"
    )
    assert (
        export(checkpoint, "--output", tmp_path / "team") == 2
        and "name a new folder" in capsys.readouterr().err
    )


def test_the_card_says_who_and_how_well(checkpoint: Path, tmp_path: Path) -> None:
    data, summary = (
        read_checkpoint(checkpoint),
        json.loads((checkpoint.parent.parent / "summary.json").read_text()),
    )
    made = card(data, summary, "someone/team")
    _, head, body = made.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "tags": ["lora", "multi-agent", "marlora"],
    }
    assert str(checkpoint.parent.parent.parent) not in made, "no path of this machine"
    for agent in ("first", "last"):
        assert f"| {agent} |" in body and data["adapters"][agent]["sha256"][:16] in body
    assert f"{summary['eval']['after']['accuracy']:.3f}" in body and "# team" in body
    data["base"]["name"] = "Qwen/Qwen2.5-0.5B-Instruct"
    made = card(data, {}, "team")
    assert "base_model: Qwen/Qwen2.5-0.5B-Instruct" in made and "Measured" not in made


def test_it_is_uploaded_only_if_told_where_to(
    checkpoint: Path, tmp_path: Path, hub: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint, "--output", tmp_path / "a", "--push_to_hub", "someone") == 2
    assert "OWNER/NAME" in capsys.readouterr().err and not (tmp_path / "a").exists() and hub == []
    assert export(checkpoint, "--output", tmp_path / "a", "--push_to_hub", "someone/team") == 0
    assert (
        export(checkpoint, "--output", tmp_path / "b", "--push_to_hub", "someone/team", "--public")
        == 0
    )
    (first, private), (_, names), (_, public), _ = hub
    assert (first, private, public) == ("someone/team", True, False) and "README.md" in names
    assert "https://hub/someone/team" in capsys.readouterr().out


ELSEWHERE: dict[str, Any] = {
    "base": {"name": "/data/secret-project/qwen"},
    "bases": {"/data/secret-project/qwen": {"policies": ["solver"]}},
    "recipe": "grpo_team",
    "step": 3,
    "system": {
        "class": "mine:Pair",
        "arguments": {"prompts": {"solver": "Say {c}."}, "operators": ["mine:half"]},
    },
    "agents": [
        {"name": "solver", "role": "solves | and\nchecks", "policy": "solver"},
        {"name": "critic", "role": "r" * 300, "policy": "gpt"},
        {"name": "judge", "policy": "base"},
    ],
    "policies": {
        "solver": {"name": "solver"},
        "gpt": {"name": "gpt", "url": "https://example.org/v1", "base": "gpt-5"},
        "base": {"name": "base"},
    },
    "adapters": {"solver": {"sha256": "ab" * 32, "trained": True}},
    "tasks": {"name": "/data/secret-project/tasks.jsonl", "args": {}, "seed": 4},
    "rewards": ["judged"],
}


def test_the_card_of_a_team_of_many_kinds_is_right_whole_and_private() -> None:
    text = card(ELSEWHERE, {}, "someone/team", repository="someone/team", meta={"c": 5})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| solver | solves \\| and checks | solver | LoRA, sha256 `abababababababab` |",
        f"| critic | {'r' * 300} | gpt | a model asked over the network, not part of this"
        " repository |",
        "| judge |  | base | the base model, no adapter |",
    ]
    assert "3 agents" in text and "1 LoRA adapter," in text and "`qwen`" in text
    assert "/home" not in text and "secret-project" not in text and "`tasks.jsonl`" in text
    flags = "--system mine:Pair --trust_checkpoint"
    assert f"\nmarlora eval team {flags}\n" in text
    assert f"\nmarlora play team {flags} --meta '{{\"c\": 5}}'\n" in text
    assert "hf download someone/team --local-dir team" in text


def test_the_card_of_tasks_given_in_python() -> None:
    data = {**ELSEWHERE, "tasks": {**ELSEWHERE["tasks"], "name": ""}, "adapters": {}}
    text = card(data, {}, "team")
    assert "--tasks TASKS" in text and "peft" not in text.lower() and "0 LoRA adapters" in text


def test_no_path_of_this_machine_goes_to_the_hub(
    checkpoint: Path, tmp_path: Path, hub: list[tuple[str, Any]]
) -> None:
    assert export(checkpoint, "--output", tmp_path / "team", "--push_to_hub", "someone/team") == 0
    sent = [p for p in (tmp_path / "team").rglob("*") if p.suffix in (".json", ".md")]
    assert len(sent) == 6 and "model" in read_checkpoint(tmp_path / "team")["bases"]
    for path in sent:
        assert str(checkpoint.parents[2]) not in path.read_text(), path.name


def test_the_card_names_the_policy_that_an_agent_speaks_with_now() -> None:
    agents = [{"name": "a", "policy": "a"}, {"name": "b", "policy": "b"}]
    spoken = speaking({"agents": agents}, {"a.policy": "b", "b.prompt": "Add."})
    assert [agent["policy"] for agent in spoken] == ["b", "b"]
