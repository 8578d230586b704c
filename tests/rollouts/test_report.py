"""`report.html`: well-formed, harmless whatever was written, complete, and there for runs that did not end."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.types import Message, SettingError, Task, Turn
from marlora.rollouts.page import number, text
from marlora.rollouts.report import write_report
from marlora.rollouts.store import Store
from marlora.rollouts.types import Episode, Reward

EVIL = '<script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(2)>"\'&\x00\x1b\u202e'
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Tags that opened and closed properly, attributes, and the text between."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def episode(step: int, task: str, value: float, sample: int = 0, split: str = "train", said: str = "7") -> Episode:
    first = Turn(0, "solver", (Message("user", f"solve {task}"),), text=said, token_ids=(1, 2), version="solver-v1-aa")
    second = Turn(1, "critic", (Message("user", f"check {said}"),), reads=(0,), text=f"{said}!", finish_reason="length")
    label = "eval-after" if split == "eval" else f"train-{step:06d}"
    rewards = (
        Reward("correct", value, "because"),
        Reward("kind", 0.5, agent="critic"),
        Reward("good", 1.0, agent="solver", turn=0),
    )
    return Episode(
        f"{label}/{task}/{sample}", f"{label}/{task}", Task(task, f"task {task}", "7", split=split), split=split, step=step,
        turns=(first, second), output=said, rewards=rewards,
    )  # fmt: skip


def row(step: int, **more: Any) -> dict[str, Any]:
    policies = {"solver": {"loss": -0.1 * step, "grad_norm": 0.5, "entropy": math.nan, "clipped": 0.0}, "critic": {"tokens": 0}}
    return {"step": step, "reward": 0.1 * step, "episodes": 4, "tokens_per_s": 100.0, "policies": policies,
            "proof": {"solver": {"status": "passed", "residual": 0.07}}, **more}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three steps that ended."""
    paired = {"difference": 0.25, "ci95": [0.1, 0.4]}
    before, after = ({"accuracy": a, "ci95": [a - 0.1, a + 0.1], "num_tasks": 50, "failed": 0} for a in (0.25, 0.5))
    summary = {
        "recipe": "grpo_team", "model": "tiny", "engine": "vllm", "steps": 3,
        "seconds": {"total": 12.0, "rollout": 5.0, "train": 3.0, "publish": 1.0}, "tokens": {"sampled": 1234, "trained": 567},
        "policies": {"solver": {"trainable_parameters": 4096, "sha256_before": "a" * 64, "sha256_after": "b" * 64},
                     "critic": {"trainable_parameters": 0, "sha256_before": "c" * 64, "sha256_after": "c" * 64}},
        "live_proof": {"checks": 2, "passed": 1, "untrained": 0, "failed": 1, "max_residual": 0.3},
        "eval": {"before": before, "after": after, "paired": paired}, "adapters": {"solver": {**before, "paired": paired}},
    }  # fmt: skip
    proofs = [
        {
            "step": s,
            "policy": "solver",
            "version": f"solver-v{s}-aa",
            "replica": "local",
            "status": status,
            "reason": "",
            "residual": 0.07,
        }
        for s, status in ((1, "passed"), (2, "failed"))
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "tasks": "arithmetic", "max_steps": 5}))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row(s, failed=s, dropped={"solver: gold": 2})) + "\n" for s in (1, 2, 3))
    )
    (tmp_path / "proofs.json").write_text(json.dumps(proofs))
    (tmp_path / "warnings.log").write_text("step 2: entropy of 'solver' fell\n")
    with Store(tmp_path / "episodes") as store:
        store.extend([episode(s, f"t{n}", float(n % 2), sample) for s in (1, 2, 3) for n in range(5) for sample in range(2)])
        store.extend([episode(3, f"e{n}", float(n % 2), split="eval") for n in range(9)])
    return tmp_path


def read(run: Path) -> tuple[str, Page]:
    source = write_report(run).read_text()
    return source, Page(source)


