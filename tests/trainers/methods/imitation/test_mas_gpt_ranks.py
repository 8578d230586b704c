"""Two processes come to the table and the triples that one comes to, and learn the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import Store
from tests.trainers.forks import two_ranks
from tests.trainers.mas_gpt_program import SETTINGS
from tests.trainers.mas_gpt_run import words_put
from tests.trainers.reading import rows

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path) -> None:
    done = two_ranks("tests.trainers.mas_gpt_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = words_put(tmp_path / "one", model, **SETTINGS)
    summary = one.train()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        assert found == one.memory.state_dict(), rank
    mine = json.loads((tmp_path / "two" / "summary.json").read_text(encoding="utf-8"))
    assert mine["eval"] == summary["eval"] and mine["mas_gpt"] == summary["mas_gpt"]
    (two,), (alone,) = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert two["mas_gpt"].pop("val_nll") == pytest.approx(alone["mas_gpt"].pop("val_nll"), abs=1e-5)
    assert two["mas_gpt"] == alone["mas_gpt"]
    after = [each["policies"]["designer"]["nll_after"] for each in (two, alone)]
    assert after[0] == pytest.approx(after[1], abs=1e-5)
    learnt_from = [
        {
            e.id: e.output
            for e in Store(tmp_path / n / "episodes")
            if e.kind != "eval" and "designer" not in e.usage
        }
        for n in ("one", "two")
    ]
    assert learnt_from[0] == learnt_from[1] and len(learnt_from[0]) > 4 * 12
