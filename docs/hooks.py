"""Hooks of the documentation site (mkdocs.yml): navigation, documents that stand outside docs/,
pages of the API, notebooks, and the sources that pages link to.

Every page stays plain Markdown whose links hold in the repository. A link that leaves docs/ leads,
on the site, to the document's own page or to a page with the file's text.
"""

from __future__ import annotations

import functools
import json
import posixpath
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("agents", "rollouts", "trainers", "recipes")
DOCUMENTS = {  # of the repository, by their page on the site
    "README.md": "index.md",
    "recipes/RESULTS.md": "project/results.md",
    "DECISIONS.md": "project/decisions.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "AGENTS.md": "project/agents.md",
    "skills/marlora/SKILL.md": "project/skill.md",
}
FIRST = (  # of a folder
    "index",
    "quick_start_cpu",
    "quick_start_gpu",
    "concepts",
    "training",
    "system",
)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```\n?", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sbatch": "bash"}
API_ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| `([\w.]+)` \|", re.MULTILINE)


def on_startup(command: str, dirty: bool) -> None:
    """Writes a view of the packages for the reader of docstrings, which follows no symbolic link
    and takes a folder without `__init__.py` for no package."""
    view = ROOT / "build" / "api" / "marlora"
    shutil.rmtree(view, ignore_errors=True)
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            copy = view / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    for folder in [view, *(path for path in view.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: what is in each folder, a few pages first."""

    def pages(folder: str, *patterns: str) -> list[dict[str, str]]:
        there = [p for each in patterns or ("*.md",) for p in (ROOT / "docs" / folder).glob(each)]
        rank = {name: number for number, name in enumerate(FIRST)}
        found = [
            (rank.get(path.stem, len(rank)), entry(str(path.relative_to(ROOT)))) for path in there
        ]
        found.sort(key=lambda item: (item[0], next(iter(item[1])).lower()))
        return [page for _, page in found]

    top = [e for e in pages("") if not {"methods.md", "api.md"} & {*e.values()}]
    api = [f"reference/api/{name}.md" for name in api_sections()]
    project = [entry(source) for source in DOCUMENTS if source in tracked()]
    nav: list[dict[str, Any]] = [
        {"Home": "index.md"},
        {"Start": [*pages("start"), *pages("demo")]},
        {"Which method when": "methods.md"},
        {"Methods": pages("methods")},
        {"Guides": pages("guides")},
        {"Tutorials": pages("tutorials", "*.md", "*.ipynb")},
        {"Reference": [*pages("reference"), *top, {"API": api}]},
        {"Project": [*project[1:], *pages("project")]},
    ]
    config.nav = [section for section in nav if next(iter(section.values()))]
    return config


def entry(source: str) -> dict[str, str]:
    """A page of the repository in the navigation, by its first heading."""
    text = (ROOT / source).read_text(encoding="utf-8")
    heading = re.search(r'^(?: *")?# (.+?)(?:\\n",?)?$', text, re.MULTILINE)
    return {heading[1] if heading else PurePosixPath(source).stem: page_of(source)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents of the repository, the API's pages and the sources that pages link to."""

    def add(uri: str, content: str) -> None:
        files.append(File.generated(config, uri, content=content))

    for source, uri in DOCUMENTS.items():
        if source in tracked():
            add(uri, (ROOT / source).read_text(encoding="utf-8"))
    add("llms.txt", (ROOT / "llms.txt").read_text(encoding="utf-8"))
    for name, names in api_sections().items():
        add(f"reference/api/{name}.md", api_page(name, names))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        add(page_of(f"docs/{notebook.src_uri}"), notebook_page(ROOT / "docs" / notebook.src_uri))
    for source in sorted(
        {target for page in files.documentation_pages() for target in sources(page)}
    ):
        add(page_of(source), source_page(source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as they are on the site."""
    here = path_of(page.file.src_uri)
    if here is None:
        return markdown

    def on_site(link: re.Match[str]) -> str:
        target, mark, anchor = link[2].partition("#")
        source = in_repository(here, target)
        if source is None:
            return link[0]
        relative = posixpath.relpath(page_of(source), posixpath.dirname(page.file.src_uri))
        return f"{link[1]}{relative}{mark}{anchor}{link[3]}"

    return outside_fences(markdown, lambda text: LINK.sub(on_site, text))


def outside_fences(markdown: str, change: Any) -> str:
    """The text with everything but its fenced blocks changed."""
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, change(markdown[last:])])


@functools.cache
def tracked() -> frozenset[str]:
    """Files of the repository, and its folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    found = {name for name in listed if name and (ROOT / name).is_file()}
    return frozenset(found | {str(up) for name in found for up in PurePosixPath(name).parents})


def page_of(source: str) -> str:
    """The page or file of the site that stands for a path of the repository."""
    if source in DOCUMENTS:
        return DOCUMENTS[source]
    if source.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", source.removeprefix("docs/"))
    return f"source/{source}.md"


@functools.cache
def path_of(uri: str) -> str | None:
    """The path in the repository of a page; None for one that is made for the site alone."""
    for source, page in DOCUMENTS.items():
        if page == uri:
            return source
    for source in (f"docs/{uri}", re.sub(r"\.md$", ".ipynb", f"docs/{uri}")):
        if source in tracked():
            return source
    return None


def in_repository(here: str, target: str) -> str | None:
    """What a link of the document `here` leads to in the repository; None for an address, an
    anchor and what does not exist, which mkdocs then refuses."""
    if not target or re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    return path if path in tracked() else None


def sources(file: File) -> Iterator[str]:
    """Files and folders outside docs/ that a page links to."""
    here = path_of(file.src_uri)
    if here is None:
        return
    for link in LINK.finditer(FENCE.sub("", file.content_string)):
        source = in_repository(here, link[2].partition("#")[0])
        if source and page_of(source).startswith("source/"):
            yield source


def source_page(source: str) -> str:
    """A file's text, or a folder's files, as a page that the search leaves out."""
    head = f"---\nsearch: {{exclude: true}}\n---\n# {source}\n\n"
    if (ROOT / source).is_dir():
        inside = sorted(name for name in tracked() if name.startswith(f"{source}/"))
        return head + "\n".join(f"- `{name}`" for name in inside) + "\n"
    text = (ROOT / source).read_text(encoding="utf-8")
    language = LANGUAGES.get(PurePosixPath(source).suffix, "text")
    return f"{head}``````{language}\n{text}\n``````\n"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code has put out."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += [shown for output in cell["outputs"] if (shown := output_text(output))]
    return "\n\n".join(parts) + "\n"


def output_text(output: dict[str, Any]) -> str:
    """What a cell has put out: a picture or plain text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/svg+xml" in data:
        return "".join(data["image/svg+xml"])
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![output](data:image/png;base64,{picture})"
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(data.get("text/plain", ""))).rstrip()
    return f"``` {{.text .output}}\n{text}\n```" if text else ""


@functools.cache
def api_sections() -> dict[str, list[str]]:
    """By section of docs/api.md: the full names of what it lists."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = {}
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        rows = [(names, module) for names, module in API_ROW.findall(body)]
        found[title.lower()] = [
            f"{module}.{name.strip('`')}" for names, module in rows for name in names.split(", ")
        ]
    return found


def api_page(name: str, names: list[str]) -> str:
    """The page of a section: every name with its docstring, arguments and public members."""
    return f"# {name.capitalize()}\n\n" + "\n\n".join(f"::: {each}" for each in names) + "\n"
