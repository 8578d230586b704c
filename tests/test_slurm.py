"""The jobs in slurm/ on a real Slurm of one node."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import Store
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.chaos.ledger import balance_run
from tests.repository import ROOT
from tests.slurm_node import SlurmNode, missing

SMALL = ["--gpus=0", "--mem=0", "--cpus-per-task=1", "--time=20"]  # what a node without GPUs has
# a step takes a fraction of a second: of a run of few, nothing may be left by the time that a
# signal arrives
STEPS = 40
RECIPE = [
    "recipes/grpo_team.py",
    "--engine",
    "transformers",
    "--max_steps",
    str(STEPS),
    "--tasks_per_step",
    "4",
    "--num_generations",
    "4",
    "--rewards",
    "exact",
    "length",
    "--reward_weights",
    '{"exact": 1.0, "length": 1.0}',
    "--num_eval_tasks",
    "4",
    "--save_every",
    "1",
    "--proof_every",
    "10",
    "--ablate_adapters",
    "false",
]
JOBS = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_sound_shell_and_say_how_they_are_used(name: str) -> None:
    path = ROOT / "slurm" / name
    subprocess.run(["bash", "-n", path], check=True)
    usage = subprocess.run(
        ["bash", path], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, cwd=ROOT
    )
    assert (
        usage.returncode != 0
        and f"usage: sbatch {'--array=0-7 ' * ('array' in name)}slurm/{name}" in usage.stderr
    )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmNode]:
    if why := missing():
        pytest.skip(f"no Slurm here: {why}")
    made = SlurmNode(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_random_model(tmp_path_factory.mktemp("model"))


def train(node: SlurmNode, folder: Path, model: Path, *args: str, processes: int = 1) -> str:
    env = {"MARLORA_PROCESSES": str(processes)}
    options = [*SMALL, f"--ntasks={processes}", f"--output={folder}.log"]
    settings = ["--model", str(model), "--output_dir", str(folder), *args]
    return node.submit(*options, "slurm/train.sbatch", *RECIPE, *settings, env=env)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def adapters(folder: Path) -> dict[str, str]:
    files = sorted(
        (folder / f"checkpoints/step-{STEPS:06d}/adapters").glob("*/adapter_model.safetensors")
    )
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ended(node: SlurmNode, job: str, log: Path) -> None:
    state = node.ended(job, 400)
    assert state == "COMPLETED", f"{state}\n{log.read_text()[-4000:]}"


def preempt(node: SlurmNode, job: str, when: Callable[[], bool]) -> None:
    """What Slurm does before a time limit: USR1 to the batch shell alone, here as soon as `when`
    holds; then start it again."""
    node.wait(
        lambda: node.state(job) == "RUNNING" and when(), 200, f"job {job} never came that far"
    )
    restarts = int(node.job(job)["Restarts"])
    node.run("scancel", "--signal=USR1", "--batch", job)

    def requeued() -> bool:
        node.hasten(job)
        found = node.job(job)
        return int(found["Restarts"]) == restarts + 1 and found["JobState"] == "RUNNING"

    node.wait(requeued, 120, f"job {job} was not started again")


def cut_twice(node: SlurmNode, job: str, folder: Path) -> None:
    """Pre-empt a training job after its first steps, and once more after later ones; then it ends
    well."""
    preempt(node, job, lambda: steps_done(folder) >= 1)
    before = steps_done(folder)
    preempt(node, job, lambda: steps_done(folder) > before)
    ended(node, job, Path(f"{folder}.log"))
    log = Path(f"{folder}.log").read_text()
    assert log.count("resumed from step-") == 2, log


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_requeued_twice_ends_as_one_that_was_not(
    node: SlurmNode, model: Path, tmp_path: Path
) -> None:
    """Bit-identical with the transformers engine: episodes, adapters and evaluation."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = train(node, cut, model)
    cut_twice(node, job, cut)
    ended(node, train(node, whole, model), tmp_path / "whole.log")
    assert adapters(cut) == adapters(whole) and len(adapters(whole)) == 2
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    assert one["eval"] == two["eval"] and one["tokens"] == two["tokens"]
    assert all(
        policy["sha256_before"] != policy["sha256_after"] for policy in one["policies"].values()
    ), "there was nothing to learn"
    first, second = (
        {e.id: e.output for e in Store(folder / "episodes")} for folder in (whole, cut)
    )
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_on_vllm_requeued_twice_loses_no_episode(
    node: SlurmNode, model: Path, tmp_path: Path
) -> None:
    """A server does not repeat itself to the last bit, so it is the books that have to balance."""
    folder = tmp_path / "run"
    job = train(
        node, folder, model, "--engine", "vllm", "--server_memory", "1", "--max_model_len", "256"
    )
    cut_twice(node, job, folder)
    assert json.loads((folder / "summary.json").read_text())["engine"] == "vllm"
    balance_run(folder, STEPS, episodes=16)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_of_a_job_train_stop_and_go_on(
    node: SlurmNode, model: Path, tmp_path: Path
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks need two cores")
    folder = tmp_path / "run"
    job = train(node, folder, model, processes=2)
    preempt(node, job, lambda: steps_done(folder) >= 1)
    ended(node, job, tmp_path / "run.log")
    assert "resumed from step-" in (tmp_path / "run.log").read_text()
    assert len(adapters(folder)) == 2 and steps_done(folder) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_array_fills_one_store_and_a_checkpoint_is_evaluated(
    node: SlurmNode, model: Path, tmp_path: Path
) -> None:
    folder, store = tmp_path / "run", tmp_path / "store"
    ended(node, train(node, folder, model), tmp_path / "run.log")
    checkpoint = str(folder / f"checkpoints/step-{STEPS:06d}")
    engine = ["--engine", "transformers", "--trust_checkpoint"]
    collect = [
        "slurm/collect_array.sbatch",
        checkpoint,
        "--output",
        str(store),
        "--num_tasks",
        "7",
        *engine,
    ]
    job = node.submit(*SMALL, "--array=0-1", f"--output={tmp_path}/collect-%a.log", *collect)
    evaluate = [
        "slurm/eval.sbatch",
        checkpoint,
        "--num_tasks",
        "4",
        "--json",
        str(tmp_path / "eval.json"),
        *engine,
    ]
    ended(
        node, node.submit(*SMALL, f"--output={tmp_path}/eval.log", *evaluate), tmp_path / "eval.log"
    )
    for part in ("0", "1"):
        ended(node, f"{job}_{part}", tmp_path / f"collect-{part}.log")
    assert len(Store(store)) == 7 and {path.name for path in Store(store).files()} == {
        f"episodes-{i}-00000.jsonl" for i in (0, 1)
    }
    assert json.loads((tmp_path / "eval.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failing_job_is_not_queued_again(node: SlurmNode, model: Path, tmp_path: Path) -> None:
    job = train(node, tmp_path / "run", model, "--learning_ratee", "1")
    assert node.ended(job, 120) == "FAILED"
    assert (
        "did you mean 'learning_rate'?" in (tmp_path / "run.log").read_text()
        and node.job(job)["Restarts"] == "0"
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_server_nodes_and_trainer_nodes_of_one_job(
    node: SlurmNode, model: Path, tmp_path: Path
) -> None:
    """Both on the one node there is: a real vLLM server in a job step of its own, found by its
    file, proven at every publish."""
    folder = tmp_path / "run"
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "MARLORA_PROCESSES": "1"}
    sizes = [
        "--gpus-per-node=0",
        "--mem=0",
        "--cpus-per-task=1",
        "--time=20",
        "--nodes=1",
        "--ntasks=2",
        f"--output={tmp_path}/run.log",
    ]
    settings = [
        "--model",
        str(model),
        "--max_steps",
        "2",
        "--server_memory",
        "1",
        "--max_model_len",
        "256",
    ]
    recipe = [*RECIPE[:1], *RECIPE[3:]]  # the job chooses the engine
    job = node.submit(*sizes, "slurm/multinode.sbatch", str(folder), *recipe, *settings, env=env)
    ended(node, job, tmp_path / "run.log")
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["engine"] == "vllm"
        and summary["steps"] == 2
        and summary["live_proof"]["failed"] == 0
    )
    assert not list(folder.glob("endpoints-*/*.json")) and not list(
        folder.glob("endpoints-*/*.key")
    ), "the servers have ended"
