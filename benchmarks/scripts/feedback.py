"""The eight methods of feedback in words on the toy model `tiny-critic`, each with three controls,
at equal tokens: python -m benchmarks.scripts.feedback FOLDER [--tokens N] [--seeds 0 1 2]
[--json FILE]

Every run has a folder of its own in FOLDER; what is finished there is read and not run again. The
table says how many runs end right (a value of the worker has ten forms, so held-out accuracy ends
near 0 or near 1), and as means over the seeds the gain, how many values were adopted of those that
the gate saw, and the tokens that the team and the helpers took. Its last row has, for each control,
the p of a sign-flip test over the seeds: runs of one seed share their tasks, so the runs of a seed
count as one. FILE gets it as a table of `benchmarks/results/`.
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

from marlora.rollouts.evaluation.statistics import sign_flip_p
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
    verdicts = [verdicts_of(json.loads(line)) for line in lines]
    found["adopted"] = sum(adopted for _, adopted in verdicts)
    found["judged"] = sum(judged for judged, _ in verdicts)
    return found


def verdicts_of(row: Mapping[str, Any]) -> tuple[int, bool]:
    """How many values (of metaTextGrad: optimizers) were judged in a step, and whether one was
    adopted; a step that found no error to learn from judges none."""
    if "meta" in row:
        return 1, bool(row["meta"]["adopted"])
    if "text_feedback" in row:
        return len(row["text_feedback"]["verdicts"]), bool(row["text_feedback"]["adopted"])
    return 0, False


def tokens_of(summary: Mapping[str, Any], kinds: Sequence[str]) -> int:
    """Tokens of all calls of these kinds."""
    rows = [row for kind in kinds for row in summary["ledger"].get(kind, {}).values()]
    return sum(int(row["prompt_tokens"] + row["sampled_tokens"]) for row in rows)


def row_of(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Any]:
    """The cells of a method's row, in the order of HEAD; `runs`: by control, seed by seed."""
    own = runs[OWN]

    def mean(numbers: Iterable[float]) -> float:
        return statistics.mean(numbers)

    gain = mean(run["eval"]["after"]["accuracy"] - run["eval"]["before"]["accuracy"] for run in own)
    adopted, judged = (mean(run[key] for run in own) for key in ("adopted", "judged"))
    return [
        f"`{name}`",
        *(share(runs[which]) for which in (OWN, *CONTROLS)),
        f"{gain:+.2f}",
        f"{adopted:.1f} of {judged:.1f}",
        round(mean(tokens_of(run, ("train", "trial")) for run in own)),
        round(mean(tokens_of(run, ("aside",)) for run in own)),
        f"{mean(run['steps'] for run in own):.1f}",
    ]


def right(run: Mapping[str, Any]) -> bool:
    """Whether it ends with at least half of the held-out tasks right."""
    return float(run["eval"]["after"]["accuracy"]) >= 0.5


def share(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many of these runs end right, "" of none."""
    return f"{sum(map(right, runs))} of {len(runs)}" if runs else ""


def last_rows(table: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[list[Any]]:
    """All methods together, and for each control the p of a sign-flip test over the seeds: of how
    many more methods end right without it, among those that were run with it."""
    totals, tests = list[Any](), list[Any]([""])
    for which in (OWN, *CONTROLS):
        totals.append(share([run for runs in table.values() for run in runs[which]]))
    for which in CONTROLS:
        differences = [
            [right(a) - right(b) for a, b in zip(runs[OWN], runs[which], strict=True)]
            for runs in table.values()
            if runs[which]
        ]
        by_seed = [statistics.mean(of_a_seed) for of_a_seed in zip(*differences, strict=True)]
        tests.append(round(sign_flip_p(by_seed), 3) if differences else "")
    rest = [""] * (len(HEAD) - 1 - len(totals))
    return [["runs that end right", *totals, *rest], ["p, against own", *tests, *rest]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--json", default="", help="a file for the table")
    parser.add_argument("--tokens", type=int, default=1_000)
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
    rows = [*(row_of(name, runs) for name, runs in table.items()), *last_rows(table)]
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
