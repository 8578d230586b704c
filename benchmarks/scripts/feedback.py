"""The eight methods of feedback in words on the toy model `tiny-critic`, each with three controls,
at equal tokens: python -m benchmarks.scripts.feedback FOLDER [--tokens N] [--seeds 0 1 2]

Every run has a folder of its own in FOLDER; what is finished there is read and not run again. The
table says, as means over the seeds, the accuracy on held-out tasks after the run (the lowest and
the highest in brackets), how many values were adopted of those that the gate saw, and the tokens
that the team and the helpers took.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from marlora.trainers.testbeds.critic.runs import CONTROLS, METHODS, critic_run, teacher_engine

OWN = "own"
COLUMNS = ("method", OWN, *CONTROLS, "gain", "adopted of proposed", "team", "helpers", "steps")


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
    found["proposed"] = sum(len(row.get("verdicts", ())) for row in rows)
    return found


def tokens_of(summary: dict[str, Any], kinds: Sequence[str]) -> int:
    """Tokens of all calls of these kinds."""
    rows = [row for kind in kinds for row in summary["ledger"].get(kind, {}).values()]
    return sum(int(row["prompt_tokens"] + row["sampled_tokens"]) for row in rows)


def row_of(name: str, runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The cells of a method's row."""
    own = runs[OWN]
    after = {
        which: statistics.mean(run["eval"]["after"]["accuracy"] for run in each)
        for which, each in runs.items()
    }
    gains = [r["eval"]["after"]["accuracy"] - r["eval"]["before"]["accuracy"] for r in own]
    yield f"`{name}`"
    for which in (OWN, *CONTROLS):
        each = [run["eval"]["after"]["accuracy"] for run in runs.get(which, [])]
        yield f"{after[which]:.3f} ({min(each):.2f} to {max(each):.2f})" if each else ""
    yield f"{statistics.mean(gains):+.3f}"
    adopted, proposed = (
        statistics.mean(run[key] for run in own) for key in ("adopted", "proposed")
    )
    yield f"{adopted:.1f} of {proposed:.1f}" if proposed else ""
    yield f"{statistics.mean(tokens_of(run, ('train', 'trial')) for run in own):,.0f}"
    yield f"{statistics.mean(tokens_of(run, ('aside',)) for run in own):,.0f}"
    yield f"{statistics.mean(run['steps'] for run in own):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=list(CONTROLS))
    parser.add_argument("--model", default="", help="a folder in place of tiny-critic")
    parser.add_argument("--teacher", action="store_true", help="its teacher answers, no model")
    args = parser.parse_args()
    table: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in args.only}
    for seed in args.seeds:  # whole rows for one seed first
        for which in (OWN, *args.controls):
            for name in args.only:
                if (name, which) == ("metatextgrad", "drawn"):
                    continue  # it rewrites the very prompt that says to guess
                runs = table[name].setdefault(which, [])
                runs.append(result_of(name, which, seed, args))
                print(name, which, seed, runs[-1]["eval"]["after"]["accuracy"], flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, runs in table.items():
        print(f"| {' | '.join(row_of(name, runs))} |")


if __name__ == "__main__":
    main()