def test_the_report_tells_what_the_run_did(run: Path) -> None:
    _, page = read(run)
    words = " ".join(" ".join(page.words).split())
    for expected in (
        "grpo_team", "engine vllm", "0.250 → 0.500", "12 (rollout 5, train 3, publish 1)", "1,234 sampled, 567 trained",
        "only solver", "+0.250 [+0.100, +0.400]", "4,096", "a" * 16, "b" * 16, "unchanged", "solver-v2-aa", "failed",
        "entropy of 'solver' fell", "6 of 12 episodes failed", "6 turns not trained on, solver: gold",
    ):  # fmt: skip
        assert expected in words, expected
    assert "critic turn 1 · read solver (turn 0) · 0 tokens · base · cut off" in words
    assert "correct 1" in words and "kind of critic 0.5" in words and "good of solver 1" in words


def test_curves_hold_the_points_that_are_numbers(run: Path) -> None:
    source, page = read(run)
    titles = re.findall(r"<figcaption>([^<]+) <small>", source)
    assert titles == [
        "reward",
        "tokens per second",
        "loss",
        "gradient norm",
        "clipped share",
        "proof residual",
    ]  # entropy was never a number
    assert sum(tag == "polyline" for tag, _ in page.tags) == 6  # critic has no numbers
    # Steps 1 to 3 lie at 44, 178 and 312; losses -0.1 to -0.3 at 12, 60 and 108.
    assert 'points="44.0,12.0 178.0,60.0 312.0,108.0"' in source
    assert "<title>step 2, solver -0.2</title>" in source


def test_a_sample_of_episodes_is_shown(run: Path) -> None:
    _, page = read(run)
    shown = [w for w in page.words if re.fullmatch(r"[\w-]+/\w+/\d", w)]
    assert len(shown) == len(set(shown)) == 18
    assert shown[:2] == ["train-000001/t3/1", "train-000001/t1/1"]  # the best, of different tasks
    assert {name.split("/")[0] for name in shown} == {"train-000001", "train-000003", "eval-after"}


def test_what_models_write_is_text(run: Path) -> None:
    bad = episode(4, "t9", math.nan, said=EVIL)
    task = Task(EVIL, EVIL, EVIL, split="train")
    bad = dataclasses.replace(bad, task=task, rewards=(Reward(EVIL, math.nan, EVIL),), error=EVIL, output=None)
    with Store(run / "episodes") as store:
        store.append(bad)
    (run / "warnings.log").write_text(EVIL)
    summary = json.loads((run / "summary.json").read_text())
    summary["recipe"] = EVIL
    summary["policies"][EVIL] = summary["policies"].pop("critic")
    (run / "summary.json").write_text(json.dumps(summary))
    source, page = read(run)
    assert any("<script src=" in word for word in page.words) and "unscorable" in " ".join(page.words)
    assert {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "object", "form"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "href", "style", "action"), (tag, name, value)
    assert not re.search(r"url\(|@import", source) and "\x00" not in source and "\x1b" not in source


def test_the_policy_allows_its_style_and_nothing_else(run: Path) -> None:
    source, page = read(run)
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "prefers-color-scheme: dark" in style


def test_a_run_that_did_not_end_has_a_report_too(run: Path) -> None:
    for name in ("summary.json", "proofs.json", "warnings.log"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    folder = run / "checkpoints" / "step-000002"
    (folder / "trainer").mkdir(parents=True)
    (folder / "system.json").write_text(json.dumps({"recipe": "grpo_team", "adapters": {"solver": {"sha256": "d" * 64}}}))
    _, page = read(run)
    words = " ".join(page.words)
    assert "did not end" in words and "3 of 5" in words and "d" * 16 in words and "Live proof" not in words


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "max_steps": 5}))
    assert "0 of 5" in " ".join(read(tmp_path)[1].words)
    with pytest.raises(SettingError, match=r"config\.yaml"):
        write_report(tmp_path / "elsewhere")


def test_numbers_are_short() -> None:
    found = [number(value) for value in (0, 3, 12345, 0.0, 0.25, 1071.6, 5e-06, -0.1613, None, True, math.nan)]
    assert found == ["0", "3", "12,345", "0", "0.25", "1,072", "5.0e-06", "-0.161", "–", "True", "nan"]


def test_long_and_invisible_text_is_told() -> None:
    assert text("a" * 10, 4) == "aaaa … (6 more characters)"
    assert text("a\x00b\tc\n\u202ed") == "a␀b\tc\n␦d"
