"""Both recipes on real tiny models: LLMSelector over the base, two trained adapters and a second
base; DyLAN among agents of two bases.

Measured, seed 0, greedy, on 200 held-out tasks: LLMSelector .94 with one adapter
in each place; one model in both .385 (base), .555 and .53 (adapters), .555 (second base). DyLAN, 69
tasks: .61 with all seven, .96 with the three that it selects.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.recipes.cli.main import main
from marlora.trainers.methods.selection.dylan import DyLANConfig, DyLANTrainer
from marlora.trainers.methods.selection.llmselector import LLMSelectorConfig, LLMSelectorTrainer
from marlora.trainers.testbeds.experts import expert_adapter
from tests.repository import ROOT
from tests.trainers.reading import rows

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def settings(recipe: str, folder: Path, **changes: Any) -> dict[str, Any]:
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    return {**yaml.safe_load(text), "output_dir": str(folder), **changes}


def pool() -> dict[str, Any]:
    """What may speak beside the base: two LoRA adapters, and a second base."""
    return {
        "adds": {"init": str(expert_adapter("first"))},
        "carries": {"init": str(expert_adapter("last"))},
        "second": {"base": "tiny-last"},
    }


def check_evaluated(folder: Path, summary: Mapping[str, Any]) -> None:
    """`marlora eval` of the last checkpoint says what the run says."""
    last = folder / "checkpoints" / f"step-{summary['steps']:06d}"
    out = folder.with_name("eval")
    assert main(["eval", str(last), "--engine", "transformers", "--output", str(out)]) in (0, None)
    found = json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary["eval"][when]["accuracy"], when


def test_a_mapping_over_bases_and_adapters_beats_every_single_model(tmp_path: Path) -> None:
    args = settings("llmselector", tmp_path / "run", policies=pool(), num_search_tasks=40)
    trained = LLMSelectorTrainer(args=LLMSelectorConfig(**args))
    summary = trained.train()
    found = trained.memory["history"][-1]
    alone = {name: each["accuracy"] for name, each in summary["uniform"].items()}
    after = summary["eval"]["after"]["accuracy"]
    told = f"{trained.memory['history']}, {after}, alone {alone}"
    print(told)
    assert found[0] == "adds" and found[1] in ("carries", "second"), told
    assert set(alone) == {"base", "adds", "carries", "second"}
    assert after > 0.9 and max(alone.values()) < 0.7, told
    assert all(each["paired"]["ci95"][0] > 0.2 for each in summary["uniform"].values())
    hashes = summary["policies"].values()
    assert all(each["sha256_before"] == each["sha256_after"] for each in hashes)
    assert summary["live_proof"]["failed"] == 0
    check_evaluated(tmp_path / "run", summary)
    with trained.run as run:
        every = {
            each: run.evaluator.measure(
                run.state.with_values(trained._values(each)), trained.search_tasks
            ).accuracy
            for each in itertools.product(trained.models, repeat=2)
        }
    print(every)
    assert len(every) == 16 and every[tuple(found)] == max(every.values()), every


def test_agents_that_agree_with_the_output_are_the_team(tmp_path: Path) -> None:
    trained = DyLANTrainer(args=DyLANConfig(**settings("dylan", tmp_path / "run")))
    summary = trained.train()
    last = rows(tmp_path / "run")[-1]
    told = f"{last['importance']}, {summary['eval']}"
    print(told)
    assert last["team"] == "expert1, expert2, expert3" and last["unread"] == 1.0, told
    assert summary["eval"]["before"]["accuracy"] < 0.75, told
    assert summary["eval"]["after"]["accuracy"] > 0.9, told
    assert summary["eval"]["paired"]["ci95"][0] > 0.1, told
    check_evaluated(tmp_path / "run", summary)
