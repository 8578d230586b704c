"""docs/settings.md: every setting of every method, written from the configs themselves.

`python -m tests.settings_page` writes the page; `test_settings_page.py` compares it.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from tests.repository import ROOT

PAGE = ROOT / "docs" / "settings.md"
METHODS = "marlora.trainers.methods"
CONFIGS = {
    "GRPOConfig": f"{METHODS}.policy_gradient.grpo",
    "PPOConfig": f"{METHODS}.policy_gradient.ppo",
    "MAPoRLConfig": f"{METHODS}.policy_gradient.maporl",
    "FlowReasonerConfig": f"{METHODS}.policy_gradient.flowreasoner",
    "AutoFlowConfig": f"{METHODS}.policy_gradient.autoflow",
    "GPTSwarmConfig": f"{METHODS}.policy_gradient.gptswarm",
    "MaASConfig": f"{METHODS}.policy_gradient.maas",
    "SFTConfig": f"{METHODS}.imitation.sft",
    "SiriusConfig": f"{METHODS}.imitation.sirius",
    "MASGPTConfig": f"{METHODS}.imitation.mas_gpt.mas_gpt",
    "MultiagentFinetuningConfig": f"{METHODS}.imitation.multiagent_finetuning",
    "PreferenceConfig": f"{METHODS}.preference.sysdpo",
    "ScoreFlowConfig": f"{METHODS}.preference.scoreflow",
    "BootstrapFewShotConfig": f"{METHODS}.prompts.bootstrapping.bootstrap_few_shot",
    "BootstrapFinetuneConfig": f"{METHODS}.prompts.bootstrapping.bootstrap_finetune",
    "MIPROConfig": f"{METHODS}.prompts.search.mipro",
    "MASSConfig": f"{METHODS}.prompts.search.mass",
    "GEPAConfig": f"{METHODS}.prompts.search.gepa_prompts",
    "ABADBOConfig": f"{METHODS}.selection.abadbo",
    "BetterTogetherConfig": f"{METHODS}.prompts.better_together",
    "TextGradConfig": f"{METHODS}.text_feedback.textgrad",
    "RevolveConfig": f"{METHODS}.text_feedback.revolve",
    "AIMEConfig": f"{METHODS}.text_feedback.aime",
    "TraceConfig": f"{METHODS}.text_feedback.trace_opto",
    "LLMAutoDiffConfig": f"{METHODS}.text_feedback.llm_autodiff",
    "SemanticBackpropConfig": f"{METHODS}.text_feedback.semantic_backprop",
    "MetaTextGradConfig": f"{METHODS}.text_feedback.metatextgrad",
    "SymbolicLearningConfig": f"{METHODS}.text_feedback.symbolic_learning",
    "AFlowConfig": f"{METHODS}.workflow_search.aflow",
    "ADASConfig": f"{METHODS}.workflow_search.adas",
    "DebFlowConfig": f"{METHODS}.workflow_search.debflow",
    "VerifierConfig": f"{METHODS}.reward_model.verifier",
    "W4SConfig": f"{METHODS}.imitation.w4s",
}
HEAD = """# Settings

Every setting of every method: a key of its YAML file and a flag (`--NAME VALUE`) of its recipe. A method has the settings of the groups
that stand behind its name; where it has another default than the group, its own table says so. This page is written from the code by
`python -m tests.settings_page`.
"""


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = field.default_factory()  # type: ignore[misc]
    return "none" if value is None else f"`{value!r}`" if value != "" else "empty"


def row(field: dataclasses.Field[Any]) -> str:
    text = " ".join(str(field.metadata["help"]).split()).replace("|", "\\|")
    return f"| `{field.name}` | {default_of(field)} | {text} |"


def page() -> str:
    """The page's text: methods with their groups, then a table for each group."""
    methods, groups = [], {}
    for name, module in CONFIGS.items():
        config = getattr(importlib.import_module(module), name)
        owners = [c for c in config.__mro__ if dataclasses.is_dataclass(c)]
        owners = [c for c in owners if set(vars(c).get("__annotations__", {}))]
        methods.append(f"- `{name}` ({module}): " + ", ".join(f"`{c.__name__}`" for c in owners))
        for owner in owners:
            groups.setdefault(owner.__name__, owner)
    lines = [HEAD, *methods]
    for name in sorted(groups):
        owner = groups[name]
        own = vars(owner)["__annotations__"]
        fields = [field for field in dataclasses.fields(owner) if field.name in own]
        lines += ["", f"## {name}", "", "| Setting | Default | What it is |", "|---|---|---|"]
        lines += [row(field) for field in fields]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
