"""`marlora eval` on two checkpoints of one tiny run: ladder, ablation, cross-play, what is refused,
and a kill half-way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import SettingError, Task
from marlora.recipes.cli.checkpoint.eval_tables import as_markdown, as_text
from marlora.recipes.cli.checkpoint.evaluate import beside, marks_of
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from tests.repository import ROOT

REWARD = "tests.trainers.small_run:bytes_mod_7"
HERE = ("--engine", "transformers", "--trust_checkpoint")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a random model: two checkpoints whose adapters differ."""
    folder = tmp_path_factory.mktemp("cli_eval")
    torch.set_num_threads(1)
    config = GRPOConfig(
        output_dir=str(folder / "run"),
        model=str(tiny_random_model(folder / "model")),
        engine="transformers",
        rewards=[REWARD],
        tasks="marlora.rollouts.tasks.toy:tiny_tasks",
        num_eval_tasks=5,
        max_steps=2,
        tasks_per_step=2,
        num_generations=3,
        learning_rate=0.05,
        lora_r=4,
        lora_alpha=8.0,
        lora_target_modules=["q_proj", "v_proj"],
        max_completion_length=5,
        save_every=1,
    )
    GRPOTrainer(system=tiny_chain(), args=config).train()
    return folder / "run"


@pytest.fixture
def two(run: Path) -> list[Path]:
    return [run / "checkpoints" / f"step-00000{n}" for n in (1, 2)]


def evaluate(*argv: object) -> int:
    try:
        main(["eval", *map(str, argv)])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def copied_tasks(*, split: str, seed: int) -> list[Task]:
    """The training tasks under other ids, and in other letters."""
    return [
        replace(task, id=f"copy of {task.id}", prompt=f" {task.prompt.upper()}\n")
        for task in tiny_tasks("train")
    ]


def test_two_checkpoints_climb_the_ladder(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        evaluate(
            *two, *HERE, "--output", out, "--cross", "--ablate", "--markdown", tmp_path / "e.md"
        )
        == 0
    ), capsys.readouterr().err
    printed = capsys.readouterr()
    result = json.loads((out / "eval.json").read_text())
    (found,) = result["sets"].values()
    one, other = result["checkpoints"]
    assert (one, other) == ("step-000001", "step-000002")
    names = list(found["contestants"])
    for expected in (
        "single agent",
        "base team",
        f"{one}: only first",
        f"{one}: only last",
        f"{one}: trained team, per-agent LoRA",
        f"{other}: trained team, per-agent LoRA",
        f"first of {one}, others of {other}",
        f"first of {other}, others of {one}",
    ):
        assert expected in names, expected
    assert names.count("base team") == 1 and found["same_as"] == {}, "one base, played once"
    last = found["comparisons"][-1]
    assert (last["from"], last["to"]) == (
        f"{one}: trained team, per-agent LoRA",
        f"{other}: trained team, per-agent LoRA",
    )
    low, high = last["ci95"]
    assert low <= last["difference"] <= high and last["p"] <= last["p_holm"]
    first, second = found["contestants"][last["from"]], found["contestants"][last["to"]]
    assert last["difference"] == pytest.approx(second["accuracy"] - first["accuracy"])
    matrix = found["cross_play"]["first"]
    assert matrix[one][one] == first["accuracy"] and matrix[other][other] == second["accuracy"]
    assert (
        matrix[one][other] == found["contestants"][f"first of {one}, others of {other}"]["accuracy"]
    )
    assert (
        first["cost"]["calls"] == 2 and found["contestants"]["single agent"]["cost"]["calls"] == 1
    )
    text = " ".join(printed.out.split())
    assert (
        "p (Holm)" in text
        and "Cross-play of first" in text
        and "Trained teams against each other" in text
    )
    assert (tmp_path / "e.md").read_text() == (out / "eval.md").read_text()
    assert "| base team |" in (out / "eval.md").read_text()


def test_samples_give_pass_and_majority(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        evaluate(
            two[0], *HERE, "--output", tmp_path, "--num_tasks", 2, "--samples", 2, "--seeds", 3, 4
        )
        == 0
    )
    result = json.loads((tmp_path / "eval.json").read_text())
    (found,) = result["sets"].values()
    assert result["sampled"] is True and found["seeds"] == [3, 4]
    for row in found["contestants"].values():
        assert set(row["pass_at"]) == {"1", "2", "4"} and set(row["by_seed"]) == {"3", "4"}
        assert row["pass_at"]["1"] <= row["pass_at"]["2"] <= row["pass_at"]["4"]
    assert "pass@4" in capsys.readouterr().out
    assert (
        sum(len(Store(folder)) for folder in tmp_path.iterdir() if folder.is_dir()) == 2 * 2 * 2 * 2
    )  # contestants, seeds, samples, tasks


