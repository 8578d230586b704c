"""marlora trains teams of language-model agents. Its public names (docs/api.md), each imported at
first use: `from marlora import Chain, GRPOConfig, GRPOTrainer`."""

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

if Path(__file__).parent.name == ".package":  # a checkout: the rooms lie at its top
    __path__ = [str(Path(__file__).parents[1])]

NAMES = {  # name: the module under `marlora` that defines it
    "AIMEConfig": "trainers.methods.text_feedback.aime",
    "AIMETrainer": "trainers.methods.text_feedback.aime",
    "ActorCritic": "agents.patterns.actor_critic",
    "Agent": "agents.chat",
    "AgentSpec": "agents.types",
    "AutoFlowConfig": "trainers.methods.policy_gradient.autoflow",
    "AutoFlowTrainer": "trainers.methods.policy_gradient.autoflow",
    "BetterTogetherConfig": "trainers.methods.prompts.better_together",
    "BetterTogetherTrainer": "trainers.methods.prompts.better_together",
    "BootstrapFewShotConfig": "trainers.methods.prompts.bootstrapping.bootstrap_few_shot",
    "BootstrapFewShotTrainer": "trainers.methods.prompts.bootstrapping.bootstrap_few_shot",
    "BootstrapFinetuneConfig": "trainers.methods.prompts.bootstrapping.bootstrap_finetune",
    "BootstrapFinetuneTrainer": "trainers.methods.prompts.bootstrapping.bootstrap_finetune",
    "Budget": "rollouts.budget",
    "Chain": "agents.patterns.chain",
    "Collaboration": "agents.patterns.collaboration",
    "Debate": "agents.patterns.debate",
    "Decision": "agents.types",
    "Episode": "rollouts.types",
    "EpisodeRunner": "rollouts.episodes.runner",
    "Extraction": "agents.patterns.extraction",
    "FlowReasonerConfig": "trainers.methods.policy_gradient.flowreasoner",
    "FlowReasonerTrainer": "trainers.methods.policy_gradient.flowreasoner",
    "GPTSwarmConfig": "trainers.methods.policy_gradient.gptswarm",
    "GPTSwarmTrainer": "trainers.methods.policy_gradient.gptswarm",
    "GRPOConfig": "trainers.methods.policy_gradient.grpo",
    "GRPOTrainer": "trainers.methods.policy_gradient.grpo",
    "LLMAutoDiffConfig": "trainers.methods.text_feedback.llm_autodiff",
    "LLMAutoDiffTrainer": "trainers.methods.text_feedback.llm_autodiff",
    "Ledger": "rollouts.ledger",
    "LogitTable": "trainers.values.logit_table",
    "MAPoRLConfig": "trainers.methods.policy_gradient.maporl",
    "MAPoRLTrainer": "trainers.methods.policy_gradient.maporl",
    "MASGPT": "agents.programs.mas_gpt",
    "MASGPTConfig": "trainers.methods.imitation.mas_gpt.mas_gpt",
    "MASGPTTrainer": "trainers.methods.imitation.mas_gpt.mas_gpt",
    "MIPROConfig": "trainers.methods.prompts.search.mipro",
    "MIPROTrainer": "trainers.methods.prompts.search.mipro",
    "Memory": "trainers.values.memory",
    "Message": "agents.types",
    "MetaTextGradConfig": "trainers.methods.text_feedback.metatextgrad",
    "MetaTextGradTrainer": "trainers.methods.text_feedback.metatextgrad",
    "MultiagentFinetuningConfig": "trainers.methods.imitation.multiagent_finetuning",
    "MultiagentFinetuningTrainer": "trainers.methods.imitation.multiagent_finetuning",
    "Output": "agents.transcript",
    "PPOConfig": "trainers.methods.policy_gradient.ppo",
    "PPOTrainer": "trainers.methods.policy_gradient.ppo",
    "Param": "agents.state",
    "Pipeline": "agents.patterns.pipeline",
    "PolicySpec": "agents.types",
    "PreferenceConfig": "trainers.methods.preference.sysdpo",
    "PreferenceTrainer": "trainers.methods.preference.sysdpo",
    "Program": "agents.programs.program",
    "Refinement": "agents.patterns.refinement",
    "RevolveConfig": "trainers.methods.text_feedback.revolve",
    "RevolveTrainer": "trainers.methods.text_feedback.revolve",
    "Reward": "agents.types",
    "RunConfig": "trainers.config",
    "RunError": "trainers.errors",
    "SFTConfig": "trainers.methods.imitation.sft",
    "SFTTrainer": "trainers.methods.imitation.sft",
    "Sampling": "agents.types",
    "ScoreFlowConfig": "trainers.methods.preference.scoreflow",
    "ScoreFlowTrainer": "trainers.methods.preference.scoreflow",
    "ScriptedEngine": "rollouts.engines.scripted",
    "Search": "trainers.values.search",
    "SelfCorrection": "agents.patterns.self_correction",
    "SemanticBackpropConfig": "trainers.methods.text_feedback.semantic_backprop",
    "SemanticBackpropTrainer": "trainers.methods.text_feedback.semantic_backprop",
    "SettingError": "agents.types",
    "SiriusConfig": "trainers.methods.imitation.sirius",
    "SiriusTrainer": "trainers.methods.imitation.sirius",
    "StepResult": "trainers.loop.step_result",
    "Store": "rollouts.episodes.store",
    "StepWorkflow": "agents.programs.step_workflow",
    "Swarm": "agents.patterns.swarm",
    "SymbolicLearningConfig": "trainers.methods.text_feedback.symbolic_learning",
    "SymbolicLearningTrainer": "trainers.methods.text_feedback.symbolic_learning",
    "System": "agents.system",
    "Task": "agents.types",
    "Team": "agents.team",
    "TeamState": "agents.state",
    "TextGradConfig": "trainers.methods.text_feedback.textgrad",
    "TextGradTrainer": "trainers.methods.text_feedback.textgrad",
    "TraceConfig": "trainers.methods.text_feedback.trace_opto",
    "TraceTrainer": "trainers.methods.text_feedback.trace_opto",
    "Trainer": "trainers.trainer",
    "Turn": "agents.types",
    "VerifierConfig": "trainers.methods.reward_model.verifier",
    "VerifierTrainer": "trainers.methods.reward_model.verifier",
    "Vote": "agents.patterns.vote",
    "Workflow": "agents.programs.workflow",
    "check_system": "agents.testing",
    "fake_team": "agents.testing",
    "gather": "agents.concurrency",
    "load_tasks": "rollouts.tasks.registry",
    "resolve_rewards": "rollouts.rewards.builtin",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("marlora")
    if name not in NAMES:
        raise AttributeError(f"module 'marlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"marlora.{NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES, "__version__"])
