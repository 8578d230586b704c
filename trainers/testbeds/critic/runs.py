"""Runs of the eight methods of feedback in words on the toy model `tiny-critic`, and their
controls: feedback that is shuffled between tasks, no feedback, and proposals that are drawn. The
model's teacher can answer in its place."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....agents.patterns.pipeline import Pipeline
from ....agents.system import System
from ....agents.types import AgentSpec, Sampling
from ....rollouts.engines.base import ModelRef
from ....rollouts.engines.scripted import ScriptedEngine
from ....rollouts.renderer import ChatRenderer
from ...methods.text_feedback.aime import AIMETrainer
from ...methods.text_feedback.llm_autodiff import LLMAutoDiffTrainer
from ...methods.text_feedback.metatextgrad import MetaTextGradTrainer
from ...methods.text_feedback.revolve import RevolveTrainer
from ...methods.text_feedback.semantic_backprop import SemanticBackpropTrainer
from ...methods.text_feedback.symbolic_learning import SymbolicLearningTrainer
from ...methods.text_feedback.textgrad import TextGradTrainer
from ...methods.text_feedback.trace_opto import TraceTrainer
from ...trainer import Trainer
from .lessons import NAME, critic_tokenizer
from .model import critic_chain
from .teacher import GUESS, JUDGE, KIND, META, ROLES, SAY, START, replies

GRADIENT = {
    "backward_system": SAY,
    "base": "{conversation}",
    "chain": "{conversation}\n{feedback}",
    "rewrite_system": "edit",
    "rewrite": "{value}\n{feedback}\n{history}",
}
JUDGED = {**GRADIENT, "judge_system": JUDGE, "judge": "{criterion}\n{case}"}
ONE_VALUE = {**GRADIENT, "rewrite": "{value}\n{feedback}"}
TRACE = {"rewrite_system": "edit", "rewrite": "{variables}\n{feedback}"}
SEMANTIC = {
    "backward_system": SAY,
    "rewrite_system": "edit",
    "rewrite": "prompt\n{value}\n{feedback}",
}
OF_META = {**GRADIENT, "meta_rewrite_system": META, "meta_rewrite": "{value}"}
SYMBOLIC = {
    "backward_system": SAY,
    "state": "{previous}\n{output}\n{requirement}",
    "rewrite_system": "edit",
    "edit_prompt": "{role}\n{feedback}",
}
Method = tuple[type[Trainer[Any]], Mapping[str, Any]]
# by recipe: its trainer, and the settings in which it differs; prompts are in words of this model
METHODS: Mapping[str, Method] = {
    "textgrad_prompts": (TextGradTrainer, {"prompts": GRADIENT}),
    "revolve": (RevolveTrainer, {"prompts": GRADIENT, "window": 2}),
    "aime": (
        AIMETrainer,
        {"prompts": JUDGED, "roles": list(ROLES), "evaluator_tokens": 20, "show_answer": True},
    ),
    "trace_opto": (TraceTrainer, {"prompts": TRACE, "skip_above": 0.5}),
    "llm_autodiff": (
        LLMAutoDiffTrainer,
        {"prompts": ONE_VALUE, "num_proposals": 3, "max_correct": 0, "gate": "strictly_better"},
    ),
    "semantic_backprop": (
        SemanticBackpropTrainer,
        {"prompts": SEMANTIC, "error_pool": 12, "gate": "strictly_better"},
    ),
    "metatextgrad": (MetaTextGradTrainer, {"prompts": OF_META, "inner_steps": 3}),
    "symbolic_learning": (
        SymbolicLearningTrainer,
        {"prompts": SYMBOLIC, "kinds": ["prompt"], "loss": "rule", "params": ["pipeline"]},
    ),
}
CONTROLS: Mapping[str, Mapping[str, Any]] = {  # by name: the settings in which they differ
    "shuffled": {"feedback": "shuffled"},
    "none": {"feedback": "none"},
    "drawn": {"helpers": {"optimizer": {"prompt": GUESS}}},
}
CHAT = re.compile(r"<\|(system|user)\|>(.*?)<\|end\|>", re.S)
HELPER = {"sampling": {"temperature": 1.0, "max_tokens": 20}}


def teacher_engine() -> ScriptedEngine:
    """The teacher in place of the model, with the model's tokens: its likeliest reply at
    temperature 0, else one that is drawn."""

    def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        messages = dict(CHAT.findall(prompt))
        shares = replies(messages.get("system", ""), messages["user"])
        if sampling.temperature == 0:
            return max(shares, key=lambda reply: shares[reply])
        rng = random.Random(f"{sampling.seed} {k} {prompt}")
        return rng.choices([*shares], [*shares.values()])[0]

    return ScriptedEngine(answer, tokens=ChatRenderer(critic_tokenizer()), context=16_384)


def critic_pipeline() -> Pipeline:
    """The same team as a pipeline of one state, whose instruction is part of the message."""
    role = {
        "agent": NAME,
        "about": "",
        "template": "{instruction}{prompt}",
        "parts": {"instruction": START},
    }
    state = {"about": "", "roles": {NAME: role}, "route": "order", "first": NAME, "next": []}
    spec = AgentSpec(NAME, "", "", policy="base", sampling=Sampling(temperature=0, max_tokens=2))
    return Pipeline([spec], pipeline={"begin": NAME, "states": {NAME: state}})


def critic_run(
    recipe: str,
    folder: Path,
    *,
    control: str = "",
    system: System | None = None,
    engine: Any = None,
    **settings: Any,
) -> Trainer[Any]:
    """A run of the method of this recipe.

    Args:
        folder: of the run.
        control: one of `CONTROLS`, "" for the method itself.
        system: in place of the team of one worker. engine: answers in place of the model.
        settings: of the method that differ.
    """
    cls, own = METHODS[recipe]
    if system is None:
        system = critic_pipeline() if recipe == "symbolic_learning" else critic_chain()
    helpers = {name: HELPER for name in ("evaluator", "backward", "optimizer", "meta")}
    changed = {**CONTROLS[control]} if control else {}
    for name, fields in changed.pop("helpers", {}).items():
        helpers[name] = {**helpers[name], **fields}
    given = {
        "output_dir": str(folder),
        "model": "tiny-critic",
        "engine": "transformers",
        "tasks": "marlora.rollouts.tasks.toy:program_tasks",
        "task_args": {"kinds": KIND},
        "rewards": ["exact"],
        "helpers": helpers,
        "metric_purpose": "",
        "num_val_tasks": 15,
        "num_eval_tasks": 60,
        "tasks_per_step": 2,
        "max_steps": 100,
        "save_every": 100,
        **own,
        **changed,
        **settings,
    }
    return cls(system=system, args=cls.Config(**given), engine=engine)
