"""What a user can get wrong: one clear line that names it, and nothing of an earlier run lost."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.patterns.chain import Chain
from marlora.agents.system import System, build_system
from marlora.agents.team import Team
from marlora.agents.types import AdapterSpec, AgentSpec, PolicySpec, SettingError, Task
from marlora.recipes import grpo_team
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.engines.vllm.server_args import lora_sizes
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.loop.run import RunError
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from tests.trainers.small_run import bytes_mod_7, config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    GRPOTrainer(
        system=tiny_chain(), rewards=[bytes_mod_7], args=config(folder, model, max_steps=1)
    ).train()
    return folder


def trainer(folder: Path, model: Path | str, **changes: Any) -> GRPOTrainer:
    given = {
        name: changes.pop(name)
        for name in ("system", "rewards", "tasks", "eval_tasks", "engine")
        if name in changes
    }
    given = {"system": Chain(["first", "last"]), "rewards": [bytes_mod_7], **given}
    if isinstance(given.get("engine"), str):
        changes["engine"] = given.pop("engine")
    return GRPOTrainer(
        args=config(
            folder, model, **{"max_steps": 1, "tasks_per_step": 3, "num_generations": 3, **changes}
        ),
        **given,
    )


def error_of(work: Callable[[], Any], kind: type[Exception] = SettingError) -> str:
    """What it raises: one line."""
    with pytest.raises(kind) as caught:
        work()
    assert type(caught.value) is kind or kind is SettingError
    told = str(caught.value)
    assert "\n" not in told and len(told) < 400, told
    return told


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# names


def test_misspelt_agents_policies_and_views(model: Path, tmp_path: Path) -> None:
    def told(**changes: Any) -> str:
        return error_of(lambda: trainer(tmp_path / "run", model, **changes))

    assert (
        told(agents={"frist": {"prompt": "x"}})
        == "agents.frist: no such agent in Chain; did you mean 'first'?"
    )
    assert told(policies={"lats": {"trainable": False}}) == (
        "policies.lats: no agent speaks with it (one that only values name later needs init, base"
        " or url); did you mean 'last'?"
    )
    assert told(agents={"first": {"tools": ["calculatr"]}}).startswith("tool 'calculatr'")
    chain = {"class": "marlora.agents.patterns.chain:Chain", "agents": ["first", "last"]}
    assert (
        told(system=None) == "system.class: missing; expected module:Class, such as"
        " marlora.agents.patterns.chain:Chain"
    )
    wrong = {"views": {"lst": "{prompt}"}}
    assert (
        error_of(lambda: build_system(chain | wrong))
        == "views.lst: no such agent in the chain; did you mean 'last'?"
    )
    assert (
        error_of(lambda: build_system(chain | {"view": {}}))
        == "system.view: Chain has no such setting; did you mean 'views'?"
    )
    assert "'marlora.agents.patterns.chain:Chian': cannot be imported" in error_of(
        lambda: build_system({"class": "marlora.agents.patterns.chain:Chian"})
    )
    assert not (tmp_path / "run").exists()


def test_two_agents_of_one_name() -> None:
    assert (
        error_of(lambda: Chain(["a", "b", "a"]))
        == "agents: two agents are named 'a'; names are unique, only policies may be shared"
    )


def test_names_that_cannot_name_a_file_or_an_adapter(model: Path, tmp_path: Path) -> None:
    assert error_of(lambda: AgentSpec("../a")).startswith("agent name '../a': letters, digits")
    for policy in ("a/b", "a.b", ""):
        system = Chain([AgentSpec("first", policy=policy or "x y")])
        assert "letters, digits, '_' and '-' expected" in error_of(
            lambda s=system: trainer(tmp_path / "run", model, system=s).train()
        )  # type: ignore[misc]


def test_an_unknown_view_field_ends_the_run_before_it_trains(model: Path, tmp_path: Path) -> None:
    system = Chain(["first", "last"], views={"last": "{previuos}"})
    told = error_of(lambda: trainer(tmp_path / "run", model, system=system).train())
    assert told.startswith("views.last: unknown field {previuos} for task ") and told.endswith(
        "did you mean 'previous'?"
    )


# systems


def test_a_system_that_cannot_be_imported_again_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Local(System):
        async def run(self, task: Task, team: Team) -> str:
            return ""

    told = error_of(lambda: trainer(tmp_path / "run", model, system=Local(["a"])))
    assert (
        "Local is defined in " in told
        and "(inside a function): put the class at the top of a module of its own" in told
    )
    monkeypatch.setattr(Chain, "__module__", "__main__")
    told = error_of(lambda: trainer(tmp_path / "run", model))
    assert (
        told
        == "system Chain is defined in __main__: put the class at the top of a module of its own,"
        " so that checkpoints can import it"
    )
    monkeypatch.setattr(Chain, "__module__", "no_such_module")
    assert "is defined in no_such_module" in error_of(lambda: trainer(tmp_path / "run", model))


# models


def test_models_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    def told(change: Callable[[Path], Any] | None = None, name: str = "broken") -> str:
        folder = tmp_path / name
        if change is not None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder)
            change(folder)
        text = error_of(lambda: trainer(tmp_path / "run", folder).train())
        assert not (tmp_path / "run" / "config.yaml").exists()
        return text.replace(str(folder), "MODEL")

    def without(*names: str) -> Callable[[Path], None]:
        return lambda folder: [(folder / name).unlink() for name in names]  # type: ignore[func-returns-value, return-value]

    assert (
        told(name="nowhere")
        == "model 'MODEL': no such folder; expected one in the Hugging Face layout, or a hub name"
    )
    expected = (
        "model 'MODEL': the folder has no tokenizer; copy tokenizer.json and its like from the"
        " model's source"
    )
    assert told(without("tokenizer.json", "tokenizer_config.json")) == expected
    assert "model 'MODEL': no tokenizer could be loaded (" in told(
        lambda folder: (folder / "tokenizer.json").write_text("{")
    )
    expected = (
        "model 'MODEL': tokenizer: no chat template; use the instruct variant of the model, or add"
        " chat_template.jinja"
    )
    assert told(without("chat_template.jinja")) == expected
    expected = "model 'MODEL': cannot be loaded as a causal language model: "
    assert told(without("model.safetensors")).startswith(expected)
    assert told(lambda folder: (folder / "model.safetensors").write_bytes(b"torn")).startswith(
        expected
    )
    assert told(without("config.json")).startswith("model 'MODEL': ")
    assert error_of(lambda: trainer(tmp_path / "run", "").train()).startswith(
        "model: empty, but policies first, last need a base"
    )


def test_adapters_that_cannot_be_made(model: Path, tmp_path: Path) -> None:
    def told(**changes: Any) -> str:
        return error_of(lambda: trainer(tmp_path / "run", model, **changes).train())

    assert told(lora_target_modules=["c_attn"]).startswith(
        "policies.first.adapter.targets: 'c_attn' is not a linear layer of Llama"
    )
    assert told(policies={"last": {"adapter": {"dropout": 0.1}}}).startswith(
        "policies.last.adapter.dropout: 0 expected"
    )
    assert told(policies={"last": {"init": "/no/such#last"}}).startswith(
        "policies.last.init: '/no/such#last': no adapter can be read there"
    )
    assert told(temperature=0.0).startswith("policies.first: its agents sample at temperature 0")
    big = [PolicySpec("a"), PolicySpec("b", adapter=AdapterSpec(r=513))]
    assert (
        error_of(lambda: lora_sizes(big))
        == "policies.b.adapter.r: vLLM serves ranks up to 512, got 513"
    )


def test_adapters_of_another_base_or_shape(model: Path, finished: Path, tmp_path: Path) -> None:
    other = tiny_random_model(tmp_path / "other", seed=5)
    checkpoint = finished / "checkpoints" / "step-000001"
    before = contents(finished)
    told = error_of(
        lambda: trainer(
            tmp_path / "run", other, policies={"first": {"init": f"{checkpoint}#first"}}
        ).train()
    )
    assert (
        "policy 'first': adapter in " in told
        and f"made for base '{model}', whose weights differ from those of '{other}'" in told
    )
    told = error_of(
        lambda: trainer(
            tmp_path / "run",
            model,
            policies={"first": {"init": f"{checkpoint}#first", "adapter": {"r": 8}}},
        ).train()
    )
    assert told.startswith("policies.first.adapter.r: 8, but ") and "says r 4; leave" in told
    told = error_of(lambda: trainer(finished, other, resume=True, system=tiny_chain()).train())
    assert f"made for base {model}, this run's is {other}; resume with the same model" in told
    assert contents(finished) == before


# the run folder


def test_a_folder_that_holds_a_run_is_left_as_it_is(
    model: Path, finished: Path, tmp_path: Path
) -> None:
    before = contents(finished)
    told = error_of(lambda: trainer(finished, model).train())
    assert told.startswith(
        f"output_dir {finished}: holds an earlier run; set resume to go on, overwrite to replace it"
    )
    assert contents(finished) == before
    (tmp_path / "file").write_text("mine")
    assert (
        error_of(lambda: trainer(tmp_path / "file", model).train())
        == f"output_dir {tmp_path / 'file'}: a file of that name is there; name a folder"
    )
    assert (tmp_path / "file").read_text() == "mine"


# tasks


def test_data_sets_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    def told(text: str | None, **changes: Any) -> str:
        path = tmp_path / "tasks.jsonl"
        path.write_text(text or "")
        return error_of(
            lambda: trainer(tmp_path / "run", model, tasks=str(path), **changes)
        ).replace(str(path), "FILE")

    assert told("") == "tasks 'FILE': no rows; expected columns prompt and answer"
    row = json.dumps({"question": "2+2?", "answer": "4"})
    assert told(row).startswith(
        "tasks 'FILE', row 1: no column 'prompt'; found ['answer', 'question'], expected ['prompt',"
        " 'answer']"
    )
    one = json.dumps({"prompt": "2+2?", "answer": "4"})
    assert "split is empty; it needs more tasks" in told(one)
    assert told(one, task_args={"fild": 1}).startswith(
        "task_args.fild: tasks 'FILE' take no such argument; did you mean 'fields'?"
    )
    assert error_of(lambda: trainer(tmp_path / "run", model, tasks="arithmetc")).startswith(
        "tasks 'arithmetc': no such tasks; did you mean 'arithmetic'?"
    )
    given = tiny_tasks()[:3]
    told_given = error_of(lambda: trainer(tmp_path / "run", model, tasks=given))
    assert (
        told_given
        == "eval_tasks: the training tasks are given as a list, so the held-out ones must be"
        " given too"
    )
    both = error_of(lambda: trainer(tmp_path / "run", model, tasks=given, eval_tasks=given[:1]))
    assert "1 held-out tasks are also trained on" in both
    assert not (tmp_path / "run").exists()


# rewards and replies


def test_a_reward_that_never_works_ends_the_run_and_can_be_mended(
    model: Path, tmp_path: Path
) -> None:
    def broken(task: Task, episode: Episode) -> float:
        raise ValueError("no such file: judge.txt")

    told = error_of(lambda: trainer(tmp_path / "run", model, rewards=[broken]).train(), RunError)
    assert (
        told
        == "step 1: no episode could be scored; the first one: reward 'broken' failed: ValueError:"
        " no such file: judge.txt; mend it and go on with resume"
    )
    kept = Store(tmp_path / "run" / "episodes").ids()
    assert (
        sum(name.startswith("train-000001/") for name in kept) == 9
    )  # every episode that was played
    summary = trainer(tmp_path / "run", model, resume=True).train()  # the reward mended
    assert summary["steps"] == 1 and summary["tokens"]["trained"] > 0


def test_a_reward_that_fails_now_and_then_costs_those_episodes_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def moody(task: Task, episode: Episode) -> float:
        return (
            math.nan
            if episode.id.endswith("/2") and episode.id.startswith("train")
            else bytes_mod_7(task, episode)
        )

    summary = trainer(tmp_path / "run", model, rewards=[moody]).train()
    (row,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (row["episodes"], row["failed"], row["unscorable"]) == (9, 0, 3)
    assert (
        "step 1: 3 of 9 episodes failed or have no score; the first: reward 'moody' gave nan"
        in capsys.readouterr().err
    )
    assert summary["tokens"]["trained"] <= 6 * 2 * 4


def test_prompts_that_never_fit_end_the_run_and_say_so(model: Path, tmp_path: Path) -> None:
    told = error_of(
        lambda: trainer(tmp_path / "run", model, max_completion_length=600).train(), RunError
    )
    assert told.startswith("step 1: every episode failed; the first one: transformers engine: ")
    assert "prompt tokens and max_tokens=600 do not fit the 512 tokens of" in told


def test_empty_replies_are_trained_on_like_others(model: Path, tmp_path: Path) -> None:
    engine = ScriptedEngine(
        lambda prompt, ref, sampling, k: "" if (sampling.seed or 0) % 2 else "7"
    )
    made = trainer(
        tmp_path / "run",
        model,
        engine=engine,
        rewards=[lambda task, episode: float(episode.output == "")],
    )
    run = made.run.open()
    try:
        episodes = run.rollouts.collect(1)
        metrics = made.learn(1, episodes)
    finally:
        run.close()
    assert {episode.output for episode in episodes} == {"", "7"} and all(
        episode.error is None for episode in episodes
    )
    assert metrics["dropped"].keys() <= {"first: zero advantage", "last: zero advantage"}
    assert all(row["tokens"] > 0 for row in metrics["policies"].values())


# the plan


def test_dry_run_prints_the_plan_and_starts_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--dry_run",
        "true",
        "--model",
        str(model),
        "--output_dir",
        str(tmp_path / "run"),
        "--policies.last.adapter.r",
        "2",
    ]
    monkeypatch.setattr("sys.argv", ["grpo_team.py", *flags])
    monkeypatch.setattr(
        "marlora.trainers.loop.run.TrainingRun.open",
        lambda self: pytest.fail("a dry run opens nothing"),
    )
    grpo_team.main()
    shown = capsys.readouterr().out
    for expected in (
        "agent      first: policy first; adds the first two digits",
        "policy     first: LoRA r=8 alpha=16 on q_proj, k_proj, v_proj; trained; init fresh",
        "policy     last: LoRA r=2 alpha=16 on q_proj, k_proj, v_proj; trained; init fresh",
        "800 to train on, 200 held out; rewards exact",
        "of 16 tasks x 8 episodes",
        "engine       transformers (as set)",
        "first prompt (to 'first'):\n<|system|>first<|end|><|user|>",
    ):
        assert expected in shown, expected
    assert "memory" in shown and "devices" in shown and "torch" in shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_the_run_would_fail_at(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dry_run", "true", "--output_dir", str(tmp_path / "run"), "--model"]
    monkeypatch.setattr("sys.argv", ["grpo_team.py", *flags, str(tmp_path / "nowhere")])
    assert error_of(grpo_team.main).startswith(f"model '{tmp_path / 'nowhere'}': no such folder")
