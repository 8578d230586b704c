"""A checkpoint of a stranger's: whatever stands in `system.json`, opening and playing it imports,
calls and asks nothing of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.lookup import is_trusted, load_function, only_trusted, trusted
from marlora.agents.programs.operators import OPERATORS, resolve_operators
from marlora.agents.system import System, build_system
from marlora.agents.types import AgentSpec, PolicySpec, Sampling, SettingError, Task, to_json
from marlora.rollouts.checkpoints import team as served
from marlora.rollouts.checkpoints.reader import places, read_checkpoint
from marlora.rollouts.checkpoints.team import LoadOptions, load_team
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.scripted import ByteTokenizer, ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeRequest
from marlora.rollouts.renderer import ChatRenderer
from marlora.rollouts.rewards.builtin import resolve_rewards
from marlora.rollouts.tasks.registry import load_tasks, split_hash
from tests.repository import ROOT

SET, ARGS = "arithmetic", {"level": 1, "num_tasks": 20}
MODULES = ("evil_in_cwd", "marlora.agents.evil", "marlora.evil", "this", "antigravity")
EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
def run(*args, **kwargs):
    pathlib.Path({marker!r}).touch()
    return run
"""


def hostile(marker: Path) -> list[str]:
    """Names that would leave the marker, import what is nobody's, or call what was never meant to
    be named."""
    return [
        f"os:system(touch {marker})",
        f"posix:system(touch {marker})",
        f"builtins:exec(open({str(marker)!r}, 'w'))",
        "subprocess:check_output",
        "this:s",
        "antigravity:geohash",
        "evil_in_cwd:run",
        "evil_in_cwd:run(x)",
        f"verified(os:system(touch {marker}))",
        f"verified(evil_in_cwd:run({marker}))",
        "marlora.agents.evil:run",
        "marlora.evil:run(x)",
        "marlora.agents..evil:run",
        "marlora.agents.types:json",
        "marlora.agents.types:json.loads",
        "marlora.agents.lookup:importlib",
        "marlora.agents.lookup:load_function(x)",
        "marlora.agents.patterns.chain:Chain.__init__",
        "marlora.agents.system:System",
        "marlora.rollouts.gateway.programs:Command",
        "marlora.rollouts.gateway.programs:Function",
        f"marlora.rollouts.gateway.programs:os.system(touch {marker})",
        "marlora.agents.tools.tools:python_tool",
        "marlora.agents.patterns.chain：Chain",
        "ｍarlora.agents.evil:run",
        "marlora.agents.patterns.chain:Chain:evil",
        "marlora/agents/evil:run",
        "../evil_in_cwd:run",
        ".evil:run",
        "evil_in_cwd\x00:run",
        "e" * 5000,
        "\ud800:x",
        "~nobody-here",
    ]


SYSTEMS: dict[str, dict[str, Any]] = {
    "marlora.agents.patterns.chain:Chain": {"views": {"b": "{previous}"}},
    "marlora.agents.patterns.vote:Vote": {},
    "marlora.agents.patterns.self_correction:SelfCorrection": {},
    "marlora.agents.patterns.debate:Debate": {"rounds": 1},
    "marlora.agents.patterns.collaboration:Collaboration": {"verifier": "calculator", "rounds": 2},
    "marlora.agents.patterns.actor_critic:ActorCritic": {},
    "marlora.agents.patterns.refinement:Refinement": {"iterations": 1},
    "marlora.agents.patterns.extraction:Extraction": {},
    "marlora.agents.patterns.swarm:Swarm": {},
    "marlora.agents.patterns.pipeline:Pipeline": {},
    "marlora.agents.patterns.temporal_network:TemporalNetwork": {},
    "marlora.agents.programs.workflow:Workflow": {
        "operators": ["custom", "review"],
        "executors": {"custom": "b"},
        "prompts": {"review": "{problem}"},
    },
    "marlora.agents.programs.flowreasoner:FlowReasoner": {"operators": ["custom"], "rounds": 1},
    "marlora.agents.programs.building_blocks:BuildingBlocks": {"reflector": "b", "reflect": 1},
    "marlora.agents.programs.program:Program": {"operators": ["custom"], "max_calls": 3},
    "marlora.agents.programs.mas_gpt:MASGPT": {"operators": ["custom"], "max_calls": 6},
    "marlora.agents.programs.supernet:Supernet": {
        "layers": 2,
        "prompts": {"generate": "{problem}"},
    },
    "marlora.agents.programs.step_workflow:StepWorkflow": {"designer": "a", "max_rounds": 3},
    "marlora.agents.games.trade:Trade": {},
    "marlora.agents.games.exchange:Exchange": {},
    "marlora.agents.games.ultimatum:Ultimatum": {},
}


