"""A team that needs another prompt and another adapter learns both from the same episodes; with the
same tokens neither is enough alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.trainers.testbeds.rules import rule_chain
from tests.trainers.methods.prompts.prompts_and_weights_run import both
from tests.trainers.outside import Outside

pytestmark = pytest.mark.usefixtures("one_thread")


def to_last(body: dict[str, Any]) -> str:
    """What makes agent `first` of the toy model go the way that the tasks want."""
    return "<INSTRUCTION>last</INSTRUCTION>"


@pytest.mark.slow
def test_a_team_that_needs_both_is_right_with_neither_alone(tmp_path: Path) -> None:
    """Agent `first` of the toy model is frozen, so only another prompt makes it right; no prompt of
    `last` is searched, so only its adapter can. The controls have the same budget of tokens.

    Measured, seed 0, on 30 held-out tasks: before 0, both 1.0, weights alone .23, prompts alone 0.
    """

    def run(name: str, **changes: Any) -> dict[str, Any]:
        with Outside(to_last) as outside:
            return both(
                tmp_path / name,
                "tiny-rules",
                outside.url,
                rule_chain({"last": "last"}),
                rewards=["exact"],
                modules=["first"],
                num_eval_tasks=30,
                num_val_tasks=12,
                gate="not_worse",
                max_steps=99,
                round_steps=2,
                tasks_per_step=8,
                num_generations=8,
                budget={"tokens": 16000},
                lora_r=8,
                max_concurrency=128,
                save_every=99,
                proof_every=99,
                **{"learning_rate": 4e-3, **changes},
            ).train()

    done = {
        "both": run("both"),
        "weights": run("weights", num_candidates=1),
        "prompts": run("prompts", learning_rate=0.0),
    }
    after = {name: summary["eval"]["after"]["accuracy"] for name, summary in done.items()}
    spent = {name: summary["budget"]["spent"]["tokens"] for name, summary in done.items()}
    told = f"after {after}, tokens {spent}"
    print(told)
    assert min(spent.values()) > 0.85 * 16000 and max(spent.values()) <= 16000, told
    assert after["both"] > 0.8 and max(after["weights"], after["prompts"]) < 0.4, told
    chosen = next(row for row in done["both"]["candidates"] if row["in_force"])
    assert chosen["values"] == {"first.prompt": "last"}, told
