"""Every command that a method's page shows is one that works: its settings are known, and it runs,
cut down to a step on a few tasks, to a summary of its recipe."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from marlora.recipes.cli.train import chosen
from marlora.recipes.launch.settings import parse, read_yaml
from tests.method_pages import FOLDER, config_path, methods
from tests.trainers.forks import forked

ELSEWHERE = {"grpo_team": "make demo-tiny"}  # tests/recipes/test_demos.py
UNTRAINED = "smollm2-135m"  # where a page has it, a model that knows nothing plays here
FEEDBACK = "--max_steps 1 --tasks_per_step 1 --num_val_tasks 2 --max_completion_length 4"
# a model without any success tries all tasks, so there are only 27
FEW = "--num_val_tasks 4 --max_completion_length 4 --task_args.largest 2"
SEARCH = "--max_steps 1 --num_val_tasks 4"
SHORT = {
    "ppo_team": "--max_steps 1 --tasks_per_step 2 --num_generations 2 --num_ppo_epochs 1",
    "maporl": "--max_steps 1 --tasks_per_step 2 --num_ppo_epochs 1 --num_eval_samples 1",
    "sft_team": "--max_steps 1 --tasks_per_step 16 --num_generations 1",
    "sirius": "--tasks_per_step 16 --num_generations 1 --max_regenerations 1",
    "multiagent_finetuning": "--max_iterations 1 --tasks_per_step 16 --num_eval_samples 1",
    "bootstrap_finetune": "--tasks_per_step 32",
    "sysdpo": "--max_steps 1 --tasks_per_step 4 --max_pairs_per_task 1",
    "abadbo": "--tasks_per_step 16 --num_generations 1 --num_val_tasks 4 --num_local_runs 1"
    " --num_targets 1 --teams_per_target 1",
    "scoreflow": "--max_steps 1 --tasks_per_step 4 --num_pairs 8",
    "flowreasoner": "--max_steps 2 --tasks_per_step 2 --num_generations 4 --num_iterations 1",
    "mas_gpt": "--tasks_per_step 6 --num_val_tasks 3 --num_train_epochs 1",
    "w4s": "--num_episodes 2 --num_candidates 2 --num_val_tasks 4 --num_train_epochs 1",
    "autoflow": "--max_steps 1 --num_generations 8 --tasks_per_step 2 --num_val_tasks 4"
    " --num_iterations 1",
    "bootstrap_few_shot": f"--num_candidate_programs 1 --max_rounds 1 {FEW}",
    "mipro": f"--max_bootstrapped_demos 0 --max_labeled_demos 0 --num_candidates 2 --num_trials 2"
    f" --minibatch_size 2 --max_summary_calls 1 --max_proposal_tokens 8 --max_rounds 1 {FEW}",
    "mass": "--num_topologies 1 --topology_evaluations 1 --prompt_optimizer.max_bootstrapped_demos 0"
    " --prompt_optimizer.num_candidates 2 --prompt_optimizer.num_trials 2"
    f" --prompt_optimizer.minibatch_size 2 --prompt_optimizer.max_proposal_tokens 8 {FEW}",
    "gepa_prompts": "--num_proposals 1 --num_val_tasks 4 --max_completion_length 4"
    " --max_proposal_tokens 8",
    "better_together": "--tasks_per_step 32 --num_val_tasks 4",
    "prompts_and_weights": "--max_steps 1 --tasks_per_step 2 --num_generations 4"
    " --num_val_tasks 4 --max_completion_length 4 --max_proposal_tokens 8",
    "textgrad_prompts": FEEDBACK,
    "revolve": FEEDBACK,
    "aime": FEEDBACK,
    "trace_opto": FEEDBACK,
    "llm_autodiff": FEEDBACK,
    "semantic_backprop": f"{FEEDBACK} --error_pool 2",
    "metatextgrad": f"{FEEDBACK} --prompt_trials 1 --inner_steps 1",
    "symbolic_learning": FEEDBACK,
    "aflow": SEARCH,
    "adas": SEARCH,
    "debflow": SEARCH,
    "gptswarm_edges": "--max_steps 1 --tasks_per_step 4",
    "maas_supernet": "--max_steps 1 --tasks_per_step 2",
    "llmselector": "--num_search_tasks 4",
    "dylan": "--tasks_per_step 4 --max_steps 1",
    "verifier": "--tasks_per_step 16",
}  # by recipe: settings that make a run of seconds, behind those of the page


def shown() -> dict[str, str]:
    """By recipe: the command that its page shows."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return {name: re.findall(r"```console\n(.*)\n```", text)[0] for name, text in pages.items()}


def arguments(command: str) -> list[str]:
    """What a page's command says behind `marlora train`."""
    first, second, *rest = shlex.split(command)
    assert (first, second) == ("marlora", "train"), f"{command!r} trains nothing"
    return rest


def test_every_page_shows_how_to_train() -> None:
    assert {name: shown()[name] for name in ELSEWHERE} == ELSEWHERE
    assert shown().keys() - ELSEWHERE.keys() == SHORT.keys()


@pytest.mark.parametrize("recipe", SHORT)
def test_the_command_names_the_recipe_and_settings_that_it_has(recipe: str) -> None:
    config, *settings = arguments(shown()[recipe])
    name, path = chosen(config)
    assert name == recipe
    parse(methods()[name].Config, path or config_path(name), settings)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHORT)
def test_the_command_runs(recipe: str, model: Path, tmp_path: Path) -> None:
    config, *settings = arguments(shown()[recipe])
    path = chosen(config)[1] or config_path(recipe)
    short = [*settings, "--num_eval_tasks", "2", *SHORT[recipe].split()]
    if read_yaml(path).get("model") == UNTRAINED:
        short += ["--model", str(model), "--engine", "transformers"]
    run = tmp_path / "run"
    done = forked("marlora.recipes.cli.main", "train", config, *short, "--output_dir", run)
    assert done.returncode == 0, f"{config} {short}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["recipe"] == recipe and summary["steps"] >= 1
    assert {"before", "after"} <= summary["eval"].keys()
