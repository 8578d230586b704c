"""`marlora bench gpu` end to end at toy sizes: every part gives its numbers, and one that fails,
hangs or cannot run takes nothing else with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.trainers.bench.gpu import hour, parts, serving
from marlora.trainers.bench.gpu.parts import PARTS, RESULT, Part
from marlora.trainers.bench.gpu.training import head_part, trees_part, update_part
from marlora.trainers.bench.gpu.work import WORK, peak_flops, work_of
from marlora.trainers.bench.measure import Options
from marlora.trainers.bench.suites import SUITES

TINY = Options(repeats=1, size="tiny", device="cpu")
WORK_OF_TINY = WORK["tiny"]


def script(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let every part's process run this program, which has the part's name as `part`."""
    import sys

    monkeypatch.setattr(
        hour,
        "command",
        lambda part, options: [sys.executable, "-c", f"part = {part.name!r}\n{text}"],
    )


def test_a_failure_a_hang_and_a_missing_vllm_leave_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    script(
        monkeypatch,
        f"""
import json, os, subprocess, sys, time
def say(name, **values):
    print({RESULT!r} + json.dumps([name, values]), flush=True)
print("a word of a library")
say("first", says="one of " + part)
if part == "head":
    raise ValueError("a kernel")
if part == "trees":
    child = subprocess.Popen(["sleep", "600"])
    open({str(pid)!r}, "w").write(str(child.pid))
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if part == "adapters":
    sys.exit(3)
say("second", says="two")
""",
    )
    monkeypatch.setattr(hour, "GRACE", 0.5)
    monkeypatch.setattr(
        hour,
        "PARTS",
        tuple(dataclasses.replace(p, limit=6.0 if p.name == "trees" else 1000.0) for p in PARTS),
    )
    report = hour.gpu(dataclasses.replace(TINY, json=str(tmp_path / "gpu.json")))
    found = {
        name: (part["status"], list(part["results"])) for name, part in report["parts"].items()
    }
    both = ["first", "second"]
    assert found == {
        "tests": ("done", both),
        "head": ("failed", ["first"]),
        "update": ("done", both),
        "trees": ("out of time", ["first"]),
        "adapters": ("left out", ["first"]),
        "loop": ("done", both),
    }
    assert "ValueError: a kernel" in report["parts"]["head"]["error"]
    assert report["failed"] == ["head", "trees"]
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["parts"] == report["parts"]
    child = int(pid.read_text(encoding="utf-8"))
    deadline = time.monotonic() + 10  # its group was killed with it
    while Path(f"/proc/{child}").exists() and "Z" not in _state(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_what_was_measured_is_written_after_every_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[str]] = []
    file = tmp_path / "gpu.json"

    def run(part: Part, options: Options, limit: float) -> dict[str, Any]:
        if file.exists():
            seen.append(list(json.loads(file.read_text(encoding="utf-8"))["parts"]))
        return {"status": "done", "seconds": 1.0, "results": {"x": {"says": "y"}}, "error": ""}

    monkeypatch.setattr(hour, "run_part", run)
    SUITES["gpu"](dataclasses.replace(TINY, json=str(file)))
    names = [part.name for part in PARTS]
    assert seen == [names[:k] for k in range(1, len(names))]


