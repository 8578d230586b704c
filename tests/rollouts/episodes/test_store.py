import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.state import TeamState
from marlora.agents.transcript import Operation
from marlora.agents.types import (
    Completion,
    Decision,
    Message,
    Reward,
    Sampling,
    SettingError,
    Task,
    Turn,
    Usage,
)
from marlora.rollouts.episodes import store as store_module
from marlora.rollouts.episodes.codec import pack, unpack
from marlora.rollouts.episodes.store import Store, StoreError
from marlora.rollouts.types import Episode


def chat_episode(id="e1", step=0, **fields):
    """Two agents, three calls; `a` is asked twice in one chat, the second time for two siblings."""
    asked = (Message("system", "You add."), Message("user", "1+1?"))
    later = (*asked, Message("assistant", "2"), Message("user", "sure?"))
    turns = (
        Turn(
            0,
            "a",
            asked,
            text="2",
            prompt_ids=(7, 8, 9),
            token_ids=(2, 1),
            logprobs=(-0.5, -0.25),
            version="a-v1",
        ),
        Turn(
            1,
            "b",
            (Message("user", "2"),),
            reads=(0,),
            text="ok",
            prompt_ids=(7, 8, 9, 4),
            token_ids=(5,),
            logprobs=(-1.0,),
        ),
        Turn(
            2,
            "a",
            later,
            (1,),
            taken=False,
            text="no",
            prompt_ids=(7, 8, 9, 2, 1, 30, 31),
            token_ids=(6, 1),
            logprobs=(-2.0, -0.1),
        ),
        Turn(
            2,
            "a",
            later,
            (1,),
            1,
            text="yes",
            prompt_ids=(7, 8, 9, 2, 1, 30, 31),
            token_ids=(3, 1),
            logprobs=(-0.7, -0.1),
        ),
    )
    defaults = {
        "group": "g1",
        "task": Task("t1", "1+1?", 2, "arithmetic", "train", {"level": 1, "_hidden": [1, "x"]}),
        "seed": 2**62 - 1,
        "split": "train",
        "kind": "trial",
        "follows": "e-before",
        "state": TeamState({"a": "a-v1"}, {"a.prompt": "You add.", "edge": {"x": 0.5}}),
        "turns": turns,
        "decisions": (Decision(0, "edge", ("x", "y"), "x", -0.1, "1+1?"),),
        "operations": (Operation(3, "join", (1, 2), "2", "too short"),),
        "output": "2",
        "output_from": (2, 3),
        "rewards": (
            Reward("correct", 1.0),
            Reward("local", 0.5, "fine", "a", 2, 1, "judge"),
            Reward("edges", 0.25, decision=0),
        ),
        "usage": {"a": Usage(2, 10, 6, 0.5), "b": Usage(1, 4, 1, 1)},
    }
    return Episode(id=id, step=step, **{**defaults, **fields})


def restored(data, *episodes):
    """The episode of a line, whose state is one of these episodes'."""
    return unpack(data, {e.state.key: e.state for e in episodes}.__getitem__)


def test_what_is_read_is_what_was_written(tmp_path):
    episodes = [
        chat_episode("e1"),
        chat_episode("e2", output="", error=None),
        chat_episode("e3", output=None, error="EngineError: gone"),
    ]
    with Store(tmp_path) as store:
        assert [store.append(e) for e in episodes] == [True, True, True]
        assert list(store.read()) == episodes
    assert list(Store(tmp_path)) == episodes and len(Store(tmp_path)) == 3


def test_turns_are_stored_as_what_they_add():
    turns = pack(chat_episode())["turns"]
    assert [t["extends"] for t in turns] == [[-1, 0], [-1, 0], [0, 0], [2, 0]]
    assert [t["prompt_ids"] for t in turns] == [[7, 8, 9], [7, 8, 9, 4], [30, 31], []]
    assert [[m["content"] for m in t["messages"]] for t in turns] == [
        ["You add.", "1+1?"],
        ["2"],
        ["sure?"],
        [],
    ]


