"""llms.txt: what the documentation holds, one line a page, for programs that read it.

`python -m tests.llms_page` writes it; `test_site.py` compares it. The form is that of llmstxt.org.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.repository import ROOT

PAGE = ROOT / "llms.txt"
SECTIONS = (  # heading, and patterns of its pages
    ("Start", ("docs/start/*.md", "docs/demo/*.md", "AGENTS.md", "skills/marlora/SKILL.md")),
    ("Methods", ("docs/methods.md", "docs/methods/*.md")),
    ("Guides", ("docs/guides/*.md",)),
    ("Tutorials", ("docs/tutorials/*.ipynb",)),
    ("Reference", ("docs/*.md", "docs/reference/*.md")),
    (
        "Project",
        (
            "recipes/RESULTS.md",
            "docs/project/*.md",
            "CONTRIBUTING.md",
            "DECISIONS.md",
            "CHANGELOG.md",
            "SECURITY.md",
        ),
    ),
)


def title_and_sentence(path: Path) -> tuple[str, str]:
    """A page's first heading, and the first sentence below it ("" if another thing stands
    there)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        heading = re.search(r'"# (.+?)(?:\\n)?"', text)
        return (heading[1] if heading else path.stem), ""
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    if heading is None:
        return path.stem, ""
    after = text[heading.end() :].strip().split("\n\n")[0]
    if after.startswith(("#", "|", "`", "-", "<", "!")):
        return heading[1], ""
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(after.split()))
    sentence = re.split(r"(?<=\w\.) ", plain)[0].rstrip(".")
    return heading[1], sentence


def page() -> str:
    """The text of llms.txt."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = " ".join(readme.partition("# marlora\n\n")[2].split("\n\n")[0].split())
    lines = ["# marlora", "", f"> {first}", ""]
    listed: set[Path] = set()
    for heading, patterns in SECTIONS:
        lines += [f"## {heading}", ""]
        for path in (p for pattern in patterns for p in sorted(ROOT.glob(pattern))):
            if path in listed:
                continue
            listed.add(path)
            title, sentence = title_and_sentence(path)
            said = f": {sentence}" if sentence else ""
            lines.append(f"- [{title}]({path.relative_to(ROOT)}){said}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
