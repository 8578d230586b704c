"""Settings from YAML, flags and dotted paths, and the errors of those that are wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.system import build_system, override_agents
from marlora.agents.types import AgentSpec, Message, Sampling, SettingError, to_json
from marlora.recipes.launch.settings import parse, read_value, run
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.episodes.store import StoreError
from marlora.trainers.errors import RunError
from marlora.trainers.loop.spec import RunSpec
from marlora.trainers.loop.summary import write_config
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from tests.repository import ROOT

RECIPE = ROOT / "recipes" / "grpo_team.py"
SYSTEM = "system: {class: 'marlora.agents.patterns.chain:Chain', agents: [solver, reviewer]}\n"


def read(text: str, *argv: str, folder: Path) -> GRPOConfig:
    """The config of a YAML text and a command line."""
    (folder / "own.yaml").write_text(text)
    return parse(GRPOConfig, RECIPE, ["--config", str(folder / "own.yaml"), *argv])


def told(text: str, *argv: str, folder: Path) -> str:
    """The error of a YAML text and a command line: one line."""
    with pytest.raises(SettingError) as caught:
        read(text, *argv, folder=folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is read


def test_the_default_file_stands_beside_the_recipe_and_flags_win() -> None:
    config = parse(GRPOConfig, RECIPE, [])
    assert (config.model, config.max_steps, config.learning_rate) == ("tiny", 30, 2e-3)
    assert config.system["views"] == {"first": "{prompt}", "last": "{previous}+{c}"}  # type: ignore[index, call-overload]
    flags = [
        "--max_steps",
        "7",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--resume",
        "true",
        "--learning_rate=1e-5",
    ]
    config = parse(GRPOConfig, RECIPE, flags)
    assert (config.max_steps, config.lora_target_modules, config.resume, config.learning_rate) == (
        7,
        ["q_proj", "v_proj"],
        True,
        1e-5,
    )


def test_config_in_both_spellings(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("max_steps: 3\n")
    for argv in (["--config", f"{tmp_path}/own.yaml"], [f"--config={tmp_path}/own.yaml"]):
        assert parse(GRPOConfig, RECIPE, [*argv, "--seed", "4"]).max_steps == 3


def test_dotted_paths_set_one_entry_of_a_mapping(tmp_path: Path) -> None:
    argv = [
        "--agents.solver.prompt",
        "Be brief: answer only",
        "--policies.solver.adapter.r",
        "4",
        "--policies.solver.trainable=false",
    ]
    argv += [
        "--agents.solver.sampling.stop",
        '["!"]',
        "--system.rounds=3",
        "--task_args.level",
        "[1, 2]",
    ]
    config = read("agents: {solver: {role: solves}}\npolicies:\n", *argv, folder=tmp_path)
    assert config.agents == {
        "solver": {"role": "solves", "prompt": "Be brief: answer only", "sampling": {"stop": ["!"]}}
    }
    assert config.policies == {"solver": {"adapter": {"r": 4}, "trainable": False}}
    assert config.system == {"rounds": 3} and config.task_args == {"level": [1, 2]}


@pytest.mark.parametrize(
    "prompt",
    [
        "5",
        "yes",
        "null",
        "{prompt}",
        "a: b",
        "# no comment",
        '"quoted"',
        "two\nlines",
        "--dashes",
        "",
    ],
)
def test_a_prompt_is_taken_as_it_stands(prompt: str, tmp_path: Path) -> None:
    config = read("max_steps: 1", f"--agents.solver.prompt={prompt}", folder=tmp_path)
    assert override_agents(Chain(["solver"]), config.agents)[0].prompt == prompt  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E3", -2000.0),
        (".5e1", 5.0),
        ("3.14", 3.14),
        ("7", 7),
        ("true", True),
        ("null", None),
        ("", ""),
        ("[1, 2e-3]", [1, 2e-3]),
        ("{a: 1}", {"a": 1}),
        ("{prompt}", "{prompt}"),
        ("{previous}+{c}", "{previous}+{c}"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("'7'", "7"),
        ("2026-11-22", "2026-11-22"),
        ("1:30", "1:30"),
        ("[broken", "[broken"),
        ("x # y", "x # y"),
    ],
)
def test_values_on_the_command_line(text: str, value: Any) -> None:
    assert read_value(text) == value and type(read_value(text)) is type(value)


def test_small_numbers_are_numbers_everywhere(tmp_path: Path) -> None:
    text = "learning_rate: 1e-5\nadvantage_epsilon: 1E-6\nepsilon_high: 2e-1\n"
    text += "policies: {solver: {learning_rate: 3e-4, adapter: {alpha: 1e1}}}\n"
    text += "agents: {reviewer: {sampling: {min_p: 1e-2}}}\nreward_weights: {exact: 5e-1}\n"
    config = read(SYSTEM + text, "--policies.reviewer.learning_rate", "4e-5", folder=tmp_path)
    assert (config.learning_rate, config.advantage_epsilon, config.epsilon_high) == (
        1e-5,
        1e-6,
        0.2,
    )
    agents = override_agents(build_system(config.system), config.agents)  # type: ignore[arg-type]
    policies = config.policy_specs(agents)
    assert (policies["solver"].learning_rate, policies["reviewer"].learning_rate) == (3e-4, 4e-5)
    assert policies["solver"].adapter.alpha == 10.0 and agents[1].sampling == Sampling(min_p=0.01)
    assert config.weight("exact") == 0.5


def test_mappings_may_be_json(tmp_path: Path) -> None:
    config = read(
        "max_steps: 1",
        "--agents",
        '{"solver": {"prompt": "p"}}',
        "--reward_weights",
        '{"exact": 1e-1}',
        folder=tmp_path,
    )
    assert config.agents == {"solver": {"prompt": "p"}} and config.reward_weights == {"exact": 0.1}


# what is wrong


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("max_step: 3", [], "own.yaml: unknown setting 'max_step'; did you mean 'max_steps'?"),
        (
            "max_steps: 3",
            ["--lerning_rate", "1"],
            "unknown setting '--lerning_rate'; did you mean 'learning_rate'?",
        ),
        ("max_steps: 3", ["--learn", "1"], "unknown setting '--learn'"),  # no abbreviations
        (
            "max_steps: 3",
            ["--agent.solver.prompt", "x"],
            "unknown setting '--agent.solver.prompt'; did you mean 'agents'?",
        ),
        (
            "max_steps: 3",
            ["--agents.solver.prompt"],
            "--agents.solver.prompt: expected a value after it",
        ),
        (
            "max_steps: 3",
            ["--agents..prompt", "x"],
            "--agents..prompt: expected names between the dots",
        ),
        (
            "max_steps: 3",
            ["--max_steps.x", "1"],
            "--max_steps.x: max_steps is 3, so nothing can be set inside it",
        ),
        (
            "agents: {solver: 5}",
            ["--agents.solver.prompt=x"],
            "--agents.solver.prompt: agents.solver is 5, so nothing can be set",
        ),
        (
            "max_steps: 3",
            ["--agents.a.role=x", "--agents", "{}"],
            "--agents: given as a whole and by path; choose one",
        ),
        ("max_steps: 3", ["--config"], "--config: expected a YAML file after it"),
        (
            "max_steps: 3",
            ["--config", "/no/such.yaml"],
            "--config /no/such.yaml: No such file or directory; expected a YAML file",
        ),
        ("", [], "own.yaml: the file is empty; expected settings, one `name: value` a line"),
        ("# only a comment", [], "the file is empty"),
        ("- max_steps", [], "expected settings, one `name: value` a line, got a list"),
        ("max_steps: [3", [], "own.yaml: not YAML: while parsing a flow sequence"),
        ("max_steps: 3\nmax_steps: 4", [], "own.yaml: not YAML: 'max_steps' is given twice"),
        ("max_steps: 3.5", [], "max_steps: expected int, got 3.5"),
        ("max_steps: [3]", [], "max_steps: expected int, got [3]"),
        (
            "max_steps: three",
            [],
            "--max_steps: invalid int value: 'three'; --help lists every setting",
        ),
        ("max_steps: 3", ["--max_steps", "3.5"], "--max_steps: invalid int value: '3.5'"),
        ("max_steps: 3", ["--max_steps"], "--max_steps: expected one argument"),
        ("learning_rate: fast", [], "--learning_rate: invalid float value: 'fast'"),
        ("learning_rate: true", [], "learning_rate: expected float, got True"),
        ("learning_rate: -1e-4", [], "learning_rate: expected a number from 0, got -0.0001"),
        ("learning_rate: .nan", [], "learning_rate: expected a number from 0, got nan"),
        ("epsilon_high: [1]", [], "epsilon_high: expected float | None, got [1]"),
        ("resume: 3", [], "resume: expected bool, got 3"),
        ("rewards: exact", [], "rewards: expected list[str], got 'exact'"),
        ("rewards: [1]", [], "rewards: expected list[str], got [1]"),
        ("model: 5", [], "model: expected str, got 5"),
        ("agents: [solver]", [], "agents: expected a mapping, got ['solver']"),
        (
            "agents: solver",
            [],
            "agents: expected a mapping (YAML, JSON or --agents.KEY), got 'solver'",
        ),
        (
            "loss_type: gppo",
            [],
            "loss_type: expected one of grpo, bnpo, dapo, dr_grpo, luspo, cispo, got 'gppo'",
        ),
        (
            "credit: grop",
            [],
            "credit: expected one of team, agent, turn, grpo, rloo, dr_grpo, at_grpo, dr_mas, rae,"
            " success, counterfactual, got 'grop'; did you mean 'grpo'?",
        ),
        ("layout: tree", [], "layout: expected one of auto, shared, packed, padded, got 'tree'"),
        ("lora_r: 0", [], "lora_r: expected at least 1, got 0"),
        ("reward_timeout: 0.0", [], "reward_timeout: expected seconds above 0, got 0.0"),
        (
            "num_generations: 1",
            [],
            "num_generations: credit 'grpo' compares episodes of one task, so at least 2; got 1",
        ),
        ("resume: true\noverwrite: true", [], "resume and overwrite: choose one"),
    ],
)
def test_wrong_settings_are_told_in_one_line(
    text: str, argv: list[str], expected: str, tmp_path: Path
) -> None:
    assert expected in told(text, *argv, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "policies: {solvr: {}}",
            "policies.solvr: no agent speaks with it (one that only values name later needs init,"
            " base or url); did you mean 'solver'?",
        ),
        ("policies: {solver: {adapter: {rank: 4}}}", "policies.solver.adapter.rank: unknown field"),
        (
            "policies: {solver: {adapter: {r: four}}}",
            "policies.solver.adapter.r: expected int, got 'four'",
        ),
        ("policies: {solver: {adapter: 4}}", "policies.solver.adapter: expected a mapping"),
        ("policies: {solver: 4}", "policies.solver: expected a mapping"),
        (
            "policies: {solver: {learnin_rate: 1}}",
            "policies.solver.learnin_rate: unknown field; did you mean 'learning_rate'?",
        ),
        (
            "agents: {solver: {policy: base}}\npolicies: {base: {trainable: true}}",
            "policies.base.trainable: the base is never trained",
        ),
        (
            "agents: {solvr: {prompt: x}}",
            "agents.solvr: no such agent in Chain; did you mean 'solver'?",
        ),
    ],
)
def test_wrong_entries_of_agents_and_policies_are_told(
    text: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as caught:
        RunSpec.resolve(read(SYSTEM + text, folder=tmp_path))
    assert expected in str(caught.value)


# what is saved


def test_saved_settings_build_the_same_run_again(tmp_path: Path) -> None:
    agents = [
        AgentSpec("a", "one", "p", sampling=Sampling(stop=("!",)), demos=(Message("user", "x"),)),
        AgentSpec("b", policy="a"),
    ]
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-5,
        policies={"a": {"adapter": {"r": 4}}},
        overwrite=True,
    )
    first = RunSpec.resolve(config, Debate(agents, rounds=2))
    (tmp_path / "run").mkdir()
    write_config(first)
    again = parse(GRPOConfig, RECIPE, ["--config", str(tmp_path / "run" / "config.yaml")])
    other = RunSpec.resolve(again)
    assert other.system == first.system and other.policies == first.policies
    assert not again.overwrite  # of that call, not of the run
    different = {
        name for name, value in to_json(vars(again)).items() if value != to_json(vars(config))[name]
    }
    assert different == {
        "system",
        "agents",
        "overwrite",
    }  # given in Python there, spelt out in the file


# from outside


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(GRPOConfig, RECIPE, ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "  --engine " in shown and "--server_urls" not in shown
    with pytest.raises(SystemExit):
        parse(GRPOConfig, RECIPE, ["--help-engine"])
    shown += capsys.readouterr().out
    for field in dataclasses.fields(GRPOConfig):
        assert f"--{field.name}" in shown
    assert "peak learning rate" in shown


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (SettingError("x: no"), 2, "error: x: no\n"),
        (RunError("step 3: no"), 1, "error: step 3: no\n"),
        (EngineError("gone"), 1, "error: gone\n"),
        (StoreError("torn"), 1, "error: torn\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
    ],
)
def test_exit_codes(
    error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code and capsys.readouterr().err == told
    run(lambda: None)  # success: no exit at all


@pytest.mark.slow
def test_launched_by_path_and_by_module_alike() -> None:
    def launched(*how: str) -> tuple[int, str, str]:
        ended = subprocess.run(
            [sys.executable, *how, "--max_step", "3"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=250,
        )
        return ended.returncode, ended.stdout, ended.stderr

    wrong = (2, "", "error: unknown setting '--max_step'; did you mean 'max_steps'?\n")
    assert launched(str(RECIPE)) == launched("-m", "marlora.recipes.grpo_team") == wrong


def test_the_recipes_yaml_holds_known_settings_only() -> None:
    for path in sorted((ROOT / "recipes").glob("grpo*.yaml")):
        assert set(yaml.safe_load(path.read_text())) <= set(GRPOConfig.__dataclass_fields__), path
