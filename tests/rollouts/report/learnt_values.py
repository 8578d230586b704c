"""The folder of a run that learnt texts, a mapping, a number and logits by search: what the report
shows beside weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from marlora.agents.state import TeamState
from marlora.agents.transcript import Operation
from marlora.agents.types import Decision, Message, Reward, Task, Turn, Usage
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode, Kind
from marlora.trainers.values.search import Candidate, Search

TASKS = [f"t{n}" for n in range(4)]
PROMPTS = (
    "Solve the task.\nShow your work.\nAnswer with a number.",
    "Solve the task step by step.\nShow your work.\nAnswer with a number.",
    "Solve the task step by step.\nShow your work.\nCheck it.\nAnswer with one number.",
)
MAPPING = ("base", "base", "adds")
STEPS = (0, 1, 2, 3)  # what was in force: PROMPTS[0], [1], [1], [2]
IN_FORCE = (0, 1, 1, 2)


def logits(edges: int, step: int) -> dict[str, dict[str, float]]:
    """A table of so many binary decisions; the even ones go up, the odd ones down."""
    return {
        f"a{n // 6}->b{n % 6}": {"on": 0.8 * step * (-1) ** n, "off": 0.0} for n in range(edges)
    }


def state(step: int, edges: int) -> TeamState:
    number = IN_FORCE[step]
    values: dict[str, Any] = {
        "edges": logits(edges, step),
        "first.policy": MAPPING[number],
        "second.policy": "base",
        "temperature": 0.5 + 0.1 * step,
    }
    return TeamState(values=values | ({"first.prompt": PROMPTS[number]} if number else {}))


def usage(scale: int, cost: float = 0.0) -> Usage:
    return Usage(scale, 100 * scale, 10 * scale, 0.5 * scale, 0, cost)


def played(
    kind: Kind, group: str, task: str, step: int, value: float, state: TeamState, **more: Any
) -> Episode:
    """An episode with an operation between its turns and a decision."""
    told = (Message("user", f"solve {task}"),)
    turns = (
        Turn(0, "first", told, text="a draft", token_ids=(1, 2), logprobs=(-0.5, -0.1)),
        Turn(2, "second", told, text="7", reads=(1,), token_ids=(3,), logprobs=(-0.1,)),
    )
    return Episode(
        f"{group}/0",
        group,
        Task(task, f"task {task}", "7"),
        kind=kind,
        step=step,
        state=state,
        turns=turns,
        operations=(Operation(1, "majority", (0,), "a draft wins"),),
        decisions=(Decision(0, "a0->b0", ("on", "off"), "on", -0.5),),
        output="7",
        output_from=(2,),
        rewards=(Reward("correct", value),),
        usage={"first": usage(1), "second": usage(1)},
        **more,
    )


def archive(evil: str) -> Search:
    """Four candidates of a search: the second was adopted, the third is lost, the last adopted."""
    search = Search("prompts", 0)
    start = search.add(Candidate({"first.prompt": PROMPTS[0]}, "start"))
    search.score(start.id, {task: 0.25 for task in TASKS})
    search.adopt(start.id)
    better = Candidate({"first.prompt": PROMPTS[1]}, "optimizer", "steps help", parents=("0",))
    search.add(better)
    search.score("1", {task: 0.5 for task in TASKS})
    search.adopt("1", "better: 0.5000 against 0.2500 on 4 tasks")
    lost = Candidate({"first.prompt": evil}, evil, evil, fault=evil, parents=("1",))
    search.add(lost)
    both = Candidate(
        {"first.prompt": PROMPTS[2]}, "optimizer", "a check is missing", parents=("1", "0"), round=3
    )
    search.add(both)
    search.score("3", {task: 0.75 for task in TASKS})
    search.adopt("3", "better: 0.7500 against 0.5000 on 4 tasks")
    return search


def ledger() -> dict[str, Any]:
    def row(scale: int, cost: float = 0.0) -> dict[str, Any]:
        return {
            "calls": scale,
            "prompt_tokens": 100 * scale,
            "sampled_tokens": 10 * scale,
            "seconds": 0.5 * scale,
            "cached_tokens": 0,
            "cost": cost,
        }

    return {
        "ledger": {
            "train": {"first": row(12), "second": row(12)},
            "aside": {"optimizer": row(3, 0.25)},
            "eval": {"first": row(8), "second": row(8)},
        },
        "ledger_by_policy": {
            "train": {"base": row(24)},
            "aside": {"optimizer": row(3, 0.25)},
            "eval": {"base": row(16)},
        },
        "budget": {
            "limit": {"tokens": 3000},
            "spent": {"tokens": 2970, "calls": 27, "cost": 0.25},
            "stopped": "budget.tokens is 3000: 2970 spent, and the next call needs 110",
        },
    }


def write_run(folder: Path, *, edges: int = 4, evil: str = "no prompt") -> Path:
    """Write the folder. `evil`: what a model said for the lost candidate."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"prompt": PROMPTS[0], "demos": [], "policy": "first"}
    config = {
        "model": "tiny",
        "tasks": "arithmetic",
        "max_steps": 5,
        "rewards": ["correct"],
        "agents": {"first": fields, "second": fields},
        "budget": {"tokens": 3000},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    states = [state(step, edges) for step in STEPS]
    before, after = "b" * 16, "a" * 16
    with Store(folder / "episodes", fsync=False) as store:
        for key, number in ((before, 0), (after, 3)):
            store.extend(
                [
                    played("eval", f"eval-{key}/d/{t}", t, number, 0.25 * number, states[number])
                    for t in TASKS
                ]
            )
        for step in (1, 2, 3):
            now = states[step - 1]
            train = [played("train", f"train-{step:06d}/{t}", t, step, 0.5, now) for t in TASKS]
            trials = [
                played("trial", f"trial-{step:016d}/d/{t}", t, step, 1.0, states[step])
                for t in TASKS
            ]
            aside = played("aside", f"aside-{step:06d}/0001-ab", "ask", step, 0.0, now)
            store.extend([*train, *trials, as_aside(aside, train[0].id)])
    write_json(
        folder / "evaluations.json",
        {
            label: {"kind": "eval", "key": key, "step": step, "tasks": TASKS, "n": 1}
            for label, key, step in (("before", before, 0), ("after", after, 3))
        },
    )
    rows = [
        {
            "step": step,
            "reward": 0.5,
            "state": states[step].key,
            "budget": {"tokens": 990 * step, "calls": 9 * step, "cost": 0.08 * step},
        }
        for step in (1, 2, 3)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    write_json(folder / "summary.json", {**SUMMARY, **ledger()})
    checkpoint = folder / "checkpoints" / "step-000003"
    write_json(checkpoint / "system.json", {"recipe": "search_prompts"})
    write_json(checkpoint / "values" / "origin.json", states[0].values)
    write_json(checkpoint / "values" / "values.json", states[3].values)
    parts = checkpoint / "trainer" / "parts"
    write_json(parts / "prompts" / "state.json", archive(evil).state_dict())
    write_json(parts / "history" / "state.json", {"tried": {"a": 1, "b": 2}})
    write_json(parts / "edges" / "state.json", {"logits": logits(edges, 3), "adam": {}})
    return folder


def as_aside(episode: Episode, follows: str) -> Episode:
    """What an optimizer said about another episode."""
    turn = Turn(0, "optimizer", (Message("user", "improve the prompt"),), text=PROMPTS[1])
    return Episode(
        episode.id,
        episode.group,
        Task("ask", "improve the prompt"),
        kind="aside",
        follows=follows,
        step=episode.step,
        state=episode.state,
        turns=(turn,),
        output=PROMPTS[1],
        output_from=(0,),
        usage={"optimizer": usage(1, 0.08)},
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


SUMMARY: dict[str, Any] = {
    "recipe": "search_prompts",
    "model": "tiny",
    "engine": "scripted",
    "measured": "accuracy",
    "steps": 3,
    "done": "the budget is spent",
    "seconds": {"total": 12.0, "rollout": 5.0, "train": 3.0, "publish": 1.0},
    "tokens": {"sampled": 270, "trained": 0},
    "policies": {},
    "live_proof": {"checks": 0, "passed": 0, "untrained": 0, "failed": 0, "max_residual": 0.0},
    "state": {"key": "a" * 16, "values": {}},
    "eval": {
        "before": {"accuracy": 0.25, "ci95": [0.1, 0.4], "num_tasks": 50},
        "after": {"accuracy": 0.75, "ci95": [0.6, 0.9], "num_tasks": 50},
        "paired": {"difference": 0.5, "ci95": [0.3, 0.7]},
    },
}