def valid(cls: str) -> dict[str, Any]:
    """`system.json` of a checkpoint of this class, without trained adapters, as a run writes it."""
    tools = ("calculator",) if cls.endswith("Chain") else ()
    others = {"Refinement": "bcd", "Extraction": ""}.get(cls.partition(":")[2], "b")
    system = build_system(
        {
            "class": cls,
            "agents": [AgentSpec("a", prompt="Add.", tools=tools), *map(AgentSpec, others)],
            **SYSTEMS[cls],
        }
    )
    names = [spec.policy for spec in system.specs]
    tasks = load_tasks(SET, "eval", seed=0, **ARGS)[:2]
    return {
        "schema": 1,
        "recipe": "grpo_team",
        "step": 1,
        "base": {"name": "the-base", "sha256": "0" * 64},
        "bases": {
            "the-base": {"sha256": "0" * 64, "files": None, "template": "t", "policies": names}
        },
        "system": {"class": cls, "arguments": json.loads(json.dumps(system.arguments()))},
        "agents": json.loads(json.dumps(to_json(system.specs))),
        "policies": {name: json.loads(json.dumps(to_json(PolicySpec(name)))) for name in names},
        "values": [],
        "adapters": {},
        "tasks": {
            "name": SET,
            "args": ARGS,
            "seed": 0,
            "num_eval_tasks": 2,
            "eval": split_hash(tasks),
        },
        "rewards": ["exact", "verified(calculator)"],
        "helpers": {"critic": {"prompt": "Judge.", "role": "judge"}},
        "sampling": json.loads(json.dumps(to_json(Sampling(max_tokens=40)))),
        "versions": {},
    }