def test_tasks_that_were_trained_on_are_refused(
    two: list[Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [two[0], *HERE, "--output", tmp_path / "out", "--tasks", f"{__name__}:copied_tasks"]
    assert evaluate(*argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "of 800 were trained on by run, such as 'copy of " in said
        and "--allow_trained_tasks" in said
    )
    assert not (tmp_path / "out").exists()
    assert (
        evaluate(
            *argv,
            "marlora.rollouts.tasks.toy:tiny_tasks",
            "--allow_trained_tasks",
            "--num_tasks",
            2,
        )
        == 0
    )
    sets = json.loads((tmp_path / "out" / "eval.json").read_text())["sets"]
    assert list(sets) == [f"{__name__}:copied_tasks", "marlora.rollouts.tasks.toy:tiny_tasks"]
    (tmp_path / "empty").mkdir()
    assert (
        evaluate(two[0], *HERE, "--output", tmp_path / "out", "--trained_on", tmp_path / "empty")
        == 2
    )
    assert "no episodes there" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
real, calls = Store.append, [0]
def append(self, episode):
    done = real(self, episode)
    calls[0] += 1
    if calls[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Store.append = append
main(sys.argv[1:])
"""


@pytest.mark.process
def test_killed_half_way_it_repeats_no_finished_task(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["eval", *map(str, two), *HERE, "--output", str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *argv], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/episodes-*.jsonl")}
    finished = {
        line.split(b'"id":"', 1)[1].split(b'"', 1)[0]
        for data in before.values()
        for line in data.splitlines()
    }
    assert len(finished) == 7
    played: list[str] = []
    real = Store.append

    def append(self: Store, episode: Any) -> bool:
        played.append(episode.id)
        return real(self, episode)

    monkeypatch.setattr(Store, "append", append)
    assert evaluate(*argv[1:]) == 0
    assert played and not {id.encode() for id in played} & finished, (
        "nothing finished is played again"
    )
    for path, data in before.items():
        assert path.read_bytes().startswith(data)
    (found,) = json.loads((tmp_path / "out" / "eval.json").read_text())["sets"].values()
    assert len(played) + 7 == 5 * len(found["contestants"])
    played.clear()
    assert evaluate(*argv[1:]) == 0 and not played


def test_wrong_usage(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        ([two[0], "--cross"], "name at least two"),
        ([two[0], two[0]], "named twice"),
        ([two[0], "--markdown", "/nowhere/x.md"], "no such folder"),
        ([two[0], "--samples", 0], "at least one each"),
    ):
        assert evaluate(*argv, *HERE, "--output", tmp_path / "out") == 2
        assert re.search(words, capsys.readouterr().err)


def test_names_and_folders() -> None:
    assert marks_of(["a/checkpoints/step-1", "b/checkpoints/step-1", "c/copy"]) == ["a", "b", "c"]
    assert marks_of(["a/checkpoints/step-1", "a/checkpoints/step-2"]) == ["step-1", "step-2"]
    mixed = ["a/checkpoints/step-1", "a/checkpoints/step-2", "b/checkpoints/step-1"]
    assert marks_of(mixed) == ["a/step-1", "a/step-2", "b/step-1"]
    long = marks_of(["x/run/checkpoints/step-1", "y/run/checkpoints/step-1"])
    assert len(set(long)) == 2 and all(name.endswith("run/checkpoints/step-1") for name in long)
    with pytest.raises(SettingError, match="named twice"):
        marks_of(["a/copy", "a/../a/copy"])
    assert (
        beside(Path("r/checkpoints/step-1")) == Path("r/eval").resolve()
        and beside(Path("r/copy")) == Path("r/eval").resolve()
    )


def test_tables_show_what_there_is() -> None:
    row = {
        "accuracy": 0.5,
        "ci95": [0.1, 0.9],
        "num_tasks": 2,
        "failed": 0,
        "agreement": None,
        "diversity": {"agents": None, "samples": 0.5},
    }
    cost = {
        "calls": 2.0,
        "prompt_tokens": 7.0,
        "sampled_tokens": 3.0,
        "seconds": {"mean": 0.5, "median": 0.5, "p95": 1.0},
    }
    spoken = {
        "answers": [2, 2],
        "accuracy": [0.5, 1.0],
        "gain": 0.5,
        "changes": [{"right_right": 1, "right_wrong": 0, "wrong_right": 1, "wrong_wrong": 0}],
    }
    full = {
        **row,
        "cost": cost,
        "rewards": {"exact": 0.5, "kind of a": 1.0},
        "transitions": spoken,
        "by_seed": {"0": 0.5, "1": 0.5},
        "pass_at": {"1": 0.5, "2": 0.75},
        "majority_at": {"1": 0.5, "2": 0.25},
    }
    change = {
        "from": "base team",
        "to": "b|c",
        "difference": 0.0,
        "ci95": [-0.1, 0.1],
        "gained": 0,
        "lost": 0,
        "p": 1.0,
        "p_holm": 1.0,
    }
    found = {
        "tasks": 2,
        "samples": 1,
        "seeds": [0, 1],
        "same_as": {"twin": "b|c"},
        "contestants": {"base team": full, "b|c": full},
        "comparisons": [change],
        "cross_play": {},
    }
    result = {
        "checkpoints": {"x": "x/step"},
        "engine": "vllm",
        "sampled": True,
        "metric": "exact",
        "sets": {"sums": found},
    }
    made = as_markdown(result)
    for expected in (
        "## sums: 2 tasks, 1 samples x 2 seeds",
        "| b\\|c | 0.500 | 0.100 .. 0.900 | 2 | +0.000 | -0.100 .. +0.100 | 1.000 |",
        "| twin (= b\\|c) |",
        "## Reward parts",
        "| kind of a |",
        "| 0.500 | 0.750 | 0.250 |",
        "1 of 1",
        "## By seed",
        "engine vllm, sampled",
    ):
        assert expected in made, expected
    assert "Trained teams against each other" not in made and "Cross-play" not in made
    assert "b|c" in as_text(result)
