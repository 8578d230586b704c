"""States in a store: once per key, whatever their names and texts; and stores of schema 1."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from marlora.agents.state import TeamState
from marlora.agents.types import Task, Turn, Usage
from marlora.rollouts.episodes.codec import pack
from marlora.rollouts.episodes.store import Store, StoreError
from marlora.rollouts.types import Episode
from tests.repository import ROOT

OLD = ROOT / "tests" / "data" / "store-0.1"  # written by marlora 0.1: every line has schema 1
STATE = TeamState({"a": "a-v1"}, {"a.prompt": "Add.", "edge": {"x": 0.5, "y": -0.5}})


def episode(id: str, state: TeamState = STATE) -> Episode:
    return Episode(id, "g", Task("t", "1+1?"), state=state)


def states(folder: Path) -> list[Path]:
    return sorted((folder / "values").iterdir())


def test_two_hundred_episodes_of_one_state_hold_it_once(tmp_path: Path) -> None:
    again = TeamState({"a": "a-v1"}, {"edge": {"y": -0.5, "x": 0.5}, "a.prompt": "Add."})
    with Store(tmp_path) as store:
        store.extend([episode(f"e{n}") for n in range(100)])
    with Store(tmp_path) as store:  # goes on in another process, in another order of names
        store.extend([episode(f"e{n}", again) for n in range(100, 200)])
    assert [path.name for path in states(tmp_path)] == [f"{STATE.key}.json"]
    [lines] = [path.read_text(encoding="utf-8") for path in Store(tmp_path).files()]
    assert "Add." not in lines and lines.count(STATE.key) == 200
    found = list(Store(tmp_path))
    assert len(found) == 200 and all(each.state == STATE for each in found)


def test_each_state_has_its_own_file_and_its_own_episodes(tmp_path: Path) -> None:
    others = [
        STATE,
        STATE.with_values({"a.prompt": "Sum."}),
        STATE.with_versions({"a": "a-v2"}),
        dataclasses.replace(STATE, outside={"judge": "http://there/v1 judge"}),
    ]
    with Store(tmp_path) as store:
        for n, state in enumerate(others):
            store.append(episode(f"e{n}", state))
    assert {path.stem for path in states(tmp_path)} == {state.key for state in others}
    assert [each.state for each in Store(tmp_path)] == others
    assert [each.id for each in Store(tmp_path).read(state=others[2].key)] == ["e2"]


VALUES = {
    "a/b": "beside a folder",
    "../../up": "outside the folder",
    "a.prompt": "Größe \u2028 \U0001f9ee \0 end",
    "": "no name",
    "lone": "a surrogate \ud83d alone",
    "\udc00": {"\ud800": 1.5},
    "tiny": 5e-324,
    "whole": 2**70,
}


@pytest.mark.parametrize("name", VALUES, ids=ascii)
def test_every_name_and_text_of_a_value_survives(tmp_path: Path, name: str) -> None:
    state = TeamState({}, {name: VALUES[name]})
    with Store(tmp_path / "run") as store:
        store.append(episode("e", state))
    [found] = Store(tmp_path / "run")
    assert found.state == state and found.state.key == state.key
    assert found.state.values[name] == VALUES[name]
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing beside the store"
    assert [path.name for path in states(tmp_path / "run")] == [f"{state.key}.json"]


def test_a_state_that_no_json_holds_is_refused_and_leaves_the_store_as_it_was(
    tmp_path: Path,
) -> None:
    with Store(tmp_path) as store:
        store.append(episode("e0"))
        for value in (float("nan"), float("inf"), {1, 2}, object()):
            with pytest.raises(StoreError, match=r"'e1' is not made of JSON values.*and values"):
                store.append(episode("e1", TeamState({}, {"edge": value})))
    assert [each.id for each in Store(tmp_path)] == ["e0"] and len(states(tmp_path)) == 1


def test_a_missing_or_altered_state_is_one_clear_error(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(episode("e"))
    [path] = states(tmp_path)
    whole = path.read_text(encoding="utf-8")
    other = dict(json.loads(whole), values={"a.prompt": "Steal."})
    for content, words in (
        (json.dumps(other), r"holds another state \(\w{16}\); the file was altered; restore it"),
        (whole[:40], "cannot be read.*; restore the file"),
        ("[]", "cannot be read.*expected a mapping.*; restore the file"),
        ('{"values": 3}', "cannot be read.*expected a mapping.*; restore the file"),
        ("", "cannot be read"),
        (None, "cannot be read.*No such file.*; restore the file"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(StoreError, match=rf"{STATE.key}\.json: .*{words}") as error:
            list(Store(tmp_path))
        assert "\n" not in str(error.value)
    assert Store(tmp_path).ids() == {"e"}, "ids need no state"
    path.write_text(whole, encoding="utf-8")
    assert [each.state for each in Store(tmp_path)] == [STATE]


def test_a_state_that_was_lost_is_written_again_by_who_plays_with_it(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(episode("e0"))
    states(tmp_path)[0].unlink()
    with Store(tmp_path) as store:
        store.append(episode("e1"))
    assert [each.state for each in Store(tmp_path)] == [STATE, STATE]


def test_a_state_is_on_disk_before_an_episode_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, on_disk = Store(tmp_path), []
    write = store._log.append

    def append(data: bytes, *, flush: bool) -> tuple[Path, int]:
        on_disk.append(states(tmp_path))
        return write(data, flush=flush)

    monkeypatch.setattr(store._log, "append", append)
    store.append(episode("e"))
    assert [[path.name for path in found] for found in on_disk] == [[f"{STATE.key}.json"]]


# schema 1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def test_a_store_of_schema_1_is_read_and_kinds_follow_from_group_and_split(old: Path) -> None:
    assert {line["schema"] for line in Store(old).lines()} == {1}
    found = {each.id: each for each in Store(old)}
    assert {id: each.kind for id, each in found.items()} == {
        "train-000003/t1/0": "train",
        "eval-before/t1/0": "eval",  # by its split
        "eval-00ff/abcd/t1/0": "eval",  # by its group
        "fix-000003/t1/0": "aside",  # a correction
        "train-000003/t1/1": "train",
    }
    first = found["train-000003/t1/0"]
    assert first.state == TeamState({"a": "a-v1"}, {"a.prompt": "Add.", "edge": {"x": 0.5}})
    assert (first.follows, first.operations, first.output_from) == ("", (), ())
    assert [turn.usage for turn in first.turns] == [None, None, None]
    assert first.usage == {"a": Usage(2, 15, 6, 0.5)}
    assert first.rewards[1].turn == 1 and first.rewards[1].decision is None
    assert first.decisions[0].about == "" and first.turns[2].prompt_ids == (7, 8, 9, 2, 1, 30)
    assert found["train-000003/t1/1"].error == "boom"
    assert found["train-000003/t1/1"].state == TeamState()


def test_filters_read_kind_and_state_of_both_schemas(old: Path) -> None:
    with Store(old) as store:
        store.append(dataclasses.replace(episode("new"), kind="eval"))
    assert [each.id for each in Store(old).read(kind="eval")] == [
        "eval-before/t1/0",
        "eval-00ff/abcd/t1/0",
        "new",
    ]
    first = next(Store(old).read(id="train-000003/t1/0"))
    same = [each.id for each in Store(old) if each.state.key == first.state.key]
    assert len(same) == 3 and len(list(Store(old).read(follows=""))) == 6
    assert [each.id for each in Store(old).read(state=first.state.key)] == same


def test_appending_to_a_store_of_schema_1_leaves_its_lines_as_they_are(old: Path) -> None:
    before = (old / "episodes-00000.jsonl").read_bytes()
    with Store(old) as store:
        again = dataclasses.replace(episode("train-000003/t1/0"), output="again")
        assert not store.append(again), "its ids are known"
        assert store.append(episode("new")) and store.append(episode("more"))
    after = (old / "episodes-00000.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 7
    assert [line["schema"] for line in Store(old).lines()] == [1, 1, 1, 1, 1, 2, 2]
    assert [each.id for each in Store(old)][5:] == ["new", "more"]
    assert [each.state for each in Store(old)][5:] == [STATE, STATE]


def test_what_schema_1_held_is_the_same_in_schema_2(old: Path, tmp_path: Path) -> None:
    found = list(Store(old))
    with Store(tmp_path / "new") as store:
        store.extend(found)
    assert list(Store(tmp_path / "new")) == found
    assert {line["schema"] for line in Store(tmp_path / "new").lines()} == {2}


def test_datasets_loads_each_schema(old: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    with Store(tmp_path / "new") as store:
        store.extend(list(Store(old)))
    for folder, column in ((old, "values"), (tmp_path / "new", "state")):
        rows = datasets.load_dataset(
            "json",
            data_files=str(folder / "episodes-*.jsonl"),
            split="train",
            cache_dir=str(tmp_path / f"cache-{column}"),
        )
        assert len(rows) == 5 and column in rows.column_names


def test_a_turn_keeps_what_its_server_reported(tmp_path: Path) -> None:
    turns = (
        Turn(0, "a", text="2", usage=Usage(1, 12, 3, 0.0, 4, 0.25)),
        Turn(0, "a", text="3", sibling=1, taken=False),
    )
    played = dataclasses.replace(episode("e"), turns=turns)
    assert json.loads(pack(played)["turns"][0]["usage"])["cached_tokens"] == 4
    with Store(tmp_path) as store:
        store.append(played)
    assert next(iter(Store(tmp_path))).turns == turns