async def work(folder: Path, **settings: Any) -> None:
    """What `play`, `collect`, `eval` and `serve` do with a checkpoint, on an engine that needs no
    model."""
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "Answer: 1")
    options = LoadOptions(
        scratch=folder / "scratch", engine=engine, say=lambda text: None, **settings
    )
    team = await load_team(folder, EngineConfig(), options)
    try:
        tasks = [*team.tasks(limit=1), *team.tasks(limit=1, split="train")]
        for player in (team.rollouts, team.rollouts.greedy()):
            for task in tasks:
                await player.play(EpisodeRequest(task, "g"), team.versions)
    finally:
        await team.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules that leave a marker when they are imported, one of them
    below `marlora.`."""
    marker = tmp_path / "MARKER"
    for name in ("evil_in_cwd", "marlora/evil", "marlora/agents/evil"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(EVIL.format(marker=str(marker)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        served, "base_of", lambda name, path, data: (ChatRenderer(ByteTokenizer()), "the-base")
    )
    for name in MODULES:
        sys.modules.pop(name, None)
    return marker


def strings(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a text, or something that may be one, stands."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from strings(value, (*at, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from strings(value, (*at, number))
    else:
        yield at


def containers(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, (dict, list)):
        yield at
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from containers(value, (*at, key))


def inside(data: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        data = data[key]
    return data


KEYS = (
    "main",
    "command",
    "verifier",
    "operators",
    "tools",
    "class",
    "init",
    "url",
    "base",
    "extra",
)


def changes(
    data: dict[str, Any], name: str, below: tuple[Any, ...], keys: bool = True
) -> Iterator[tuple[str, Any]]:
    """The file with the name at every place below, one at a time: in place of what is there, and
    added to it."""
    part = inside(data, below)
    for at in strings(part, below):
        changed = copy.deepcopy(data)
        inside(changed, at[:-1])[at[-1]] = name
        yield f"at {at}", changed
    for at in containers(part, below):
        if isinstance(inside(data, at), list):
            changed = copy.deepcopy(data)
            inside(changed, at).append(name)
            yield f"appended to {at}", changed
        else:
            for key in (*KEYS, name) if keys else (name,):
                for value in (name, [name]):
                    changed = copy.deepcopy(data)
                    inside(changed, at)[key] = value
                    yield f"added to {at} as {key!r:.20}", changed


def assert_harmless(folder: Path, changed: Any, marker: Path, where: str) -> bool:
    """Open and play it; returns whether it was refused. Nothing else than a refusal in words may
    come out."""
    (folder / "system.json").write_text(json.dumps(changed))
    refused = False
    try:
        asyncio.run(work(folder))
    except SettingError:
        refused = True
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    assert not marker.exists(), where
    assert not set(MODULES) & set(sys.modules), where
    return refused


@pytest.mark.parametrize("cls", SYSTEMS)
def test_what_a_run_writes_is_opened_and_played(cls: str, world: Path, tmp_path: Path) -> None:
    """The files below are refused for what was put in, not for what they are."""
    data = valid(cls)
    if "games" in cls:
        data["tasks"]["name"], data["tasks"]["args"] = (
            f"marlora.rollouts.tasks.games:{cls.split('.')[3].split(':')[0]}",
            {},
        )
        data["rewards"] = [
            "marlora.rollouts.rewards.games:payoff",
            "marlora.rollouts.rewards.games:deal",
        ]
        data["tasks"]["eval"] = split_hash(load_tasks(data["tasks"]["name"], "eval", seed=0)[:2])
    (tmp_path / "system.json").write_text(json.dumps(data))
    asyncio.run(work(tmp_path))


@pytest.mark.parametrize("number", range(len(hostile(Path("x")))))
def test_a_hostile_name_anywhere_does_nothing(number: int, world: Path, tmp_path: Path) -> None:
    """Every place of the whole file, for a chain whose agents have a tool."""
    name, data = hostile(world)[number], valid("marlora.agents.patterns.chain:Chain")
    changed_files = changes(data, name, (), keys=number < 8)
    refused = [
        assert_harmless(tmp_path, changed, world, f"{name!r:.80} {where}")
        for where, changed in changed_files
    ]
    assert sum(refused) > len(refused) / 4, "most places are read"


@pytest.mark.parametrize("cls", SYSTEMS)
def test_a_hostile_name_in_the_arguments_of_a_system_does_nothing(
    cls: str, world: Path, tmp_path: Path
) -> None:
    data = valid(cls)
    for name in hostile(world)[:12]:
        for where, changed in changes(data, name, ("system", "arguments")):
            assert_harmless(tmp_path, changed, world, f"{cls} {name!r:.80} {where}")


LOADED: dict[str, tuple[str, Callable[[dict[str, Any], str], Any]]] = {
    "operator": (
        "marlora.agents.programs.workflow:Workflow",
        lambda d, n: d["system"]["arguments"]["operators"].append(n),
    ),
    "verifier": (
        "marlora.agents.patterns.collaboration:Collaboration",
        lambda d, n: d["system"]["arguments"].update(verifier=n),
    ),
    "tool": ("marlora.agents.patterns.chain:Chain", lambda d, n: d["agents"][1].update(tools=[n])),
    "reward": ("marlora.agents.patterns.chain:Chain", lambda d, n: d.update(rewards=[n])),
    "tasks": ("marlora.agents.patterns.chain:Chain", lambda d, n: d["tasks"].update(name=n)),
}


@pytest.mark.parametrize("kind", LOADED)
def test_the_error_says_what_is_named_where_and_what_to_do(
    kind: str, world: Path, tmp_path: Path
) -> None:
    cls, put = LOADED[kind]
    data = valid(cls)
    put(data, "evil_in_cwd:run")
    (tmp_path / "system.json").write_text(json.dumps(data))
    with pytest.raises(SettingError) as caught:
        asyncio.run(work(tmp_path))
    (where,) = places(data, "evil_in_cwd:run")
    assert all(
        part in str(caught.value)
        for part in (f"{kind} evil_in_cwd:run", f"({where})", "--trust_checkpoint")
    ), caught.value


@pytest.mark.parametrize("kind", LOADED)
def test_with_trust_it_is_imported(kind: str, world: Path, tmp_path: Path) -> None:
    """The same files do import the module once their reader agrees, so what is refused above would
    have been loaded."""
    cls, put = LOADED[kind]
    data = valid(cls)
    put(data, "evil_in_cwd:run")
    (tmp_path / "system.json").write_text(json.dumps(data))
    with contextlib.suppress(
        SettingError, TypeError
    ):  # the function is no operator, tool or set of tasks
        asyncio.run(work(tmp_path, trust=True))
    assert world.exists()


@pytest.mark.parametrize("cls", ["programs:Command", "workers:Workers", "programs:Function"])
def test_a_program_runs_only_with_trust(cls: str, world: Path, tmp_path: Path) -> None:
    """Naming the class with --system agrees to the class, not to the command that the checkpoint
    gives it."""
    data, name = (valid("marlora.agents.patterns.vote:Vote"), f"marlora.rollouts.gateway.{cls}")
    told: dict[str, Any] = (
        {"main": "evil_in_cwd:run"}
        if cls == "programs:Function"
        else {"command": ["touch", str(world)]}
    )
    data["system"] = {"class": name, "arguments": told}
    (tmp_path / "system.json").write_text(json.dumps(data))
    with pytest.raises(SettingError, match=f"give --system {name}"):
        asyncio.run(work(tmp_path))
    with pytest.raises(SettingError, match=r"names the program .*--trust_checkpoint"):
        asyncio.run(work(tmp_path, system=name))
    assert not world.exists()


def test_a_name_that_is_looked_up_late_is_judged_too(world: Path, tmp_path: Path) -> None:
    """A System that looks a name up only while it runs, as the shipped ones may one day."""
    data = valid("marlora.agents.patterns.vote:Vote")
    data["system"] = {"class": f"{__name__}:Late", "arguments": {"late": "evil_in_cwd:run"}}
    (tmp_path / "system.json").write_text(json.dumps(data))
    with pytest.raises(SettingError, match="operator evil_in_cwd:run"):
        asyncio.run(work(tmp_path, system=f"{__name__}:Late"))
    assert not world.exists()


@pytest.mark.parametrize(
    ("helper", "message"),
    [
        ({"url": "http://elsewhere/v1"}, "elsewhere/v1 as critic with .*--trust_checkpoint"),
        ({"tools": ["calculator"]}, "helpers.critic.tools: unknown field of a helper"),
        ({"init": "/etc"}, "helpers.critic.init: unknown field of a helper"),
        ({"base": "another"}, "helpers.critic.base: 'another' is no base of the checkpoint"),
        ("critic", "helpers.critic: expected a mapping"),
        (["critic"], "helpers.critic: expected a mapping"),
    ],
)
def test_a_helper_is_data_and_asked_with_consent(
    helper: Any, message: str, world: Path, tmp_path: Path
) -> None:
    data = valid("marlora.agents.patterns.vote:Vote")
    data["rewards"] = ["judge(critic)"]
    (tmp_path / "system.json").write_text(json.dumps(data))
    asyncio.run(work(tmp_path))
    data["helpers"] = {"critic": helper}
    (tmp_path / "system.json").write_text(json.dumps(data))
    with pytest.raises(SettingError, match=message):
        asyncio.run(work(tmp_path))
    data["helpers"] = {"a": {"prompt": "Judge."}}
    (tmp_path / "system.json").write_text(json.dumps(data))
    with pytest.raises(SettingError, match=r"helpers\.a: the team has an agent or a"):
        asyncio.run(work(tmp_path))


def test_an_outside_model_is_not_asked_and_its_key_not_shown(world: Path, tmp_path: Path) -> None:
    data = valid("marlora.agents.patterns.vote:Vote")
    data["policies"]["a"]["url"] = "http://user:sesame-secret@elsewhere/v1?key=sesame-secret"
    for key_env, shown in (
        ("", "the key in MARLORA_OUTSIDE_KEY, if it is set"),
        ("HOME", "the key in HOME"),
        ("sesame-secret", r"a key that is not here \(got a text of 13 characters .*\)"),
    ):
        data["policies"]["a"]["key_env"] = key_env
        (tmp_path / "system.json").write_text(json.dumps(data))
        with pytest.raises(
            SettingError, match=rf"elsewhere/v1.* as a with {shown}; give --trust_checkpoint"
        ) as caught:
            asyncio.run(work(tmp_path))
        assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"megatron_config": {"hidden_size": 1}, "megatron_core": "evil_in_cwd"},
        {"megatron_core": "evil_in_cwd"},
        {"init_lora_weights": "pissa"},
        {"auto_mapping": {"parent_library": "evil_in_cwd", "base_model_class": "x"}},
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"target_modules": "(a+)+$"},
        {"something_new": "on"},
    ],
)
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused(
    setting: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    """PEFT imports the module that `megatron_core` names."""
    import numpy
    from safetensors.numpy import save_file

    from marlora.rollouts.files import adapter_sha256

    data, folder = valid("marlora.agents.patterns.vote:Vote"), tmp_path / "adapters" / "a"
    folder.mkdir(parents=True)
    save_file(
        {"x.lora_A.weight": numpy.zeros((2, 2), numpy.float32)},
        folder / "adapter_model.safetensors",
    )
    data["adapters"] = {
        "a": {"sha256": adapter_sha256(folder / "adapter_model.safetensors"), "trained": True}
    }
    (tmp_path / "system.json").write_text(json.dumps(data))
    plain = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32.0,
        "target_modules": ["q_proj"],
        "megatron_core": "megatron.core",
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    assert read_checkpoint(tmp_path) == data
    (folder / "adapter_config.json").write_text(json.dumps(plain | setting))
    with pytest.raises(SettingError, match=list(setting)[-1]):
        read_checkpoint(tmp_path)


# the rule


@dataclass
class Late(System):
    """Looks its name up at play."""

    late: str = ""

    async def run(self, task: Task, team: Any) -> str:
        return str(resolve_operators([self.late]))


def test_every_system_of_ours_is_marked_and_nothing_else_is() -> None:
    """A new System of `marlora.agents` has to be marked; programs of the user's never are."""
    classes = set()
    for path in [each for room in ("agents", "rollouts") for each in (ROOT / room).rglob("*.py")]:
        module = importlib.import_module(
            "marlora." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        )
        classes |= {
            found
            for found in vars(module).values()
            if inspect.isclass(found) and issubclass(found, System)
        }
    names = {
        f"{found.__module__}:{found.__name__}": is_trusted("system", found) for found in classes
    }
    abstract = {"marlora.agents.system:System", "marlora.agents.games.base:Game"}
    programs = {
        f"marlora.rollouts.gateway.programs:{name}"
        for name in ("ExternalProgram", "Function", "Command")
    } | {"marlora.rollouts.gateway.workers:Workers"}
    assert {name for name, marked in names.items() if marked} == set(SYSTEMS)
    assert {name for name, marked in names.items() if not marked} == abstract | programs


