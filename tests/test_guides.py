"""What the guides and the start pages show works as it stands, in the folder that `marlora init`
makes. Commands that need a whole checkout are those of tests/test_readme.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from tests.guide_blocks import blocks, importable_here, resolve, run_page
from tests.repository import ROOT
from tests.test_readme import DOCUMENTS

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = [
    page for folder in ("guides", "start") for page in sorted((ROOT / "docs" / folder).glob("*.md"))
]
ELSEWHERE = {ROOT / document for document in DOCUMENTS}  # tests/test_readme.py has their commands
WITH_COMMANDS = [
    page
    for page in PAGES
    if page not in ELSEWHERE and any(block.language == "bash" for block in blocks(page))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a newcomer, as the current one."""
    monkeypatch.chdir(tmp_path)
    main(["init", "mine"])
    monkeypatch.chdir("mine")
    return tmp_path / "mine"


@pytest.fixture
def trained(folder: Path) -> None:
    """What settings of a run read of the checkpoint that the pages begin with."""
    adapter = folder / "run" / "checkpoints" / "step-000020" / "adapters" / "first"
    adapter.mkdir(parents=True)
    adapter.joinpath("adapter_config.json").write_text("{}", encoding="utf-8")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs_and_settings_hold(page: Path, folder: Path) -> None:
    with importable_here():
        run_page(page, commands=False, bash=page not in ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_commands_run(page: Path, folder: Path) -> None:
    with importable_here():
        run_page(page, commands=True)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nassert 1 == 2\n```", AssertionError),
        ("```python\nfrom marlora import Nothing\n```", ImportError),
        ("```yaml\nnum_generation: 4\n```", SettingError),
        ("```bash\nmarlora trian config.yaml\n```", SystemExit),
        ("```bash\nrm -r runs\n```", AssertionError),
        ("```ruby\n1\n```", AssertionError),
    ],
)
def test_a_wrong_block_is_seen(block: str, error: type[BaseException], folder: Path) -> None:
    page = folder / "page.md"
    page.write_text(block + "\n", encoding="utf-8")
    with importable_here(), pytest.raises(error):
        run_page(page, commands=False)


def test_lines_go_over_the_config(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text("```yaml\nmax_steps: 3\n```\n", encoding="utf-8")
    with importable_here():
        spec = resolve(blocks(page)[0])
    assert spec.config.max_steps == 3 and spec.config.num_eval_tasks == 10
