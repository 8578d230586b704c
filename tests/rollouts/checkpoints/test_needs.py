"""The flags that a checkpoint needs are those without which it is refused: no fewer, no more."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.rollouts.checkpoints.needs import meta_flag, needed_flags
from marlora.rollouts.checkpoints.team import LoadOptions, resolve_names
from tests.recipes.test_next_commands import MINE

OURS: dict[str, Any] = {
    "system": {
        "class": "marlora.agents.patterns.chain:Chain",
        "arguments": {"views": {"first": "{prompt}", "last": "{previous}+{c}"}},
    },
    "agents": [{"name": "first", "policy": "first"}, {"name": "last", "policy": "last"}],
    "policies": {"first": {"name": "first"}, "last": {"name": "last"}},
    "base": {"name": "the-base"},
    "bases": {"the-base": {}},
    "rewards": ["exact"],
    "tasks": {"name": "arithmetic", "args": {}, "seed": 0, "num_eval_tasks": 2, "eval": ""},
}
PROGRAM: dict[str, Any] = {
    "class": "marlora.rollouts.gateway.programs:Command",
    "arguments": {"command": ["python", "x.py"]},
}
TRUST, SYSTEM = ["--trust_checkpoint"], ["--system", "mine:Pair"]
# what is changed, and what must be said
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all of it ours": ({}, []),
    "a reward": ({"rewards": ["exact", "mine:bytes_mod_7"]}, TRUST),
    "a task set": ({"tasks": {**OURS["tasks"], "name": "mine:sums"}}, TRUST),
    "a set of ours with a colon": (
        {"tasks": {**OURS["tasks"], "name": "marlora.rollouts.tasks.toy:tiny_tasks"}},
        [],
    ),
    "a tool": (
        {"agents": [{**OURS["agents"][0], "tools": ["mine:two"]}, OURS["agents"][1]]},
        TRUST,
    ),
    "a tool of ours": (
        {"agents": [{**OURS["agents"][0], "tools": ["calculator"]}, OURS["agents"][1]]},
        [],
    ),
    "a system": ({"system": {"class": "mine:Pair", "arguments": {}}}, SYSTEM),
    "a system and a reward": (
        {"system": {"class": "mine:Pair", "arguments": {}}, "rewards": ["mine:bytes_mod_7"]},
        [*SYSTEM, *TRUST],
    ),
    "a program": ({"system": PROGRAM}, ["--system", PROGRAM["class"], *TRUST]),
    "a judge on the checkpoint's own base": (
        {"rewards": ["judge(critic)"], "helpers": {"critic": {"prompt": "Judge."}}},
        [],
    ),
    "a judge elsewhere": (
        {
            "rewards": ["judge(critic)"],
            "helpers": {"critic": {"url": "http://x/v1", "base": "m", "key_env": "HOME"}},
        },
        TRUST,
    ),
    "a judge elsewhere, by its address": ({"rewards": ["judge(http://x/v1, m)"]}, TRUST),
    "a model elsewhere, with a key": (
        {
            "policies": {
                **OURS["policies"],
                "last": {"name": "last", "url": "http://x/v1", "key_env": "HOME"},
            }
        },
        TRUST,
    ),
    "a model elsewhere": (
        {"policies": {**OURS["policies"], "last": {"name": "last", "url": "http://x/v1"}}},
        TRUST,
    ),
}


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.parametrize(("changes", "flags"), CASES.values(), ids=CASES)
def test_needed_flags(changes: dict[str, Any], flags: list[str], tmp_path: Path) -> None:
    data = copy.deepcopy({**OURS, **changes})
    assert needed_flags(data) == flags
    assert "mine" not in sys.modules, "a checkpoint of somebody else's may be exported"

    def opened(words: list[str]) -> None:
        system = words[words.index("--system") + 1] if "--system" in words else ""
        options = LoadOptions(scratch=tmp_path, system=system, trust=TRUST[0] in words)
        resolve_names(tmp_path, data, options)

    opened(flags)
    if flags and changes.get("tasks") is None:  # task sets are looked up later
        fewer = flags[:-1] if flags[-1:] == TRUST else []
        with pytest.raises(SettingError, match=r"--trust_checkpoint|--system"):
            opened(fewer)


def test_meta_is_printed_where_the_team_shows_it() -> None:
    assert meta_flag(OURS, {"c": 5}) == ["--meta", '{"c": 5}']
    assert meta_flag(OURS, {"rationale": "5"}) == [] and meta_flag(OURS, {}) == []
    own = {**OURS, "system": {"class": "mine:Pair", "arguments": {}}}
    assert meta_flag(own, {"any": 1}) == ["--meta", '{"any": 1}']
