"""`report.html`: well-formed, harmless whatever was written, complete, and there for runs that did
not end."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import leather
import pytest
import yaml

from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.rollouts.episodes.codec import pack
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.charts import Line, chart
from marlora.rollouts.report.episode_index import EpisodeIndex, crc, episode_row, even, most_telling
from marlora.rollouts.report.html import number, text, visible
from marlora.rollouts.report.report import numbers_of, read_runs, write_report
from marlora.rollouts.report.run_data import VALIDATION, RunData
from marlora.rollouts.report.tables import adapters, any_value, joined, proofs
from marlora.rollouts.types import Episode

EVIL = (
    '<script src="https://evil.example/x.js">alert(1)</script><img src=x'
    " onerror=alert(2)>\"'&\x00\x1b\u202e"
)
AFTER = "a" * 16  # the key of the episodes of an evaluation
VOID = {"meta", "link", "br", "img", "input"}


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


def episode(
    step: int, task: str, value: float, sample: int = 0, split: str = "train", said: str = "7"
) -> Episode:
    first = Turn(
        0,
        "solver",
        (Message("user", f"solve {task}"),),
        text=said,
        token_ids=(1, 2),
        version="solver-v1-aa",
    )
    second = Turn(
        1,
        "critic",
        (Message("user", f"check {said}"),),
        reads=(0,),
        text=f"{said}!",
        finish_reason="length",
    )
    label = f"eval-{AFTER}/digest" if split == "eval" else f"train-{step:06d}"
    rewards = (
        Reward("correct", value, "because"),
        Reward("kind", 0.5, agent="critic"),
        Reward("good", 1.0, agent="solver", turn=0),
    )
    return Episode(
        f"{label}/{task}/{sample}",
        f"{label}/{task}",
        Task(task, f"task {task}", "7", split=split),
        kind="eval" if split == "eval" else "train",
        split=split,
        step=step,
        turns=(first, second),
        output=said,
        rewards=rewards,
    )


def row(step: int, **more: Any) -> dict[str, Any]:
    policies = {
        "solver": {"loss": -0.1 * step, "grad_norm": 0.5, "entropy": math.nan, "clipped": 0.0},
        "critic": {"tokens": 0},
    }
    return {
        "step": step,
        "reward": 0.1 * step,
        "episodes": 4,
        "tokens_per_s": 100.0,
        "policies": policies,
        "proof": {"solver": {"status": "passed", "residual": 0.07}},
        **more,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three steps that ended."""
    paired = {"difference": 0.25, "ci95": [0.1, 0.4]}
    before, after = (
        {"accuracy": a, "ci95": [a - 0.1, a + 0.1], "num_tasks": 50, "failed": 0}
        for a in (0.25, 0.5)
    )
    summary = {
        "recipe": "grpo_team",
        "model": "tiny",
        "engine": "vllm",
        "steps": 3,
        "seconds": {"total": 12.0, "rollout": 5.0, "train": 3.0, "publish": 1.0},
        "tokens": {"sampled": 1234, "trained": 567},
        "policies": {
            "solver": {
                "trainable_parameters": 4096,
                "sha256_before": "a" * 64,
                "sha256_after": "b" * 64,
            },
            "critic": {
                "trainable_parameters": 0,
                "sha256_before": "c" * 64,
                "sha256_after": "c" * 64,
            },
        },
        "live_proof": {"checks": 2, "passed": 1, "untrained": 0, "failed": 1, "max_residual": 0.3},
        "rounds": [{"round": 1, "kept": 0.5}],
        "table": {"wrong": {"right": 3}},
        "eval": {"before": before, "after": after, "paired": paired},
        "adapters": {"solver": {**before, "paired": paired}},
    }
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
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": "tiny", "tasks": "arithmetic", "max_steps": 5})
    )
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                row(
                    s,
                    failed=s,
                    dropped={"solver: gold": 2},
                    selection={"first": {"kept": {"success": s}}},
                )
            )
            + "\n"
            for s in (1, 2, 3)
        )
    )
    (tmp_path / "proofs.json").write_text(json.dumps(proofs))
    (tmp_path / "warnings.log").write_text("step 2: entropy of 'solver' fell\n")
    with Store(tmp_path / "episodes") as store:
        store.extend(
            [
                episode(s, f"t{n}", float(n % 2), sample)
                for s in (1, 2, 3)
                for n in range(5)
                for sample in range(2)
            ]
        )
        store.extend([episode(3, f"e{n}", float(n % 2), split="eval") for n in range(9)])
    write_evaluations(tmp_path, after=evaluation_entry(AFTER, 3, 9))
    return tmp_path