def test_a_template_that_rewrites_history_is_stored_whole():
    first = Turn(
        0,
        "a",
        (Message("user", "x"),),
        text="<think>hm</think>y",
        prompt_ids=(1, 2),
        token_ids=(3, 4),
    )
    second = Turn(
        1,
        "a",
        (*first.messages, Message("assistant", first.text), Message("user", "z")),
        prompt_ids=(1, 2, 4, 9),
    )
    episode = chat_episode(turns=(first, second))
    assert pack(episode)["turns"][1]["prompt_ids"] == [1, 2, 4, 9] and pack(episode)["turns"][1][
        "extends"
    ] == [-1, 0]
    assert restored(pack(episode), episode) == episode


@pytest.mark.parametrize("stop", [(), ('"seed": 5, ',), ("\\",)])
@pytest.mark.parametrize("seed", [None, 0, 2**62])
def test_sampling_is_read_whole_although_only_its_seed_differs(seed, stop):
    for temperature in (1, 0.5):
        sampling = Sampling(temperature=temperature, seed=seed, stop=stop, logit_bias={"7": 1.5})
        turn = dataclasses.replace(chat_episode().turns[0], sampling=sampling)
        episode = dataclasses.replace(chat_episode(), turns=(turn,))
        (read,) = unpack(pack(episode), {episode.state.key: episode.state}.__getitem__).turns
        assert read == turn and type(read.sampling.temperature) is float


def test_nan_is_kept_apart_from_zero(tmp_path):
    Store(tmp_path).append(
        chat_episode(
            rewards=(
                Reward("correct", math.nan, "boom"),
                Reward("judge", math.inf),
                Reward("format", 0.0),
            )
        )
    )
    assert [str(r.value) for r in next(Store(tmp_path).read()).rewards] == ["nan", "nan", "0.0"]


ids = st.lists(st.integers(0, 3), max_size=4).map(tuple)
words = st.sampled_from(["", "a", "b\n", "é\u2028", '"\\'])
optional = st.none() | words
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=words,
    name=optional,
    tool_calls=st.sampled_from([(), ({"name": "add", "arguments": {"a": 1}},)]),
    tool_call_id=optional,
)


@st.composite
def chats(draw):
    """Turns of which some go on from an earlier one, exactly, almost, or not at all; siblings and
    lone calls."""
    turns: list[Turn] = []
    for index in range(draw(st.integers(0, 5))):
        chat, prompt = tuple(draw(st.lists(messages, max_size=2))), draw(ids)
        if turns and draw(st.booleans()):
            old = draw(st.sampled_from(turns))
            chat = (
                *old.messages,
                Message("assistant", draw(st.sampled_from([old.text, "other"]))),
                *chat,
            )
            prompt = old.prompt_ids + draw(st.sampled_from([old.token_ids, ()])) + prompt
        agent, source = draw(st.sampled_from("ab")), draw(st.sampled_from(["sampled", "written"]))
        sampling = Sampling(
            stop=draw(st.sampled_from([(), ("x",)])), seed=draw(st.integers(0, 2**62))
        )
        for sibling in range(draw(st.integers(1, 3))):
            if draw(st.integers(0, 5)) == 0:
                prompt = (*prompt, 9)
            said = Completion(
                draw(words),
                prompt,
                tokens := draw(ids),
                tuple(-0.1 * t for t in tokens),
                draw(words),
                draw(words),
            )
            gold = draw(st.booleans())
            turns.append(
                Turn(
                    index,
                    agent,
                    chat,
                    draw(ids),
                    sibling,
                    sibling == 0,
                    source,
                    gold,
                    sampling,
                    **vars(said),
                )
            )
    return tuple(turns)


@settings(max_examples=60, deadline=None)
@given(
    turns=chats(),
    output=optional,
    answer=st.none() | st.integers() | words,
    parent=st.sampled_from([None, "p"]),
)
def test_expansion_equals_what_was_sent(turns, output, answer, parent):
    task = Task("t", "?", answer, meta={"_tests": ["1"]})
    episode = Episode(
        "e",
        "g",
        task,
        turns=turns,
        output=output,
        parent=parent,
        rewards=(Reward("r", 0.1, turn=0),),
    )
    assert restored(json.loads(json.dumps(pack(episode), allow_nan=False)), episode) == episode


