"""`marlora bench store`: what a store of ten thousand, a hundred thousand and a million episodes
costs: to fill, to append to, to resume from, to list in a report, and to find evaluations in.

Most of a store is filled with copies of an encoded episode under ids of their own, since encoding a
million would say nothing new; what is appended and timed is encoded. Given are processor seconds
and the process' memory above that before. `per_episode` falls or stays where a part is linear.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ....agents.types import Message, Reward, Task, Turn, Usage
from ....rollouts.episodes.store import Store
from ....rollouts.report.episode_index import EpisodeIndex, rows
from ....rollouts.types import Episode
from ..measure import Options, machine, memory, table

SIZES = (10_000, 100_000, 1_000_000)
APPENDED, STEP = 1_000, 100  # episodes that are appended and timed, and how many at a time
EVALUATIONS = 50  # one episode in so many is of an evaluation
TINY = (200, 400)
MARK = "id-to-be-replaced"


def sample(name: str, step: int, kind: Any = "train") -> Episode:
    """A small episode: one turn of eight tokens."""
    turn = Turn(
        0,
        "solver",
        messages=(Message("user", "1 + 1"),),
        text="two",
        policy="solver",
        prompt_ids=(5, 6, 7, 8),
        token_ids=tuple(range(10, 18)),
        logprobs=(-0.5,) * 8,
    )
    return Episode(
        id=name,
        group=name.rpartition("/")[0],
        task=Task("sum", "1 + 1", "2", split=kind),
        seed=1,
        kind=kind,
        split=kind,
        step=step,
        turns=(turn,),
        output="two",
        rewards=(Reward("correct", 1.0),),
        usage={"solver": Usage(1, 4, 8)},
    )


def store(options: Options) -> dict[str, Any]:
    """Every part at every size. With `options.json` what is done is written after each size."""
    results: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"suite": "store", "clock": "processor time", **machine()}
    for size in TINY if options.size == "tiny" else SIZES:
        with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
            results[str(size)] = measured(Path(scratch) / "run", size)
        if options.json not in ("", "-"):
            text = json.dumps(report | {"results": results}, indent=2) + "\n"
            Path(options.json).write_text(text, encoding="utf-8")
    rows_ = [
        [f"{int(size):,}", name, f"{part['s']:.2f}", f"{part['us_per_episode']:.1f}", _mib(part)]
        for size, parts in results.items()
        for name, part in parts.items()
    ]
    columns = ["episodes", "part", "s of CPU", "us an episode", "MiB more"]
    return {**report, "results": results, **table("store: one turn an episode", columns, rows_)}


def _mib(part: dict[str, Any]) -> str:
    return f"{part['bytes'] / 2**20:.0f}"


def measured(run: Path, size: int) -> dict[str, dict[str, Any]]:
    """Seconds and memory of every part, in a run folder whose store gets this many episodes."""
    found: dict[str, dict[str, Any]] = {}

    def part(name: str, count: int, work: Callable[[], Any]) -> Any:
        gc.collect()
        before, start = memory("VmRSS"), time.process_time()
        result = work()
        seconds = time.process_time() - start
        grown = max(0, memory("VmRSS") - before)
        found[name] = {"s": seconds, "us_per_episode": 1e6 * seconds / count, "bytes": grown}
        return result

    fill(run / "episodes", size - APPENDED if size > APPENDED else size // 2)
    added = size - (size - APPENDED if size > APPENDED else size // 2)
    with Store(run / "episodes") as episodes:
        part("open", size, lambda: episodes.extend([sample("first/0", 0)]))  # reads the ids
        part("append", added - 1, lambda: _append(episodes, added - 1))
    with Store(run / "episodes") as episodes:
        last = f"step-{(size - added - 1) // STEP}"
        one = {f"{last}/{k}" for k in range(STEP)}
        part("resume: a step's episodes", size, lambda: _count(episodes.read(id=one)))
        part("evaluations", size, lambda: _count(episodes.read(kind="eval")))
        listed = part("report: rows", size, lambda: rows(episodes, "correct"))
        index = EpisodeIndex(lambda policy, ids: None)
        part("report: texts", size, lambda: index.add(run, "run", listed))
        if len(listed) != size or index.runs[0]["episodes"] != size:
            raise AssertionError(f"{len(listed)} of {size} episodes were listed")
    return found


def fill(folder: Path, count: int) -> None:
    """So many episodes, encoded once and written under ids of their own: steps of `STEP` episodes,
    one in `EVALUATIONS` of an evaluation."""
    lines: dict[str, str] = {}
    for kind in ("train", "eval"):
        with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
            with Store(scratch) as one:
                one.append(sample(f"{MARK}/0", 1, kind))
                (path,) = one.files()
                lines[kind] = path.read_text(encoding="utf-8")
            values = Path(scratch) / "values"
            (folder / "values").mkdir(parents=True, exist_ok=True)
            for state in values.iterdir():
                (folder / "values" / state.name).write_bytes(state.read_bytes())
    per_file = 100_000
    for number, start in enumerate(range(0, count, per_file)):
        path = folder / f"episodes-{number:05d}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for k in range(start, min(start + per_file, count)):
                line = lines["eval" if k % EVALUATIONS == 0 else "train"]
                step = f"step-{k // STEP}"
                file.write(line.replace(f"{MARK}/0", f"{step}/{k % STEP}", 1).replace(MARK, step))


def _append(episodes: Store, count: int) -> None:
    for start in range(0, count, STEP):
        batch = range(start, min(start + STEP, count))
        episodes.extend([sample(f"more-{start}/{k}", start) for k in batch])


def _count(episodes: Iterator[Episode]) -> int:
    return sum(1 for _ in episodes)
