"""SECURITY.md says what is so: files, options and errors it names exist, and the cage hides what it
says and no more."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from marlora.agents.execution import Limits
from marlora.recipes.cli.main import parser
from marlora.rollouts.sandbox.isolation import Isolation
from marlora.rollouts.sandbox.python import run_plain
from marlora.rollouts.sandbox.self_test import isolations
from tests.repository import ROOT, files

TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`([^`\n]+)`", TEXT)


@pytest.mark.parametrize("name", sorted({n for n in NAMED if re.fullmatch(r"[\w/]+/\w+\.py", n)}))
def test_files_it_names_exist(name: str) -> None:
    assert Path(name) in files()


@pytest.mark.parametrize("name", sorted({n for n in NAMED if n.startswith("--")}))
def test_options_it_names_exist(name: str) -> None:
    commands = next(action.choices for action in parser()._actions if action.dest == "command")
    assert any(name in command.format_help() for command in commands.values()), name


@pytest.mark.parametrize(
    "name", sorted({n for n in NAMED if n.startswith("MARLORA_") or n.endswith("Error")})
)
def test_names_it_gives_are_the_codes(name: str) -> None:
    assert any(name in (ROOT / path).read_text() for path in files() if path.suffix == ".py")


LOOKS = r"""
import json, os
def seen(act):
    try:
        return [True, str(act())]
    except BaseException as error:
        return [False, type(error).__name__]
print(json.dumps({
    "size": seen(lambda: os.stat(FILE).st_size),
    "absent": seen(lambda: os.stat(FILE + "x")),
    "target": seen(lambda: os.readlink(LINK)),
    "process": seen(lambda: os.stat("/proc/%d" % PARENT) and "there"),
    "disk": seen(lambda: os.statvfs(os.path.dirname(FILE)).f_bsize > 0),
    "text": seen(lambda: open(FILE).read()),
    "names": seen(lambda: os.listdir(os.path.dirname(FILE))),
    "environment": seen(lambda: open("/proc/%d/environ" % PARENT).read()),
    "written": seen(lambda: open(FILE, "a")),
}))
"""


@pytest.mark.parametrize("isolation", isolations(), ids=lambda isolation: isolation.kind)
def test_what_each_isolation_hides(isolation: Isolation, tmp_path: Path) -> None:
    """`isolations()` are those that hold on this machine; `.ci/run` installs what both need."""
    kind = isolation.kind
    file, link = tmp_path / "secret", tmp_path / "link"
    file.write_text("seven77")
    link.symlink_to(file)
    known = f"FILE, LINK, PARENT = {str(file)!r}, {str(link)!r}, {os.getpid()}\n"
    ran = run_plain(
        isolation, known + LOOKS, Limits(seconds=20.0, cpu_seconds=10, memory=256 << 20)
    )
    seen = json.loads(ran.output)
    for name in ("text", "names", "environment", "written"):
        assert seen[name][0] is False, (name, seen[name])
    looked = {name: seen[name][0] for name in ("size", "target", "process")}
    assert looked == dict.fromkeys(looked, kind == "landlock"), seen
    if kind == "landlock":  # as SECURITY.md says
        assert (
            seen["size"] == [True, "7"]
            and seen["target"] == [True, str(file)]
            and seen["disk"] == [True, "True"]
        )
        assert seen["absent"] == [False, "FileNotFoundError"]
