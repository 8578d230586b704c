"""`marlora init NAME`: a folder with a team, a reward, data and a config, which learn offline at
once and are there to be changed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from marlora.agents.types import SettingError
from marlora.rollouts.tasks.toy import tiny_tasks

ROWS = 10  # of each split

TEAM = '''"""The team: ordinary Python. An agent replies; what it is shown is up to you."""

from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.types import Task, Turn


class Sum(System):
    """`first` adds the first two numbers, `last` adds the third to what `first` wrote."""

    async def run(self, task: Task, team: Team) -> Turn:
        first = await team["first"].reply(task.prompt)
        third = task.prompt.rpartition("+")[2]
        return await team["last"].reply(f"{first.text}+{third}", reads=[first])
'''
REWARDS = '''"""The reward: a function of a task and of what the team did, from 0 to 1."""

from marlora.agents.types import Task
from marlora.rollouts.types import Episode


def right_sum(task: Task, episode: Episode) -> float:
    """1 if the output is the sum, else 0."""
    return float((episode.output or "").strip() == task.answer)
'''
CONFIG = """# marlora train                             (in this folder; a minute on two CPU cores)
# marlora train config.yaml --dry_run true  (the plan alone)
# marlora train config.yaml --help          (every setting)
recipe: grpo_team               # marlora recipes lists the others
output_dir: run
model: tiny                     # then a folder or a hub name, such as Qwen/Qwen2.5-0.5B-Instruct
engine: transformers            # auto takes vLLM where it is installed
system:
  class: team:Sum               # team.py
  agents: [first, last]
agents:
  first: {role: adds two numbers, prompt: first}
  last: {role: adds the third number, prompt: last}
tasks: data                     # train.jsonl and eval.jsonl there
rewards: [rewards:right_sum]    # rewards.py
num_eval_tasks: 10

max_steps: 20
tasks_per_step: 10
num_generations: 8
max_completion_length: 5
learning_rate: 2.0e-3
"""


def cmd_init(args: argparse.Namespace) -> None:
    """Write a folder with a team, a reward, data and a config that train offline in a minute."""
    folder = Path(args.name)
    if folder.exists():
        raise SettingError(f"init {args.name}: exists already; name a new folder")
    (folder / "data").mkdir(parents=True)
    files = {"team.py": TEAM, "rewards.py": REWARDS, "config.yaml": CONFIG}
    for split in ("train", "eval"):
        rows = [{"prompt": t.prompt, "answer": t.answer} for t in tiny_tasks(split)[:ROWS]]
        files[f"data/{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}: {', '.join(files)}\nnow: cd {folder} && marlora train")


def add_init(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora init`."""
    command.add_argument("name", help="the folder to make")
