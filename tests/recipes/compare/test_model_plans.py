"""Plans for models that need a GPU, or a night: every recipe takes the team, and what that takes fits
where the plan says it runs. Nothing is played, and of Qwen3 there are sizes but no weights."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from marlora.agents.types import AgentSpec
from marlora.recipes.compare.arms import PlannedRun
from marlora.recipes.compare.dry_run import recipe_plan
from marlora.recipes.compare.plan import ComparisonPlan, read_plan
from marlora.recipes.compare.runs import REFUSED
from marlora.recipes.launch.settings import read_yaml
from marlora.trainers.config import RunConfig
from marlora.trainers.model.memory_estimate import GIB, engine_estimate, estimate
from marlora.trainers.testbeds.tiny import tiny_tokenizer
from tests.compare_tables import FOLDER

ROOM = 24 * GIB  # of the smallest GPU that the plans are meant for
SIZES = {  # of the published config.json files
    "Qwen/Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "Qwen/Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
PARAMETERS = {"Qwen/Qwen3-0.6B": 596.0, "Qwen/Qwen3-1.7B": 1720.6}  # millions
SHARED = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
# by plan, the arms whose dry runs are made: the large plans are the small ones with another model, and
# those of SmolLM2 have the arms of qwen3_sums
SHOWN = {
    "qwen3_sums": (),  # all
    "qwen3_policies": ("shared",),
    "smollm2_sums": ("sirius",),
    "smollm2_letters": ("grpo",),
    "smollm2_seats": (),
}
OF_THE_MEMORY = ("lora_r", "lora_alpha", "lora_target_modules", "tokens_per_batch")
GPU = {  # and the arm that takes most
    "qwen3_sums": "grpo",
    "qwen3_1b7_sums": "grpo",
    "qwen3_policies": "separate",
    "qwen3_1b7_policies": "separate",
}


@functools.cache
def sizes(name: str) -> Path:
    """A folder with the configuration of a Qwen3, and a tokenizer whose template knows its
    settings; without weights."""
    folder = Path(tempfile.mkdtemp(prefix="marlora-qwen3-"))
    config = Qwen3Config(**SHARED, **SIZES[name])
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and enable_thinking %}{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def plan_of(stem: str, folder: Path) -> tuple[ComparisonPlan, str]:
    """A plan that stands in benchmarks/compare, with sizes in the place of its model; the model."""
    given = read_yaml(FOLDER / f"{stem}.yaml")
    name = given["team"]["model"]
    model = str(sizes(name)) if name in SIZES else name
    changes = {"output_dir": str(folder), "team": {**given["team"], "model": model}}
    return ComparisonPlan(stem, {**given, **changes}), name


@pytest.mark.parametrize(("stem", "largest"), GPU.items())
def test_a_gpu_has_room_for_trainer_and_server(stem: str, largest: str) -> None:
    """Weights twice, adapters and optimizers, activations and the head; 8 GiB are left for the
    server's cache. The arm is the one with most adapters and no other has more tokens at a time."""
    plan, name = plan_of(stem, Path("unused"))
    own = plan.settings_of(PlannedRun(plan.arms[largest], 0))
    kept = {k: own[k] for k in OF_THE_MEMORY if k in own}
    config = RunConfig(model=str(sizes(name)), **kept)
    specs = config.policy_specs((AgentSpec("first"), AgentSpec("last"))).values()
    trainer = estimate(str(sizes(name)), specs, config, torch.bfloat16)
    server = engine_estimate(str(sizes(name)), specs, torch.bfloat16)
    assert trainer.parameters / 1e6 == pytest.approx(PARAMETERS[name], abs=0.1)
    assert trainer.total + server.weights + server.adapters + 8 * GIB < ROOM
    assert not any("tokens_per_batch" in arm.settings for arm in plan.arms.values())


@pytest.mark.parametrize("kind", ["sums", "policies"])
def test_plans_of_two_sizes_differ_in_the_model_alone(kind: str) -> None:
    small, large = (read_yaml(FOLDER / f"qwen3_{size}{kind}.yaml") for size in ("", "1b7_"))
    assert large["team"].pop("model") == "Qwen/Qwen3-1.7B"
    assert small["team"].pop("model") == "Qwen/Qwen3-0.6B"
    assert large.pop("output_dir") != small.pop("output_dir") and large == small


@pytest.mark.parametrize("stem", ["tiny_policies", "qwen3_policies"])
def test_shared_and_separate_differ_in_who_speaks_as_whom_alone(stem: str) -> None:
    arms = read_plan(FOLDER / f"{stem}.yaml").arms
    separate, shared = dict(arms["separate"].settings), dict(arms["shared"].settings)
    assert shared.pop("agents") == {"last": {"policy": "first"}} and shared == separate
    assert arms["separate"].recipe == arms["shared"].recipe
    assert arms["separate"].seeds == arms["shared"].seeds == (0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "arms"), SHOWN.items())
def test_the_arms_of_a_plan_take_its_team(
    stem: str, arms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, name = plan_of(stem, tmp_path)
    monkeypatch.chdir(tmp_path)
    for policy in plan.team.get("policies", {}).values():  # adapters that another plan leaves
        checkpoint, _, agent = policy.get("init", "").partition("#")
        if agent:
            folder = tmp_path / checkpoint / "adapters" / agent
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    for arm in [plan.arms[name] for name in arms or plan.arms]:
        lines = recipe_plan(plan, PlannedRun(arm, 0))
        shown = "\n".join(lines)
        assert REFUSED not in shown, f"{arm.name}: {shown}"
        assert any(line.startswith("memory ") for line in lines), f"{arm.name}: {shown}"
        if name in SIZES:
            assert f"{PARAMETERS[name]:.1f}M parameters" in shown


def test_seats_are_chosen_among_checkpoints_that_the_other_plan_leaves() -> None:
    seats, other = (read_plan(FOLDER / f"smollm2_{kind}.yaml") for kind in ("seats", "sums"))
    assert {key: seats.team[key] for key in ("tasks", "task_args", "system")} == {
        key: other.team[key] for key in ("tasks", "task_args", "system")
    }
    for policy in seats.team["policies"].values():
        folder, _, checkpoint = policy["init"].partition("/checkpoints/step-")
        arm = other.arms[folder.split("/")[-2]]
        assert folder == str(arm.folder / "seed-0") and 0 in arm.seeds
        step, _, agent = checkpoint.partition("#")
        steps = arm.settings.get("max_steps") or arm.settings["max_iterations"]
        # the budget ends a run before its last step; how far it came stands in its summary
        assert 0 < int(step) <= steps and agent in seats.team["agents"]
