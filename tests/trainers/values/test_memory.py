"""A method's memory: JSON, saved and resumed whole, never shown to a team."""

from __future__ import annotations

import pytest

from marlora.agents.types import SettingError
from marlora.trainers.values.memory import Memory


def test_it_is_a_mapping_that_a_team_does_not_see():
    memory = Memory("memory")
    memory["trials"] = [1]
    memory["trials"].append({"score": 0.5})
    assert memory.setdefault("best", 3) == 3 and memory.setdefault("best", 4) == 3
    assert "best" in memory and list(memory) == ["trials", "best"] and len(memory) == 2
    del memory["best"]
    assert memory.get("best") is None and memory.get("best", 0) == 0
    assert memory["trials"] == [1, {"score": 0.5}]
    assert memory.values() == {}
    assert repr(memory) == "Memory('memory', {'trials': [1, {'score': 0.5}]})"


def test_a_resumed_memory_holds_the_same(tmp_path):
    memory, shared = Memory("memory"), [1]
    memory["a"] = memory["b"] = shared
    shared.append(2)  # was copied when it was set: one list would come back as two
    memory["a"].append(3)
    assert (memory["a"], memory["b"]) == ([1, 3], [1])
    memory.save(tmp_path)
    resumed = Memory("memory")
    resumed["other"] = 1
    resumed.load(tmp_path)
    assert resumed.state_dict() == memory.state_dict() == {"a": [1, 3], "b": [1]}
    assert resumed.sha256() == memory.sha256()
    resumed["a"].append(4)
    assert memory["a"] == [1, 3] and resumed.sha256() != memory.sha256()


def test_what_is_not_json_is_refused_with_its_path(tmp_path):
    memory = Memory("memory")
    with pytest.raises(
        SettingError, match=r"memory\.trials\[0\]\.pair: expected JSON .*, got tuple"
    ):
        memory["trials"] = [{"pair": (1, 2)}]
    with pytest.raises(SettingError, match="memory: expected texts as keys, got 1"):
        memory[1] = "x"
    assert len(memory) == 0
    memory["scores"] = {}
    memory["scores"]["t"] = float("nan")  # put in behind its back
    with pytest.raises(SettingError, match=r"memory\.scores\.t: expected JSON .*, got nan"):
        memory.save(tmp_path)
