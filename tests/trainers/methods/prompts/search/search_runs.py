"""What the tests of searches over prompts ask of a run: its end, the same on two ranks, and what its
checkpoint is worth."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.recipes.cli.main import main
from marlora.rollouts.checkpoints import team as teams
from marlora.rollouts.engines.scripted import Answer, ScriptedEngine
from tests.trainers.forks import two_ranks


def end(made: Any) -> dict[str, Any]:
    """What a run ends with: the values, the archive, what the method remembers."""
    state = {
        "values": made.run.values,
        "archive": made.search.state_dict(),
        "memory": made.memory.state_dict(),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


def summary_of(made: Any) -> dict[str, Any]:
    text = (made.spec.config.folder / "summary.json").read_text(encoding="utf-8")
    summary: dict[str, Any] = json.loads(text)
    return summary


def play_one(trainer: Callable[[Path, Path], Any]) -> None:
    """Play a run, as the program FOLDER MODEL; each rank writes its end."""
    made = trainer(Path(sys.argv[1]), Path(sys.argv[2]))
    made.train()
    path = Path(f"{sys.argv[1]}.rank{made.run.ranks.rank}.json")
    path.write_text(json.dumps(end(made)), encoding="utf-8")


def on_two_ranks(program: str, whole: Any, folder: Path) -> list[Any]:
    """The ends of such a program's run on two ranks."""
    done = two_ranks(program, folder / "two", whole.args.model)
    assert done.returncode == 0, done.stderr[-4000:]
    paths = [folder / f"two.rank{rank}.json" for rank in (0, 1)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def evaluated(
    made: Any, say: Answer, step: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What `marlora eval` makes of a run's checkpoint, which is what the run has said."""

    async def scripted(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(say, context=16_384)

    monkeypatch.setattr(teams, "start_engine", scripted)
    checkpoint = made.spec.config.folder / "checkpoints" / f"step-{step:06d}"
    argv = ["eval", str(checkpoint), "--trust_checkpoint", "--output", str(folder / "eval")]
    assert main(argv) in (0, None)
    text = (folder / "eval" / "eval.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["eval"]
    said = summary_of(made)["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == said[when]["accuracy"]
    return found
