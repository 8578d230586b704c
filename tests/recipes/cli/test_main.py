"""The `marlora` command on a checkpoint of one step, as a user calls it: numbers, files, exit
codes, one clear line of error."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import from_json
from marlora.recipes.cli import doctor
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.bench import proxy as bench_proxy
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from tests.repository import ROOT

COMMANDS = (
    "train",
    "recipes",
    "init",
    "cache",
    "eval",
    "collect",
    "serve",
    "play",
    "report",
    "export",
    "bench",
    "doctor",
)
HERE = ("--engine", "transformers")
TRUST = (*HERE, "--trust_checkpoint")  # the run's reward is a function of these tests
REWARD = "tests.trainers.small_run:bytes_mod_7"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a random model, with a reward that differs between replies."""
    folder = tmp_path_factory.mktemp("cli")
    torch.set_num_threads(1)
    config = GRPOConfig(
        output_dir=str(folder / "run"),
        model=str(tiny_random_model(folder / "model")),
        engine="transformers",
        rewards=[REWARD],
        tasks="marlora.rollouts.tasks.toy:tiny_tasks",
        num_eval_tasks=4,
        max_steps=1,
        tasks_per_step=2,
        num_generations=3,
        learning_rate=0.05,
        lora_r=4,
        lora_alpha=8.0,
        lora_target_modules=["q_proj", "v_proj"],
        max_completion_length=5,
        ablate_adapters=True,
    )
    summary = GRPOTrainer(system=tiny_chain(), args=config).train()
    assert all(
        policy["sha256_before"] != policy["sha256_after"] for policy in summary["policies"].values()
    )
    return folder / "run"


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, far from its run, without what only the trainer needs."""
    return Path(
        shutil.copytree(
            run / "checkpoints" / "step-000001",
            tmp_path / "copy",
            ignore=shutil.ignore_patterns("trainer"),
        )
    )


def marlora(*argv: object) -> int:
    """Exit code of a command in this process."""
    try:
        main([str(arg) for arg in argv])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def refused(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 2) -> str:
    """What is said when a command is refused: the last line on stderr, and the only one of an
    error."""
    capsys.readouterr()
    assert marlora(*argv) == code
    lines = capsys.readouterr().err.splitlines()
    assert [
        line.startswith("error: ") for line in lines if line.startswith(("error", "Traceback"))
    ] == [True]
    assert lines[-1].startswith("error: ")
    return lines[-1]


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change system.json by hand; its manifest no longer holds, and goes."""
    data = json.loads((checkpoint / "system.json").read_text())
    change(data)
    (checkpoint / "system.json").write_text(json.dumps(data))
    (checkpoint / "manifest.json").unlink(missing_ok=True)