def test_filters(tmp_path):
    store = Store(tmp_path)
    for n in range(6):
        store.append(
            chat_episode(
                f"e{n}",
                step=n // 2,
                split="train" if n % 2 else "eval",
                parent="p" if n == 5 else None,
            )
        )
    found = {
        "step": [e.id for e in store.read(step=1)],
        "several": [e.id for e in store.read(step=[0, 2], split="eval")],
        "parent": [e.id for e in store.read(parent="p")],
        "top": len(list(store.read(parent=None))),
        "task": len(list(store.read(task="t1", group="g1"))),
    }
    assert found == {
        "step": ["e2", "e3"],
        "several": ["e0", "e4"],
        "parent": ["e5"],
        "top": 5,
        "task": 6,
    }
    with pytest.raises(SettingError, match="did you mean 'split'"):
        next(store.read(splits="eval"))


def test_an_id_is_stored_once(tmp_path):
    with Store(tmp_path) as store:
        assert store.append(chat_episode("e1")) and not store.append(
            chat_episode("e1", output="other")
        )
        assert (
            store.extend(
                [chat_episode("e2"), chat_episode("e2", output="other"), chat_episode("e1")]
            )
            == 1
        )
    again = Store(tmp_path)
    assert not again.append(chat_episode("e1", output="other"))
    assert again.ids() == {"e1", "e2"} and [e.output for e in again] == ["2", "2"]


