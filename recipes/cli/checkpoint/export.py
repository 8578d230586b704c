"""`marlora export`: a checkpoint as a folder to give away, with a model card; to the hub only if a
repository is named.

marlora export RUN/checkpoints/step-000004 --output team
marlora export RUN/checkpoints/step-000004 --output team --push_to_hub OWNER/NAME
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlora.agents.programs.program import PROGRAM
from marlora.agents.types import SettingError
from marlora.recipes.cli.checkpoint.eval_tables import row_of
from marlora.recipes.cli.checkpoint.team import say
from marlora.rollouts.checkpoints.needs import meta_flag, needed_flags
from marlora.rollouts.checkpoints.reader import read_checkpoint, read_values
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.sections import accuracy_rows

LEFT_OUT = (
    "trainer",
    "manifest.json",
)  # the optimizer's state; and the manifest, which names its files
PROGRAM_HEAD = """# The program that answers every task: `problem` is the task's text, the
# functions are operators that the team's agents answer. To read; `marlora play` and `marlora eval`
# run it in the sandbox.

"""


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
    if args.push_to_hub:
        shorten_paths(target)
        data = read_checkpoint(target)
    write_program(data, target)
    name = args.push_to_hub or target.resolve().name
    folder = "" if args.push_to_hub or target.is_absolute() else args.output
    (target / "README.md").write_text(
        card(
            {**data, "agents": speaking(data, read_values(target, data))},
            summary_of(checkpoint),
            name,
            folder,
            args.push_to_hub,
            example_meta(checkpoint),
        ),
        encoding="utf-8",
    )
    print(target)
    if args.push_to_hub:
        print(push(target, args.push_to_hub, private=not args.public))
    else:
        say("nothing was uploaded; --push_to_hub OWNER/NAME does that")


def speaking(data: Mapping[str, Any], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The agents with the policies that they speak with: a value may name another than the spec."""
    return [
        {**agent, "policy": values.get(f"{agent['name']}.policy") or agent["policy"]}
        for agent in data["agents"]
    ]


def write_program(data: Mapping[str, Any], target: Path) -> None:
    """Write the program of a team that has one (`agents/programs/program.py`), prompts included, to
    `program.py`: for readers, since the team itself reads its values."""
    path = target / "values" / "values.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    program = {**data["system"]["arguments"], **values}.get(PROGRAM)
    if isinstance(program, str):
        (target / f"{PROGRAM}.py").write_text(f"{PROGRAM_HEAD}{program}\n", encoding="utf-8")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder with the user's own login; returns where it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A team of adapters")
    return str(url)


def shorten_paths(folder: Path) -> None:
    """Leave only the last part of every path of this machine in the JSON files of a folder, which
    goes to the hub: base models and task files lie elsewhere for others anyway."""
    short: dict[str, str] = {}

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {shortened(key): shortened(each) for key, each in value.items()}
        if isinstance(value, list):
            return [shortened(each) for each in value]
        if not (isinstance(value, str) and Path(value).is_absolute() and "\n" not in value):
            return value
        name = Path(value).name or value
        if short.setdefault(name, value) != value:
            raise SettingError(
                f"--push_to_hub: {short[name]} and {value} end in one name, and paths of this"
                " machine are shortened to it; give the folders different names"
            )
        return name

    for path in sorted(folder.rglob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(shortened(data), indent=2) + "\n", encoding="utf-8")


def summary_of(checkpoint: Path) -> Mapping[str, Any]:
    """The run's `summary.json`, if the checkpoint is its last one: earlier ones have other
    accuracies."""
    path = checkpoint.resolve().parent.parent / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return summary if checkpoint.resolve().name == f"step-{summary.get('steps', -1):06d}" else {}


def example_meta(checkpoint: Path) -> Mapping[str, Any]:
    """The public meta of one of the run's tasks, from its stored episodes; {} without them."""
    if (store := checkpoint.resolve().parent.parent / "episodes").is_dir():
        for episode in Store(store).read():
            return episode.task.public().meta
    return {}


def card(
    data: Mapping[str, Any],
    summary: Mapping[str, Any],
    name: str,
    folder: str = "",
    repository: str = "",
    meta: Mapping[str, Any] | None = None,
) -> str:
    """The model card: the agents, what they were trained on, how well they did, how to load them.

    `folder`: what the commands on the card call the folder; "" is the last part of `name`.
    `repository`: where it is downloaded from, if it is. `meta`: the public meta of one of its
    tasks, for the commands.
    """
    base = str(data["base"]["name"])
    on_hub = _on_hub(base)
    title = name.rpartition("/")[2]
    bases = [each if _on_hub(each) else Path(each).name for each in data["bases"]]
    adapters = ["library_name: peft", "tags: [lora, multi-agent, marlora]"]
    lines = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        *(adapters if data["adapters"] else ["tags: [multi-agent, marlora]"]),
        "---",
        "",
        f"# {title}",
        "",
        *_about(data, bases),
        "",
        *_agents_table(data),
        "",
        *measured(summary, (data["rewards"] or ["reward"])[0]),
        *_loading(data, base if on_hub else "THE-BASE", folder or title),
        *_whole_team(data, folder or title, repository, meta or {}),
    ]
    return "\n".join(lines)