# usage


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert marlora(command, "--help") == 0
    assert f"usage: marlora {command}" in capsys.readouterr().out
    assert marlora("--help") == 0
    assert re.search(rf"^ +{command} +[A-Z]", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "argv",
    [[], ["evaluate"], ["eval"], ["eval", "x", "--num_task", "3"], ["bench"], ["collect", "x"]],
)
def test_wrong_usage_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert marlora(*argv) == 2
    assert "marlora" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_starts_without_torch() -> None:
    code = (
        "import sys; from marlora.recipes.cli.main import parser; parser(); sys.exit('torch' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# eval


def test_a_copied_checkpoint_is_evaluated_in_a_new_process(
    run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The same tasks, greedily, by the same adapters: the numbers are those the run wrote down."""
    argv = ["eval", checkpoint, *TRUST, "--ablate", "--json", tmp_path / "found.json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "marlora.recipes.cli.main", *map(str, argv)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("base team", "only first", "only last", "trained team"):
        assert name in done.stdout
    found, summary = (
        json.loads((tmp_path / "found.json").read_text()),
        json.loads((run / "summary.json").read_text()),
    )
    assert found["eval"] == summary["eval"]
    assert found["adapters"] == summary["adapters"] and set(found["adapters"]) == {"first", "last"}
    assert (found["metric"], found["engine"], found["eval"]["after"]["num_tasks"]) == (
        "bytes_mod_7",
        "transformers",
        4,
    )


def test_adapters_are_chosen_by_name(
    run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(adapters: str) -> dict[str, Any]:
        assert (
            marlora(
                "eval",
                checkpoint,
                *TRUST,
                "--adapters",
                adapters,
                "--json",
                tmp_path / "found.json",
            )
            == 0
        )
        return json.loads((tmp_path / "found.json").read_text())

    summary = json.loads((run / "summary.json").read_text())
    none, first = evaluate("none"), evaluate("first")
    assert (
        none["adapters_on"] == []
        and none["eval"]["after"] == none["eval"]["before"] == summary["eval"]["before"]
    )
    assert none["eval"]["paired"]["difference"] == 0
    assert first["adapters_on"] == ["first"]
    assert first["eval"]["after"]["accuracy"] == summary["adapters"]["first"]["accuracy"]
    assert "adapters: first" in capsys.readouterr().out
    assert "--adapters frist" in refused(capsys, "eval", checkpoint, *TRUST, "--adapters", "frist")


def test_nothing_is_played_for_numbers_that_could_not_be_written(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in refused(
        capsys, "eval", checkpoint, *TRUST, "--json", "/nowhere/at/all.json"
    )


def test_a_server_that_is_not_there_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "127.0.0.1:9" in refused(
        capsys, "eval", checkpoint, "--trust_checkpoint", "--server_urls", "http://127.0.0.1:9/v1"
    )


def swap(checkpoint: Path) -> None:
    first, last = checkpoint / "adapters" / "first", checkpoint / "adapters" / "last"
    first.rename(checkpoint / "x")
    last.rename(first)
    (checkpoint / "x").rename(last)
    (checkpoint / "manifest.json").unlink()


def other_rank(checkpoint: Path) -> None:
    path = checkpoint / "adapters" / "last" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    (checkpoint / "manifest.json").unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename_policy(data: dict[str, Any]) -> None:
    data["policies"]["../../evil"] = {**data["policies"]["first"], "name": "../../evil"}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (shutil.rmtree, "system.json: No such file"),
    "torn": (lambda c: (c / "system.json").write_text('{"schema": 1,'), "not JSON"),
    "a list": (lambda c: (c / "system.json").write_text("[]"), "expected an object"),
    "a part is missing": (lambda c: rewrite(c, lambda d: d.pop("tasks")), "tasks is missing"),
    "a part is another kind": (
        lambda c: rewrite(c, lambda d: d.update(agents={})),
        "agents: expected list",
    ),
    "deeper": (lambda c: rewrite(c, lambda d: d["tasks"].pop("seed")), "'seed'"),
    "newer": (lambda c: rewrite(c, lambda d: d.update(schema=2)), "install a newer one"),
    "a name that leaves the folder": (lambda c: rewrite(c, rename_policy), "it names files"),
    "no weights": (
        lambda c: (c / "adapters" / "last" / "adapter_model.safetensors").unlink(),
        "last/adapter_model.safetensors: missing",
    ),
    "altered weights": (
        lambda c: flip(c / "adapters" / "first" / "adapter_model.safetensors"),
        "altered or torn",
    ),
    "altered settings": (lambda c: (c / "system.json").open("a").write(" "), "altered or torn"),
    "swapped adapters": (swap, "they were swapped"),
    "another alpha": (other_rank, "alpha is 80"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(
    damage: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, words = DAMAGE[damage]
    harm(checkpoint)
    said = refused(capsys, "eval", checkpoint, *TRUST)
    assert words in said and str(checkpoint) in said


def test_a_run_folder_is_told_its_newest_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(run / "checkpoints" / "step-000001") in refused(capsys, "eval", run, *TRUST)


# the base model


@pytest.fixture
def moved(run: Path, checkpoint: Path, tmp_path: Path) -> Path:
    """The base, in another place than the checkpoint says."""
    name = str(run.parent / "model")
    text = (checkpoint / "system.json").read_text()
    (checkpoint / "system.json").write_text(text.replace(name, "/gone/model"))
    (checkpoint / "manifest.json").unlink()
    return Path(shutil.copytree(name, tmp_path / "moved"))


def test_a_base_that_moved_is_named(
    moved: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "eval", checkpoint, *TRUST)
    assert "/gone/model" in said and "--model" in said
    for given in (str(moved), f"/gone/model={moved}"):
        assert marlora("eval", checkpoint, *TRUST, "--num_tasks", 1, "--model", given) == 0
    assert "without a name" in refused(
        capsys, "eval", checkpoint, *TRUST, "--model", moved, "--model", moved
    )


def test_another_base_is_refused(
    moved: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(moved / "model.safetensors")
    assert "files differ" in refused(capsys, "eval", checkpoint, *TRUST, "--model", moved)


def test_another_chat_template_is_refused(
    moved: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|> "))
    assert "chat template" in refused(capsys, "eval", checkpoint, *TRUST, "--model", moved)


# what a checkpoint may name

FOREIGN = '''
import pathlib
from marlora.agents.patterns.chain import Chain
from marlora.trainers.testbeds.tiny import tiny_tasks
pathlib.Path(__file__).with_name("imported").touch()
def reward(task, episode): return 1.0
def verifier(task, text): return 1.0
def maker(text): return reward
def add(a: int, b: int) -> int:
    """Sum."""
    return a + b
def tasks(*, split, seed): return tiny_tasks(split, seed)
class Mine(Chain): pass
'''

NAMES: dict[str, tuple[Callable[[dict[str, Any], str], Any], tuple[str, ...]]] = {
    "reward": (lambda d, m: d.update(rewards=[f"{m}:reward"]), ("--trust_checkpoint",)),
    "verifier": (
        lambda d, m: d.update(rewards=["length", f"verified({m}:verifier)"]),
        ("--trust_checkpoint",),
    ),
    "maker": (
        lambda d, m: d.update(rewards=["length", f"{m}:maker(text)"]),
        ("--trust_checkpoint",),
    ),
    "tool": (lambda d, m: d["agents"][0].update(tools=[f"{m}:add"]), ("--trust_checkpoint",)),
    "tasks": (lambda d, m: d["tasks"].update(name=f"{m}:tasks"), ("--trust_checkpoint",)),
    "system": (
        lambda d, m: d["system"].update({"class": f"{m}:Mine"}),
        ("--system", "{module}:Mine"),
    ),
}


@pytest.mark.parametrize("what", NAMES)
def test_foreign_code_is_imported_only_if_the_user_agrees(
    what: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = f"foreign_{what}"
    (tmp_path / f"{module}.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))
    name, agree = NAMES[what]
    rewrite(checkpoint, lambda data: (data.update(rewards=["length"]), name(data, module)))
    said = refused(capsys, "eval", checkpoint, *HERE, "--num_tasks", 1)
    assert module in said and agree[0] in said
    assert not (tmp_path / "imported").exists()
    argv = [part.format(module=module) for part in agree]
    assert marlora("eval", checkpoint, *HERE, "--num_tasks", 1, *argv) == 0, capsys.readouterr().err
    assert (tmp_path / "imported").exists()


def test_a_tool_of_ours_that_is_no_tool_is_foreign_too(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tool is called with what a model writes, so only the room of agents may be named: this one
    would write files."""
    rewrite(
        checkpoint,
        lambda data: data["agents"][0].update(tools=["marlora.trainers.checkpoint:write_json"]),
    )
    assert "write_json" in refused(capsys, "eval", checkpoint, *HERE)


@pytest.mark.parametrize(
    "name",
    [
        "marlora.rollouts.rewards.scoring:fn_name(x)",
        "verified(marlora.trainers.checkpoint:write_json)",
    ],
)
def test_what_is_ours_but_not_meant_for_it_is_not_called(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(checkpoint, lambda data: data.update(rewards=["length", name]))
    said = refused(capsys, "eval", checkpoint, *HERE)
    assert name.removeprefix("verified(").removesuffix("json)") in said and "(rewards[1])" in said


def test_a_foreign_verifier_of_the_system_is_foreign(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debate = {
        "class": "marlora.agents.patterns.collaboration:Collaboration",
        "arguments": {"verifier": "elsewhere:verifier"},
    }
    rewrite(checkpoint, lambda data: data.update(system=debate))
    said = refused(capsys, "eval", checkpoint, *HERE)
    assert (
        "verifier elsewhere:verifier (system.arguments.verifier)" in said
        and "--trust_checkpoint" in said
    )


def test_an_outside_model_is_asked_only_if_the_user_agrees(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's key would go to the address the checkpoint names."""
    rewrite(checkpoint, lambda data: data["policies"]["first"].update(url="http://elsewhere/v1"))
    assert "http://elsewhere/v1" in refused(capsys, "eval", checkpoint, *HERE)


def test_a_checkpoint_of_tasks_given_in_python_asks_for_a_set(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(checkpoint, lambda data: data["tasks"].update(name=""))
    assert "--tasks" in refused(capsys, "eval", checkpoint, *TRUST)
    assert (
        marlora(
            "eval",
            checkpoint,
            *TRUST,
            "--tasks",
            "marlora.rollouts.tasks.toy:tiny_tasks",
            "--num_tasks",
            1,
        )
        == 0
    )


# collect and play


def test_collect_appends_what_is_not_there_yet(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def collect(*more: object) -> list[Episode]:
        capsys.readouterr()
        assert (
            marlora(
                "collect",
                checkpoint,
                *TRUST,
                "--output",
                tmp_path / "store",
                "--num_tasks",
                2,
                *more,
            )
            == 0
        )
        return list(Store(tmp_path / "store"))

    first = collect()
    assert len(first) == 2 and {e.task.split for e in first} == {"train"}
    assert all(
        set(e.state.versions) == {"first", "last"} and e.rewards[0].name == "bytes_mod_7"
        for e in first
    )
    assert collect() == first and "0 episodes appended" in capsys.readouterr().out
    assert collect("--num_generations", 2)[:2] == first and len(Store(tmp_path / "store")) == 4
    bare = collect("--adapters", "none")[4:]
    assert len(bare) == 2 and all(e.state.versions == {} for e in bare)
    assert len(collect("--seed", 1)) == 8 and len(collect("--split", "eval")) == 10
    assert "at least 1" in refused(
        capsys, "collect", checkpoint, *TRUST, "--output", tmp_path / "store", "--num_tasks", 0
    )


def test_play_answers_every_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(text: str, *more: object) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert marlora("play", checkpoint, *TRUST, *more) == 0
        return capsys.readouterr().out

    said = play("1+2+3\n\n4+5+6", "--meta", '{"c": 3}')
    assert (
        said.count("[first] was told: ") == 2
        and "[first] was told: 1+2+3\n" in said
        and said.count("\nteam: ") == 2
    )
    lines = play("1+2+3\n", "--meta", '{"c": 3}', "--raw").splitlines()
    (episode,) = (from_json(Episode, json.loads(line)) for line in lines)
    assert [turn.agent for turn in episode.turns] == ["first", "last"] and episode.rewards == ()
    assert said.split("team: ")[1].split("\n")[0] == str(episode.output).split("\n")[0]
    assert "--meta" in refused(capsys, "play", checkpoint, *TRUST, "--meta", "{c: 3}")
    assert "JSON object" in refused(capsys, "play", checkpoint, *TRUST, "--meta", "3")


# serve


def test_serve_needs_a_server(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs vLLM" in refused(capsys, "serve", checkpoint, *TRUST)


@pytest.mark.slow
def test_serve_answers_until_ctrl_c(checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "marlora.recipes.cli.main",
        "serve",
        str(checkpoint),
        "--trust_checkpoint",
        "--engine",
        "vllm",
        "--server_memory",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if "ready" in line:
                break
        assert lines, process.communicate()[1]
        found = dict(line.split(" ", 1) for line in lines if line.startswith(("url ", "key_file ")))
        models = [
            line.split()[1] for line in lines if line.startswith("model ") and "(policy" in line
        ]
        assert [name.split("-v")[0] for name in models] == ["first", "last"]
        key = Path(found["key_file"]).read_text()

        def ask(path: str, body: Any = None) -> Any:
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            request = urllib.request.Request(
                found["url"] + path, body and json.dumps(body).encode(), headers
            )
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=60
            ) as response:
                return json.load(response)

        assert set(models) <= {entry["id"] for entry in ask("/v1/models")["data"]}
        answer = ask(
            "/v1/completions", {"model": models[0], "prompt": [2, 10, 11], "max_tokens": 3}
        )
        assert answer["model"] == models[0] and answer["usage"]["completion_tokens"] >= 1
        said = {"role": "user", "content": "1+2+3"}
        chat = ask(
            "/v1/chat/completions", {"model": models[1], "messages": [said], "max_tokens": 3}
        )
        assert chat["model"] == models[1] and chat["choices"][0]["message"]["role"] == "assistant"
        children = descendants(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and said.splitlines()[-1] == "stopped"
        assert not [pid for pid in children if running(pid)]
        assert not Path(found["key_file"]).exists()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def descendants(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [deeper for child in found for deeper in descendants(child)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# report, bench, doctor


def test_a_run_ends_with_its_report_and_it_can_be_written_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert marlora("report", run) == 0
    told = capsys.readouterr().out.strip().splitlines()
    assert "What was spent" in told[0] and told[-1] == str(run / "report.html")
    assert (run / "report.html").read_text() == first
    assert marlora("report", run, "--json", "-") == 0
    printed = capsys.readouterr()
    numbers = json.loads(printed.out)
    assert numbers["page"] == str(run / "report.html") and numbers["paired"] == []
    assert [each["name"] for each in numbers["runs"]] == [run.name]
    assert "What was spent" in printed.err
    assert "config.yaml" in refused(capsys, "report", run.parent)


@pytest.mark.parametrize("suite", ["sandbox", "proxy", "rollout"])
def test_bench_gives_numbers_and_where_they_come_from(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_proxy, "CALLS", {1: 2, 8: 2})
    monkeypatch.setattr(bench_proxy, "LATENCY", 0.01)
    assert (
        marlora("bench", suite, "--size", "tiny", "--repeats", 1, "--json", tmp_path / "found.json")
        == 0
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["suite"], found["command"], found["repeats"]) == (
        suite,
        f"marlora bench {suite} --size tiny --repeats 1",
        1,
    )
    assert found["cpu"] and found["versions"]["torch"] == torch.__version__
    assert suite in capsys.readouterr().out


def test_bench_of_an_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'update'" in refused(capsys, "bench", "updaet")
    assert "--repeats" in refused(capsys, "bench", "update", "--repeats", 0)
    assert "did you mean 'qwen3-4b'" in refused(capsys, "bench", "update", "--size", "qwen3-4")


def test_a_run_that_fails_is_exit_code_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    with Store(tmp_path / "store") as other:
        other.ids()
        other.extend([])  # the first writer holds the folder's lock
        said = refused(
            capsys,
            "collect",
            checkpoint,
            *TRUST,
            "--num_tasks",
            1,
            "--output",
            tmp_path / "store",
            code=1,
        )
    assert "one folder, one writer" in said


def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert marlora("doctor") == 0
    said = capsys.readouterr().out
    for part in (
        "Python",
        "torch build",
        "GPU",
        "transformers",
        "vLLM",
        "model cache",
        "disk",
        "Slurm",
        "sandbox",
        "bfloat16",
    ):
        assert part in said


def test_doctor_names_what_stops_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.requirements
    needs = {
        **real(),
        "peft": doctor.Requirement("peft<0.1"),
        "nowhere": doctor.Requirement("nowhere"),
    }
    monkeypatch.setattr(doctor, "requirements", lambda: needs)
    monkeypatch.setattr(
        doctor,
        "NEEDED",
        {"torch": "Tensor", "peft": "LoraConfig", "nowhere": "x", "aiohttp": "NoSuchName"},
    )
    assert refused(capsys, "doctor", code=1).endswith("peft, nowhere, aiohttp")
    rows = {row[0]: row[1:] for row in doctor.examine()[0]}
    assert "tested with <0.1" in rows["peft"][0] and rows["peft"][1] == "pip install 'peft<0.1'"
    assert rows["nowhere"][0] == "not installed" and "cannot be imported" in rows["aiohttp"][0]


def test_doctor_finds_a_torchvision_of_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    )
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    found, todo = doctor.vision()
    assert (
        "0.1, does not fit torch: operator torchvision::nms" in found
        and todo == "pip uninstall torchvision torchaudio"
    )