@pytest.mark.parametrize("share", [1.0, 0.5, 2.0])
def test_a_part_has_its_limit_and_what_others_left(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Of its limit every part takes this share (more: it would not end)."""
    limits: list[float] = []
    clock = [0.0]

    def run(part: Part, options: Options, limit: float) -> dict[str, Any]:
        limits.append(limit)
        clock[0] += share * (limit if share > 1 else part.limit)
        return {"status": "out of time", "seconds": limit, "results": {}, "error": "late"}

    monkeypatch.setattr(hour, "run_part", run)
    monkeypatch.setattr(hour.time, "monotonic", lambda: clock[0])
    report = hour.gpu(TINY)
    own = [part.limit for part in PARTS]
    assert sum(own) <= hour.MOST <= 600
    spare = hour.MOST - sum(own)
    if share == 1.0:
        assert limits == [limit + spare for limit in own]
    elif share == 0.5:
        assert limits[-1] == own[-1] + spare + sum(own[:-1]) / 2
    else:
        left = [name for name, part in report["parts"].items() if part["status"] == "not begun"]
        assert left == [part.name for part in PARTS[len(limits) :]] != []


@pytest.mark.slow  # a process that imports everything
def test_a_part_in_its_own_process_says_that_there_is_no_gpu() -> None:
    """The real command line; its tests need a GPU."""
    found = hour.run_part(PARTS[0], TINY, 300.0)
    assert (found["status"], found["results"]) == (
        "left out",
        {"left out": {"says": "no GPU is seen here"}},
    )


def taken(results: Iterator[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found = dict(results)
    assert found and all(value["says"] for value in found.values())
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.mark.usefixtures("one_thread")
def test_update_with_one_adapter_and_with_eight() -> None:
    found = taken(update_part(TINY, WORK_OF_TINY))
    one, eight = found["tiny, 1 adapters"], found["tiny, 8 adapters"]
    assert eight["tokens"] == 8 * one["tokens"] == 8 * 2 * 9
    assert eight["unique_tokens"] == 8 * one["unique_tokens"] == 8 * (6 + 2 * 2)
    assert 0 < one["mfu"] < 1 and one["mfu_of"] == "measured matrix product"


@pytest.mark.usefixtures("one_thread")
def test_trees_of_twenty_leaves_against_packed_rows() -> None:
    (found,) = taken(trees_part(TINY, WORK_OF_TINY)).values()
    assert set(found["ways"]) == {"packed", "branches"}
    assert found["rho"] == 20 * 14 / (12 + 20 * 2)
    assert "no backward pass on the CPU" in found["refused"]["flex"]
    assert found["ways"]["branches"]["difference"] <= 1e-5


def test_the_head_of_trl_ours_and_plain_logits() -> None:
    (found,) = taken(head_part(TINY, WORK_OF_TINY)).values()
    assert set(found["ways"]) == {"plain", "ours", "trl"}
    assert all(way["difference"] <= 1e-5 for way in found["ways"].values())


@pytest.mark.usefixtures("one_thread")
def test_a_whole_loop_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a)
    )
    with pytest.raises(serving.LeftOut, match="vllm is not installed"):
        next(serving.adapters_part(TINY, WORK_OF_TINY))
    found = taken(serving.loop_part(TINY, WORK_OF_TINY))["loop"]
    assert found["engine"] == "transformers" and found["seconds_per_step"] > 0
    assert found["proof"]["failed"] == 0 and found["proof"]["passed"] > 0
    assert set(found["phases"]) == {"rollout", "train", "publish"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_adapters_side_by_side_and_eight_published() -> None:
    """On a vLLM server of its own."""
    found = taken(serving.adapters_part(TINY, WORK_OF_TINY))
    assert set(found) == {"start", "adapters", "publish"}
    assert set(found["adapters"]["tokens_per_second"]) == {"0", "1", "4", "8"}
    median = found["publish"]["median"]
    assert 0 < median["publish"] < median["first_token"] and median["prove"] > 0


def test_sizes_that_need_a_gpu_say_so() -> None:
    with pytest.raises(SettingError, match=r"no GPU is seen here; --size tiny runs every part"):
        work_of(dataclasses.replace(TINY, size="qwen3-4b"))
    with pytest.raises(SettingError, match="bench gpu --size 135m"):
        hour.gpu(dataclasses.replace(TINY, size="135m"))
    assert work_of(Options(1, "qwen3-4b", device="cuda")).served == "qwen3-1.7b"
    assert (peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA H100 PCIe")) == (989e12, 756e12)
    assert peak_flops("a card of tomorrow") is None


def test_options_reach_a_part_as_they_are() -> None:
    options = dataclasses.replace(TINY, opponents=("trl",), rho=(4.5,), json="x.json")
    argv = parts.command(PARTS[1], options)
    assert argv[3] == "head" and parts.options_of(argv[4]) == options
    assert os.path.isfile(parts.CHECKOUT / "pyproject.toml")