def evaluation_entry(key: str, step: int, tasks: int, kind: str = "eval", n: int = 1) -> Any:
    names = [f"e{number}" for number in range(tasks)]
    return {"kind": kind, "key": key, "step": step, "tasks": names, "n": n}


def write_evaluations(run: Path, **entries: Any) -> None:
    (run / "evaluations.json").write_text(json.dumps(entries))


def read(run: Path) -> tuple[str, Page, dict[str, Any]]:
    """The page's source, the page, and the data of its browser."""
    source = write_report(run).read_text()
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL
    )
    return source, Page(source), json.loads(data)


def words_of(page: Page) -> str:
    return " ".join(" ".join(page.words).split())


def test_the_report_tells_what_the_run_did(run: Path) -> None:
    _, page, _ = read(run)
    words = words_of(page)
    for expected in (
        "grpo_team",
        "engine vllm",
        (
            "Training helped: 0.250 → 0.500 on 50 held-out tasks (+0.250, 95 % interval +0.100 to"
            " +0.400)"
        ),
        "By adapter: solver alone helps",
        "12 (rollout 5, train 3, publish 1)",
        "1,234 sampled, 567 trained",
        "only solver",
        "+0.250 [+0.100, +0.400]",
        "4,096",
        "a" * 16,
        "b" * 16,
        "unchanged",
        "solver-v2-aa",
        "failed",
        "entropy of 'solver' fell",
        "6 of 12 episodes failed",
        "6 turns not trained on, solver: gold",
    ):
        assert expected in words, expected
    assert "selection, step 3" in words and "first" in words and "success" in words, (
        "what a method told of the last step"
    )
    assert "rounds round kept 1 0.5" in words and "table right wrong 3" in words, (
        "what a method adds is shown as it is"
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.4, "Training helped"),
        (-0.4, -0.1, "Training hurt"),
        (-0.1, 0.2, "No effect of training is shown"),
    ],
)
def test_the_verdict_follows_the_interval(run: Path, low: float, high: float, said: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["eval"]["paired"]["ci95"] = [low, high]
    (run / "summary.json").write_text(json.dumps(summary))
    assert f"{said}: 0.250" in words_of(read(run)[1])


def test_the_verdict_names_episodes_to_read(run: Path) -> None:
    before = "b" * 16
    with Store(run / "episodes") as store:
        wrong = {"e1": 0.0, "e0": 1.0}  # after: odd ones are right
        store.extend([evaluated(before, e, wrong) for e in store.read(kind="eval")])
    write_evaluations(
        run, before=evaluation_entry(before, 0, 9), after=evaluation_entry(AFTER, 3, 9)
    )
    assert episodes_to_read(run) == [f"eval-{AFTER}/digest/e{n}/0" for n in (1, 0, 2)]
    write_evaluations(
        run, before=evaluation_entry(AFTER, 0, 9), after=evaluation_entry(AFTER, 3, 9)
    )
    assert episodes_to_read(run) == [f"eval-{AFTER}/digest/e0/0"], "nothing moved"


def evaluated(label: str, one: Episode, values: Mapping[str, float]) -> Episode:
    """The episode as one of another evaluation, with other rewards of some tasks."""
    group = one.group.replace(AFTER, label)
    reward = Reward("correct", values.get(one.task.id, one.reward("correct")))
    return dataclasses.replace(one, id=f"{group}/0", group=group, rewards=(reward,))


def episodes_to_read(run: Path) -> list[str]:
    (links,) = re.findall("<p>Episodes to read: (.*?)</p>", read(run)[0])
    return [unquote(link) for link in re.findall(r'href="#e=0:([^"]+)"', links)]


def first_schema(one: Episode, label: str) -> str:
    """The episode as a line of a store of 0.1, in the evaluation of this label."""
    data = pack(one)
    for name in ("kind", "follows", "state", "operations", "output_from"):
        del data[name]
    for turn in data["turns"]:
        del turn["usage"]
    for reward in data["rewards"]:
        del reward["decision"]
    group = f"eval-{label}/{one.task.id}"
    more = {"schema": 1, "id": f"{group}/0", "group": group, "team_version": "{}", "values": "{}"}
    return json.dumps({**data, **more})


def test_a_run_of_0_1_is_shown(run: Path) -> None:
    """Its store has schema 1, its evaluations their labels in the names of groups, and it has no
    evaluations.json."""
    shutil.rmtree(run / "episodes")
    (run / "evaluations.json").unlink()
    tasks = [episode(4, f"t{n}", float(n % 2), split="eval") for n in range(4)]
    lines = [first_schema(evaluated("", e, {"t1": 0.0}), "before") for e in tasks]
    lines += [first_schema(evaluated("", e, {}), "step-000004") for e in tasks]
    lines += [first_schema(evaluated("", e, {}), "only-solver") for e in tasks]
    training = json.loads(first_schema(episode(2, "t1", 1.0), "x"))
    training |= {"id": "train-000002/t1/0", "group": "train-000002/t1"}
    (run / "episodes").mkdir()
    store = run / "episodes" / "episodes-00000.jsonl"
    store.write_text("".join(line + "\n" for line in [*lines, json.dumps(training)]))
    found = RunData.read(run)
    assert [point[:2] for point in found.eval_points()] == [(0, 0.25), (4, 0.5)]
    assert [point[:2] for point in found.reward_points()] == [(2, 1.0)]
    assert list(found.evaluations) == ["before", "step-000004", "only-solver"]
    source, _, data = read(run)
    labels = {data["strings"][n] for each in data["rows"] for n in each[2]}
    assert labels == {"eval-before", "eval-step-000004", "eval-only-solver", "train-000002"}
    assert episodes_to_read(run) == ["eval-step-000004/t1/0", "eval-step-000004/t0/0"]
    assert "What was spent" not in source and "Values" not in source


def test_evaluations_are_found_by_their_labels(run: Path) -> None:
    """One key may have several labels; the last attempt at a task counts, of as many samples as
    were asked for."""
    key, again, trial = "b" * 16, f"{'b' * 16}.1", "c" * 16
    base = [episode(0, f"e{n}", 1.0, split="eval") for n in range(2)]
    one = [evaluated(key, e, {"e0": 0.0, "e1": math.nan}) for e in base]
    more = [evaluated(again, base[1], {"e1": 1.0})]
    more.append(dataclasses.replace(one[0], id=f"{one[0].group}/1", rewards=base[0].rewards))
    group = f"trial-{trial}/digest/e0"
    for sample, value in enumerate((1.0, 0.0)):
        rewards = (Reward("correct", value),)
        more.append(
            dataclasses.replace(
                base[0], id=f"{group}/{sample}", group=group, kind="trial", rewards=rewards, step=2
            )
        )
    with Store(run / "episodes") as store:
        store.extend([*one, *more])
    entry = evaluation_entry(key, 0, 2)
    validated = {
        "val-step-000002": evaluation_entry(trial, 2, 1, "trial", n=2),
        "sampled": evaluation_entry(key, 0, 1, n=2),
    }
    write_evaluations(run, before=entry, after={**entry, "step": 3}, **validated)
    found = RunData.read(run)
    assert [point[:2] for point in found.eval_points()] == [(0, 0.5), (3, 0.5)]
    labels = {r.id: r.labels for r in found.episodes}
    first = f"eval-{key}/digest/e0"
    assert labels[f"{first}/0"] == ("eval-before", "eval-after", "eval-sampled")
    assert labels[f"{first}/1"] == ("eval-sampled",)
    assert labels[f"eval-{key}/digest/e1/0"] == (f"eval-{key}",), "another attempt came after it"
    assert labels[f"eval-{again}/digest/e1/0"] == ("eval-before", "eval-after")
    assert labels[f"{group}/0"] == ("val-step-000002",)
    assert [p[:2] for p in found.eval_points(VALIDATION)] == [(2, 0.5)]
    assert [p[0] for p in found.reward_points()] == [1, 2, 3], "trials train nothing"
    titles = re.findall(r"<figcaption>([^<]+) <small>", read(run)[0])
    assert titles[:2] == ["reward", "held-out accuracy"] and "validation accuracy" not in titles


def test_curves_hold_the_points_that_are_numbers(run: Path) -> None:
    source, page, _ = read(run)
    titles = re.findall(r"<figcaption>([^<]+) <small>", source)
    assert titles == ["reward", "selection first kept success", "failed", "loss"]
    assert "<title>step 2, solver -0.2</title>" in source and "nan" not in " ".join(titles)
    words = words_of(page)
    assert "1 more curve for developers, or noise" in words, "a count is good in no direction"
    assert "3 more curves that never changed value what it is" in words
    assert "gradient norm 0.5 of the adapter, before clipping" in words
    assert "clipped 0 share of trained tokens whose ratio was clipped; lower is better" in words
    assert sum("band" in str(a.get("class")) for _, a in page.tags) == 1, "the reward's interval"


def test_a_chart_is_text_in_ipython_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """leather returns an object for display instead of text where IPython is importable."""
    lines, colours = {"a": Line([(1, 0.5), (2, 1.0)])}, {"a": "c0"}
    monkeypatch.setattr(leather.chart, "IPythonSVG", lambda svg: svg)
    plain = chart("reward", "", lines, colours)
    monkeypatch.setattr(leather.chart, "IPythonSVG", lambda svg: object())
    assert chart("reward", "", lines, colours) == plain
    assert plain.count("<svg ") == 1 and "<?xml" not in plain and "<!DOCTYPE" not in plain


def test_a_chart_by_hand() -> None:
    made = chart(
        "x",
        "",
        {"a": Line([(1, 0.0), (3, 1.0)], [(1, -1.0, 0.5), (3, 0.5, 2.0)]), "b": Line([])},
        {"a": "c0", "b": "c1"},
    )
    points = [
        tuple(map(float, pair.split(",")))
        for pair in re.search(r'<polyline points="([^"]+)"', made)[1].split()
    ]  # type: ignore[index]
    corners = [
        tuple(map(float, pair.split(",")))
        for pair in re.search(r'<polygon [^>]*points="([^"]+)"', made)[1].split()
    ]  # type: ignore[index]
    (x1, y1), (x2, y2) = points
    assert x1 < x2 and y1 > y2 and [x for x, _ in corners] == [x1, x2, x2, x1]
    unit = y1 - y2
    assert [y for _, y in corners] == pytest.approx(
        [y1 + unit, y1 - unit / 2, y1 - 2 * unit, y1 - unit / 2], abs=0.2
    )
    assert "style=" not in made and chart("x", "", {"a": Line([])}, {"a": "c0"}) == ""
    assert "polyline" in chart("one point", "", {"a": Line([(4, 0.0)])}, {"a": "c0"})
    rounded = Line([(1, 0.7), (2, math.nextafter(0.7, 0))])  # no ticks fit between these
    assert "polyline" in chart("equal but for rounding", "", {"a": rounded}, {"a": "c0"})


def test_the_browser_has_every_episode(run: Path) -> None:
    _, _, data = read(run)
    text_of = data["strings"]
    assert (
        data["runs"] == [{"name": run.name, "episodes": 39, "listed": 39, "whole": 39}]
        and len(data["rows"]) == 39
    )
    found = data["episodes"]["0:train-000002/t1/0"]
    assert (
        text_of[found["prompt"]] == "task t1"
        and text_of[found["answer"]] == "7"
        and text_of[found["output"]] == "7"
    )
    assert [
        (text_of[name], value, why and text_of[why]) for name, value, why in found["rewards"]
    ] == [("correct", 1.0, "because"), ("kind of critic", 0.5, None)]
    solver, critic = found["turns"]
    assert (
        text_of[critic["agent"]] == "critic"
        and critic["reads"] == [0]
        and critic["marks"] == ["truncated"]
    )
    assert [(text_of[name], value) for name, value, _ in solver["rewards"]] == [
        ("good of solver", 1.0)
    ] and solver["n"] == 2
    assert "tokens" not in solver, "no tokenizer was given"


def test_tokens_come_with_advantage_ratio_and_log_prob(run: Path) -> None:
    row = {
        "step": 1,
        "policy": "solver",
        "episode": "train-000001/t1/0",
        "turn": 0,
        "ids": crc((1, 2)),
        "advantage": 0.5,
        "ratio": [1.0, 2.0],
    }
    other = {**row, "ids": crc((1, 3)), "advantage": 9}
    (run / "learned.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other) + '\n{"torn')
    gallery = EpisodeIndex(lambda policy, ids: [f"<{i}>" for i in ids])
    with Store(run / "episodes") as store:
        rows = [episode_row(pack(e), "correct") for e in store]
    gallery.add(run, "run", rows)
    turn = gallery.episodes["0:train-000001/t1/0"]["turns"][0]
    assert [list(gallery.strings)[n] for n in turn["tokens"]] == ["<1>", "<2>"]
    assert (turn["advantage"], turn["ratio"]) == (0.5, [1.0, 2.0]) and "logp" not in turn
    assert "advantage" not in gallery.episodes["0:train-000002/t1/0"]["turns"][0]


def test_a_large_run_is_sampled_and_says_so(run: Path) -> None:
    failed = dataclasses.replace(episode(2, "t9", 0.0), error="boom", rewards=(), output=None)
    with Store(run / "episodes") as store:
        store.append(failed)
        rows = [episode_row(pack(e), "correct") for e in store]
    kept = most_telling(rows, 12)
    assert (
        len(kept) == 12 == len({row.id for row in kept})
        and kept[0].id == failed.id
        and kept[0].marks == "fc"
    )
    assert {label for row in kept for label in row.labels} >= {"train-000001", "train-000002"}
    assert most_telling(rows, 100) and len(most_telling(rows, 100)) == 40
    assert [rows.index(row) for row in even(rows, 4)] == [0, 10, 20, 30]
    path = write_report(run, max_episodes=12)
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    found = json.loads(data)
    assert len(found["episodes"]) == 12 and len(found["rows"]) == 40
    assert found["runs"] == [{"name": run.name, "episodes": 40, "listed": 40, "whole": 12}]


def test_what_models_write_is_text(run: Path) -> None:
    bad = episode(4, "t9", math.nan, said=EVIL)
    task = Task(EVIL, EVIL, EVIL, split="train")
    bad = dataclasses.replace(
        bad, task=task, rewards=(Reward(EVIL, math.nan, EVIL),), error=EVIL, output=None
    )
    with Store(run / "episodes") as store:
        store.append(bad)
    (run / "warnings.log").write_text(EVIL)
    summary = json.loads((run / "summary.json").read_text())
    summary["recipe"], summary["found"] = EVIL, {EVIL: {EVIL: EVIL}}
    summary["policies"][EVIL] = summary["policies"].pop("critic")
    (run / "summary.json").write_text(json.dumps(summary))
    source, page, data = read(run)
    assert any("<script src=" in word for word in page.words)
    assert (
        visible(EVIL, 8000) in data["strings"]
        and "\x00" not in source
        and "\x1b" not in source
        and "\u202e" not in source
    )
    assert sum(tag == "script" for tag, _ in page.tags) == 2, "the data and the page's own"
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "link", "object"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "style", "action"), (
                tag,
                name,
                value,
            )
            assert name != "href" or str(value).startswith("#"), value
    assert not re.search(r"url\(|@import", source)


def test_the_policy_allows_its_style_and_script_and_nothing_else(run: Path) -> None:
    source, page, _ = read(run)
    (policy,) = (
        a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (style, script)
    )
    expected = (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}';"
        " base-uri 'none'; form-action 'none'"
    )
    assert policy == expected
    assert "prefers-color-scheme: dark" in style
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", script
    )


