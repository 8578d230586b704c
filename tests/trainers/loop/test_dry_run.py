"""Who would sit where: lines of `--dry_run` on machines that are only described."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from marlora.agents.types import SettingError, Task
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.dry_run import Node, placement, plan
from marlora.trainers.loop.spec import RunSpec
from marlora.trainers.model.memory_estimate import GIB, Memory
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.trainers.small_run import config

NEED = Memory(4_000_000_000, 1, weights=8 * GIB, adapters=1 * GIB, activations=2 * GIB, head=0.0)
GPUS = {str(number): 80.0 * GIB for number in range(4)}


def lines(gpus: dict[str, float], ranks: int = 1, bases: int = 1, **settings: object) -> list[str]:
    node = Node("n1", gpus, 23 * GIB, ranks, ranks)
    found = placement(
        RunConfig(engine="vllm", **settings), {f"m{k}": NEED for k in range(bases)}, node
    )  # type: ignore[arg-type]
    return [" ".join(line.split()) for line in found]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM seems to be installed. (Only vLLM: other packages remember what they were told.)"""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> object:
        return name if name == "vllm" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_three_trainers_and_a_server_with_a_gpu_of_its_own() -> None:
    assert lines(GPUS, 3, server_devices="3", server_port=8000) == [
        "nodes n1: 3 of 3 trainers",
        "trainer 0 GPU 0: about 11.00 GiB of 80.0",
        "trainer 1 GPU 1: about 11.00 GiB of 80.0",
        "trainer 2 GPU 2: about 11.00 GiB of 80.0",
        "server 0 GPU 3, 127.0.0.1, port 8000: 90% of its memory, 8.00 GiB of weights",
    ]


def test_one_gpu_is_shared_by_the_printed_split() -> None:
    found = lines({"2": 80.0 * GIB})
    assert (
        found[2]
        == "server 0 GPU 2 beside trainer 0, 127.0.0.1, a free port: 78% of its memory, 8.00 GiB of"
        " weights"
    )
    assert found[3].startswith("memory: trainer about 18.0 GiB of the GPU's 80")
    with pytest.raises(SettingError, match=r"server_memory: .*a server needs at least"):
        lines({"0": 16.0 * GIB})


def test_two_servers_and_two_bases_are_told_apart() -> None:
    found = lines(GPUS, 1, bases=2, server_devices="1;2,3")
    assert found[1] == "trainer 0 GPU 0: about 22.00 GiB of 80.0"
    assert [line.split(":")[0] for line in found[2:]] == [
        f"server {k} GPU {d}, 127.0.0.1, a free port" for k, d in enumerate(["1", "2,3"] * 2)
    ]
    assert found[2].endswith("8.00 GiB of weights (m0)") and found[5].endswith("(m1)")


def test_on_a_cpu_too_much_is_said() -> None:
    assert lines({})[1:] == [
        "trainer 0 CPU: about 11.00 GiB of 23.0",
        "server 0 CPU, 127.0.0.1, a free port: 8.00 GiB of weights, 2 GiB of KV cache",
    ]
    assert lines({}, 2)[-1].startswith("too much 30.0 GiB and KV caches, 23.0 are free")


def test_servers_elsewhere() -> None:
    assert lines(GPUS, endpoints="runs/e", num_servers=2)[0::2] == [
        "nodes n1: 1 of 1 trainers, servers elsewhere",
        "servers 2, found through runs/e",
    ]
    assert lines(GPUS, server_urls=["http://a/v1"])[-1] == "server http://a/v1"


@pytest.mark.parametrize("unmatchable", [True, False])
def test_gold_answers_that_no_reply_can_match_are_told(
    tmp_path: Path, model: Path, unmatchable: bool
) -> None:
    odd = [Task("odd", "12+c", "so we get\n#### 72")] if unmatchable else []
    spec = RunSpec.resolve(
        config(tmp_path / "run", model),
        tiny_chain(),
        tasks=[*tiny_tasks()[:4], *odd],
        eval_tasks=tiny_tasks("eval")[:2],
        rewards=["correct"],
    )
    told = [line for line in plan(spec).lines() if line.startswith("warning: ")]
    assert told == [f"warning: {text}" for text in spec.warnings]
    assert len(told) == int(unmatchable)
    if unmatchable:
        assert "in 1 of 5 training tasks, such as 'odd' with answer" in told[0]
