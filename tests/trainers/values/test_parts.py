"""Parts: one loop saves, restores and hashes them; a part that is missing or altered is named."""

from __future__ import annotations

import json
import re

import pytest

from marlora.agents.types import SettingError
from marlora.trainers.checkpoint import CheckpointError
from marlora.trainers.values.logit_table import LogitTable
from marlora.trainers.values.memory import Memory
from marlora.trainers.values.parts import (
    JsonPart,
    check_names,
    hashes_of,
    json_copy,
    json_sha256,
    load_parts,
    save_parts,
    values_of,
)
from marlora.trainers.values.search import Candidate, Search


def parts(filled=False):
    table = LogitTable("edges", {"a-b": ("yes", "no")}, 0.1)
    memory, search = Memory("archive"), Search("search", seed=0)
    if filled:
        table.logits["a-b"]["yes"] = 0.1 + 0.2
        memory["history"] = [{"round": 1, "score": 1 / 3}]
        search.score(search.add(Candidate({"a.prompt": "Think."})).id, {"t": 0.5})
    return [table, memory, search]


def saved(tmp_path):
    filled = parts(filled=True)
    return filled, save_parts(filled, tmp_path)


def test_what_is_restored_is_what_was_saved(tmp_path):
    filled, hashes = saved(tmp_path)
    fresh = parts()
    assert hashes_of(fresh) != hashes
    load_parts(fresh, tmp_path, hashes)
    assert hashes_of(fresh) == hashes == hashes_of(filled)
    assert [part.state_dict() for part in fresh] == [part.state_dict() for part in filled]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "edges", "search"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_a_team_sees_the_table_and_no_archive():
    assert values_of(parts(filled=True)) == {"edges": {"a-b": {"yes": 0.1 + 0.2, "no": 0.0}}}


def test_a_value_has_one_owner():
    one, other = parts()[0], parts()[0]
    other._name = "other"
    other.values = lambda: {"edges": 1}
    with pytest.raises(SettingError, match="value 'edges': parts 'edges' and 'other' both give it"):
        values_of([one, other])


def test_a_part_whose_folder_is_gone_is_named(tmp_path):
    _, hashes = saved(tmp_path)
    (tmp_path / "archive" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"archive/state\.json: cannot be read"):
        load_parts(parts(), tmp_path, hashes)
    (tmp_path / "archive").rmdir()
    with pytest.raises(CheckpointError, match=r"archive: missing, though .* lists part 'archive'"):
        load_parts(parts(), tmp_path, hashes)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("archive", lambda state: state.update(history=[])),
        ("edges", lambda state: state["logits"]["a-b"].update(yes=0.3)),
        ("search", lambda state: state["candidates"][0]["scores"].update(t=0.75)),
    ],
)
def test_a_part_that_was_altered_is_named(tmp_path, part, change):
    _, hashes = saved(tmp_path)
    path = tmp_path / part / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{part}: the sha256 of part '{part}' is not"):
        load_parts(parts(), tmp_path, hashes)


def test_a_file_that_is_no_json_is_named(tmp_path):
    _, hashes = saved(tmp_path)
    (tmp_path / "edges" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"edges/state\.json: cannot be read"):
        load_parts(parts(), tmp_path, hashes)


def test_a_checkpoint_of_other_parts_is_refused(tmp_path):
    _, hashes = saved(tmp_path)
    found = re.escape(str(tmp_path))
    with pytest.raises(SettingError, match=f"part 'new': this run has it and {found} does not"):
        load_parts([*parts(), Memory("new")], tmp_path, hashes)
    with pytest.raises(SettingError, match=f"part 'edges': {found} has it and this run does not"):
        load_parts(parts()[1:], tmp_path, hashes)


@pytest.mark.parametrize("name", ["a/b", "", "..", ".hidden", "a b", "é"])
def test_a_name_that_is_no_folder_s_is_refused(name):
    with pytest.raises(SettingError, match="expected letters, digits"):
        Memory(name)


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(SettingError, match="part 'm': 2 parts of a run have this name"):
        check_names([Memory("m"), Memory("n"), Memory("m")])


def test_a_part_without_a_state_says_so(tmp_path):
    with pytest.raises(TypeError, match=r"JsonPart has no state_dict\(\)"):
        JsonPart("p").save(tmp_path)


def test_the_hash_is_of_the_content():
    assert json_sha256({"a": 1, "b": [1.5]}) == json_sha256({"b": [1.5], "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})
    assert json_sha256("\ud800") != json_sha256("\ud801")  # halves of a pair, as models write them


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {"b": (2,)}]}, r"m\.a\[1\]\.b: expected JSON .*, got tuple"),
        ({"a": {1: 2}}, r"m\.a: expected texts as keys, got 1"),
        ({"a": float("nan")}, r"m\.a: expected JSON .*, got nan"),
        ([float("inf")], r"m\[0\]: expected JSON .*, got inf"),
        ({"a": {"b": {1, 2}}}, r"m\.a\.b: expected JSON .*, got set"),
        ({"a": b"x"}, r"m\.a: expected JSON .*, got bytes"),
    ],
)
def test_what_is_not_json_is_refused_with_its_path(value, message):
    with pytest.raises(SettingError, match=message):
        json_copy(value, "m")


def test_a_copy_shares_nothing():
    value = {"a": [1, True, None, "x", 0.5, {"b": []}]}
    copy = json_copy(value, "m")
    assert copy == value and json.loads(json.dumps(copy)) == copy
    copy["a"][5]["b"].append(1)
    assert value["a"][5]["b"] == []
