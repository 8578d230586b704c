"""`marlora export`: a checkpoint as a folder to give away, with a model card; to the hub only if a
repository is named.

marlora export RUN/checkpoints/step-000004 --output team
marlora export RUN/checkpoints/step-000004 --output team --push_to_hub OWNER/NAME
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlora.agents.types import SettingError
from marlora.recipes.cli.eval_tables import row_of
from marlora.recipes.cli.team import say
from marlora.rollouts.checkpoints.reader import read_checkpoint
from marlora.rollouts.report.sections import accuracy_rows

LEFT_OUT = (
    "trainer",
    "manifest.json",
)  # the optimizer's state; and the manifest, which names its files


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of `marlora export`."""
    parser.add_argument("checkpoint", help="a checkpoint folder: RUN/checkpoints/step-NNNNNN")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument(
        "--push_to_hub",
        default="",
        metavar="OWNER/NAME",
        help="upload it to this repository of the Hugging Face hub",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="of --push_to_hub: let everybody see it; a new repository is private without it",
    )


def cmd_export(args: argparse.Namespace) -> None:
    """Copy a checkpoint's adapters and system.json with a model card; nothing leaves this machine
    unless --push_to_hub names where to."""
    checkpoint, target = Path(args.checkpoint), Path(args.output)
    if args.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to_hub):
        raise SettingError(f"--push_to_hub {args.push_to_hub!r}: expected OWNER/NAME")
    if target.exists():
        raise SettingError(f"--output {target}: it is there already; name a new folder")
    data = read_checkpoint(checkpoint)
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (target / "README.md").write_text(
        card(data, summary_of(checkpoint), args.push_to_hub or target.name)
    )
    print(target)
    if args.push_to_hub:
        print(push(target, args.push_to_hub, private=not args.public))
    else:
        say("nothing was uploaded; --push_to_hub OWNER/NAME does that")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder with the user's own login; returns where it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A team of adapters")
    return str(url)


def summary_of(checkpoint: Path) -> Mapping[str, Any]:
    """The run's `summary.json`, if the checkpoint is its last one: earlier ones have other
    accuracies."""
    path = checkpoint.resolve().parent.parent / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else {}
    return summary if checkpoint.resolve().name == f"step-{summary.get('steps', -1):06d}" else {}


def card(data: Mapping[str, Any], summary: Mapping[str, Any], name: str) -> str:
    """The model card: the agents, what they were trained on, how well they did, how to load
    them."""
    base = str(data["base"]["name"])
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    tasks = data["tasks"]
    lines = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        "library_name: peft",
        "tags: [lora, multi-agent, marlora]",
        "---",
        "",
        f"# {name.rpartition('/')[2]}",
        "",
        f"A team of {len(data['agents'])} agents on one base model"
        f" (`{base if on_hub else Path(base).name}`), with one LoRA adapter per",
        f"policy, trained with marlora (recipe `{data.get('recipe', '')}`, step {data['step']}).",
        "",
        *_agents_table(data),
        "",
        f"System: `{data['system']['class']}`. Tasks: `{tasks['name'] or 'given in Python'}`, seed"
        f" {tasks['seed']}.",
        "",
        *measured(summary),
        *_usage(data, base if on_hub else "THE-BASE"),
    ]
    return "\n".join(lines)


def _agents_table(data: Mapping[str, Any]) -> list[str]:
    rows = [("agent", "role", "policy", "adapter's sha256"), ("---",) * 4]
    for agent in data["agents"]:
        sha256 = data["adapters"].get(agent["policy"], {}).get("sha256", "none: the bare base")
        role = plain(agent.get("role", ""))
        rows.append((agent["name"], role, agent["policy"], f"`{sha256[:16]}`"))
    return [row_of(row) for row in rows]


def _usage(data: Mapping[str, Any], base: str) -> list[str]:
    trained = [policy for policy, entry in data["adapters"].items() if entry.get("trained")]
    adapter = f"adapters/{trained[0] if trained else 'POLICY'}"
    return [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{adapter}")',
        "```",
        "",
        "The whole team, as it was trained: `marlora eval FOLDER` and `marlora play FOLDER`."
        " `system.json` names system, prompts and tasks.",
        "",
    ]


def measured(summary: Mapping[str, Any]) -> list[str]:
    """Held-out accuracy with intervals, as the run measured it; nothing if this is not the run's
    last checkpoint."""
    result = summary.get("eval") or {}
    if not (result.get("before") and result.get("after")):
        return []
    named = {
        "base team": result["before"],
        **{f"only {n}": e for n, e in (summary.get("adapters") or {}).items()},
    }
    named["trained team"] = {**result["after"], "paired": result["paired"]}
    columns = (
        "held-out",
        "mean",
        "95 % interval",
        "tasks",
        "against base",
        "95 % interval (paired)",
    )
    return [
        "## Measured",
        "",
        row_of(columns),
        row_of(("---",) * len(columns)),
        *map(row_of, accuracy_rows(named)),
        "",
    ]


def plain(text: str) -> str:
    """A text for a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
