"""The eight methods of feedback in words on the toy model `tiny-critic`, each with three controls,
at equal tokens: python -m benchmarks.scripts.feedback FOLDER [--tokens N] [--seeds 0 1 2]
[--json FILE]

Every run has a folder of its own in FOLDER; what is finished there is read and not run again. The
table says the accuracy on held-out tasks after the run, seed by seed, and as means over the seeds
the gain, how many values were adopted of those that the gate saw, and the tokens that the team and
the helpers took. FILE gets it as a table of `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlora.trainers.testbeds.critic.runs import CONTROLS, METHODS, critic_run, teacher_engine

OWN = "own"
HEAD = (
    *("method", OWN, *CONTROLS, "gain", "adopted of judged"),
    *("tokens: team", "helpers", "steps"),
)


def result_of(name: str, control: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a run came to: read, or run now."""
    folder = Path(args.folder) / f"{name}-{control}-{seed}"
    summary = folder / "summary.json"
    if not summary.is_file():
        settings = {"model": args.model} if args.model else {}
        critic_run(
            name,
            folder,
            control="" if control == OWN else control,
            seed=seed,
            budget={"tokens": args.tokens},
            overwrite=True,
            engine=teacher_engine() if args.teacher else None,
            **settings,
        ).train()
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    metrics = folder / "metrics.jsonl"  # missing where the budget ended the run in its first step
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [json.loads(line).get("text_feedback", {}) for line in lines]
    found["adopted"] = sum(bool(row.get("adopted")) for row in rows)
    found["judged"] = sum(len(row.get("verdicts", ())) for row in rows)
    return found


def tokens_of(summary: dict[str, Any], kinds: Sequence[str]) -> int:
    """Tokens of all calls of these kinds."""
    rows = [row for kind in kinds for row in summary["ledger"].get(kind, {}).values()]
    return sum(int(row["prompt_tokens"] + row["sampled_tokens"]) for row in rows)


def row_of(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Any]:
    """The cells of a method's row, in the order of HEAD; `runs`: by control, seed by seed."""
    own = runs[OWN]

    def after(run: Mapping[str, Any]) -> float:
        return float(run["eval"]["after"]["accuracy"])

    def mean(numbers: Iterable[float]) -> float:
        return statistics.mean(numbers)

    gain = mean(after(run) - run["eval"]["before"]["accuracy"] for run in own)
    adopted, judged = (mean(run[key] for run in own) for key in ("adopted", "judged"))
    return [
        f"`{name}`",
        *(" ".join(f"{after(run):.2f}" for run in runs.get(w, [])) for w in (OWN, *CONTROLS)),
        f"{gain:+.2f}",
        f"{adopted:.1f} of {judged:.1f}",
        round(mean(tokens_of(run, ("train", "trial")) for run in own)),
        round(mean(tokens_of(run, ("aside",)) for run in own)),
        f"{mean(run['steps'] for run in own):.1f}",
    ]


def ended_right(table: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[Any]:
    """A last row: how many of the runs of each column end with at least half of the tasks right."""
    cells = []
    for which in (OWN, *CONTROLS):
        after = [r["eval"]["after"]["accuracy"] for runs in table.values() for r in runs[which]]
        cells.append(f"{sum(score >= 0.5 for score in after)} of {len(after)}")
    return ["runs that end right", *cells, *[""] * (len(HEAD) - 1 - len(cells))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--json", default="", help="a file for the table")
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=list(CONTROLS))
    parser.add_argument("--model", default="", help="a folder in place of tiny-critic")
    parser.add_argument("--teacher", action="store_true", help="its teacher answers, no model")
    args = parser.parse_args()
    table: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {which: [] for which in (OWN, *CONTROLS)} for name in args.only
    }
    for seed in args.seeds:  # whole rows for one seed first
        for which in (OWN, *args.controls):
            for name in args.only:
                if (name, which) == ("metatextgrad", "drawn"):
                    continue  # it rewrites the very prompt that says to guess
                runs = table[name][which]
                runs.append(result_of(name, which, seed, args))
                print(name, which, seed, runs[-1]["eval"]["after"]["accuracy"], flush=True)
    rows = [*(row_of(name, runs) for name, runs in table.items()), ended_right(table)]
    for cells in (HEAD, ["---"] * len(HEAD), *rows):
        print(f"| {' | '.join(map(str, cells))} |")
    if args.json:
        given = shlex.join(a for a in sys.argv[1:] if a not in (args.folder, "--json", args.json))
        command = f"python -m benchmarks.scripts.feedback FOLDER {given}".strip()
        source = "summary.json and metrics.jsonl of the runs"
        content = {"command": command, "source": source, "head": HEAD, "rows": rows}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
