"""Text is UTF-8 whatever the machine's locale is: every read and write says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlora.agents.types import SettingError
from marlora.rollouts.tasks.registry import load_tasks
from marlora.trainers.warm_start import init_folder
from tests.encodings import without_encoding
from tests.repository import ROOMS, ROOT, modules


@pytest.mark.parametrize("room", [*ROOMS, "benchmarks", ".ci"])
def test_every_read_and_write_names_its_encoding(room: str) -> None:
    files = modules(room)
    assert files
    lacking = [
        f"{path}:{call.lineno}"
        for path in files
        for call in without_encoding((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not lacking, lacking


@pytest.mark.parametrize(
    "source, lacks",
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, mode='a')", True),
        ("open(p, mode)", True),
        ("open(p, 'rb')", False),
        ("open(p, 'w', -1, 'utf-8')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.open()", True),
        ("p.open('a')", True),
        ("p.open('wb')", False),
        ("os.open(p, flags)", False),
        ("os.fdopen(f, 'w')", True),
        ("os.fdopen(f, 'rb')", False),
        ("io.open(p)", True),
        ("gzip.open(p)", False),
        ("gzip.open(p, 'rt')", True),
        ("p.read_text()", True),
        ("p.read_text(errors='replace')", True),
        ("p.read_text('utf-8')", False),
        ("p.read_bytes()", False),
        ("p.write_text(t)", True),
        ("p.write_text(t, encoding='utf-8')", False),
        ("files.write_text(p, t)", False),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("tempfile.TemporaryFile('w+')", True),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.run(c, universal_newlines=True)", True),
        ("subprocess.Popen(c, text=True, encoding='utf-8')", False),
        ("subprocess.run(c)", False),
        ("io.TextIOWrapper(b)", True),
        ("logging.FileHandler(p)", True),
    ],
)
def test_what_counts_as_naming_it(source: str, lacks: bool) -> None:
    assert bool(without_encoding(source)) == lacks


ROW = '{"prompt": "Où est %s?", "answer": "é"}\n'


@pytest.mark.parametrize(
    "data, place",
    [
        (ROW.encode() + (ROW % "la gare").encode("latin-1"), "line 2, byte 14"),
        (ROW.encode("latin-1"), "line 1, byte 14"),
        (b"\xef\xbb\xbf" + ROW.encode() * 2 + b'\n{"prompt": "\xff"}', "line 4, byte 13"),
        (ROW.encode("utf-16"), "line 1, byte 1"),
        (b'{"prompt": "cut \xc3', "line 1, byte 17"),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_task_file_that_is_not_utf_8_is_one_clear_line(
    tmp_path: Path, data: bytes, place: str, kind: str
) -> None:
    path = tmp_path / f"tasks{kind}"
    path.write_bytes(data)
    with pytest.raises(SettingError) as error:
        load_tasks(str(path), "train")
    text = str(error.value)
    assert str(path) in text and place in text and "not UTF-8" in text and "\n" not in text


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_task_file_may_have_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [(ROW % number).replace("\n", "\r\n") for number in range(40)]
    path.write_bytes(mark + "".join(rows).encode())
    assert all(task.answer == "é" for task in load_tasks(str(path), "train"))


READS = """
import sys
from pathlib import Path
from marlora.recipes.launch.settings import exit_with_code, read_yaml
from marlora.rollouts.tasks.registry import load_tasks
folder = Path(sys.argv[1])
def work():
    assert sys.stdout.encoding.lower().replace("-", "") not in ("utf8",), sys.stdout.encoding
    print(read_yaml(folder / "config.yaml")["agents"]["a"]["prompt"] == "R\\u00e9ponds.")
    print(load_tasks(str(folder / "tasks.jsonl"), "train")[0].answer)
    print("\\u2192")
exit_with_code(work, interrupted="")
"""


def test_a_command_works_in_a_locale_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text('agents: {a: {prompt: "Réponds."}}', encoding="utf-8")
    (tmp_path / "tasks.jsonl").write_text(
        "".join(ROW % number for number in range(40)), encoding="utf-8"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"},
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }
    done = subprocess.run(
        [sys.executable, "-c", READS, str(tmp_path)],
        capture_output=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == ["True", "\\xe9", "\\u2192"]


@pytest.mark.parametrize(
    "init, found",
    [
        ("run/step-1#solver", "run/step-1/adapters/solver"),
        ("run#1/step-1#solver", "run#1/step-1/adapters/solver"),
        ("run#1/step-1", "run#1/step-1"),
        ("run#1/peft", "run#1/peft"),  # of folders that are not there yet, too
        ("peft#2", "peft#2"),
        ("nothing#solver", "nothing#solver"),
        ("#solver", "#solver"),
        ("run/step-1#", "run/step-1#"),
    ],
)
def test_only_the_name_of_a_policy_is_split_off_a_path(
    init: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/step-1", "run#1/step-1", "peft", "peft#2"):
        (tmp_path / folder).mkdir(parents=True)
    assert init_folder(init) == Path(found)
    absolute = f"{tmp_path}/{init}"
    if not init.startswith("#"):
        assert init_folder(absolute) == tmp_path / found