def _on_hub(name: str) -> bool:
    """Whether a base is named as on the hub, and no folder of this machine has that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _agents_table(data: Mapping[str, Any]) -> list[str]:
    rows = [("agent", "role", "policy", "weights"), ("---",) * 4]
    for agent in data["agents"]:
        role = plain(agent.get("role", ""))
        rows.append((agent["name"], role, agent["policy"], _weights(agent["policy"], data)))
    return [row_of(row) for row in rows]


def _weights(policy: str, data: Mapping[str, Any]) -> str:
    """What a policy speaks with: its LoRA adapter, the bare base, or a model of others."""
    if data["policies"].get(policy, {}).get("url"):
        return "a model asked over the network, not part of this repository"
    entry = data["adapters"].get(policy)
    if entry is None:
        return "the base model, no adapter"
    kind = "LoRA" if entry.get("trained") else "LoRA, not trained in this run"
    return f"{kind}, sha256 `{entry['sha256'][:16]}`"


def _about(data: Mapping[str, Any], base_names: Sequence[str]) -> list[str]:
    """A sentence on agents, bases and adapters, and one on what they were trained on."""
    outside = [n for n, policy in data["policies"].items() if policy.get("url")]
    count = len(data["adapters"])
    bases = ", ".join(f"`{name}`" for name in base_names)
    kind = "one base model" if len(base_names) == 1 else "several base models"
    models = f"{kind} ({bases})" if bases else "models of others"
    tasks, recipe = data["tasks"], data.get("recipe") or "none"
    task_set = f"`{last_part(tasks['name'])}`" if tasks["name"] else "given in Python"
    lines = [
        f"A team of {number_of(len(data['agents']), 'agent')} on {models}, with"
        f" {number_of(count, 'LoRA adapter')}, trained with marlora (recipe `{recipe}`, step"
        f" {data['step']})."
    ]
    if outside:
        names = ", ".join(f"`{name}`" for name in outside)
        lines[0] += f" {names}: asked over the network, see `system.json`."
    system = data["system"]["class"]
    return [*lines, "", f"System: `{system}`. Tasks: {task_set}, seed {tasks['seed']}."]


def number_of(count: int, noun: str) -> str:
    """A count with its noun: `1 agent`, `2 agents`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def last_part(name: str) -> str:
    """The last part of a name that is a path of this machine; other names whole."""
    is_path = Path(name).is_absolute() or name.startswith(("~", "."))
    return Path(name).name if is_path else name


def _loading(data: Mapping[str, Any], base: str, folder: str) -> list[str]:
    """How one adapter is loaded with PEFT."""
    trained = [policy for policy, entry in data["adapters"].items() if entry.get("trained")]
    if not trained:
        return ["## Use", ""]
    return [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{folder}/adapters/{trained[0]}")',
        "```",
        "",
    ]


def _whole_team(
    data: Mapping[str, Any], folder: str, repository: str, meta: Mapping[str, Any]
) -> list[str]:
    """How the whole team is evaluated and asked."""
    download = shlex.join(["hf", "download", repository, "--local-dir", folder])
    return [
        "The whole team, as it was trained:",
        "",
        "```bash",
        *([download] if repository else []),
        *_commands(data, folder, meta),
        "```",
        "",
        *_notes(data),
    ]


def _commands(data: Mapping[str, Any], folder: str, meta: Mapping[str, Any]) -> list[str]:
    """`marlora eval` and `marlora play` for a folder, with the flags that they need; `meta`: that
    of a task."""
    flags = needed_flags(data)
    tasks = [] if data["tasks"]["name"] else ["--tasks", "TASKS"]
    return [
        shlex.join(["marlora", "eval", folder, *flags, *tasks]),
        shlex.join(["marlora", "play", folder, *flags, *meta_flag(data, meta)]),
    ]


def _notes(data: Mapping[str, Any]) -> list[str]:
    """What the commands need beside this folder."""
    flags = needed_flags(data)
    notes = ["`system.json` names system, prompts and tasks."]
    if flags:
        notes.append(
            f"`{' '.join(flags)}` consents to code or models that it names outside marlora; that"
            " code is not part of this folder and must be importable from where the command runs."
        )
    if not data["tasks"]["name"]:
        notes.append("The tasks were given in Python: name a set in place of `TASKS`.")
    if any(Path(name).is_absolute() for name in data["bases"]):
        notes.append("`--model FOLDER` says where the base model lies, if it is elsewhere.")
    return [*notes, ""]


def measured(summary: Mapping[str, Any], metric: str = "held-out") -> list[str]:
    """Means of the first reward, `metric`, on held-out tasks, as the run measured them; nothing if
    this is not the run's last checkpoint."""
    result = summary.get("eval") or {}
    if not (result.get("before") and result.get("after")):
        return []
    named = {
        "base team": result["before"],
        **{f"only {n}": e for n, e in (summary.get("adapters") or {}).items()},
    }
    named["trained team"] = {**result["after"], "paired": result["paired"]}
    columns = (
        f"held-out `{metric}`",
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