def test_data_cannot_end_its_script(run: Path) -> None:
    with Store(run / "episodes") as store:
        store.append(episode(9, "t0", 1.0, said="</script><!--<script>&amp;\u2028"))
    source, _, data = read(run)
    (raw,) = re.findall(r'id="data">(.*?)</script>', source, re.DOTALL)
    assert not set("<>&\u2028") & set(raw)
    assert any("</script><!--<script>&amp;" in each for each in data["strings"])


def test_the_numbers_are_those_of_the_page(run: Path) -> None:
    other = run / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("other"))
    summary = json.loads((run / "summary.json").read_text())
    numbers = json.loads(json.dumps(numbers_of(read_runs([run, other]))))
    first, second = numbers["runs"]
    assert (first["name"], second["name"], first["recipe"]) == (run.name, "other", "grpo_team")
    assert first["eval"] == summary["eval"] and first["steps"] == 3 and not first["unfinished"]
    assert "6 of 12 episodes failed" in first["warnings"]
    assert first["problems"] and all(each in words_of(read(run)[1]) for each in first["problems"])
    (test,) = numbers["paired"]
    assert (test["run"], test["against"], test["tasks"]) == ("other", run.name, 9)
    assert test["difference"] == 0.0 and test["p"] == 1.0


def test_warnings_that_differ_by_numbers_are_one() -> None:
    lines = [f"step {step}: policy 'a': truncated 0.{step} (above 0.5)" for step in (6, 7, 9)]
    assert joined([*lines, "step 2: other", "alone"]) == [
        "policy 'a': truncated 0.9 (above 0.5) (3 times, steps 6 to 9)",
        "step 2: other",
        "alone",
    ]
    assert joined(["lost 1", "lost 2"]) == ["lost 2 (2 times)"]


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("other"))
    (other / "config.yaml").write_text(
        yaml.safe_dump(
            {"model": "tiny", "tasks": "arithmetic", "max_steps": 5, "learning_rate": 0.5}
        )
    )
    path = write_report(run, other, output=tmp_path / "both.html")
    page = Page(path.read_text())
    words = words_of(page)
    assert words.count("tokens spent on learning") == 1
    assert "Runs compared" in words and "1 settings differ" in words and "learning_rate" in words
    assert {a.get("id") for _, a in page.tags} >= {"run-0", "run-1", "compare", "episodes"}
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert [r["name"] for r in json.loads(data)["runs"]] == [run.name, "other"]
    with pytest.raises(SettingError, match="named twice"):
        write_report(run, run)