def test_a_mark_is_the_objects_own() -> None:
    """Neither a subclass nor an equal copy of what is marked is."""

    @trusted("system")
    class Ours(System):
        pass

    class Theirs(Ours):
        pass

    assert (
        is_trusted("system", Ours)
        and not is_trusted("system", Theirs)
        and not is_trusted("reward", Ours)
    )
    assert not is_trusted("operator", copy.copy(OPERATORS["custom"]))


@pytest.mark.parametrize(
    "name",
    [
        "exact",
        "verified(calculator)",
        "judge(critic)",
        "marlora.rollouts.rewards.builtin:exact",
        "marlora.rollouts.rewards.games:won",
    ],
)
def test_rewards_of_ours_need_no_trust(name: str) -> None:
    with only_trusted():
        assert callable(resolve_rewards([name])[0])


@pytest.mark.parametrize(
    "name",
    [
        "correct(4)",
        "marlora.rollouts.rewards.scoring:fn_name(x)",
        "marlora.rollouts.rewards.builtin:resolve_verifier",
        "verified(calculator(x))",
        "judge(http://elsewhere/v1, m)",
    ],
)
def test_what_is_ours_but_not_marked_for_it_is_refused(name: str) -> None:
    with only_trusted(), pytest.raises(SettingError, match="--trust_checkpoint"):
        resolve_rewards([name])


def test_the_rule_ends_where_it_began(world: Path) -> None:
    with pytest.raises(SettingError), only_trusted():
        load_function("reward", "evil_in_cwd:run", {})
    assert not world.exists()
    with only_trusted(False):
        load_function("reward", "evil_in_cwd:run", {})
    assert world.exists()
