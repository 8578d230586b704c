"""Several processes train what one trains, and none waits for another that has gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.repository import ROOT, clean_environment
from tests.trainers.reading import rows

pytestmark = pytest.mark.process

BIN = Path(sys.executable).parent


def torchrun(count: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
    ]


TORCHRUN = torchrun(2)
ACCELERATE = [str(BIN / "accelerate"), "launch"]


def start(command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    env = clean_environment(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        PYTHONPATH=str(ROOT),
        TOKENIZERS_PARALLELISM="false",
    )
    return subprocess.run(
        command, cwd=ROOT, env={**env, **settings}, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the same run: of one process and of two."""
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_random_model(folder / "model")
    found = []
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        done = start(
            [*launcher, "-m", "tests.trainers.rank_program", str(folder / name), str(model)]
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(folder / name)
    return found[0], found[1]


@pytest.fixture(scope="module")
def four(runs: tuple[Path, Path]) -> Path:
    """The same run of four."""
    folder = runs[0].with_name("four")
    done = start(
        [
            *torchrun(4),
            "-m",
            "tests.trainers.rank_program",
            str(folder),
            str(folder.with_name("model")),
        ]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def said(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads(Path(f"{folder}.rank{rank}.json").read_text())


def tensors(folder: Path, policy: str) -> torch.Tensor:
    found = load_file(
        folder / "checkpoints/step-000003/adapters" / policy / "adapter_model.safetensors"
    )
    return torch.cat([found[key].flatten() for key in sorted(found)]).double()


def test_ranks_talk(runs: tuple[Path, Path]) -> None:
    for rank in (0, 1):
        found = said(runs[1], rank)
        assert (found["rank"], found["size"], found["device"][:3]) == (rank, 2, "cpu")
        assert found["sum"] == [[3.0, 0.0], [[11.0]]]
        assert found["broadcast"] == {"text": "häß", "rank": 0}
        assert found["gather"] == ["", "x"]
        assert [message["content"] for message in found["share"]] == ["rank 0"]
        assert (found["any"], found["none"], found["on_main"]) == (True, False, 0)


def test_what_ends_rank_0_ends_the_others(runs: tuple[Path, Path]) -> None:
    assert said(runs[1], 0)["raised"] == ["RunError the disk is full", "Stopped"]
    assert said(runs[1], 1)["raised"] == ["RankError rank 0: RunError: the disk is full", "Stopped"]


def test_two_ranks_train_what_one_trains(runs: tuple[Path, Path]) -> None:
    assert_trained_alike(runs[1], runs[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_train_what_one_trains(runs: tuple[Path, Path], four: Path) -> None:
    assert_trained_alike(four, runs[0])
    assert len({json.dumps(said(four, rank)["sha256"]) for rank in range(4)}) == 1
    batches = said(four, 3)["batches"]
    assert batches[2:4] == [[1, 0, 0, 0]] * 2, (
        "in the second step three ranks have no samples of either agent, and join"
    )


def assert_trained_alike(ours: Path, theirs: Path) -> None:
    """Equal within the determinism contract."""
    for policy in ("first", "last"):
        assert (tensors(ours, policy) - tensors(theirs, policy)).abs().max() <= 1e-5
    for mine, other in zip(rows(ours), rows(theirs), strict=True):
        for key in ("step", "reward", "episodes", "failed", "sampled_tokens", "dropped"):
            assert mine[key] == other[key]
        for policy in ("first", "last"):
            a, b = mine["policies"][policy], other["policies"][policy]
            assert a.keys() == b.keys() and a["grad_norm"] > 0
            # gradients of equal parameters within 1e-6; after a step the parameters differ by some
            # 1e-7 (1e-5 at most), and gradients with them
            near = 1e-6 if mine["step"] == 1 else 1e-5
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=near)
            for key in (
                "tokens",
                "sequences",
                "entropy",
                "truncated",
                "constant_groups",
                "clipped",
            ):
                assert a[key] == pytest.approx(b[key], rel=1e-6)


def test_every_rank_holds_the_same_adapters(runs: tuple[Path, Path]) -> None:
    assert said(runs[1], 0)["sha256"] == said(runs[1], 1)["sha256"]


def test_a_rank_without_samples_of_an_agent_joins(runs: tuple[Path, Path]) -> None:
    """That the run has ended shows it; here, that it came to this: by step and policy, batches
    dealt to each rank."""
    batches = said(runs[1], 1)["batches"]
    assert len(batches) == 3 * 2
    assert batches[2:4] == [[1, 0], [1, 0]]
    assert all(min(dealt) >= 1 and sum(dealt) >= 3 for dealt in batches[:2] + batches[4:])


def test_rank_0_alone_writes(runs: tuple[Path, Path]) -> None:
    one, two = runs
    assert (said(two, 0)["evaluated"], said(two, 1)["evaluated"]) == (True, False)
    assert len(rows(two)) == 3
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (two, one))
    assert mine["engine"] == "transformers" and mine["live_proof"]["failed"] == 0
    assert mine["eval"]["after"] is not None and mine["tokens"] == theirs["tokens"]


LAUNCHES = {
    "python -m": [sys.executable, "-m", "marlora.recipes.grpo_team"],
    "accelerate launch": [*ACCELERATE, "recipes/grpo_team.py"],
    "accelerate launch --cpu --num_processes 2": [
        *ACCELERATE,
        "--cpu",
        "--num_processes",
        "2",
        "recipes/grpo_team.py",
    ],
    "torchrun": [*TORCHRUN, "recipes/grpo_team.py"],
}


@pytest.mark.slow
def test_two_ranks_play_where_no_weight_learns(tmp_path: Path) -> None:
    """No rank reads the base's weights; both end with the adapters they began with."""
    model, folder = tiny_random_model(tmp_path / "model"), tmp_path / "two"
    policies = {name: {"trainable": False} for name in ("first", "last")}
    settings = json.dumps({"policies": policies})
    done = start(
        [*TORCHRUN, "-m", "tests.trainers.rank_program", str(folder), str(model), settings]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [
        json.loads(Path(f"{folder}.rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)
    ]
    assert found[0]["sha256"] == found[1]["sha256"] and found[0]["batches"] == []
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    after = {name: entry["sha256_after"] for name, entry in summary["policies"].items()}
    assert (after, summary["steps"]) == (found[0]["sha256"], 3)
    assert summary["live_proof"]["checks"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_way_to_launch_a_recipe_gives_the_same_run(tmp_path: Path) -> None:
    """The default YAML on the tiny model, two steps; batches small enough for two ranks."""
    found = {}
    for number, (name, command) in enumerate(LAUNCHES.items()):
        folder = tmp_path / str(number)
        options = [
            "--max_steps",
            "2",
            "--num_eval_tasks",
            "10",
            "--tokens_per_batch",
            "512",
            "--output_dir",
            str(folder),
        ]
        done = start([*command, *options])
        assert done.returncode == 0, f"{name}: {done.stderr[-4000:]}"
        assert "held-out accuracy" in done.stdout
        assert ("starting all of them by torchrun" in done.stderr) == ("num_processes" in name)
        found[name] = json.loads((folder / "summary.json").read_text())
    first = found.pop("python -m")
    for name, summary in found.items():
        assert summary["eval"]["after"] == first["eval"]["after"], name
        assert summary["tokens"] == first["tokens"], name
        if (
            name == "accelerate launch"
        ):  # two ranks add in another order: equal within the contract, not to the last bit
            assert summary["policies"] == first["policies"], name


def test_a_rank_that_stalls_ends_all_with_their_stacks() -> None:
    """Rank 1 never joins the second sum. Rank 0, which waits for it, says so; the stacks show where
    rank 1 is; the launcher has code 1."""
    done = start([*TORCHRUN, "-m", "tests.trainers.stalled_program", "sleep"])
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        line == "error: hung: rank 0 has waited 3 s in collective number 2 (sum of gradients) for "
        "rank 1, which has been in none since number 1; stacks of all ranks follow"
    )
    stacks = done.stderr.split("stacks of rank ")[1:]
    assert sorted(stack[0] for stack in stacks) == ["0", "1"]
    mine, theirs = sorted(stacks)
    assert "in sum_" in mine and "in stall_here" not in mine
    assert "in stall_here" in theirs and "Thread" in theirs
    assert "rank 1 ends too: hung: rank 0 has waited 3 s" in done.stderr
    assert "was not reached" not in done.stdout


@pytest.mark.slow
def test_a_rank_that_keeps_the_interpreter_to_itself_ends_too() -> None:
    """No thread of Python runs there: the timer in C writes the stacks and ends it, before it holds
    up anybody."""
    done = start([*TORCHRUN, "-m", "tests.trainers.stalled_program", "frozen"])
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in freeze_here" in done.stderr


@pytest.mark.slow
def test_a_failure_of_rank_0_ends_both_with_one_line(tmp_path: Path) -> None:
    """A folder with somebody else's config.yaml is refused on rank 0 only; the other rank must
    neither wait nor complain."""
    model = tiny_random_model(tmp_path / "model")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: other\n")
    done = start(
        [*TORCHRUN, "recipes/grpo_team.py", "--model", str(model), "--output_dir", str(folder)]
    )
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert "holds config.yaml, which no run of marlora wrote" in done.stderr and os.listdir(
        folder
    ) == ["config.yaml"]