def test_where_nothing_was_trained_there_is_no_table_of_proofs_or_adapters(run: Path) -> None:
    records = [
        {"step": 0, "version": name, "replica": r, "status": "identity", "reason": "nothing"}
        for name in ("solver-v0-aa", "critic-v0-bb")
        for r in ("one", "two")
    ]
    counts = {"checks": 0, "passed": 0, "untrained": 0, "failed": 0, "max_residual": 0.0}
    shown = proofs({**counts, "identity": 4}, records)
    assert "nothing to prove. 2 frozen adapters" in shown and "<table" not in shown
    wrong = [*records, {**records[0], "status": "failed", "reason": "another folder"}]
    shown = proofs({**counts, "checks": 1, "failed": 1}, wrong)
    assert "<table" in shown and "another folder" in shown
    same = {"trainable_parameters": 0, "sha256_before": "a", "sha256_after": "a"}
    assert adapters({"solver": same, "critic": same}) == ""
    assert "unchanged" in adapters({"solver": same, "critic": {**same, "trainable_parameters": 8}})


def test_a_run_that_did_not_end_has_a_report_too(run: Path) -> None:
    for name in ("summary.json", "proofs.json", "warnings.log"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    folder = run / "checkpoints" / "step-000002"
    (folder / "trainer").mkdir(parents=True)
    (folder / "system.json").write_text(
        json.dumps({"recipe": "grpo_team", "adapters": {"solver": {"sha256": "d" * 64}}})
    )
    (folder / "trainer" / "state.json").write_text(
        json.dumps({"step": 2, "sha256_before": {"solver": "c" * 64}})
    )
    _, page, _ = read(run)
    words = " ".join(page.words)
    assert (
        "did not end" in words
        and "3 of 5" in words
        and "d" * 16 in words
        and "Live proof" not in words
    )
    assert "Training helped" not in words and "Training hurt" not in words, (
        "only one evaluation was finished"
    )


def test_a_run_that_went_on_after_its_end_says_how_far_it_came(run: Path) -> None:
    """Its summary is of the earlier end. Before 1 of 4 tasks is right, at step 4 all are; an
    evaluation that was cut off does not count."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(4)) + "\n")
    shutil.rmtree(run / "episodes")
    played = {
        "before": (1, 0, 0, 0),
        "only-solver": (0, 0, 0, 0),
        "step-000004": (1, 1, 1, 1),
        "after": (0,),
    }

    def key_of(label: str) -> str:
        return hashlib.sha256(label.encode()).hexdigest()[:16]

    with Store(run / "episodes") as store:
        for label, values in played.items():
            for n, value in enumerate(values):
                one = episode(4, f"e{n}", float(value), split="eval")
                store.append(evaluated(key_of(label), one, {}))
    write_evaluations(run, **{label: evaluation_entry(key_of(label), 4, 4) for label in played})
    found = RunData.read(run).summary
    assert (
        found["unfinished"]
        and found["eval"]["before"]["accuracy"] == 0.25
        and found["eval"]["after"]["accuracy"] == 1.0
    )
    assert (found["eval"]["paired"]["difference"], found["eval"]["paired"]["gained"]) == (0.75, 3)
    assert found["live_proof"] == {"checks": 2, "passed": 1, "untrained": 0, "failed": 1}
    words = " ".join(read(run)[1].words)
    assert (
        "did not end" in words
        and "Training helped so far: 0.250 → 1.000 on 4 held-out tasks" in words
        and "4 of 5" in words
    )


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "max_steps": 5}))
    assert "0 of 5" in " ".join(read(tmp_path)[1].words)
    with pytest.raises(SettingError, match=r"config\.yaml"):
        write_report(tmp_path / "elsewhere")


def test_a_child_has_a_row_and_no_part_in_the_curves(run: Path) -> None:
    before = RunData.read(run)
    child = dataclasses.replace(
        episode(3, "t1", 1.0), id="train-000003/t1/0/mend/0", parent="train-000003/t1/0", rewards=()
    )
    with Store(run / "episodes") as store:
        store.append(child)
    after = RunData.read(run)
    assert (len(after.episodes), after.episodes[-1].child, after.episodes[-1].marks) == (
        len(before.episodes) + 1,
        True,
        "ck",
    )
    assert (
        after.reward_points() == before.reward_points()
        and after.eval_points() == before.eval_points()
    )
    gallery = EpisodeIndex()
    gallery.add(run, "run", after.episodes)
    assert gallery.episodes[f"0:{child.id}"]["parent"] == "train-000003/t1/0"


def test_what_a_method_adds_is_shown_whatever_its_shape() -> None:
    assert (
        any_value({"a": {"x": {"hits": 3, "<i>": 0.5}}}).count(
            "hits <b>3</b> · &lt;i&gt; <b>0.5</b>"
        )
        == 1
    )
    assert "<td>0.5</td>" in any_value({"a": 0.5}) and '<th scope="col">x</th>' in any_value(
        [{"x": 1}]
    )
    assert (
        any_value({}) == any_value(None) == ""
        and any_value([1, 2]) == "<p>1, 2</p>"
        and any_value({"fault": "", "parents": [], "id": None}) == ""
        and "&lt;b&gt;" in any_value({"<b>": "<b>"})
    )


def test_numbers_are_short() -> None:
    found = [
        number(value)
        for value in (0, 3, 12345, 0.0, 0.25, 1071.6, 5e-06, -0.1613, None, True, math.nan)
    ]
    assert found == [
        "0",
        "3",
        "12,345",
        "0",
        "0.25",
        "1,072",
        "5.0e-06",
        "-0.161",
        "–",
        "True",
        "nan",
    ]


def test_long_and_invisible_text_is_told() -> None:
    assert text("a" * 10, 4) == "aaaa … (6 more characters)"
    assert text("a\x00b\tc\n\u202ed") == "a␀b\tc\n␦d" and visible("\ud800<") == "␦<"


def test_rounds_of_debates_have_a_table_and_sampled_ones_are_no_evaluation(run: Path):
    changes = [{"right_right": 6, "right_wrong": 1, "wrong_right": 2, "wrong_wrong": 1}]
    entry = {"answers": [10, 10], "accuracy": [0.7, 0.8], "gain": 0.1, "changes": changes}
    summary = json.loads((run / "summary.json").read_text()) | {"collaboration": {"after": entry}}
    (run / "summary.json").write_text(json.dumps(summary))
    before = RunData.read(run).eval_points()
    with Store(run / "episodes") as store:
        store.append(evaluated("c" * 16, episode(3, "e9", 1.0, split="eval"), {}))
    sampled = evaluation_entry("c" * 16, 3, 10)
    write_evaluations(run, after=evaluation_entry(AFTER, 3, 9), **{"sampled-after": sampled})
    words = "".join(Page(write_report(run).read_text()).words)
    assert "Rounds" in words and "2 of 3" in words and "+0.100" in words
    assert RunData.read(run).eval_points() == before
