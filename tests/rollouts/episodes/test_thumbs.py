"""Thumbs on disk: the last one counts, nothing is lost, what is none is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from marlora.agents.types import SettingError
from marlora.rollouts.episodes.thumbs import FILE, give_thumb, read_thumbs


def test_the_last_thumb_counts_and_0_takes_it_back(tmp_path: Path) -> None:
    assert read_thumbs(tmp_path) == {}
    for episode, thumb in (("a", 1), ("b", -1), ("a", -1), ("b", 0), ("ü\n", 1)):
        give_thumb(tmp_path, episode, thumb)
    assert read_thumbs(tmp_path) == {"a": -1, "ü\n": 1}
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len(rows) == 5 and rows[0].keys() == {"episode", "thumb", "time"}


def test_a_line_that_a_crash_tore_is_cut_off(tmp_path: Path) -> None:
    give_thumb(tmp_path, "a", 1)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"episode": "b", "thu')
    assert read_thumbs(tmp_path) == {"a": 1}
    give_thumb(tmp_path, "c", -1)
    assert read_thumbs(tmp_path) == {"a": 1, "c": -1}


@pytest.mark.parametrize(
    "line", ['{"episode": "a", "thumb": 2}', '{"episode": 1, "thumb": 1}', '{"thumb": 1}', "[]",
             '{"episode": "a", "thumb": true}', "no"]
)  # fmt: skip
def test_a_line_that_is_no_thumb_is_told(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(f'{line}\n{{"episode": "a", "thumb": 1}}\n')
    with pytest.raises(SettingError, match=r"thumbs\.jsonl, line 1: expected an episode"):
        read_thumbs(tmp_path)
    with pytest.raises(ValueError, match="expected 1, -1 or 0"):
        give_thumb(tmp_path, "a", 2)


def test_several_writers_wait_for_one_another(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=lambda n=n: [give_thumb(tmp_path, f"{n}-{i}", 1) for i in range(5)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_thumbs(tmp_path)) == 20
