"""The commands that a run prints at its end, pasted into a shell in the folder it was started in,
for a team, a reward, a tool and a task set of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.repository import ROOT

MINE = '''
from dataclasses import dataclass

from marlora.agents.system import System
from marlora.agents.tools.tools import tool
from marlora.agents.types import Task


@dataclass
class Pair(System):
    async def run(self, task, team):
        first = await team["first"].reply(task.prompt)
        last = await team["last"].reply(f"{first.text}+{task.meta['c']}")
        return last.text


@tool
def two() -> int:
    """2."""
    return 2


def bytes_mod_7(task, episode):
    return sum(str(episode.output).encode()) % 7 / 6


def sums(*, split="train", seed=0):
    digits = range(6) if split == "train" else range(6, 9)
    return [Task(f"{split}-{n}", f"{n}+1", str(n + 1), meta={"c": 1}) for n in digits]
'''
SETTINGS = {
    "output_dir": "runs/my pair",
    "system": {"class": "mine:Pair", "agents": ["first", "last"]},
    "agents": {"last": {"tools": ["mine:two"]}},
    "rewards": ["mine:bytes_mod_7"],
    "tasks": "mine:sums",
    "engine": "transformers",
    "num_eval_tasks": 2,
    "max_steps": 1,
    "tasks_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 4,
    "lora_r": 2,
}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_run_prints_works_as_printed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    model = tiny_random_model(tmp_path / "model")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": str(model)}))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"

    def shell(command: str, stdin: str = "") -> str:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=env, input=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        return done.stdout

    recipe = ROOT / "recipes" / "grpo_team.py"  # its own folder, not this one, is on the path
    printed = shell(f"'{sys.executable}' '{recipe}' --config mine.yaml")
    ablate, play = printed.partition("next:\n")[2].splitlines()
    assert "base team" in shell(ablate)
    assert "team: " in shell(play, "7+1\n") and "failed" not in shell(play, "7+1\n")
    assert "mine:Pair" in shell("cat 'runs/my pair/checkpoints/step-000001/system.json'")
    exported = shell("marlora export 'runs/my pair/checkpoints/step-000001' --output 'given away'")
    card = (tmp_path / "given away" / "README.md").read_text()
    commands = [line for line in card.splitlines() if line.startswith("marlora ")]
    assert "given away" in exported and len(commands) == 2
    assert "trained team" in shell(commands[0] + " --engine transformers")
    assert "team: " in shell(commands[1] + " --engine transformers", "7+1\n")
