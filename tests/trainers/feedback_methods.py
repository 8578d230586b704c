"""Methods of feedback in words that have to behave alike around their step: after a kill, on two
ranks, from their checkpoints, with helpers elsewhere. Each is a short run with scripted helpers.

`python -m tests.trainers.feedback_methods FOLDER MODEL` plays all of them on each rank.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlora.rollouts.engines.scripted import Answer
from tests.trainers.feedback_run import HELPERS, run_of, scripted
from tests.trainers.feedback_run import METHODS as ON_SIGNS
from tests.trainers.methods.text_feedback import test_metatextgrad as meta
from tests.trainers.methods.text_feedback import test_semantic_backprop as semantic
from tests.trainers.methods.text_feedback import test_symbolic_learning as symbolic


@dataclass(frozen=True)
class Method:
    """How a run of a method is made, who answers in it, its helpers, and which of them an outside
    model may be."""

    make: Callable[..., Any]
    say: Callable[[], Answer]
    helpers: dict[str, Any]
    outside: str = "optimizer"


METHODS = {
    "semantic_backprop": Method(
        semantic.semantic,
        lambda: scripted(semantic.perform, semantic.explain, semantic.improve),
        HELPERS,
    ),
    "metatextgrad": Method(meta.meta, meta.says, meta.HELPERS, "meta"),
    "symbolic_learning": Method(symbolic.symbolic, lambda: symbolic.says, HELPERS),
    **{
        name: Method(functools.partial(run_of, name), lambda says=says: scripted(**says), HELPERS)
        for name, (_, _, says) in ON_SIGNS.items()
        if name != "textgrad_prompts"  # whose own file has these tests
    },
}


def main() -> None:
    folder, model = map(Path, sys.argv[1:3])
    for name, method in METHODS.items():
        made = method.make(folder / name, model)
        made.train()
        rank = made.run.ranks.rank
        path = folder / f"{name}.rank{rank}.json"
        path.write_text(json.dumps(dict(made.run.values)), encoding="utf-8")


if __name__ == "__main__":
    main()
