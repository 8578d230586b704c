"""Every recipe, with each of its settings: from its own `main` to the plan of the run, on a model
that has learnt nothing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.repository import ROOT

SETTINGS = sorted((ROOT / "recipes").glob("*.yaml"))
# what these name is not at hand here: a task set of a hub, a verifier that another run trains
NEEDS_A_NETWORK = {
    "maporl_gsm8k": ["--tasks", "arithmetic", "--verifier", "calculator"],
    "verifier_gsm8k": ["--tasks", "arithmetic"],
    "scoreflow_gsm8k": ["--tasks", "arithmetic"],
    "mas_gpt_gsm8k": ["--tasks", "arithmetic"],
}
HELPERS = {  # whose model is a toy model of their own, which is not trained for a plan
    "aflow_tiny": ["proposer"],
    "adas_tiny": ["proposer"],
    "debflow_tiny": ["affirmative", "negative", "moderator", "judge"],
}

# recipes whose method trains no policy
NO_WEIGHTS = {
    "adas",
    "aflow",
    "aime",
    "debflow",
    "verifier",
    "dylan",
    "bootstrap_few_shot",
    "gptswarm_edges",
    "llm_autodiff",
    "llmselector",
    "mass",
    "gepa_prompts",
    "maas_supernet",
    "mipro",
    "metatextgrad",
    "revolve",
    "semantic_backprop",
    "symbolic_learning",
    "textgrad_prompts",
    "trace_opto",
}


def recipe_of(settings: Path) -> str:
    """The recipe whose name the settings' name begins with; the longest, if there are several."""
    stems = [path.stem for path in (ROOT / "recipes").glob("*.py")]
    return max((stem for stem in stems if settings.stem.startswith(stem)), key=len)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.stem)
def test_a_recipe_plans_what_its_settings_say(
    settings: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = [
        "--config",
        str(settings),
        "--model",
        str(model),
        "--engine",
        "transformers",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    for helper in HELPERS.get(settings.stem, []):
        here += [f"--helpers.{helper}.base", str(model)]
    flags = [*here, *NEEDS_A_NETWORK.get(settings.stem, []), "--dry_run", "true"]
    monkeypatch.setattr("sys.argv", [f"{recipe_of(settings)}.py", *flags])
    importlib.import_module(f"marlora.recipes.{recipe_of(settings)}").main()
    shown = capsys.readouterr().out
    assert "first prompt (to" in shown and "to train on" in shown
    assert ("; trained; init fresh" in shown) != (recipe_of(settings) in NO_WEIGHTS)
    assert not (tmp_path / "run").exists()
