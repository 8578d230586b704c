"""Beginning: recipes by name, configs that name one, a folder of one's own, the cache of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from marlora.recipes.cli.main import main
from marlora.recipes.cli.train import chosen, configs, recipe_of, recipes
from tests.repository import ROOT


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    line: str = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def marlora(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "marlora.recipes.cli.main", *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_every_recipe_and_config_has_a_name() -> None:
    known = recipes()
    assert set(known) == {
        path.stem
        for path in (ROOT / "recipes").glob("*.py")
        if path.stem != "minimal_grpo"  # one flat file without settings
    }
    assert all(sentence and not sentence.endswith(".") for sentence in known.values())
    assert {recipe_of(path) for path in configs().values()} == set(known)
    assert recipe_of(configs()["bootstrap_few_shot_arithmetic"]) == "bootstrap_few_shot"


def test_a_config_names_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("max_steps: 1\n", encoding="utf-8")
    assert "recipe: grpo_team" in refused(capsys, "train", str(own))
    own.write_text("recipe: grpo_tem\n", encoding="utf-8")
    assert "grpo_team" in refused(capsys, "train", str(own))
    own.write_text("recipe: sysdpo\n", encoding="utf-8")
    assert chosen(str(own)) == ("sysdpo", own)
    ours = os.path.relpath(ROOT / "recipes" / "scoreflow_gsm8k.yaml")
    assert chosen(ours) == ("scoreflow", Path(ours))
    assert "leave --config out" in refused(capsys, "train", str(own), "--config", "other.yaml")
    assert "sirius" in refused(capsys, "train", "siriu")
    assert "expected a YAML file" in refused(capsys, "train", str(tmp_path / "none.yaml"))


def test_the_config_of_this_folder_is_meant_if_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--max_steps", "1"]):
        assert "there is no config.yaml in this folder" in refused(capsys, "train", *arguments)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "usage: marlora train" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("recipe: sysdpo\nmax_stps: 1\n", encoding="utf-8")
    assert "config.yaml: unknown setting 'max_stps'" in refused(capsys, "train", "--seed", "2")
    main(["train", "config.yaml", "--help"])
    assert capsys.readouterr().out.startswith("marlora train config.yaml [--config FILE]")


def test_settings_of_another_recipe_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text("recipe: sysdpo\n", encoding="utf-8")
    line = refused(capsys, "train", "grpo_team", "--config", str(tmp_path / "own.yaml"))
    assert "settings of 'sysdpo', but this is 'grpo_team'" in line


def test_a_copied_config_is_that_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["recipes", "--copy", "maporl_gsm8k"])
    copied = yaml.safe_load((tmp_path / "maporl_gsm8k.yaml").read_text(encoding="utf-8"))
    ours = yaml.safe_load(configs()["maporl_gsm8k"].read_text(encoding="utf-8"))
    assert copied == {"recipe": "maporl", **ours}
    assert chosen("maporl_gsm8k.yaml") == ("maporl", Path("maporl_gsm8k.yaml"))
    assert "exists already" in refused(capsys, "recipes", "--copy", "maporl_gsm8k")
    assert "grpo_team" in refused(capsys, "recipes", "--copy", "grpo_tea")


def test_the_cache_is_shown_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARLORA_CACHE", str(tmp_path))
    own, other = "tiny-0123456789ab", "tiny-talk-ab0123456789"
    for name in (own, other, "mine", "tiny-llama-1.1b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"0" * 1_000_000)
    (tmp_path / "tiny-link").symlink_to(tmp_path / "mine")
    main(["cache"])
    shown = capsys.readouterr().out
    assert own in shown and "1.0 MB" in shown
    assert "mine" not in shown and "tiny-link" not in shown and "llama" not in shown
    assert own in refused(capsys, "cache", "--clear", "tiny-012")
    main(["cache", "--clear", own])
    left = {"mine", "tiny-link", "tiny-llama-1.1b"}
    assert {path.name for path in tmp_path.iterdir()} == {other, *left}
    main(["cache", "--clear"])
    assert {path.name for path in tmp_path.iterdir()} == left


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in text


@pytest.mark.slow
@pytest.mark.process
def test_a_folder_of_ones_own_trains_resumes_and_is_evaluated(tmp_path: Path) -> None:
    """Its team, its reward and its data lie beside the config, wherever a command is run."""
    assert marlora(tmp_path, "init", "mine").returncode == 0
    again = marlora(tmp_path, "init", "mine")
    assert again.returncode == 2 and "exists already" in again.stderr
    folder, config = tmp_path / "mine", "config.yaml"
    first = marlora(folder, "train", "--max_steps", "1", "--save_every", "1")
    assert first.returncode == 0, first.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["recipe"] == "grpo_team" and summary["live_proof"]["failed"] == 0
    elsewhere = ["--output_dir", str(folder / "run")]
    more = ["--max_steps", "2", "--resume", "true"]
    second = marlora(tmp_path, "train", f"mine/{config}", *elsewhere, *more)
    assert second.returncode == 0, second.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    saved = yaml.safe_load((folder / "run" / config).read_text(encoding="utf-8"))
    assert saved["recipe"] == "grpo_team" and chosen(str(folder / "run"))[0] == "grpo_team"
    checkpoint = str(folder / "run" / "checkpoints" / "step-000002")
    engine = ["--engine", "transformers", "--num_tasks", "2"]
    refused = marlora(tmp_path, "eval", checkpoint, "--system", "team:Sum", *engine)
    assert refused.returncode == 2 and f"had it from {folder}: go there" in refused.stderr
    flags = ["--system", "team:Sum", "--trust_checkpoint", *engine]
    evaluated = marlora(tmp_path, "eval", checkpoint, *flags)
    assert evaluated.returncode == 0, evaluated.stderr