@pytest.mark.parametrize("again", [False, True], ids=["the writer", "opened again"])
def test_the_writer_finds_episodes_by_id_without_reading_others(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * len(json.dumps(pack(chat_episode("e0"))))
    store = Store(tmp_path, max_bytes=size)
    store.extend([chat_episode(f"e{n}", output="\N{SNOWMAN}") for n in range(4)])
    for n in range(4, 9):
        store.append(chat_episode(f"e{n}", step=n))
    if again:
        store.close()
        assert not store.append(chat_episode("e3"))
    assert len(store.files()) > 1
    expected = list(Store(tmp_path).read(id=["e7", "e2", "e5"]))
    parsed: list[bytes] = []
    plain = store_module._parse
    monkeypatch.setattr(store_module, "_parse", lambda line: (parsed.append(line), plain(line))[1])
    assert list(store.read(id=["e7", "e2", "e5"])) == expected and len(parsed) == 3
    assert [e.id for e in expected] == ["e2", "e5", "e7"]
    assert [e.id for e in store.read(id=["e7", "e2"], step=7)] == ["e7"] and len(parsed) == 5
    assert list(store.read(id=set())) == [] and len(parsed) == 5
    with Store(tmp_path, writer="b") as other:
        other.append(chat_episode("b1"))
    assert [e.id for e in store.read(id=["b1", "e1"])] == ["e1", "b1"], "not known: all are read"


def test_a_file_that_was_altered_beside_its_writer_is_an_error(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.extend([chat_episode("e0"), chat_episode("e1")])
        (path,) = store.files()
        path.write_bytes(path.read_bytes()[7:])
        with pytest.raises(StoreError, match="expected episode 'e1'; the file was altered"):
            list(store.read(id="e1"))


def test_files_are_rotated_by_size_and_appending_goes_on_in_the_last(tmp_path):
    size = len(json.dumps(pack(chat_episode("e0"))))
    for n in range(5):
        with Store(tmp_path, max_bytes=size) as store:
            store.append(chat_episode(f"e{n}"))
    assert [f.name for f in Store(tmp_path).files()] == [
        "episodes-00000.jsonl",
        "episodes-00001.jsonl",
        "episodes-00002.jsonl",
    ]
    assert [e.id for e in Store(tmp_path)] == ["e0", "e1", "e2", "e3", "e4"]


@pytest.mark.parametrize("keep", [1, 40, -2])
def test_a_torn_last_line_is_left_out_by_readers_and_cut_off_by_the_writer(tmp_path, caplog, keep):
    with Store(tmp_path) as store:
        store.extend([chat_episode("e0"), chat_episode("e1")])
    path = tmp_path / "episodes-00000.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:keep])
    assert [e.id for e in Store(tmp_path)] == ["e0"] and "torn" in caplog.text
    assert path.read_bytes() == whole[0] + whole[1][:keep]  # reading changes nothing
    with Store(tmp_path) as store:
        store.append(chat_episode("e1"))
    assert path.read_bytes() == b"".join(whole)


def test_a_whole_last_line_without_its_line_feed_is_kept(tmp_path):
    Store(tmp_path).append(chat_episode("e0"))
    path = tmp_path / "episodes-00000.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Store(tmp_path) as store:
        store.append(chat_episode("e1"))
    assert [e.id for e in Store(tmp_path)] == ["e0", "e1"]


def test_a_torn_line_elsewhere_is_an_error(tmp_path):
    with Store(tmp_path) as store:
        store.extend([chat_episode("e0"), chat_episode("e1")])
    path = tmp_path / "episodes-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:50] + b"\n" + lines[1])
    for use in (lambda: list(Store(tmp_path)), lambda: Store(tmp_path).append(chat_episode("e2"))):
        with pytest.raises(StoreError, match=r"episodes-00000.jsonl, line 1: not an episode"):
            use()
    (tmp_path / "episodes-00001.jsonl").write_bytes(
        lines[1]
    )  # a torn end of a file that is not the last
    path.write_bytes(lines[0] + lines[1][:50])
    with pytest.raises(StoreError, match=r"episodes-00000.jsonl, line 2"):
        list(Store(tmp_path))


def test_a_newer_schema_is_refused(tmp_path):
    (tmp_path / "episodes-00000.jsonl").write_text(
        json.dumps({**pack(chat_episode()), "schema": 3}) + "\n"
    )
    for use in (lambda: list(Store(tmp_path)), lambda: Store(tmp_path).append(chat_episode("e2"))):
        with pytest.raises(StoreError, match="schema 3, this version of marlora reads up to 2"):
            use()


def test_a_second_writer_is_refused_and_the_lock_ends_with_close(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.append(chat_episode("e0"))
    with pytest.raises(StoreError, match="one folder, one writer"):
        second.append(chat_episode("e1"))
    assert second.ids() == {"e0"}  # reading is free
    first.close()
    assert second.append(chat_episode("e1")) and second.ids() == {"e0", "e1"}


def test_a_full_disk_is_an_error_and_earlier_lines_stay_whole(tmp_path, monkeypatch):
    store, write, room = Store(tmp_path), os.write, [10**6]

    def limited(handle, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(
            handle, bytes(data)[: min(700, room[0])]
        )  # short writes, as the system may do
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    store.append(chat_episode("e0"))
    room[0] = 1000
    with pytest.raises(OSError, match="No space left"):
        store.append(chat_episode("e1"))
    assert [e.id for e in Store(tmp_path)] == ["e0"]
    assert (tmp_path / "episodes-00000.jsonl").read_bytes().endswith(b"\n")
    room[0] = 10**6
    assert store.append(chat_episode("e1")) and [e.id for e in store] == ["e0", "e1"]


def test_many_are_written_with_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers see them at once, and a file that is full is flushed before the next one begins."""
    real, flushed = os.fsync, []

    def fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with Store(tmp_path, max_bytes=1) as store:
        store.extend([chat_episode("e1"), chat_episode("e2")], flush=False)
        assert store.ids() == {"e1", "e2"} == {e.id for e in Store(tmp_path).read()}
        assert "episodes-00000.jsonl" not in flushed
        store.extend([chat_episode("e3")], flush=False)
        assert flushed.count("episodes-00000.jsonl") == 1
        assert flushed.count("episodes-00001.jsonl") == 0
        store.flush()
        store.flush()
        assert flushed.count("episodes-00001.jsonl") == 1
        store.append(chat_episode("e4"))
        assert flushed.count("episodes-00002.jsonl") == 1


def test_a_flush_that_fails_is_an_error_and_the_lines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path) as store:
        store.extend([chat_episode("e1")])
        store.extend([chat_episode("e2")], flush=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match=r"flushed to disk .*No space left"):
                store.flush()
        assert store.append(chat_episode("e2")) is False
        assert store.append(chat_episode("e3")) is True
        assert [e.id for e in store] == ["e1", "e2", "e3"]


def test_what_is_not_json_is_an_error_that_names_the_episode(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="'e1' is not made of JSON values"):
        store.append(chat_episode("e1", task=Task("t", "?", meta={"when": {1, 2}})))
    assert store.append(chat_episode("e1")) and len(store) == 1


def test_datasets_reads_the_files_as_they_are(tmp_path, monkeypatch):
    """The shapes differ as much as they can: mixed answers, no turns, no output, other agents, NaN,
    tools."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    call = Message("assistant", "", tool_calls=({"name": "f", "arguments": {"x": 1}},))
    episodes = [
        chat_episode(
            "e0",
            turns=(),
            output=None,
            error="boom",
            rewards=(),
            usage={},
            state=TeamState(),
            decisions=(),
            operations=(),
            output_from=(),
            follows="",
        ),
        chat_episode(
            "e1",
            task=Task("t", "?", ["4", 4.5], meta={"a": 1}),
            rewards=(Reward("correct", math.nan, "raised"),),
            parent="e0",
        ),
        chat_episode(
            "e2",
            task=Task("t", "?", "x", meta={"a": "text", "b": {"c": None}}),
            usage={"z": Usage(1, 2, 3, 4)},
        ),
        chat_episode(
            "e3",
            turns=(Turn(0, "z", (call, Message("tool", "3", tool_call_id="c1"))),),
            state=TeamState({}, {"a.demos": [{"role": "user"}]}),
        ),
    ]
    with Store(tmp_path, max_bytes=4000) as store:
        for episode in episodes:
            store.append(episode)
    assert len(store.files()) == 2
    rows = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "episodes-*.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows["id"] == ["e0", "e1", "e2", "e3"] and [
        json.loads(t["answer"]) for t in rows["task"]
    ] == [2, ["4", 4.5], "x", 2]
    assert [restored(row, *episodes) for row in rows.select([0, 2, 3])] == [
        episodes[0],
        episodes[2],
        episodes[3],
    ]
    assert math.isnan(restored(rows[1], *episodes).rewards[0].value)


def test_writers_with_names_fill_one_folder_at_the_same_time(tmp_path: Path) -> None:
    one, two = chat_episode(), dataclasses.replace(chat_episode(), id="other")
    with Store(tmp_path, writer="1") as first, Store(tmp_path, writer="2", max_bytes=1) as second:
        first.append(one)
        second.append(two)
        second.append(dataclasses.replace(two, id="third"))
        with pytest.raises(StoreError, match="another process or Store"):
            Store(tmp_path, writer="1").append(two)
    assert [f.name for f in Store(tmp_path).files()] == [
        "episodes-1-00000.jsonl",
        "episodes-2-00000.jsonl",
        "episodes-2-00001.jsonl",
    ]
    assert Store(tmp_path).ids() == {one.id, "other", "third"}
    with Store(tmp_path, writer="1") as first:
        assert not first.append(one), "it goes on where it was"


def test_a_torn_end_of_any_writers_last_file_is_left_out(tmp_path: Path) -> None:
    for writer in ("1", "2"):
        with Store(tmp_path, writer=writer) as store:
            store.append(dataclasses.replace(chat_episode(), id=writer))
        with (tmp_path / f"episodes-{writer}-00000.jsonl").open("ab") as file:
            file.write(b'{"id": "torn')
    assert Store(tmp_path).ids() == {"1", "2"}
    with Store(tmp_path, writer="2") as store:
        store.append(dataclasses.replace(chat_episode(), id="3"))
    assert Store(tmp_path).ids() == {"1", "2", "3"}


def test_a_writers_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"writer '\.\./x'"):
        Store(tmp_path, writer="../x")
