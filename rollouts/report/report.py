"""`report.html` of one run or several: one file that opens from disk, with nothing fetched.

Whatever a model, task or setting wrote is escaped, and the page's own policy (CSP) allows its style
sheet and its script by hash and nothing else. A run that was interrupted has no `summary.json`; the
report then shows what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...agents.types import SettingError
from ..files import write_text
from .comparison import comparison, paired_tests
from .curves import group_curves
from .episode_index import MAX_EPISODES, EpisodeIndex, Pieces
from .html import group, page, section, text
from .learning.agent_credit import credit_table
from .learning.before_after import ids_to_show, kinds_table, side_by_side
from .overview import facts, problems, verdict
from .run_data import RunData, read_json
from .sections import KEY, ledger_sections, sections_of
from .tables import (
    accuracy_table,
    adapters,
    any_value,
    last_step,
    proofs,
    section_body,
    warning_lines,
    warnings,
)
from .values.value_sections import value_sections

PLACED_KEYS = (
    "recipe",
    "model",
    "engine",
    "steps",
    "seconds",
    "tokens",
    "policies",
    "heads",
    "live_proof",
    "eval",
    "adapters",
    "collaboration",  # in a section of its own
    KEY,
    "finding",
    "unfinished",
    "measured",  # heads the accuracies
    "done",  # among the facts
    "state",  # its values have sections
    "supernet",
    "programs",  # the candidates of an archive
    "ledger",
    "ledger_by_policy",
    "budget",
)  # keys of summary.json that have a place of their own; every other one is shown as it is


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """What the folders of these runs hold. Raises `SettingError` if one holds no run."""
    return [
        RunData.read(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)
    ]


def write_report(
    *folders: Path,
    output: Path | None = None,
    pieces: Pieces | None = None,
    max_episodes: int = MAX_EPISODES,
    runs: Sequence[RunData] | None = None,
) -> Path:
    """Write the report of these runs and return its path: `output`, or `report.html` in the first
    one's folder. `runs`: what the folders hold, if it was read already.

    `pieces` gives the text of each token, so that tokens can be coloured; without it a reply is
    shown as one text. Raises `SettingError` if a folder holds no run.
    """
    path = output or folders[0] / "report.html"
    runs = read_runs(folders) if runs is None else runs
    write_text(path, build(runs, pieces, max_episodes)[0], errors="replace")
    return path


def build(
    runs: Sequence[RunData],
    pieces: Pieces | None = None,
    max_episodes: int = MAX_EPISODES,
    follow: bool = False,
) -> tuple[str, EpisodeIndex]:
    """The page as text, and the data of its episode browser."""
    index = EpisodeIndex(pieces or (lambda policy, ids: None))
    for run in runs:
        index.add(run.folder, run.name, run.episodes, max_episodes // len(runs), ids_to_show(run))
    parts = [comparison(runs)] if len(runs) > 1 else []
    parts += [part for number, run in enumerate(runs) for part in parts_of(run, number, index)]
    title = (
        f"{runs[0].title}: {runs[0].name}"
        if len(runs) == 1
        else " and ".join(run.name for run in runs)
    )
    nav = "".join(f'<a href="#{name}">{label}</a>' for name, label in links(runs, parts))
    body = f'<nav>{nav}<span id="live"></span></nav><main>{"".join(parts)}{BROWSER}</main>'
    return page(title, body, index.to_json(), follow=follow), index


def links(runs: Sequence[RunData], parts: Sequence[str]) -> list[tuple[str, str]]:
    """(anchor, label) of the page's navigation, for what the page holds."""
    targets = (
        [("compare", "Runs"), *((f"run-{n}", text(r.name)) for n, r in enumerate(runs))]
        if len(runs) > 1
        else [
            ("learning-0", "Learning"),
            ("values-0", "Values"),
            ("candidates-0", "Candidates"),
            ("health-0", "Health"),
            ("cost-0", "Time and tokens"),
        ]
    )
    present = [
        (name, label) for name, label in targets if any(f'id="{name}"' in part for part in parts)
    ]
    return [*present, ("episodes", "Episodes")]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names; their whole paths where two are alike."""
    short = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SettingError("report: a run is named twice")
    return [
        name if short.count(name) == 1 else str(folder.resolve())
        for name, folder in zip(short, folders, strict=True)
    ]


def parts_of(run: RunData, n: int, index: EpisodeIndex) -> list[str]:
    """The head and the groups of run number `n`, without its episodes."""
    return [
        (
            f'<header id="run-{n}"><h1>{text(run.title)}'
            f" <small>{text(run.name)}</small></h1>{verdict(run, n)}"
            f"{warnings(run.folder, run.metrics)}{facts(run)}</header>"
        ),
        group("Does it learn?", learning(run, n, index), f"learning-{n}"),
        group("Is it healthy?", health(run), f"health-{n}"),
        group("Where did time and tokens go?", cost(run), f"cost-{n}"),
    ]


def learning(run: RunData, n: int, index: EpisodeIndex) -> str:
    """Accuracy, reward, tasks that moved, credit by agent, what the method adds, and values."""
    return "".join(
        [
            section("Held-out accuracy", accuracy_table(run.summary)),
            section("Over the steps", group_curves(run, "learning")),
            section("The same task before and after", side_by_side(run, n, index)),
            section("Which kinds of task moved", kinds_table(run)),
            section("Credit by agent", credit_table(run)),
            *(section(text(each.title), section_body(each)) for each in sections_of(run.summary)),
            *value_sections(run, n),
            *(
                section(text(key.replace("_", " ")), any_value(value))
                for key, value in run.summary.items()
                if key not in PLACED_KEYS
            ),
            *last_step(run.metrics),
        ]
    )


def health(run: RunData) -> str:
    """Curves of the updates, adapters, and the live proof."""
    records = read_json(run.folder / "proofs.json") or []
    return "".join(
        [
            section("Over the steps", group_curves(run, "health")),
            section("Adapters", adapters(run.policies)),
            section("Scalar heads", adapters(run.summary.get("heads") or {}, "head")),
            section("Live proof", proofs(run.summary.get("live_proof") or {}, records)),
        ]
    )


def cost(run: RunData) -> str:
    """Curves of time and tokens, and tables of what the run has spent."""
    tables = [
        section(text(each.title), section_body(each)) for each in ledger_sections(run.summary)
    ]
    return "".join([section("Over the steps", group_curves(run, "cost")), *tables])


def numbers_of(runs: Sequence[RunData]) -> dict[str, Any]:
    """What the page says in numbers, as JSON: of every run its accuracies, problems, warnings and
    what it has spent; `paired`: the tests against the first run."""
    return {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "recipe": run.summary.get("recipe", ""),
                "steps": run.summary.get("steps"),
                "unfinished": bool(run.summary.get("unfinished")),
                "eval": run.summary.get("eval") or {},
                "problems": problems(run),
                "warnings": warning_lines(run.folder, run.metrics),
                "ledger": run.summary.get("ledger") or {},
                "budget": run.summary.get("budget") or {},
            }
            for run in runs
        ],
        "paired": paired_tests(runs),
    }


BROWSER = """
<section id="episodes"><h2>Episodes</h2><p id="sampled" class="soft"></p>
<form id="filters" autocomplete="off">
<label>search <input id="q" type="search" placeholder="task, prompt or id  ( / )"></label>
<label>run <select id="run"></select></label>
<label>kind <select id="kind"></select></label><label>when <select id="label"></select></label>
<label>agent <select id="agent"></select></label>
<label>outcome <select id="outcome"><option value="">all</option>
<option value="right">right</option><option value="wrong">not right</option>
<option value="f">failed</option><option value="u">unscorable</option>
<option value="c">a reply truncated</option>
<option value="m">with siblings</option><option value="k">follows from another</option>
<option value="t">whole text here</option></select></label>
<label>reward from <input id="low" type="number" step="any"></label>
<label>to <input id="high" type="number" step="any"></label>
<button type="reset">clear</button></form>
<p id="count" class="soft" role="status"></p>
<div id="list" class="scroll"><table><thead><tr id="heads"></tr></thead>
<tbody id="rows"></tbody></table></div>
<p id="pager"><button id="back" type="button">previous</button> <span id="where"></span>
<button id="next" type="button">next</button>
<span class="soft keys">keys: <kbd>j</kbd> <kbd>k</kbd> walk through the list, <kbd>/</kbd> search,
<kbd>a</kbd> <kbd>r</kbd> <kbd>l</kbd> <kbd>n</kbd> colour tokens,
<kbd>Esc</kbd> closes</span></p>
<article id="episode" tabindex="-1" aria-live="polite" hidden></article></section>
<noscript>
<p class="note">Episodes need the script of this page, which is turned off here.</p>
</noscript>"""
