"""Programs of other people's making are trained as they are: plain `openai`, and twelve frameworks.

The slow tests install the real packages into throw-away environments that know nothing of marlora.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.types import SettingError, Task
from marlora.rollouts.checkpoints.team import LoadOptions, load_team
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.episodes.runner import EpisodeRequest
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.episode_index import json_lines
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.repository import ROOT, throw_away
from tests.trainers.small_run import bytes_mod_7

torch.set_num_threads(1)

# Those of one tuple share an environment: frameworks that want another major version of `openai`
# than the first ones cannot be installed beside them.
ENVIRONMENTS = (
    (
        "openai>=3,<4",
        "langgraph>=1,<2",
        "langchain-openai>=1,<2",
        "ag2>=1.2,<2",
        "openai-agents>=0.24,<1",
        "dspy>=3.4,<4",
        "pydantic-ai-slim[openai]>=2.66,<3",
        "autogen-agentchat==0.7.5",
        "autogen-ext[openai]==0.7.5",
    ),
    (
        "openai>=2,<3",
        "crewai>=1.15,<2",
        "llama-index-core>=0.14,<0.15",
        "llama-index-llms-openai-like>=0.8,<1",
        "haystack-ai>=3.4,<4",
        "smolagents[openai]>=1.26,<2",
        "agno>=3.1,<4",
        "strands-agents[openai]>=1.62,<2",
    ),
)
PROGRAMS = {  # by name: its environment
    "openai_roles": 0,
    "frameworks/langgraph_roles": 0,
    "frameworks/ag2_roles": 0,
    "frameworks/agents_sdk_roles": 0,
    "frameworks/dspy_roles": 0,
    "frameworks/pydantic_ai_roles": 0,
    "frameworks/autogen_roles": 0,
    "frameworks/crewai_roles": 1,
    "frameworks/llama_index_roles": 1,
    "frameworks/haystack_roles": 1,
    "frameworks/smolagents_roles": 1,
    "frameworks/agno_roles": 1,
    "frameworks/strands_roles": 1,
}


def never_zero(task: Task, episode: Episode) -> float:
    """A reward that always teaches something, so that two steps of two episodes move every
    adapter."""
    return 1 + bytes_mod_7(task, episode)


def trainer(
    folder: Path, rewards: Any = None, tasks: Any = None, eval_tasks: Any = None, **changes: Any
) -> GRPOTrainer:
    settings = yaml.safe_load((ROOT / "recipes" / "own_program.yaml").read_text())
    return GRPOTrainer(
        args=GRPOConfig(**{**settings, "output_dir": str(folder), **changes}),
        tasks=tasks,
        eval_tasks=eval_tasks,
        rewards=rewards,
        recipe="own_program",
    )


def check_trained(summary: dict[str, Any], steps: int) -> None:
    assert summary["steps"] == steps and set(summary["policies"]) == {"first", "last"}
    assert all(
        policy["sha256_before"] != policy["sha256_after"] for policy in summary["policies"].values()
    )
    proof = summary["live_proof"]
    assert proof["failed"] == 0 and proof["passed"] >= 2 and proof["max_residual"] < 0.001


def check_turns(episode: Episode) -> None:
    """Two turns whose messages are the program's own, the second with the first one's text."""
    assert episode.error is None, episode.error
    first, last = episode.turns
    assert [(m.role, m.content) for m in first.messages] == [
        ("system", "first"),
        ("user", episode.task.prompt),
    ]
    third = episode.task.prompt.split("+")[-1]
    assert [(m.role, m.content) for m in last.messages] == [
        ("system", "last"),
        ("user", f"{first.text}+{third}"),
    ]
    assert (
        (first.agent, last.agent) == ("first", "last")
        and first.prompt_ids
        and len(last.token_ids) == len(last.logprobs)
    )
    assert episode.output == last.text.strip() or episode.output == last.text


def test_a_program_is_trained_resumed_reported_and_evaluated(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    small: dict[str, Any] = {
        "model": str(model),
        "tasks_per_step": 2,
        "num_generations": 3,
        "num_eval_tasks": 2,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "save_every": 1,
    }
    folder = tmp_path / "run"
    check_trained(trainer(folder, [bytes_mod_7], max_steps=1, **small).train(), 1)
    summary = trainer(folder, [bytes_mod_7], max_steps=2, resume=True, **small).train()
    check_trained(summary, 2)
    episodes = [e for e in Store(folder / "episodes").read() if e.split == "train"]
    assert len(episodes) == 12 and "first" in (folder / "report.html").read_text()
    for episode in episodes:
        if "+" not in episode.turns[0].text:  # a model of noise may write one
            check_turns(episode)
    asyncio.run(evaluated(folder / "checkpoints" / "step-000002", tmp_path))


async def evaluated(checkpoint: Path, folder: Path) -> None:
    """The checkpoint plays again, once its reader agrees to run the program that it names."""
    system, settings = (
        "marlora.rollouts.gateway.programs:Function",
        EngineConfig(engine="transformers"),
    )
    with pytest.raises(
        SettingError,
        match=r"the program marlora\.recipes\.programs\.openai_roles:main.*--trust_checkpoint",
    ):
        await load_team(
            checkpoint,
            settings,
            LoadOptions(system=system, rewards=["exact"], scratch=folder / "no"),
        )
    team = await load_team(
        checkpoint,
        settings,
        LoadOptions(system=system, rewards=["exact"], scratch=folder / "yes", trust=True),
    )
    try:
        episode = await team.rollouts.play(EpisodeRequest(Task("t", "1+2+3", "6"), "g"), team.state)
        check_turns(episode)
        assert [t.version for t in episode.turns] == [team.versions["first"], team.versions["last"]]
    finally:
        await team.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plain_program_learns(tmp_path: Path, seed: int) -> None:
    """The recipe as it stands, ten steps of 48 episodes: held-out greedy accuracy and the sampled
    reward rise."""
    summary = trainer(tmp_path / "run", seed=seed, save_every=100).train()
    check_trained(summary, 10)
    before, after = summary["eval"]["before"]["accuracy"], summary["eval"]["after"]["accuracy"]
    rewards = [
        json.loads(line)["reward"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    print(f"seed {seed}: held out {before} -> {after}, sampled {rewards}")
    assert after - before >= 0.15 and summary["eval"]["paired"]["ci95"][0] > 0, (before, after)


@pytest.fixture(scope="session")
def framework_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, in which the program of each framework plays a task as it is and every
    episode is trained on."""
    pythons = [str(throw_away(packages, by_uv=True)) for packages in ENVIRONMENTS]
    commands = {
        name: [pythons[number], str(ROOT / "recipes" / "programs" / f"{name}.py")]
        for name, number in PROGRAMS.items()
    }
    tasks = [
        replace(task, id=name, meta={"command": commands[name]})
        for task, name in zip(tiny_tasks(), PROGRAMS, strict=False)
    ]
    held_out = [replace(tiny_tasks("eval")[0], meta={"command": commands["openai_roles"]})]
    changes: dict[str, Any] = {
        "system": {
            "class": "tests.recipes.each_framework:EachFramework",
            "agents": ["first", "last"],
        },
        "max_steps": 1,
        "tasks_per_step": len(tasks),
        "num_generations": 1,
        "num_eval_tasks": 1,
        "credit": "team",
        "learning_rate": 1e-2,
        "max_concurrency": 4,
    }
    folder = tmp_path_factory.mktemp("frameworks")
    run = trainer(folder, [never_zero], tasks=tasks, eval_tasks=held_out, **changes)
    check_trained(run.train(), 1)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_each_framework_is_trained_as_it_is(program: str, framework_run: Path) -> None:
    (episode,) = Store(framework_run / "episodes").read(task=program, split="train")
    if "crewai" in program:
        check_wrapped(episode)
    else:
        check_turns(episode)
    rows = json_lines(framework_run / "learned.jsonl")
    learnt = [row for row in rows if row["episode"] == episode.id]
    assert len(learnt) == 2, "both turns were trained on"


def check_wrapped(episode: Episode) -> None:
    """Two turns, of a framework that puts role and task into prompts of its own."""
    assert episode.error is None, episode.error
    first, last = episode.turns
    third = episode.task.prompt.split("+")[-1]
    for turn, role, asked in (
        (first, "first", episode.task.prompt),
        (last, "last", f"{first.text}+{third}"),
    ):
        system, user = turn.messages
        assert turn.agent == role and len(turn.token_ids) == len(turn.logprobs) > 0
        assert role in system.content and asked in user.content
    assert episode.output == last.text.strip()
